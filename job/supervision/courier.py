"""The courier carries what a run leaves to the store while it works, in threads of its own.

Training never waits for the store: while it cannot be reached, sealed checkpoints queue up on disk (a bounded number of
them) and are committed when it is back.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from job import layout
from job.errors import AccessDenied, InternalError, Interrupted, JobError, TemporaryFailure
from job.files import read_json
from job.storage import transfer
from job.storage.store import Store, foreseen
from job.supervision.own import Ownership
from job.workdir import WorkDir

log = logging.getLogger(__name__)

QUEUED = 3
"""Sealed checkpoints that wait for the store, besides the one under way; older ones give way, unless all are kept."""
REFUSALS_SECONDS = 900.0
"""How long a refusal is borne that was none before: credentials are rotated while a run goes on."""
_WAITS = (0.2, 30.0)
"""Seconds between two looks for work, and at most between two tries after a failure."""


class Courier:
    """Commits sealed checkpoints, prunes old ones, and keeps the status in the store up to date."""

    def __init__(
        self,
        store: Store,
        ownership: Ownership,
        workdir: WorkDir,
        keep: int | Literal["all"],
        status: Callable[[], bytes],
        every_seconds: float,
    ) -> None:
        """
        Args:
            keep: newest commits that pruning leaves, besides the best.
            status: the run's status as it is now.
            every_seconds: between two writes of it.
        """
        self._store, self._ownership, self._workdir = store, ownership, workdir
        self._keep, self._status, self._every = keep, status, every_seconds
        self.committed = 0
        """Step of the newest commit of this attempt; 0 if there is none."""
        self._failure: JobError | None = None
        self._refused_since: float | None = None
        self._tell_now = threading.Event()
        self._leave = threading.Event()
        self._work = threading.Lock()
        self._sending: Path | None = None
        self._queue = threading.Lock()
        self._aside: threading.Thread | None = None
        self._leave_aside = threading.Event()
        # Two threads: a status that cannot be written must not hold a checkpoint up, nor the other way round.
        self._threads = [
            threading.Thread(target=body, name=name, daemon=True)
            for name, body in (("courier", self._run), ("status", self._tell))
        ]

    def start(self) -> None:
        """Begins to work."""
        for thread in self._threads:
            thread.start()

    def tell(self) -> None:
        """Has the status written soon: the phase is another."""
        self._tell_now.set()

    def send_aside(self, what: str, send: Callable[[Callable[[], None], Callable[[], None]], None]) -> None:
        """Sends something in a thread of its own, so that no checkpoint waits for it. A failure costs a warning only.

        Args:
            what: for that warning.
            send: gets two calls that raise: one if the run is another attempt's, one if the courier is to leave.
        """
        self._aside = threading.Thread(target=self._send_aside, args=(what, send), name="aside", daemon=True)
        self._aside.start()

    def stop_aside(self, seconds: float) -> None:
        """Ends what ``send_aside`` began, as it stands, after at most ``seconds``."""
        self._leave_aside.set()
        if self._aside is not None:
            self._aside.join(seconds)

    def _send_aside(self, what: str, send: Callable[[Callable[[], None], Callable[[], None]], None]) -> None:
        def tick() -> None:
            if self._leave_aside.is_set() or self._leave.is_set():
                raise Interrupted("the courier leaves")

        try:
            send(self._ownership.check, tick)
        except Exception as error:
            if not (self._leave_aside.is_set() or self._leave.is_set()):
                log.warning("%s: not kept in the store (%s)", what, error)

    def check(self) -> None:
        """Raises what ends the attempt: the run is another attempt's, or the store refuses for good.

        To be called a few times a second: it also keeps the queue of checkpoints short.
        """
        if self._failure is not None:
            raise self._failure
        self._bound_queue()

    def finish(self) -> None:
        """Commits everything that is sealed, now.

        Raises:
            TemporaryFailure: the store could not be reached within its patience.
            JobError: as ``check``.
        """
        self.check()
        with self._work:
            self._commit_sealed()

    def stop(self) -> None:
        """Ends the threads; what they are at is not waited for longer than a moment."""
        self._leave.set()
        self._tell_now.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(5.0)

    def _run(self) -> None:
        wait = _WAITS[0]
        while not self._leave.wait(wait):
            try:
                with self._work:
                    self._commit_sealed()
                self._refused_since, wait = None, _WAITS[0]
            except (TemporaryFailure, AccessDenied) as error:
                wait = min(_WAITS[1], max(1.0, 2 * wait))
                log.warning("%s; %d checkpoints wait, trying again in %.0f s", error, len(self._waiting()), wait)
                if self._is_refused_for_good(error):
                    self._failure = error
                    return
            except JobError as error:
                self._failure = error
                return
            except Exception as error:
                if self._leave.is_set():  # the work directory is taken away while the attempt ends
                    return
                self._failure = self._explained(error)
                return

    def _explained(self, error: Exception) -> JobError:
        if isinstance(error, OSError):
            return foreseen(error, "a checkpoint cannot be sent", self._workdir.root)
        log.error("a failure nobody foresaw; please report it", exc_info=error)
        return InternalError(f"the courier ended: {type(error).__name__}: {error}")

    def _is_refused_for_good(self, error: JobError) -> bool:
        if not isinstance(error, AccessDenied):
            self._refused_since = None
            return False
        self._refused_since = self._refused_since or time.monotonic()
        return time.monotonic() - self._refused_since > REFUSALS_SECONDS

    def _tell(self) -> None:
        while not self._leave.is_set():
            self._tell_now.clear()
            try:
                self._store.write(layout.STATUS, self._status())
            except JobError as error:  # only a word to the curious: whatever matters fails elsewhere, too
                log.debug("status: %s", error)
            self._tell_now.wait(self._every)

    def _waiting(self) -> list[Path]:
        """Sealed checkpoints that are not in the store yet, oldest first."""
        if not self._workdir.checkpoints.exists():
            return []
        sealed = [path for path in self._workdir.checkpoints.iterdir() if layout.parse_checkpoint(path.name)]
        return sorted(sealed, key=lambda path: layout.parse_checkpoint(path.name) or (0, 0))

    def _bound_queue(self) -> None:
        if self._keep == "all":
            return
        for folder in self._waiting()[: -max(QUEUED, self._keep)]:
            given_up = folder.with_name(f".{folder.name}.given-up")
            with self._queue:
                if folder == self._sending:
                    continue
                with suppress(FileNotFoundError):  # sent at this very moment
                    folder.rename(given_up)  # at once: half of it must not pass for a checkpoint
            if given_up.exists():
                log.warning("%s was never sent: newer ones wait for the store too", folder.name)
                shutil.rmtree(given_up, ignore_errors=True)

    def _commit_sealed(self) -> None:
        for folder in self._waiting():
            with self._queue:
                if not folder.exists():  # given up meanwhile
                    continue
                self._sending = folder
            self._ownership.check()
            state = read_json(folder / layout.CHECKPOINT_STATE)
            extra = {"spec_digest": state["spec_digest"], "eval_loss": state["eval_loss"]}
            # Before the marker: who resumes from it must find the lines of every step that led to it.
            self.push_metrics()
            transfer.push_checkpoint(self._store, folder, state["step"], self._ownership.generation, extra)
            shutil.rmtree(folder, ignore_errors=True)
            self._sending = None
            self.committed = max(self.committed, state["step"])
            log.info("committed the checkpoint of step %d", state["step"])
            transfer.prune(self._store, self._keep, _best(self._store))

    def push_metrics(self) -> None:
        """Sends metrics and log as they are."""
        for path, name in ((self._workdir.metrics, layout.METRICS), (self._workdir.log, layout.TRAINING_LOG)):
            if path.exists():
                key = layout.so_far(name, self._ownership.generation)
                send_copy(self._store, path, key, self._workdir.outgoing)


def send_copy(store: Store, path: Path, key: str, folder: Path) -> None:
    """Sends a file that may grow meanwhile, as it is now."""
    store.put(copied(path, folder), key)


def copied(path: Path, folder: Path) -> Path:
    """A copy, as it is now, of a file that may grow."""
    folder.mkdir(exist_ok=True)
    copy = folder / path.name
    shutil.copyfile(path, copy)
    return copy


def _best(store: Store) -> int | None:
    """Step of the committed checkpoint with the lowest evaluation loss; None if none was measured."""
    measured: list[tuple[Any, int]] = [
        (commit.record["eval_loss"], commit.step)
        for commit in transfer.committed(store)
        if commit.record.get("eval_loss") is not None
    ]
    return min(measured)[1] if measured else None
