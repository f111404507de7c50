"""What every process started by the supervisor does first: quiet libraries, plain log lines, no life of its own."""

import logging
import os
import sys
import threading
import time
from pathlib import Path

SUPERVISOR = "TUNEJOB_SUPERVISOR"
"""Environment variable: process id of the supervisor."""


def setup_child() -> None:
    """Plain log lines to stderr, which the supervisor stamps; an end when the supervisor is gone."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("accelerate", "datasets", "transformers", "httpx", "filelock", "peft", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    parent = os.environ.get(SUPERVISOR, "")
    if parent.isdigit():
        threading.Thread(target=_leave_with, args=(int(parent),), daemon=True, name="supervisor-watch").start()


def _leave_with(supervisor: int) -> None:
    """A worker whose supervisor was killed must not train on unseen; accelerate between them passes nothing on."""
    born = _birth(supervisor)
    while born is not None and _birth(supervisor) == born:
        time.sleep(0.5)
    os._exit(1)


def _birth(pid: int) -> str | None:
    """When a living process started, in clock ticks since boot; None if it is gone, or dead and not yet reaped."""
    try:
        # proc(5): the name, in parentheses, may hold blanks; after it come the state and, 19 fields on, the start.
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in ("Z", "X") else fields[18]
