"""Carries out a run on this machine: ``python -m job run`` as a child that shares the terminal."""

import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import job
from job.errors import JobError, SpecInvalid
from job.exits import EXITS, ExitCode
from job.spec import JobSpec, dump, resolved, run_id

_NEEDED = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "huggingface_hub")
_NEEDED_FOR_4BIT = ("bitsandbytes",)
_READING = ("datasets", "huggingface_hub", "psutil", "pyarrow", "transformers")

_STDERR = 2
_KILLED = {
    "SIGKILL": "most often the machine ran out of memory: lower training.micro_batch_size or training.max_length",
    "SIGSEGV": "a library crashed; the log above says how far it came",
}
"""By name: Windows has no SIGKILL."""


class NotInstalled(JobError):
    """The libraries that train are not on this machine."""


@dataclass(frozen=True)
class Finished:
    """How a run on this machine ended."""

    folder: str
    """The run's folder, as a URI or a path."""
    code: int
    """By ``job.exits``."""
    remark: str = ""
    """A sentence for the user where the run's process could not say one itself."""

    message: str = ""
    """The sentence with which the run failed, as its process said it."""

    def __str__(self) -> str:
        """One sentence, for an error message."""
        meaning = EXITS[ExitCode(self.code)].meaning if self.code in set(ExitCode) else "unknown"
        return f"{self.folder}: the run left with {self.code} ({self.message or self.remark or meaning})"


def under(output: str, spec: JobSpec) -> str:
    """The folder of a spec's run below a folder of runs."""
    if not output.strip("/ "):
        raise SpecInvalid(f"--output {output!r}: neither empty nor the root of the disk; name a folder")
    return f"{output.rstrip('/')}/{run_id(spec)}"


def work(spec: JobSpec, folder: str) -> Finished:
    """Trains, evaluates and publishes one run into ``folder``; talk goes to stderr while it lasts.

    A signal that asks this process to leave is passed on, and the child is waited for: it seals what it has.

    Raises:
        NotInstalled: torch or another library of the training is missing.
    """
    need_libraries(spec)
    with spec_file(spec) as path:
        outcome = path.with_name("outcome.json")
        command = [sys.executable, "-m", "job", "run", "--spec", str(path), "--folder", folder]
        code = supervised([*command, "--outcome", str(outcome)], child_environment())
        message = json.loads(outcome.read_text(encoding="utf-8"))["message"] if outcome.exists() else ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = _KILLED.get(name, "start it again to go on")
        return Finished(folder, 128 - code, f"the run's process was ended by {name}; {hint}")
    return Finished(folder, code, message=message)


def look(
    spec: JobSpec,
    settings: Mapping[str, str],
    samples: str | None = None,
    room: int | None = None,
    is_talk: bool = False,
) -> int:
    """Prints what training would make of the spec's data; the code is the child's (``job.exits``).

    Args:
        settings: environment variables that say how this machine reaches the store.
        samples: file to write a few rows to, with what is trained of each.
        room: bytes of one device, to say whether the training fits it.
        is_talk: prints it on stderr.

    Raises:
        NotInstalled: what reads rows is not on this machine.
    """
    if missing := missing_libraries(_READING):
        raise NotInstalled(f"looking at data needs {', '.join(missing)}: pip install 'tunejob[job]'")
    with spec_file(spec) as path:
        command = [sys.executable, "-m", "job.look", str(path), *(["--samples", samples] if samples else [])]
        command += ["--room", str(room)] if room else []
        return supervised(command, {**child_environment(), **settings}, is_talk)


def child_environment() -> dict[str, str]:
    """The environment in which ``python -m job`` is ours, wherever it is called.

    PYTHONSAFEPATH keeps a folder ``job`` in the current directory from standing in for the package. A checkout that is
    not installed has to be named instead.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if not _is_installed():
        checkout = str(Path(job.__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [checkout, environment.get("PYTHONPATH")]))
    return environment


def missing_libraries(names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that cannot be imported here; none of them is imported."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def need_libraries(spec: JobSpec) -> None:
    """Raises NotInstalled where a library that trains this spec is missing; imports none of them."""
    missing = missing_libraries(_NEEDED + (_NEEDED_FOR_4BIT if spec.method == "qlora" else ()))
    if missing:
        raise NotInstalled(
            f"training on this machine needs {', '.join(missing)}: install with  pip install 'tunejob[job]'  "
            "(in a checkout: make set-up)"
        )


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution("tunejob")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def spec_file(spec: JobSpec) -> Iterator[Path]:
    """The resolved spec in a file that lasts as long as the block."""
    with tempfile.TemporaryDirectory(prefix="tunejob-") as folder:
        path = Path(folder) / "spec.yaml"
        path.write_text(dump(resolved(spec)), encoding="utf-8")
        yield path


def supervised(command: list[str], environment: dict[str, str], is_talk: bool = False) -> int:
    """The child's return code, negative if a signal ended it; ``is_talk`` sends its results to stderr too."""
    child: subprocess.Popen[bytes] | None = None
    asked: list[int] = []

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        # The terminal delivers Ctrl-C to the child by itself; a second copy would read as impatience.
        if child is not None and number == signal.SIGTERM:
            child.send_signal(number)

    with _handling({signal.SIGINT: pass_on, signal.SIGTERM: pass_on}):
        child = subprocess.Popen(command, env=environment, stdout=_STDERR if is_talk else None)
        if signal.SIGTERM in asked:
            child.send_signal(signal.SIGTERM)
        return child.wait()


@contextmanager
def _handling(handlers: "dict[signal.Signals, signal._HANDLER]") -> Iterator[None]:
    """Handles signals within the block; a thread other than the main one may not, and leaves them alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
