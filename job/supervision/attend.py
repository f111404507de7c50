"""Staying with a child process: passing on the request to leave, noticing that it hangs, saying how it ended."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from job.errors import ContainerMemory, Hung, InternalError, Interrupted, RankLost, TemporaryFailure
from job.files import read_json
from job.outcome import cause, recorded
from job.storage.store import size_text
from job.supervision import container
from job.supervision.launch import Child
from job.supervision.leaving import Leaving
from job.workdir import WorkDir

log = logging.getLogger(__name__)

HANG_VARIABLE = "TUNEJOB_HANG_SECONDS"
HANG_SECONDS = 1800.0
"""How long training or evaluation may be without a step."""
LOADING = 4
"""Times as long may loading take: a large base over a slow volume says nothing in between."""

SQUEEZED_SECONDS = 30.0
"""How long the worker may stand still with no memory left for its code (``container.Memory.is_squeezed``)."""

_POLL_SECONDS = 0.2
_LOOK_SECONDS = 2.0
_STACKS_SECONDS = 3.0


@dataclass
class Attendant:
    """Attends one child after the other."""

    workdir: WorkDir
    leaving: Leaving
    grace_seconds: int
    tick: Callable[[], None]
    """Called a few times a second; what it raises ends the child."""
    is_over_budget: Callable[[], bool]
    require_budget: Callable[[], None]
    """Raises BudgetSpent if it is."""
    kept: Callable[[], str]
    """What is committed, for messages."""
    oom_kills: int = field(default_factory=container.oom_kills)
    """Processes the kernel had ended before we began."""

    def attend(
        self, child: Child, processes: Sequence[str], *, trains: bool = False, at_end: Callable[[], object]
    ) -> None:
        """Returns when the child has ended well.

        Args:
            processes: names under which the child's processes write down how they end.
            trains: it is the worker: it may be asked for a checkpoint, and must make progress.
            at_end: called when the child has ended, before anything is said of how.

        Raises:
            JobError: what a process wrote down; Interrupted; ContainerMemory or TemporaryFailure for one that vanished
                without a word; Hung; whatever ``tick`` raises.
        """
        asked_at = None
        pulse = _Pulse(self.workdir.progress) if trains else None
        code = None
        try:
            while (code := child.wait(_POLL_SECONDS)) is None:
                self.tick()
                if not self.leaving.is_asked and not self.is_over_budget():
                    self._require_pulse(pulse, child, processes)
                    continue
                if asked_at is None:
                    asked_at = time.monotonic()
                    self._ask(trains)
                if not self.workdir.stop.exists() or self._phase() != "train":
                    break  # only a training step has something to save
                if time.monotonic() - asked_at > max(2.0, self.grace_seconds - 8.0):
                    break  # the last committed checkpoint has to do
        finally:
            child.end(3.0)
        at_end()
        self._settle(processes, code)

    def _phase(self) -> str:
        """The worker's phase by its own word."""
        with suppress(FileNotFoundError):
            return str(read_json(self.workdir.progress)["phase"])
        return ""

    def _ask(self, trains: bool) -> None:
        why = "asked to leave" if self.leaving.is_asked else "resources.budget is used up"
        saves = trains and self._phase() == "train"
        log.warning("%s; %s", why, "sealing a checkpoint" if saves else "leaving")
        if saves:
            self.workdir.stop.touch()

    def _require_pulse(self, pulse: "_Pulse | None", child: Child, processes: Sequence[str]) -> None:
        if pulse is None:
            return
        silent = pulse.silent_seconds()
        if min(silent, pulse.squeezed_seconds()) >= SQUEEZED_SECONDS:
            raise self._out_of_memory("stands still: the kernel takes back its code as fast as it is read", processes)
        if silent < _limit(self._phase()):
            return
        log.error("no progress for %.0f s; the stacks of every rank follow", silent)
        for process in processes:
            child.dump_stacks(self.workdir.pid(process))
        child.wait(_STACKS_SECONDS)
        raise Hung(
            f"no progress for {silent:.0f} s in phase {self._phase() or 'load'}; {self.kept()}. The stacks are in the "
            f"log; {HANG_VARIABLE} sets the limit"
        )

    def _settle(self, processes: Sequence[str], code: int | None) -> None:
        """Raises how a group of processes ended: a real cause, then a request to leave, then a vanished one.

        A rank that lost its peers, or was ended with them, is none of the first: torchrun ends the healthy ranks when
        one dies. One that vanished is no interruption, even if a request to leave came meanwhile.

        Args:
            code: the launcher's, where it ended by itself; None where we ended it.
        """
        outcomes = {process: recorded(self.workdir.outcome(process)) for process in processes}
        failure = cause(outcomes.values())
        if failure is not None and not isinstance(failure, TemporaryFailure):
            raise failure
        silent = [process for process, outcome in outcomes.items() if outcome is None]
        if silent:
            self._require_no_oom(silent)
        if silent and code is not None:
            raise RankLost(
                f"{', '.join(silent)} vanished without a word (exit {code}): killed from outside, or for memory; "
                "see the lines above"
            )
        if self.leaving.is_asked:
            raise Interrupted(f"asked to leave; {self.kept()}")
        self.require_budget()
        if failure is not None:
            raise failure
        if code != 0:
            raise InternalError(f"{', '.join(processes)} ended well but the launcher exited with {code}")

    def _require_no_oom(self, silent: Sequence[str]) -> None:
        if container.oom_kills() > self.oom_kills:
            raise self._out_of_memory("was ended by the kernel", silent)

    def _out_of_memory(self, what: str, processes: Sequence[str]) -> ContainerMemory:
        memory = container.memory()
        limit = f" of {size_text(memory.limit)}" if memory else ""
        return ContainerMemory(
            f"{', '.join(processes)} {what}: the container's memory limit{limit} was reached (not the GPU's memory); "
            f"{self.kept()}. Raise resources.memory, or lower training.micro_batch_size"
        )


class _Pulse:
    """How long the worker has said nothing, and how long it has had no memory to go on with."""

    def __init__(self, progress: Path) -> None:
        self._progress = progress
        self._seen: int | None = None
        self._since = time.monotonic()
        self._roomy_at = self._looked_at = time.monotonic()

    def silent_seconds(self) -> float:
        with suppress(FileNotFoundError):
            seen = self._progress.stat().st_mtime_ns
            if seen != self._seen:
                self._seen, self._since = seen, time.monotonic()
        return time.monotonic() - self._since

    def squeezed_seconds(self) -> float:
        """Looks every few seconds only; one look that finds room begins it anew."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_SECONDS:
            self._looked_at = now
            memory = container.memory()
            if memory is None or not memory.is_squeezed:
                self._roomy_at = now
        return now - self._roomy_at


def _limit(phase: str) -> float:
    """Seconds of silence borne in a phase of the worker."""
    try:
        seconds = float(os.environ.get(HANG_VARIABLE, ""))
    except ValueError:
        seconds = HANG_SECONDS
    return seconds if phase in ("train", "evaluate") else LOADING * seconds
