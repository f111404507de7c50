"""The supervisor: one attempt of a run, from spec to published manifest. It never imports torch.

It owns the run in the store, moves the bytes, starts ``prepare``, the worker and ``verify``, has the courier commit
what they seal, and decides the exit code. Its phases are those of docs/design.md.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from job import layout
from job.errors import (
    BudgetSpent,
    InternalError,
    Interrupted,
    JobError,
    RankLost,
    SpecInvalid,
    TemporaryFailure,
)
from job.exits import EXITS, ExitCode, JobReaction
from job.files import read_json, write_json
from job.inputs import write_inputs
from job.libraries import unused_to_prepare, unused_to_train
from job.outcome import as_foreseen
from job.spec import JobSpec, digest, dump
from job.storage import transfer
from job.storage.basemodel import inspect
from job.storage.parallel import in_parallel
from job.storage.store import Store, open_store, probe, to_json, translated
from job.supervision import container, launch, prefix
from job.supervision.account import JOB, Account
from job.supervision.attend import Attendant
from job.supervision.courier import Courier
from job.supervision.folders import Folders
from job.supervision.leaving import Leaving
from job.supervision.ledger import attempts, complete, next_number, require_progress, seconds_spent
from job.supervision.own import Ownership, claim
from job.supervision.prepared_cache import PreparedCache, key_of
from job.supervision.publishing import publish

log = logging.getLogger(__name__)

CPU_RANKS = "TUNEJOB_CPU_RANKS"
"""Environment variable: ranks on a machine without a GPU, for tests of several processes."""
_WORKER_PHASES = ("worker", "load", "train", "seal", "evaluate")
"""Phases in which the worker's word counts; `worker` until it has said one."""

_STATUS_SECONDS = 5.0
_AFTER_FAILURE_SECONDS = 120.0
"""How long a store that does not answer is asked to take the checkpoints of an attempt that failed."""
_LAST_WORDS_SECONDS = 30.0
"""How long a store that does not answer is asked to take the last word on an attempt that failed."""


def supervise(spec: JobSpec, uri: str, work: Path, outcome: Path | None = None) -> ExitCode:
    """Runs one attempt. Every failure becomes an exit code here and nowhere else.

    Args:
        uri: the run's own prefix in a store.
        work: folder for scratch; each attempt has one of its own in it, removed at its end.
        outcome: where to leave the code and its sentence for the process that started this one.
    """
    attempt = Attempt(spec, uri, work)
    with attempt.leaving.listening():
        try:
            attempt.run()
            code, message = ExitCode.OK, ""
        except Exception as error:
            foreseen = _as_told(error, attempt.leaving)
            if foreseen is None:
                log.exception("a failure nobody foresaw; please report it")
                code, message = ExitCode.CRASH, f"{type(error).__name__}: {error}"
            else:
                log.error("%s", foreseen)
                code, message = foreseen.exit_code, str(foreseen)
        attempt.close(code, message)
        if outcome is not None:
            write_json(outcome, {"exit_code": int(code), "message": message})
    return code


