"""``python -m tests.job.rss FOLDER METHOD``: peak memory of a real training in a process of its own, as JSON."""

import json
import sys
from pathlib import Path

import torch

from job.sizing.estimate import estimate, setting_of
from job.sizing.shapes import read_config, shapes_of
from job.training.adapter import add_adapter
from job.training.kernels import PaddingFree, chunked_head
from job.training.loop import Loop, make_optimizer
from job.training.memory import give_back_at_once, peak_bytes, reset_peak
from job.training.model import load_base
from job.training.order import Order
from tests.job.made import CPU, made_rows, made_spec

TRAINING = {"batch_size": 4, "micro_batch_size": 2, "max_length": 512, "max_steps": 2}


def main(folder: Path, method: str) -> None:
    """Two steps of two micro-batches each; prints what they held besides the process, and what was estimated."""
    torch.set_num_threads(1)
    spec = made_spec(method=method, lora={"r": 16, "dropout": 0.0}, training=TRAINING)
    assert give_back_at_once()
    reset_peak(CPU.device)
    before = peak_bytes(CPU.device)
    model = add_adapter(load_base(folder, spec, CPU), spec, CPU)
    core = model.get_base_model()
    rows = made_rows([512] * 8, 1000)
    order = Order(rows.sources, [1.0], spec.training, "digest")
    kernel = PaddingFree(CPU.device, chunked_head(core))
    loop = Loop(model, make_optimizer(model, spec.training), rows, order, spec.training, kernel, CPU)
    reset_peak(CPU.device)
    for _ in loop.run(lambda: False):
        pass
    config = read_config(folder)
    assert config is not None
    found = estimate(shapes_of(config), spec, setting_of(spec))
    peak = peak_bytes(CPU.device)
    print(json.dumps({"held": peak - before, "estimated": found.tensors, "peak": peak, "total": found.bytes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
