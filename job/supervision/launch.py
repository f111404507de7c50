"""Starts processes and ends them. The only door to them.

``accelerate launch`` neither passes signals on nor exit codes back, so it gets a process group of its own, is asked
by file, and its ranks report by file (``job.outcome``).
"""

import json
import logging
import os
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from job.child import SUPERVISOR
from job.libraries import UNUSED
from job.process import this_process
from job.workdir import WorkDir

if TYPE_CHECKING:
    import psutil

log = logging.getLogger(__name__)

SECRETS = ("AWS_", "S3_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Beginnings of environment variables that no child sees: it needs neither the store nor the hub."""

_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
}

_UNLESS_SET = {
    # Threads that spin while they wait cost twentyfold where cores are shared, as in a pod with a CPU limit.
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}

_NOISE = ("Failed to load CPU gemm_4bit_forward from kernels-community",)
"""Beginnings of lines that libraries write when they are imported, before anyone could ask them not to."""


class Child:
    """A process of ours with everything it starts, in a group of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], on_line: Callable[[str], None]) -> None:
        """
        Args:
            on_line: gets every line the group writes to stdout or stderr, from another thread.
        """
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._is_muted = False
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True, name="child-output")
        self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        if self._process.stdout is None:
            return
        for line in self._process.stdout:
            if line.strip() and not line.startswith(_NOISE) and not self._is_muted:
                on_line(line.rstrip())

    def wait(self, seconds: float) -> int | None:
        """The exit code (negative: the signal) once the process has ended; None if it still runs after ``seconds``."""
        reap_orphans(self._process.pid)
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._reader.join(5)
        return code

    def dump_stacks(self, pid_file: Path) -> None:
        """Has a process below ours write the stacks of its threads to its output."""
        with suppress(OSError, ValueError):
            pid = int(pid_file.read_text(encoding="ascii"))
            for process in self._family():
                if process.pid == pid:
                    process.send_signal(signal.SIGUSR1)

    def end(self, grace_seconds: float) -> None:
        """Ends the process and everything below it: SIGTERM, and SIGKILL for what is left after ``grace_seconds``.

        What it says from then on is not passed on: launchers answer the request with tracebacks of their own.
        """
        self._is_muted = self._process.poll() is None
        family = self._family()
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        while self._alive() and time.monotonic() < deadline:
            self._process.poll()
            time.sleep(0.05)
        self._kill(family)
        self._process.wait()

    def kill(self) -> None:
        """Ends the process and everything below it at once, without waiting."""
        self._kill(self._family())

    def _family(self) -> "list[psutil.Process]":
        """Every process below ours; torchrun gives each rank a session, and so a group, of its own."""
        import psutil

        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def _kill(self, family: "list[psutil.Process]") -> None:
        import psutil

        self._signal(signal.SIGKILL)
        for process in family:
            with suppress(psutil.NoSuchProcess):  # told from another of the same number by its start
                process.kill()

    def _alive(self) -> bool:
        try:
            os.killpg(self._process.pid, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            log.debug("process group %d is gone", self._process.pid)


def reap_orphans(child: int) -> None:
    """As pid 1, takes the exit codes of processes that lost their parents, or they stay in the process table.

    Args:
        child: our own child, whose code somebody else waits for.
    """
    while os.getpid() == 1:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == child:
            return
        os.waitpid(ended.si_pid, 0)


def _environment(workdir: Path, **extra: str) -> dict[str, str]:
    """The children's environment: ours without what opens the store or the hub, and quiet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SECRETS)}
    # A user's accelerate configuration, found below HF_HOME, would change what we launch.
    kept["HF_HOME"] = str(WorkDir(workdir).caches)
    home = Path(__file__).resolve().parents[1]
    if str(home) not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        # A checkout that is not installed; the children do not look into the working directory.
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home), os.environ.get("PYTHONPATH")]))
    # Not -P: accelerate drops it when it starts the ranks. A file torch.py in the working directory must not win.
    return _UNLESS_SET | kept | _QUIET | {"PYTHONSAFEPATH": "1", SUPERVISOR: json.dumps(asdict(this_process()))} | extra


def python_child(module: str, workdir: Path, on_line: Callable[[str], None], unused: Collection[str] = ()) -> Child:
    """``python -m MODULE WORKDIR`` of this interpreter.

    Args:
        unused: libraries that it is kept from importing (``job.libraries``).
    """
    environment = _environment(workdir, **{UNUSED: " ".join(unused)})
    return Child([sys.executable, "-m", module, str(workdir)], environment, on_line)


def ranks_child(
    workdir: Path,
    ranks: int,
    gpus: bool,
    grace_seconds: int,
    on_line: Callable[[str], None],
    unused: Collection[str] = (),
) -> Child:
    """``accelerate launch`` of the worker, one process per rank on this machine.

    Args:
        unused: libraries that the ranks are kept from importing (``job.libraries``).
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if not threads.isdigit() or threads == "0":
        threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    flags = f"--quiet --num_processes {ranks} --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags.split()]
    command += ["--num_cpu_threads_per_process", threads]
    extra = {
        UNUSED: " ".join(unused),
        "TUNEJOB_RANKS": str(ranks),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(5, grace_seconds - 10)),
    }
    if ranks > 1:
        command += ["--multi_gpu", "--main_process_port", "0"]
    if not gpus:
        # --cpu with several processes would start one; the variable makes torchrun's ranks take gloo.
        extra["ACCELERATE_USE_CPU"] = "true"
        command += ["--cpu"] if ranks == 1 else []
    command += ["-m", "job.training.train", str(workdir)]
    return Child(command, _environment(workdir, **extra), on_line)