class Attempt:
    """One attempt of one run."""

    def __init__(self, spec: JobSpec, uri: str, work: Path) -> None:
        self.spec, self.uri = spec, uri
        self._folders = Folders(work, uri)
        self.workdir = self._folders.attempt
        self.leaving = Leaving(spec.resources.grace_seconds, self._hurry, self._leave_late)
        self._account = Account(uri.rstrip("/").rsplit("/", 1)[-1], self.workdir)
        self._scratch = container.Scratch(work)
        self._attendant = Attendant(
            self.workdir,
            self.leaving,
            spec.resources.grace_seconds,
            self._tick,
            lambda: self._account.elapsed > self._budget_left,
            self._require_budget,
            lambda: self._account.kept,
        )
        self._store: Store | None = None
        self._ownership: Ownership | None = None
        self._courier: Courier | None = None
        self._child: launch.Child | None = None
        self._budget_left = float("inf")
        self._cause: Exception | None = None
        self._unsent: JobError | None = None
        self._cache: PreparedCache | None = None
        self._is_in_ledger = False
        self._may_be_published = False

    def run(self) -> None:
        """All phases.

        Raises:
            JobError: as the exit contract names them; Interrupted if it was asked to leave.
        """
        with self._phase("preflight"):
            _refuse_unoffered(self.spec)
            container.require_gpu_files(self.spec.resources.gpus)
            with translated("scratch: cannot be written", self.workdir.root.parent):
                self.workdir.root.mkdir(parents=True, exist_ok=True)
            store = self._store = open_store(self.uri)
            if lacking := probe(store):
                log.warning(
                    "%s: does not keep %s on writes; see to it that only one attempt runs at a time",
                    store.uri,
                    " and ".join(lacking),
                )
        with self._phase("own"):
            prefix.require_spec(store, self.spec)
            # Once more when it is ours: another attempt may have published while we watched its heartbeat.
            if self._already_published(store) or not self._own(store):
                return
        with self._phase("pull"):
            self._pull(store)
        with self._phase("prepare"):
            self._prepare()
        with self._phase("worker"):
            self._work()
        with self._phase("verify"):
            self._attend(self._child_of("job.evaluation.verify", unused_to_train(self.spec)), ["verify"])
        with self._phase("publish"):
            self._publish(store)

    def close(self, code: ExitCode, message: str) -> None:
        """Leaves word of how it ended, as far as the store still takes it, and gives the run up."""
        self._account.end(code, message)
        if self._store is not None and code != ExitCode.OK:
            self._store.hurry(min(self.leaving.leave_by, time.monotonic() + _LAST_WORDS_SECONDS))
        if self._courier is not None:
            self._courier.stop()
        if self._store is not None and self._ownership is not None and self._is_ours(self._ownership):
            self._leave_word_in(self._store, self._ownership)
            self._folders.sweep()
        if self._ownership is not None:
            _best_effort(self._ownership.release, code.name)
        self._account.end_log()
        if code not in (ExitCode.CRASH, ExitCode.INTERNAL):
            shutil.rmtree(self.workdir.root, ignore_errors=True)
        owned = self._ownership is not None and not self._ownership.is_lost
        if owned and EXITS[code].reaction in (JobReaction.COMPLETE, JobReaction.FAIL):  # else the next may need it
            self._folders.forget()
        self._account.leave_word()

    def _leave_word_in(self, store: Store, ownership: Ownership) -> None:
        _best_effort(self._account.write_status, store)
        _best_effort(self._account.write_line, store, ownership.generation)
        if not self._may_be_published:
            _best_effort(self._account.push_log, store, ownership.generation, ownership.check)

    def _is_ours(self, ownership: Ownership) -> bool:
        """Whether this attempt is in the ledger and, proven now, still owns the run: only then it may write."""
        if not self._is_in_ledger:
            return False
        try:
            ownership.check()
        except JobError as error:
            log.warning("no word of the end is left: %s", error)
            return False
        return True

    def _hurry(self, until: float) -> None:
        if self._store is not None:
            self._store.hurry(until)

    def _leave_late(self) -> ExitCode:
        """What must not be left out even if the grace period is over: no orphan, and a word on how it ended."""
        if self._child is not None:
            self._child.kill()
        status = self._account.status
        if status.exit_code is None:  # else it is settled how it ended, and only the last words are missing
            told = _as_told(self._cause, self.leaving) if self._cause else None
            cause = told or Interrupted("asked to leave")
            message = f"{cause}; the grace period ended in phase {status.phase}; {self._account.kept}"
            self._account.note(exit_code=int(cause.exit_code), message=message)
        self._account.leave_word()
        return ExitCode(self._account.status.exit_code or 0)

    # own

    def _already_published(self, store: Store) -> bool:
        manifest = transfer.read_manifest(store)
        if manifest is None:
            return False
        transfer.verify_manifest(store, manifest, self._waiting("the result was verified"))
        prefix.survey(store, self.spec, self._folders.inputs)
        self._account.manifest_sha256 = manifest.sha256
        log.info("%s is already complete and its inputs are unchanged; nothing to do", store.uri)
        return True

    def _own(self, store: Store) -> bool:
        """Makes the run ours. False if it was published meanwhile: then nothing is left to do."""
        self._ownership = claim(
            store,
            digest(self.spec),
            is_free_of_specs=lambda: not prefix.holds_something(store),
            tick=self._waiting("another attempt's heartbeat was watched"),
        )
        if self._already_published(store):
            return False
        store.sweep("")
        if not prefix.holds_something(store):
            store.delete(layout.INPUTS)
            store.delete(layout.TRAINING_CONFIG)
        number = self._enter_ledger(store, self._ownership)
        self._folders.sweep()
        self.workdir.spec.write_text(dump(self.spec), encoding="utf-8")
        self._fetch_so_far(store, layout.TRAINING_LOG, self.workdir.log)
        self._account.begin_log()
        log.info(
            "run %s, attempt %d: %s of %s", self._account.status.run, number, self.spec.method, self.spec.model.name
        )
        if store.read(layout.TRAINING_CONFIG) is None:
            transfer.write_once(store, layout.TRAINING_CONFIG, dump(self.spec).encode())
        self._courier = Courier(
            store,
            self._ownership,
            self.workdir,
            self.spec.checkpoints.keep,
            self._account.dump,
            _STATUS_SECONDS,
        )
        self._courier.start()
        return True

    def _enter_ledger(self, store: Store, ownership: Ownership) -> int:
        """This attempt's number, once the ledger has it and what an attempt that vanished left to be said.

        Raises:
            BudgetSpent: earlier attempts used up `resources.budget`.
        """
        ledger = attempts(store)
        newest = transfer.newest_step(store)
        complete(store, ledger, newest)
        if self.spec.resources.budget_hours is not None:
            self._budget_left = self.spec.resources.budget_hours * 3600 - seconds_spent(ledger)
        number = next_number(store)
        self._account.note(attempt=number, committed=newest)
        self._is_in_ledger = True
        self._account.write_line(store, ownership.generation)
        self._require_budget()
        require_progress(ledger, os.environ.get(JOB, ""))
        return number

    def _require_budget(self) -> None:
        if self._account.elapsed > self._budget_left:
            raise BudgetSpent(
                f"resources.budget: {self.spec.resources.budget_hours:g} hours over all attempts are used up; the "
                f"newest committed checkpoint is of step {self._account.status.committed}. Raise it to go on"
            )

    # pull

    def _pull(self, store: Store) -> None:
        survey, recorded = prefix.survey(store, self.spec, self._folders.inputs)
        waiting = self._waiting("the inputs were brought")

        def tick() -> None:
            self._account.announcer.pulling(survey.bytes_here, survey.bytes_to_bring)
            waiting()

        self._account.brought = survey.bytes_verified
        survey = survey.bring(recorded, tick)
        inspect(survey.inputs.model.path, self.spec.model.name)
        self._cache = PreparedCache(store, self._folders.prepared, key_of(self.spec, survey.records))
        if not recorded:
            transfer.write_once(store, layout.INPUTS, to_json({"inputs": survey.records}))
        with translated("the record of the inputs: cannot be written", self.workdir.root):
            write_inputs(self.workdir.inputs, survey.inputs)
        commit = transfer.newest_verified(store, self.workdir.resume, self._waiting("a checkpoint was brought"))
        self._account.note(committed=commit.step if commit else 0)
        if commit is not None:
            self._fetch_so_far(store, layout.METRICS, self.workdir.metrics)
            log.info("going on from the checkpoint of step %d", commit.step)

    def _fetch_so_far(self, store: Store, name: str, to: Path) -> None:
        """Log or metrics of the attempts before, if any left them."""
        key = layout.newest_so_far((entry.key for entry in store.list(layout.SO_FAR)), name)
        if key is None and store.stat(name) is not None:  # of a result that was published once
            key = name
        if key is not None:
            store.get(key, to)

    # prepare, train, seal, evaluate, verify

    def _prepare(self) -> None:
        """Prepares the rows, or takes what an earlier attempt prepared of the same inputs."""
        if self._cache is None or self._courier is None:
            raise InternalError("preparing without owning the run")
        origin = self._cache.take(self.workdir.prepared, self._waiting("prepared rows were brought"))
        if origin is not None:
            log.info("the rows are those an earlier attempt prepared, kept by %s", origin)
        else:
            self._attend(self._child_of("job.data.prepare", unused_to_prepare(self.spec)), ["prepare"])
        self._cache.keep_here(self.workdir.prepared)
        self._courier.send_aside("prepared rows", self._cache.send)

    def _work(self) -> None:
        gpus = self.spec.resources.gpus
        cpu_ranks = os.environ.get(CPU_RANKS, "")
        ranks = gpus or (int(cpu_ranks) if cpu_ranks.isdigit() else 1) or 1
        grace = self.spec.resources.grace_seconds
        unused = unused_to_train(self.spec)
        child = launch.ranks_child(self.workdir.root, ranks, bool(gpus), grace, log.info, unused)
        processes = [f"rank-{rank}" for rank in range(ranks)]
        try:
            self._attend(child, processes, trains=True)
        except Exception as error:
            self._cause = error
            if self._store is not None:
                self._store.hurry(min(self.leaving.leave_by, time.monotonic() + _AFTER_FAILURE_SECONDS))
            self._flush()  # what was sealed before a failure is worth as much as what was sealed before success
            raise
        if self._unsent is not None:
            raise self._unsent

    def _flush(self) -> None:
        """Commits whatever is sealed; what kept it from that is kept, for there may be a better reason to tell."""
        self._unsent = None
        try:
            if self._courier is not None:  # it may wait for the store for minutes
                in_parallel(Courier.finish, [self._courier], self._account.tell)
        except JobError as error:
            log.warning("%s", error)
            self._unsent = error
        finally:
            self._merge_committed()

    def _child_of(self, module: str, unused: Collection[str]) -> launch.Child:
        return launch.python_child(module, self.workdir.root, log.info, unused)

    def _attend(self, child: launch.Child, processes: list[str], *, trains: bool = False) -> None:
        self._child = child
        try:
            self._attendant.attend(child, processes, trains=trains, at_end=self._flush)
        finally:
            self._child = None

    def _tick(self) -> None:
        """A few times a second while a child works.

        Raises:
            JobError: what ends the attempt though the child is well.
        """
        if self._account.status.phase in _WORKER_PHASES:
            with suppress(FileNotFoundError):
                word = read_json(self.workdir.progress)
                self._account.note(**{key: word[key] for key in ("phase", "step", "steps", "loss") if key in word})
                self._account.announcer.progress(word)
        else:
            self._account.tell()
        memory = container.memory()
        self._account.note(memory=round(memory.share, 3) if memory else None)
        self._merge_committed()
        if self._courier is not None:
            self._courier.check()
        self._scratch.check()
        self._require_ownership()

    def _merge_committed(self) -> None:
        if self._courier is not None:
            self._account.note_committed(self._courier.committed)

    def _require_ownership(self) -> None:
        if self._ownership is not None and self._ownership.is_lost:
            self._ownership.check()

    # publish

    def _publish(self, store: Store) -> None:
        if self._ownership is None:
            raise InternalError("publishing without owning the run")
        if self._already_published(store):  # an owner before us did not know that it was none any more
            return
        self.leaving.check("before publishing; the next attempt publishes without training")

        def tick() -> None:
            self.leaving.check_time("while publishing; the next attempt publishes without training")
            self._require_ownership()
            self._account.tell()

        manifest = publish(
            store,
            self.workdir,
            self.spec,
            self._account.status.run,
            self._account.seconds,
            self._ownership.check,
            tick,
            self._expect_publication,
        )
        self._account.manifest_sha256 = manifest.sha256
        for entry in list(store.list(layout.SO_FAR)):
            _best_effort(store.delete, entry.key)
        if self._courier is not None and self._cache is not None:
            self._courier.stop_aside(_LAST_WORDS_SECONDS)
            _best_effort(self._cache.drop)

    def _expect_publication(self) -> None:
        self._may_be_published = True

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.leaving.check(f"before {name}")
        with self._account.phase(name):
            if self._courier is not None:
                self._courier.tell()
            yield

    def _waiting(self, doing: str) -> Callable[[], None]:
        """What is to be done a few times a second while something else than a child is waited for."""

        def tick() -> None:
            self.leaving.check(f"while {doing}")
            self._scratch.check()
            self._require_ownership()
            self._account.tell()

        return tick


def _as_told(error: Exception, leaving: Leaving) -> JobError | None:
    """The failure of ours that ends an attempt; None if nobody foresaw it.

    What waiting might have cured is an interruption where we were asked to leave: there was no time left to wait.
    """
    foreseen = as_foreseen(error)
    if leaving.is_asked and isinstance(foreseen, TemporaryFailure) and not isinstance(foreseen, RankLost):
        return Interrupted(f"asked to leave; {foreseen}")
    return foreseen


def _best_effort(act: Callable[..., None], *arguments: Any) -> None:
    try:
        act(*arguments)
    except (JobError, OSError) as error:
        log.warning("could not leave word of the end: %s", error)


def _refuse_unoffered(spec: JobSpec) -> None:
    """What a spec may say but this version cannot train, by name."""
    if spec.resources.nodes > 1:
        raise SpecInvalid("resources.nodes: training over several nodes is not offered yet; use one node")
