"""``python -m job.sizing.built SPEC``: the estimate of device memory for a model of any family, built without weights.

Families that ``job.sizing.shapes`` knows need none of this, and no torch.
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from job.errors import JobError
from job.exits import ExitCode
from job.sizing.fits import lines_of, told
from job.sizing.parts import kind_of
from job.sizing.shapes import Matrix, Shapes, UnknownFamily
from job.spec import JobSpec, read
from job.training.apart import refusal
from job.training.attention import stock_attention
from job.training.model import empty


def memory_of(folder: Path, spec: JobSpec, room: int | None = None) -> list[str]:
    """The estimate for the model in a folder, of whatever family: see ``job.sizing.fits.lines_of``."""
    try:
        return list(lines_of(folder, spec, room))
    except UnknownFamily:
        return list(told(built(folder), spec, room))


def built(folder: Path) -> Shapes:
    """The shapes of a model that is built without weights; its activations are counted as if it were a Llama.

    Raises:
        SpecInvalid: transformers does not know it.
    """
    model = empty(folder, str(folder))
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layers = int(config.num_hidden_layers)
    shapes = _gathered(config, layers, tied, set(linear), sizes)
    eager = stock_attention(model) == "eager"
    bounded = getattr(config, "attn_logit_softcapping", None) is not None
    return replace(shapes, bounded=bounded, eager=eager, padded=eager or refusal(model) is not None)


def _gathered(config: Any, layers: int, tied: bool, linear: set[str], sizes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Matrices by the end of their name, everything else as vectors."""
    found: Counter[tuple[str, int, int, bool]] = Counter()
    rest = 0
    for name, size in sizes.items():
        owner = name.removesuffix(".weight")
        inside = re.search(r"\.\d+\.(.+)", owner)
        if inside is None or len(size) < 2:
            rest += 0 if inside is None and len(size) == 2 else math.prod(size)
            continue
        found[inside[1], size[-1], math.prod(size) // size[-1], owner in linear] += 1
    kinds = {"attention": "attention", "experts": "experts", "router": "experts"}
    matrices = tuple(
        Matrix(name, kinds.get(kind_of(name), "mlp"), inputs, outputs, max(1, round(times / layers)), linear=plain)
        for (name, inputs, outputs, plain), times in found.items()
    )
    heads = int(config.num_attention_heads)
    width = int(config.hidden_size)
    return Shapes(
        family=str(config.model_type),
        layers=layers,
        width=width,
        vocabulary=int(config.vocab_size),
        heads=heads,
        head_width=int(getattr(config, "head_dim", None) or width // heads),
        key_value_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        inner=int(getattr(config, "intermediate_size", None) or 4 * width),
        matrices=matrices,
        vectors=rest // layers,
        tied=tied,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the estimate for a spec whose model is in a folder of this machine."""
    parser = argparse.ArgumentParser(prog="python -m job.sizing.built", description="Estimates a spec's device memory.")
    parser.add_argument("spec", type=Path)
    parser.add_argument("--room", type=int, help="bytes of one device")
    options = parser.parse_args(arguments)
    try:
        spec = read(options.spec)
        lines = memory_of(Path(spec.model.source), spec, options.room)
    except JobError as error:
        print(f"tunejob: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(lines), flush=True)
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
