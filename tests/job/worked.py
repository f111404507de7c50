"""The real worker in this process, on a work directory as the supervisor leaves it."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from job.data.prepare import prepare
from job.evaluation import evaluate, generate
from job.exits import ExitCode
from job.files import read_json
from job.inputs import Input, Inputs, write_inputs
from job.spec import dump
from job.training import sharded, train
from job.training.kernels import PaddingFree
from job.workdir import WorkDir
from tests.job import tiny
from tests.job.made import CPU, made_model, made_rows, made_spec


def made_workdir(root: Path, model: Path, rows: list[Any] | None = None, **sections: Any) -> WorkDir:
    """A prepared work directory: 24 rows, some of them for evaluation; 8 steps, a checkpoint after each."""
    data = tiny.write_rows(root / "train.jsonl", rows or tiny.numbered_rows(24))
    training = {"max_steps": 8, "batch_size": 4, "logging_steps": 1} | sections.pop("training", {})
    lora = {"dropout": 0.1} | sections.pop("lora", {})
    where = {"train": str(data)} | sections.pop("data", {"eval_split": 0.3})
    sections = {"checkpoints": {"every_steps": 1}} | sections
    spec = made_spec(model=str(model), data=where, training=training, lora=lora, **sections)
    workdir = WorkDir(root)
    workdir.spec.write_text(dump(spec), encoding="utf-8")
    held_out = Input(where["eval"], Path(where["eval"])) if "eval" in where else None
    write_inputs(workdir.inputs, Inputs(Input(str(model), model), (Input(str(data), data),), held_out))
    assert prepare(workdir) == ExitCode.OK
    return workdir


def work(workdir: WorkDir) -> ExitCode:
    """One life of the worker."""
    os.environ["TUNEJOB_RANKS"] = "1"
    return train.run(workdir)


def resume(workdir: WorkDir, step: int) -> None:
    """Makes the checkpoint of a step the one that the next life goes on from, and forgets what came after."""
    folder = workdir.checkpoints / f"checkpoint-{step}"
    folder.rename(workdir.resume)
    for path in workdir.checkpoints.iterdir():
        path.rename(workdir.root / f"forgotten-{path.name}")


def evaluation(workdir: WorkDir) -> dict[str, Any]:
    """What the worker found at the end."""
    record: dict[str, Any] = read_json(workdir.evaluation)
    return record


def adapter(folder: Path) -> bytes:
    """The bytes of an adapter's tensors."""
    return (folder / "adapter_model.safetensors").read_bytes()


def losses_on_the_way(workdir: WorkDir) -> dict[int, float]:
    """Evaluation loss by step; a step evaluated twice fails."""
    lines = [json.loads(line) for line in workdir.metrics.read_text(encoding="utf-8").splitlines()]
    found = [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    assert len(dict(found)) == len(found)
    return dict(found)


def measured(rank: int, world: int, base: str, lengths: list[int], parallelism: str) -> dict[str, Any]:
    """On one of several ranks: the sums of every row, and this rank's answers by row."""
    placement = replace(CPU, rank=rank, world=world)
    spec = made_spec(training={"parallelism": parallelism})
    core = made_model(Path(base), spec).get_base_model()
    if sharded.shards(spec, placement):
        sharded.shard(core, placement)
    rows = made_rows(lengths, 300)
    figures = evaluate.measure(core, rows, PaddingFree(placement.device), placement, budget=50)
    tokenizer = AutoTokenizer.from_pretrained(base)
    said = generate.answers(core, rows, tokenizer, [0], placement, len(lengths), max_new_tokens=3, budget=12)
    return {"sums": figures.sums.flatten().tolist(), "said": {str(row): text for row, text in said.items()}}
