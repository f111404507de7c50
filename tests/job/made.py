"""Rows, specs and models in memory, for tests of the worker's parts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from peft import PeftModel

from job.data.prepared import Rows
from job.spec import JobSpec
from job.training.adapter import add_adapter
from job.training.device import Placement
from job.training.model import load_base

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""What config.json of Llama 3.1 8B says of its sizes."""

CPU = Placement(torch.device("cpu"), torch.float32, rank=0, world=1)


def made_rows(lengths: Sequence[int], vocabulary: int, seed: int = 0, prompt: int = 2) -> Rows:
    """Rows of random tokens of the given lengths; all but the first ``prompt`` tokens are trained."""
    random = np.random.default_rng(seed)
    tokens = [random.integers(5, vocabulary, length).astype(np.int32) for length in lengths]
    return rows_of(tokens, [[position >= min(prompt, len(row) - 1) for position in range(len(row))] for row in tokens])


def rows_of(
    tokens: Sequence[Any],
    trained: Sequence[Sequence[bool]],
    prompts: Sequence[Sequence[int]] | None = None,
    answers: Sequence[str] | None = None,
) -> Rows:
    """Rows of given tokens and masks (the first token of a row is never trained; longer masks are cut)."""
    count = len(tokens)
    masks = [[False, *map(bool, mask[1 : len(row)])] for row, mask in zip(tokens, trained, strict=True)]
    prompts = prompts or [[int(row[0])] for row in tokens]
    table = pa.table(
        {
            "tokens": pa.array([list(map(int, row)) for row in tokens], pa.list_(pa.int32())),
            "trained": pa.array([[int(bit) for bit in mask] for mask in masks], pa.list_(pa.int8())),
            "prompt": pa.array([list(prompt) for prompt in prompts], pa.list_(pa.int32())),
            "answer": pa.array(answers or [""] * count, pa.string()),
            "length": pa.array([len(row) for row in tokens], pa.int32()),
            "supervised": pa.array([sum(mask) for mask in masks], pa.int32()),
            "source": pa.array([0] * count, pa.int16()),
            "number": pa.array(range(1, count + 1), pa.int64()),
        }
    )
    return Rows(table, ["made.jsonl"])


def made_spec(**sections: Any) -> JobSpec:
    """A spec for tests of parts: dropout 0, constant rate, unless told otherwise."""
    lora = {"r": 4, "alpha": 8, "dropout": 0.0} | sections.pop("lora", {})
    training = {"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-2, "max_length": 64} | sections.pop(
        "training", {}
    )
    return JobSpec.model_validate(
        {"name": "made", "model": "tiny", "data": {"train": "made.jsonl"}, "lora": lora, "training": training}
        | sections
    )


def made_model(folder: Path, spec: JobSpec) -> PeftModel:
    """A tiny model with a fresh adapter."""
    return add_adapter(load_base(folder, spec, CPU), spec, CPU)
