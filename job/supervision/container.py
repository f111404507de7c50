"""What this container may use, and uses: memory by its cgroup, scratch by the limit it was told, GPUs by their files.

Everything here is "not known" outside a container, and then nothing is limited.
"""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from job.errors import DeviceFailure, DiskFailure
from job.storage.store import size_text

SCRATCH_LIMIT = "TUNEJOB_SCRATCH_LIMIT"
"""Environment variable: the size limit of the scratch volume, a Kubernetes quantity. The kubelet evicts a pod that
exceeds it, and the eviction looks like any other request to leave."""

FULL = 0.95
"""Share of a limit at which we say so ourselves."""

SQUEEZED = 0.97
"""Share of the memory limit in pages that cannot be taken back. From there on the kernel has only the code of programs
to take, reads it again at every turn, and may go on like that for hours without ending anything."""

_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 writes a number near 2^63 where there is no limit
_QUANTITY = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[kKMGTP]i?|)")
_POWERS = {"k": 1, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


@dataclass(frozen=True)
class Memory:
    """The container's memory, in bytes."""

    used: int
    """Without file pages that the kernel can take back."""
    limit: int

    pinned: int = 0
    """Of it, what no file backs: the processes' own data."""

    @property
    def share(self) -> float:
        """Of the limit in use, from 0 to 1; from ``FULL`` on the kernel is about to end something."""
        return self.used / self.limit

    @property
    def is_squeezed(self) -> bool:
        """Whether next to no room is left for the programs' own code."""
        return self.pinned >= SQUEEZED * self.limit


def memory(cgroup: Path = _CGROUP) -> Memory | None:
    """The container's memory; None where there is no limit or no cgroup to be read (version 2 or 1)."""
    for folder, limit_name, used_name, reclaimable, pinned in (
        (cgroup, "memory.max", "memory.current", "inactive_file", ("anon", "shmem")),
        (
            cgroup / "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
            ("total_rss", "total_shmem"),
        ),
    ):
        limit, used = _number(folder / limit_name), _number(folder / used_name)
        if limit is not None and used is not None and limit < _UNLIMITED:
            stat = folder / "memory.stat"
            return Memory(
                max(0, used - _counter(stat, reclaimable)), limit, sum(_counter(stat, name) for name in pinned)
            )
    return None


def oom_kills(cgroup: Path = _CGROUP) -> int:
    """Processes of this container that the kernel ended because its memory was used up, so far."""
    files = (cgroup / "memory.events", cgroup / "memory" / "memory.oom_control")
    return max(_counter(path, "oom_kill") for path in files)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no number, and no limit
        return None


def _counter(path: Path, name: str) -> int:
    """The value of a line ``name value``; 0 if there is none."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(value) for key, _, value in (line.partition(" ") for line in lines) if key == name), 0)


class Scratch:
    """The scratch volume and its limit, watched so that we leave before the kubelet makes us."""

    def __init__(self, root: Path, limit: int | None = None, every_seconds: float = 2.0) -> None:
        """
        Args:
            limit: bytes; left out: what the environment says.
        """
        self._root = root
        self._limit = limit if limit is not None else parse_quantity(os.environ.get(SCRATCH_LIMIT, ""))
        self._every, self._looked = every_seconds, -every_seconds

    def require(self, needed: int, what: str) -> None:
        """Raises DiskFailure if so many bytes more would reach the limit."""
        if self._limit is not None and self.used() + needed > FULL * self._limit:
            raise DiskFailure(
                f"{what} needs {size_text(needed)} of scratch; {size_text(self.used())} of {size_text(self._limit)} "
                "are used already: give the pod's scratch volume a higher size limit"
            )

    def check(self) -> None:
        """Raises DiskFailure if the volume is nearly full; looks every few seconds only."""
        if self._limit is None or time.monotonic() - self._looked < self._every:
            return
        self._looked = time.monotonic()
        if self.used() > FULL * self._limit:
            raise DiskFailure(
                f"scratch: {size_text(self.used())} of {size_text(self._limit)} are used, and at the limit the pod is "
                "evicted: give the scratch volume a higher size limit"
            )

    def used(self) -> int:
        """Bytes on disk, counted as the kubelet does."""
        total = 0
        for parent, _, names in os.walk(self._root):
            for name in names:
                try:
                    total += os.lstat(os.path.join(parent, name)).st_blocks * 512
                except OSError:  # removed meanwhile
                    continue
        return total


def parse_quantity(text: str) -> int | None:
    """Bytes of a Kubernetes quantity such as 20Gi; None where it is none."""
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        return None
    unit = match["unit"]
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match["number"]) * base ** (_POWERS[unit[0]] if unit else 0))


def require_gpu_files(gpus: int, root: Path = Path("/dev")) -> None:
    """Raises DeviceFailure where GPUs are asked for and not one device file of any maker's is there.

    The worker asks the driver itself; this spares a hopeless pod the download of a model.
    """
    if gpus and not any(any(root.glob(pattern)) for pattern in ("nvidia[0-9]*", "nvidia-caps*", "dxg", "kfd", "dri/*")):
        raise DeviceFailure(
            f"resources.gpus: {gpus} asked for, but this container has no GPU device; check the pod's resource limits "
            "(nvidia.com/gpu) and the node's device plugin, or set resources.gpus to 0 to train on the CPU"
        )
