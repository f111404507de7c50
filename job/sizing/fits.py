"""Whether a spec fits a device, what to lower if not, and the arithmetic: lines for people. No torch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from job.sizing.activations import Setting, is_padded
from job.sizing.estimate import GIB, Estimate, estimate, recomputes, setting_of
from job.sizing.shapes import Shapes, UnknownFamily, read_config, shapes_of
from job.spec import JobSpec

TIGHT = 0.9
"""Share of a device's memory above which an estimate says nothing certain: fragments and libraries take some."""

UNKNOWN = "device memory: not estimated: the model's config.json is not here"


def lines_of(folder: Path, spec: JobSpec, room: int | None = None) -> Iterator[str]:
    """The estimate for the model in a folder.

    Args:
        room: bytes of one device; left out: nothing is said of whether it fits.

    Raises:
        UnknownFamily: the model has to be built first (``job.sizing.built``).
        SpecInvalid: config.json cannot be read.
    """
    config = read_config(folder)
    if config is None:
        yield f"{UNKNOWN} ({folder})"
        return
    yield from told(shapes_of(config), spec, room)


def told(shapes: Shapes, spec: JobSpec, room: int | None) -> Iterator[str]:
    """The estimate for a model of these shapes: the sum, the arithmetic, and whether it fits."""
    found = estimate(shapes, spec)
    here = found.setting
    what = "device memory (not measured on GPUs)" if here.device == "cuda" else "memory"
    yield f"{what} at the peak of training: {found.gib:.1f} GiB, for micro-batches of {here.tokens:,} tokens"
    yield from (f"  {line}" for line in found.table())
    if found.missing:
        names = ", ".join(found.missing)
        yield f"not estimated: lora.modules_to_save: {names}: nobody here knows how large; all else is in the sum"
    elif room is not None and here.device == "cuda":
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


def expected(folder: Path, spec: JobSpec, here: Callable[[bool], Setting]) -> Estimate | None:
    """The estimate for a run that knows its device and its rows; None where the model or a part of it is not known.

    Args:
        here: the setting, given whether rows lie side by side, padded.
    """
    try:
        shapes = shapes_of(read_config(folder) or {})
    except UnknownFamily:
        return None
    found = estimate(shapes, spec, here(is_padded(shapes, spec)))
    return None if found.missing else found
