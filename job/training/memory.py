"""Peak memory of this process: the device's where there is one, else the process's resident set."""

import ctypes
from pathlib import Path

import torch


def reset_peak(device: torch.device) -> None:
    """Begins a new measurement."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM; see proc(5)
    except OSError:
        return  # not Linux, or not allowed: the peak then counts from the process's start


def peak_bytes(device: torch.device) -> int:
    """Bytes at the peak since ``reset_peak``."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


_M_MMAP_THRESHOLD = -3
"""glibc's name for the size from which a block is mapped by itself (mallopt(3))."""

HOARD = 2.5
"""Times what a process uses that glibc may come to hold: freed blocks of up to 32 MiB stay in its heap, in pieces."""


def give_back_at_once(size: int = 128 << 10) -> bool:
    """Has the C library map every block of ``size`` bytes or more by itself, so that a freed one goes back at once.

    Costs about a quarter more CPU time in training: pages are cleared anew each time.

    Returns:
        Whether the C library can do so; glibc can.
    """
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, size))
    except (AttributeError, OSError):
        return False


def be_frugal(expected: int, available: int | None) -> bool:
    """Gives back at once where what the process is expected to use, and what glibc would hoard, may not fit.

    Returns:
        Whether it does.
    """
    return available is not None and available < HOARD * expected and give_back_at_once()


def available_bytes() -> int | None:
    """Memory this process may still take, by the kernel's word and the container's limit; None where unknown."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int(Path(limit).read_text(encoding="ascii")) - int(Path(used).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return max(0, min(free)) if free else None
