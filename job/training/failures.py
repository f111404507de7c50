"""Which failure of torch's stands for which of ours. The only place that reads their texts."""

import torch

from job.errors import DeviceFailure, DeviceOutOfMemory, JobError, TemporaryFailure
from job.training.memory import peak_bytes

_LOST = {46: "busy", 100: "not there", 214: "an ECC error", 719: "a launch failure", 999: "an unknown error"}
"""cudaError codes after which the device is gone for this process; others are bugs."""

_OUT_OF_MEMORY = 2

_OOM_TEXTS = ("CUBLAS_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory", "out of memory")

_LOST_PEER_TEXTS = ("Connection reset by peer", "Connection closed by peer", "ncclRemoteError", "Broken pipe")


def as_torch_failure(error: BaseException) -> JobError | None:
    """Device memory, a lost device or a lost peer; None for anything else."""
    code = _cuda_code(error)
    if is_out_of_memory(error):
        return DeviceOutOfMemory(
            f"device memory: {str(error).splitlines()[0]}; at its peak this process held {_peak()}; lower "
            "training.micro_batch_size (the run and its loss stay the same), set training.gradient_checkpointing: "
            "true, or use method: qlora"
        )
    if code in _LOST:
        return DeviceFailure(f"the GPU reports {_LOST[code]} (CUDA error {code}); try again on another one")
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER_TEXTS):
        return TemporaryFailure(f"a rank lost its peers: {str(error).splitlines()[0]}")
    return None


def _peak() -> str:
    device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")  # type: ignore[no-untyped-call]
    return f"{peak_bytes(device) / 2**30:.2f} GiB"


def is_out_of_memory(error: BaseException) -> bool:
    """The device, or the allocator of the CPU, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError) or _cuda_code(error) == _OUT_OF_MEMORY:
        return True
    return isinstance(error, RuntimeError | MemoryError) and any(text in str(error) for text in _OOM_TEXTS)


def _cuda_code(error: BaseException) -> int | None:
    return getattr(error, "error_code", None) if isinstance(error, torch.AcceleratorError) else None
