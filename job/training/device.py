"""Where a rank computes, and in which precision: what the device does well, never what it merely emulates."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from job.errors import DeviceFailure, SpecInvalid
from job.spec import JobSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """One rank's place."""

    device: torch.device
    precision: torch.dtype
    """Type in which the frozen base is held and multiplied; the adapter is always float32."""
    rank: int
    world: int

    @property
    def precision_name(self) -> str:
        """`float32`, `bfloat16` or `float16`."""
        return str(self.precision).removeprefix("torch.")

    @property
    def autocast(self) -> Callable[[], AbstractContextManager[object]]:
        """The context in which forward and loss run."""
        if self.precision == torch.float32:
            return nullcontext
        return lambda: torch.autocast(self.device.type, dtype=self.precision)

    @property
    def scales_loss(self) -> bool:
        """float16 has too few exponent bits for gradients: the loss is scaled."""
        return self.precision == torch.float16


class Numbers:
    """A few numbers on their way from the device; reading them waits for what came before them, for nothing later."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._values = values

    def read(self) -> list[float]:
        """The numbers, in the order of the vector they came as."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


def place(spec: JobSpec) -> Placement:
    """This rank's device and precision.

    Raises:
        DeviceFailure: the spec asks for GPUs and none, or one too old for this torch, is visible.
        SpecInvalid: the device lacks the precision asked for.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _RANK)
    available = torch.cuda.is_available()
    if spec.resources.gpus and not available:
        raise DeviceFailure(
            f"resources.gpus: {spec.resources.gpus} asked for, but torch {torch.__version__} sees none; "
            "check the driver and the pod's device request, or set resources.gpus to 0 to train on the CPU"
        )
    if available:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        _refuse_old(device)
    else:
        device = torch.device("cpu")
    return Placement(device, _precision(spec.training.precision, device), rank, world)


_RANK = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        if wanted == "float16":
            raise SpecInvalid("training.precision: float16 does not train on a CPU; use auto or float32")
        return torch.float32 if wanted == "auto" else DTYPES[wanted]
    # is_bf16_supported() alone is true on cards that only emulate it.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if wanted == "bfloat16" and not has_bfloat16:
        raise SpecInvalid("training.precision: this GPU has no bfloat16 (Ampere and later do); use auto or float16")
    return DTYPES[wanted]


def _refuse_old(device: torch.device) -> None:
    """A card this torch has no code for fails only at its first kernel, with an obscure message."""
    major, minor = torch.cuda.get_device_capability(device)
    built = [int(arch.removeprefix("sm_")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if built and major * 10 + minor < min(built):
        raise DeviceFailure(
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}; torch "
            f"{torch.__version__} starts at {min(built) / 10:.1f}: use an image with an older CUDA, or another GPU"
        )
