"""The state of a training at a step: enough to go on bit for bit, and loadable by PEFT as it lies.

There is no random state in it: order and dropout of a step are functions of seed and step (``job.training.order`` and
``job.training.loop``). Nothing here is a pickle but the adapter_model.bin that a spec may ask for.
"""

import logging
import platform
import shutil
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from job.errors import Conflict, IntegrityFailure
from job.files import read_json, sealing, write_json
from job.layout import CHECKPOINT_STATE, checkpoint_name
from job.training.adapter import load_adapter, save_adapter, trained

log = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
BEST = "best"
"""Folder in a checkpoint: the adapter of the lowest evaluation loss before it, where that is to be published."""

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "numpy")
"""What a training is computed with; the order of the rows is numpy's."""


@dataclass(frozen=True)
class State:
    """What a checkpoint knows besides tensors."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens trained on so far, prompts included."""
    spec_digest: str
    data_digest: str
    kernels: dict[str, str]
    """The kernel chosen at the start of the run; a resumed run keeps it."""
    environment: dict[str, Any]
    """CPU, threads, device and library versions: equal ones resume bit for bit."""
    scaler: dict[str, Any]
    """State of the loss scale; empty where there is none."""
    room: int | None = None
    """Tokens of a micro-batch that fitted once the device's memory had run out; a resumed run takes no more."""
    eval_loss: float | None = None
    """Evaluation loss at this step, if it was measured."""
    course: dict[str, Any] = field(default_factory=dict)
    """How the evaluation loss went up to here; see ``job.training.course.Course``."""


def environment(device: torch.device, world: int) -> dict[str, Any]:
    """What the last bits of a training depend on besides spec and data."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "ranks": world,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {library: version(library) for library in _LIBRARIES},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def save(
    folder: Path, model: PeftModel, optimizer: Optimizer, state: State, formats: str, best: Path | None = None
) -> Path:
    """Seals a checkpoint below ``folder``: whole under its name, or not there.

    Args:
        best: folder of the best adapter so far, to be carried along; absent or None: there is none. That of this very
            step is not carried twice.

    Returns:
        Its folder, ``checkpoint-<step>``.
    """
    target = folder / checkpoint_name(state.step)
    folder.mkdir(parents=True, exist_ok=True)
    with sealing(target) as scratch:
        save_adapter(model, scratch, formats)
        tensors, numbers = _flatten(optimizer, _names(optimizer, trained(model)))
        save_file(tensors, scratch / OPTIMIZER)
        if best is not None and best.exists() and state.course.get("best_step") != state.step:
            shutil.copytree(best, scratch / BEST)
        write_json(scratch / CHECKPOINT_STATE, asdict(state) | {"optimizer": numbers})
    return target


def read_state(folder: Path) -> State:
    """The record of a checkpoint, without its tensors."""
    record = read_json(folder / CHECKPOINT_STATE)
    record.pop("optimizer")
    return State(**record)


def restore(folder: Path, model: PeftModel, optimizer: Optimizer) -> None:
    """Gives model and optimizer a checkpoint's tensors.

    Raises:
        IntegrityFailure: its tensors are not this run's.
    """
    load_adapter(model, folder)
    _unflatten(
        optimizer, trained(model), load_file(folder / OPTIMIZER), read_json(folder / CHECKPOINT_STATE)["optimizer"]
    )


def accept(state: State, spec_digest: str, data_digest: str, here: dict[str, Any]) -> None:
    """Sees that a checkpoint belongs to this run, and says where it was made under other conditions.

    Raises:
        Conflict: another spec, or other data.
    """
    if state.spec_digest != spec_digest:
        raise Conflict(f"checkpoint-{state.step} was trained from another spec; name another output")
    if state.data_digest != data_digest:
        raise Conflict(
            f"checkpoint-{state.step} was trained on other data, tokenizer or chat template than is here now; "
            "name another output to begin anew"
        )
    differences = [key for key, value in here.items() if state.environment.get(key) != value]
    if differences:
        log.warning(
            "resuming from step %d under other conditions (%s): equal up to rounding, not bit for bit",
            state.step,
            ", ".join(f"{key}: {state.environment.get(key)} then, {here[key]} now" for key in differences),
        )


def _names(optimizer: Optimizer, parameters: dict[str, torch.nn.Parameter]) -> list[str]:
    """The names of the optimizer's parameters in its own order, which is by group."""
    name_of = {id(parameter): name for name, parameter in parameters.items()}
    return [name_of[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _flatten(optimizer: Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizer state as named tensors and named numbers: `parameter|field`, deeper fields behind another bar."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, dict):  # bitsandbytes wraps its quantised state
            for key, inner in value.items():
                visit(f"{path}|{key}", inner)
        elif isinstance(value, Tensor):
            # A copy of its own: safetensors refuses memory that two names share.
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        else:
            numbers[path] = value

    for index, state in optimizer.state_dict()["state"].items():
        visit(names[index], state)
    return tensors, numbers


def _unflatten(
    optimizer: Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
) -> None:
    index_of = {name: index for index, name in enumerate(_names(optimizer, parameters))}
    state: dict[int, dict[str, Any]] = {}
    for path, value in (tensors | numbers).items():
        name, *fields = path.split("|")
        if name not in index_of:
            raise IntegrityFailure(f"checkpoint: its optimizer knows a parameter this run does not: {name}")
        place = state.setdefault(index_of[name], {})
        for key in fields[:-1]:
            place = place.setdefault(key, {})
        place[fields[-1]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
