"""Which process is which, and whether it still runs: asked of this machine's kernel, never guessed."""

import errno
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path


@dataclass(frozen=True)
class Identity:
    """Which process an owner is; enough to ask this machine whether it still runs."""

    pid: int
    host: str
    boot_id: str | None = None
    """Of the machine's kernel since it started; None where the system has no such thing."""
    pid_namespace: str | None = None
    start_ticks: int | None = None
    """When the process started, in clock ticks since boot: process numbers are used again."""


class Life(Enum):
    """What this machine knows about a process."""

    ALIVE = "alive"
    DEAD = "dead"
    UNKNOWN = "unknown"
    """It is, or was, somewhere this process cannot see."""


def this_process() -> Identity:
    """Who is asking."""
    return Identity(
        pid=os.getpid(),
        host=os.uname().nodename,
        boot_id=_boot_id(),
        pid_namespace=_pid_namespace(),
        start_ticks=_start_ticks(os.getpid()),
    )


def life_of(identity: Identity) -> Life:
    """Whether a process of this machine and pid namespace still runs."""
    if identity.boot_id is None or identity.pid_namespace is None or identity.start_ticks is None:
        return Life.UNKNOWN
    if (identity.boot_id, identity.pid_namespace) != (_boot_id(), _pid_namespace()):
        return Life.UNKNOWN
    ticks = _start_ticks(identity.pid)
    if ticks is not None:
        return Life.ALIVE if ticks == identity.start_ticks else Life.DEAD
    return Life.UNKNOWN if _hidden(identity.pid) else Life.DEAD


def is_gone(identity: Identity) -> bool:
    """Whether a process that was here when this one began has ended; a zombie has.

    Where the system does not tell processes of one number apart, only that the number is free again counts.
    """
    life = life_of(identity)
    if life is not Life.UNKNOWN:
        return life is Life.DEAD
    try:
        os.kill(identity.pid, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        # A /proc mounted for another namespace counts processes otherwise than the kernel does for us.
        is_ours = os.readlink("/proc/self") == str(os.getpid())
        return os.readlink("/proc/self/ns/pid") if is_ours else None
    except OSError:
        return None


def _stat_fields(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None if it cannot be read."""
    try:
        # The name in parentheses may itself hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _start_ticks(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if there is none to be seen, or only its zombie."""
    fields = _stat_fields(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def _hidden(pid: int) -> bool:
    """Whether a process runs that /proc does not show us (hidepid)."""
    if _stat_fields(pid) is not None:
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True
