"""What every process started by the supervisor does first: quiet libraries, plain log lines, no life of its own."""

import logging
import os
import sys
import threading
import time

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
    while True:
        try:
            os.kill(supervisor, 0)
        except ProcessLookupError:
            os._exit(1)
        except PermissionError:
            pass
        time.sleep(1.0)
