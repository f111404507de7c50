"""What the supervisor says while it works: log lines, progress, the human log of the run, its last word to the pod."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from job.exits import ExitCode
from job.status import Status

log = logging.getLogger(__name__)

LOG_FORMAT = "TUNEJOB_LOG"
"""Environment variable: `json` for lines of JSON on stdout that tell the progress; else it is told to people."""
TERMINATION_LOG = "TUNEJOB_TERMINATION_LOG"
"""Environment variable: the pod's ``terminationMessagePath``, where Kubernetes takes a container's last word from;
/dev/termination-log unless the manifest says otherwise."""
TERMINATION_BYTES = 4096

_EVERY_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""
_JSON_SECONDS = 5.0
_PROGRESS = {"is_progress": True}


def speaks_json() -> bool:
    """Whether progress is told to machines."""
    return os.environ.get(LOG_FORMAT) == "json"


def setup_logging() -> None:
    """Lines to stderr; called once, by the entrypoint."""
    logging.raiseExceptions = False  # nobody reading stderr is no reason to stop
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    if speaks_json():
        handler.addFilter(lambda record: not getattr(record, "is_progress", False))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def log_to(path: Path) -> logging.Handler:
    """Copies every log line, stamped, to the run's human log; the caller removes the handler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    logging.getLogger().addHandler(handler)
    return handler


def leave_word(status: Status, manifest_sha256: str | None, seconds: float) -> None:
    """Writes the attempt's last word where the kubelet reads it: one line of JSON, at most 4 KiB. Nothing elsewhere.

    Args:
        status: the last one, with its exit code.
        manifest_sha256: digest of the published manifest, if there is one.
        seconds: the attempt lasted.
    """
    code = ExitCode(status.exit_code or 0)
    word = {
        "run": status.run,
        "attempt": status.attempt,
        "code": int(code),
        "name": code.name,
        "phase": status.phase,
        "step": status.step,
        "steps": status.steps,
        "committed": status.committed,
        "manifest_sha256": manifest_sha256,
        "seconds": round(seconds, 1),
        "message": status.message,
    }
    line = _line(word)
    while len(line) > TERMINATION_BYTES:
        word["message"] = str(word["message"])[: -max(1, (len(line) - TERMINATION_BYTES) // 6) - 1] + "…"
        line = _line(word)
    path = Path(os.environ.get(TERMINATION_LOG) or "/dev/termination-log")
    with suppress(OSError):
        if path.exists():
            path.write_bytes(line)


def _line(word: Mapping[str, Any]) -> bytes:
    return (json.dumps(word, ensure_ascii=False) + "\n").encode("utf-8", errors="replace")


class Announcer:
    """Shows progress: a bar on a terminal, else a line every few seconds."""

    def __init__(self, status: Callable[[], Status]) -> None:
        """
        Args:
            status: the run's, as it is now.
        """
        self._status = status
        self._bar: Any = None
        self._task: Any = None
        self._said_at = 0.0
        self._said: tuple[Any, ...] = ()
        self._json_at = 0.0
        self._json_said: tuple[Any, ...] = ()
        self._stderr_handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def phase(self, name: str) -> None:
        """Takes a phase of the supervisor's own."""
        self._say_json({"phase": name})

    def pulling(self, here: Callable[[], int], in_all: int) -> None:
        """Takes how many bytes of the inputs there are; ``here`` is asked only if it is told."""
        self._say_json({"phase": "pull"}, lambda: {"bytes": here(), "of": in_all})

    def progress(self, word: Mapping[str, Any]) -> None:
        """Takes the worker's latest word: phase, and in training step, steps, loss and tokens_per_second."""
        self._say_json(word)
        if word.get("phase") != "train" or "tokens_per_second" not in word:
            self._phase(word)
        elif sys.stderr.isatty() and not speaks_json():
            self._show_bar(word)
        elif time.monotonic() - self._said_at >= _EVERY_SECONDS or word["step"] == word["steps"]:
            self._say(word)

    def _say_json(self, word: Mapping[str, Any], more: Callable[[], Mapping[str, Any]] = dict) -> None:
        """One line when the phase is another, when training is over, and every few seconds."""
        key = (word.get("phase"), word.get("what"), bool(word.get("steps")) and word.get("step") == word.get("steps"))
        if not speaks_json() or (key == self._json_said and time.monotonic() - self._json_at < _JSON_SECONDS):
            return
        self._json_said, self._json_at = key, time.monotonic()
        status = asdict(self._status())
        known = {name: status[name] for name in ("run", "attempt", "step", "steps", "loss", "committed", "memory")}
        with suppress(OSError, ValueError):  # nobody reads stdout, or it is closed
            sys.stdout.buffer.write(_line(known | dict(word) | dict(more())))
            sys.stdout.buffer.flush()

    def _phase(self, word: Mapping[str, Any]) -> None:
        self.close()
        key = (word.get("phase"), word.get("what"))
        if key != self._said:
            self._said = key
            log.info("phase: %s", " ".join(str(part) for part in key if part), extra=_PROGRESS)

    def _say(self, word: Mapping[str, Any]) -> None:
        key = ("step", word["step"])
        if key != self._said:
            self._said, self._said_at = key, time.monotonic()
            log.info("step %d of %d, %s", word["step"], word["steps"], _figures(word), extra=_PROGRESS)

    def _show_bar(self, word: Mapping[str, Any]) -> None:
        if self._bar is None:
            self._open_bar(int(word["steps"]))
        self._bar.update(self._task, completed=word["step"], figures=_figures(word))

    def _open_bar(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
        )
        self._bar.start()
        self._task = self._bar.add_task("train", total=steps, figures="")
        # rich keeps lines above the bar only if they pass through the stderr it put in place.
        for handler in logging.getLogger().handlers:
            if type(handler) is logging.StreamHandler:
                self._stderr_handlers.append((handler, handler.setStream(sys.stderr)))

    def close(self) -> None:
        """Takes the bar away; what it last showed stays."""
        if self._bar is None:
            return
        self._bar.stop()
        for handler, stream in self._stderr_handlers:
            if stream is not None:
                handler.setStream(stream)
        self._bar, self._stderr_handlers = None, []


def _figures(word: Mapping[str, Any]) -> str:
    return f"loss {word['loss']:.4f}, {word['tokens_per_second']:,.0f} tokens/s"
