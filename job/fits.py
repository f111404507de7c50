"""Whether a spec fits a device, what to lower if not, and the arithmetic: lines for people.

A family that ``job.shapes`` does not know is built without weights: that needs torch, and is a process of its own
(``python -m job.fits SPEC``), so that ``tunejob check`` stays quick.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from job.activations import Setting
from job.errors import JobError
from job.estimate import GIB, Estimate, estimate, recomputes, setting_of
from job.exits import ExitCode
from job.shapes import Shapes, UnknownFamily, read_config, shapes_of
from job.spec import JobSpec, read

TIGHT = 0.9
"""Share of a device's memory above which an estimate says nothing certain: fragments and libraries take some."""

UNKNOWN = "device memory: not estimated: the model's config.json is not here"


def lines_of(folder: Path, spec: JobSpec, room: int | None = None) -> Iterator[str]:
    """The estimate for the model in a folder.

    Args:
        room: bytes of one device; left out: nothing is said of whether it fits.

    Raises:
        UnknownFamily: the model has to be built first (``main``).
        SpecInvalid: config.json cannot be read.
    """
    config = read_config(folder)
    if config is None:
        yield f"{UNKNOWN} ({folder})"
        return
    yield from told(shapes_of(config), spec, room)


def memory_of(folder: Path, spec: JobSpec, room: int | None = None) -> list[str]:
    """The same, and a model of another family is built for it."""
    try:
        return list(lines_of(folder, spec, room))
    except UnknownFamily:
        return list(told(built(folder), spec, room))


def told(shapes: Shapes, spec: JobSpec, room: int | None) -> Iterator[str]:
    """The estimate for a model of these shapes: the sum, the arithmetic, and whether it fits."""
    found = estimate(shapes, spec)
    here = found.setting
    what = "device memory (not measured on GPUs)" if here.device == "cuda" else "memory"
    yield f"{what} at the peak of training: {found.gib:.1f} GiB, for micro-batches of {here.tokens:,} tokens"
    yield from (f"  {line}" for line in found.table())
    if room is not None and here.device == "cuda":
        yield verdict(shapes, spec, found, room)


def verdict(shapes: Shapes, spec: JobSpec, found: Estimate, room: int) -> str:
    """Whether it fits, and what to lower if not."""
    name = f"{spec.resources.gpu_type or 'the GPU'} ({room / GIB:.0f} GiB)"
    if found.bytes <= TIGHT * room:
        return f"fits {name}"
    word = "is tight on" if found.bytes <= room else "does not fit"
    cure = remedy(shapes, spec, int(TIGHT * room))
    if cure is None:
        return f"{word} {name}, whatever is lowered; take a larger GPU, or a smaller model"
    changes, lower = cure
    return f"{word} {name}; with {', '.join(changes)} it takes {lower.gib:.1f} GiB"


def remedy(shapes: Shapes, spec: JobSpec, room: int) -> tuple[list[str], Estimate] | None:
    """What brings the peak below ``room`` bytes: changes that leave the result the same first, then others."""
    changes: list[str] = []
    for change in _changes(spec):
        spec = _with(spec, change)
        # A later value of the same key takes the place of an earlier one.
        changes = [*(old for old in changes if old.split(":")[0] != change.split(":")[0]), change]
        found = estimate(shapes, spec)
        if found.bytes <= room:
            return changes, found
    return None


def _changes(spec: JobSpec) -> Iterator[str]:
    training = spec.training
    if not recomputes(spec, setting_of(spec)):
        yield "training.gradient_checkpointing: true"
    micro = training.micro_batch_size
    while micro > 1:
        micro //= 2
        yield f"training.micro_batch_size: {micro}"
    if setting_of(spec).ranks > 1 and training.parallelism == "replicate":
        yield "training.parallelism: shard"
    if training.optimizer == "adamw":
        yield "training.optimizer: paged_adamw_8bit"
    if spec.quantized is None:
        yield "method: qlora"
    length = training.max_length
    while length > 512:
        length //= 2
        yield f"training.max_length: {length}"


def _with(spec: JobSpec, change: str) -> JobSpec:
    """The spec with one ``key: value`` changed."""
    key, value = change.split(": ")
    if key == "method":
        return spec.model_copy(update={key: value})
    parsed: Any = {"true": True}.get(value, int(value) if value.isdigit() else value)
    training = spec.training.model_copy(update={key.removeprefix("training."): parsed})
    return spec.model_copy(update={"training": training})


def expected(folder: Path, spec: JobSpec, here: Setting) -> Estimate | None:
    """The estimate for a run that knows its device and its rows; None for a family that is not known."""
    try:
        return estimate(shapes_of(read_config(folder) or {}), spec, here)
    except UnknownFamily:
        return None


def built(folder: Path) -> Shapes:
    """The shapes of a model that is built without weights; its activations are counted as if it were a Llama.

    Raises:
        SpecInvalid: transformers does not know it.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from job.model import empty

    model = empty(folder, str(folder))
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    sizes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layers = int(config.num_hidden_layers)
    return _gathered(config, layers, tied, set(linear), sizes)


def _gathered(config: Any, layers: int, tied: bool, linear: set[str], sizes: Mapping[str, tuple[int, ...]]) -> Shapes:
    """Matrices by the end of their name, everything else as vectors."""
    import math
    import re
    from collections import Counter

    from job.parts import kind_of
    from job.shapes import Matrix

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
    parser = argparse.ArgumentParser(prog="python -m job.fits", description="Estimates a spec's device memory.")
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
