"""What every process started by the supervisor does first: quiet libraries, plain log lines, no life of its own."""

import faulthandler
import gc
import json
import logging
import os
import signal
import sys
import threading
import time

from job.process import Identity, is_gone

SUPERVISOR = "TUNEJOB_SUPERVISOR"
"""Environment variable: which process the supervisor is (``job.process.Identity`` as JSON)."""


def setup_child() -> None:
    """Plain log lines to stderr, which the supervisor stamps; an end when the supervisor is gone."""
    gc.freeze()  # what was imported stays
    gc.enable()  # see ``job.libraries``
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("accelerate", "datasets", "transformers", "httpx", "filelock", "peft", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # how the supervisor asks where a silent worker stands
    supervisor = os.environ.get(SUPERVISOR)
    if supervisor:
        identity = Identity(**json.loads(supervisor))
        threading.Thread(target=leave_with, args=(identity,), daemon=True, name="supervisor-watch").start()


def leave_with(supervisor: Identity) -> None:
    """Ends this process when another is gone; for a thread.

    A worker whose supervisor was killed must not train on unseen; accelerate between them passes nothing on.
    """
    while not is_gone(supervisor):
        time.sleep(0.5)
    os._exit(1)
