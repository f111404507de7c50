"""What the supervisor says while it works: log lines, a progress bar on a terminal, the human log of the run."""

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_EVERY_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""


def setup_logging() -> None:
    """Lines to stderr; called once, by the entrypoint."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def log_to(path: Path) -> logging.Handler:
    """Copies every log line, stamped, to the run's human log; the caller removes the handler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    logging.getLogger().addHandler(handler)
    return handler


class Announcer:
    """Shows progress: a bar on a terminal, else a line every few seconds."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._said_at = 0.0
        self._said: tuple[Any, ...] = ()
        self._stderr_handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def progress(self, word: Mapping[str, Any]) -> None:
        """Takes the worker's latest word: phase, and in training step, steps, loss and tokens_per_second."""
        if word.get("phase") != "train" or not word.get("steps"):
            self._phase(word)
        elif sys.stderr.isatty():
            self._show_bar(word)
        elif time.monotonic() - self._said_at >= _EVERY_SECONDS or word["step"] == word["steps"]:
            self._say(word)

    def _phase(self, word: Mapping[str, Any]) -> None:
        self.close()
        key = (word.get("phase"), word.get("what"))
        if key != self._said:
            self._said = key
            log.info("phase: %s", " ".join(str(part) for part in key if part))

    def _say(self, word: Mapping[str, Any]) -> None:
        key = ("step", word["step"])
        if key != self._said:
            self._said, self._said_at = key, time.monotonic()
            log.info("step %d of %d, %s", word["step"], word["steps"], _figures(word))

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
