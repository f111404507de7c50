"""The supervisor: one attempt of a run, from spec to published manifest. It never imports torch.

It owns the run in the store, moves the bytes, starts ``prepare``, the worker and ``verify``, has the courier commit
what they seal, and decides the exit code. Its phases are those of docs/design.md.
"""

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from job import layout
from job.errors import BudgetSpent, Conflict, InternalError, Interrupted, JobError, SpecInvalid, TemporaryFailure
from job.exits import EXITS, ExitCode, JobReaction
from job.files import read_json, write_json
from job.inputs import Input, Inputs, write_inputs
from job.outcome import as_foreseen
from job.spec import JobSpec, differences, digest, dump, parse
from job.status import Status
from job.storage import transfer
from job.storage.basemodel import inspect
from job.storage.store import Store, from_json, local_path, open_store, probe, to_json, translated
from job.supervision import container, launch, pull
from job.supervision.announce import Announcer, leave_word, log_to
from job.supervision.attend import Attendant
from job.supervision.courier import Courier, send_copy
from job.supervision.leaving import Leaving
from job.supervision.ledger import attempts, complete, next_number, record_attempt, require_progress, seconds_spent
from job.supervision.own import Ownership, claim
from job.supervision.prepared_cache import PreparedCache, key_of
from job.supervision.results import eval_results, model_card
from job.workdir import WorkDir

log = logging.getLogger(__name__)

CPU_RANKS = "TUNEJOB_CPU_RANKS"
"""Environment variable: ranks on a machine without a GPU, for tests of several processes."""
JOB = "TUNEJOB_JOB"
"""Environment variable: name of the Kubernetes Job this attempt is a pod of; absent elsewhere."""
POD = "TUNEJOB_POD"
"""Environment variable: name of the pod."""

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
            foreseen = as_foreseen(error)
            if isinstance(foreseen, TemporaryFailure) and attempt.leaving.is_asked:
                foreseen = Interrupted(f"asked to leave; {foreseen}")  # there was no time left to wait for it
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
        self.workdir = WorkDir(work / f"{_scratch_prefix(uri)}{secrets.token_hex(4)}")
        self.leaving = Leaving(spec.resources.grace_seconds, self._hurry, self._leave_late)
        self._brought = work / f"{_scratch_prefix(uri)}inputs"
        self._prepared_here = work / f"{_scratch_prefix(uri)}prepared"
        self._began, self._started = time.monotonic(), _now()
        self._status = Status(run=uri.rstrip("/").rsplit("/", 1)[-1], attempt=1, phase="preflight")
        self._announcer = Announcer(lambda: self._status)
        self._scratch = container.Scratch(work)
        self._attendant = Attendant(
            self.workdir,
            self.leaving,
            spec.resources.grace_seconds,
            self._tick,
            lambda: time.monotonic() - self._began > self._budget_left,
            self._require_budget,
            self._kept,
        )
        self._seconds: dict[str, float] = {}
        self._store: Store | None = None
        self._ownership: Ownership | None = None
        self._courier: Courier | None = None
        self._child: launch.Child | None = None
        self._log_handler: logging.Handler | None = None
        self._budget_left = float("inf")
        self._survey_made: pull.Survey | None = None
        self._manifest: transfer.Manifest | None = None
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
            if not probe(store):
                log.warning(
                    "%s: keeps no conditions on writes; see to it that only one attempt runs at a time", store.uri
                )
        with self._phase("own"):
            self._refuse_other_spec(store)
            # Once more when it is ours: another attempt may have published while we watched its heartbeat.
            if self._already_published(store) or not self._own(store):
                return
        with self._phase("pull"):
            inputs = self._pull(store)
        with self._phase("prepare"):
            self._prepare()
        with self._phase("worker"):
            self._work()
        with self._phase("verify"):
            self._attend(launch.python_child("job.evaluation.verify", self.workdir.root, log.info), ["verify"])
        with self._phase("publish"):
            self._publish(store, inputs)

    def close(self, code: ExitCode, message: str) -> None:
        """Leaves word of how it ended, as far as the store still takes it, and gives the run up."""
        self._announcer.close()
        self._status = replace(self._status, exit_code=int(code), message=message)
        if self._store is not None and code != ExitCode.OK:
            self._store.hurry(min(self.leaving.leave_by, time.monotonic() + _LAST_WORDS_SECONDS))
        if self._courier is not None:
            self._courier.stop()
        if self._store is not None and self._is_ours():
            for act in (self._tell_status, self._record_attempt, self._push_log):
                _best_effort(act, self._store)
            self._sweep_scratch()
        if self._ownership is not None:
            _best_effort(self._ownership.release, code.name)
        if self._log_handler is not None:
            logging.getLogger().removeHandler(self._log_handler)
            self._log_handler.close()
        if code not in (ExitCode.CRASH, ExitCode.INTERNAL):
            shutil.rmtree(self.workdir.root, ignore_errors=True)
        owned = self._ownership is not None and not self._ownership.is_lost
        if owned and EXITS[code].reaction in (JobReaction.COMPLETE, JobReaction.FAIL):  # else the next may need it
            shutil.rmtree(self._brought, ignore_errors=True)
            shutil.rmtree(self._prepared_here, ignore_errors=True)
        self._leave_word()

    def _is_ours(self) -> bool:
        """Whether this attempt is in the ledger and, proven now, still owns the run: only then it may write."""
        if self._ownership is None or not self._is_in_ledger:
            return False
        try:
            self._ownership.check()
        except JobError as error:
            log.warning("no word of the end is left: %s", error)
            return False
        return True

    def _leave_word(self) -> None:
        manifest = self._manifest.sha256 if self._manifest else None
        leave_word(self._status, manifest, time.monotonic() - self._began)

    def _hurry(self, until: float) -> None:
        if self._store is not None:
            self._store.hurry(until)

    def _leave_late(self) -> ExitCode:
        """What must not be left out even if the grace period is over: no orphan, and a word on how it ended."""
        if self._child is not None:
            self._child.kill()
        if self._status.exit_code == ExitCode.OK:  # published, and only the last words to the store are missing
            self._leave_word()
            return ExitCode.OK
        message = f"asked to leave; the grace period ended in phase {self._status.phase}; {self._kept()}"
        self._status = replace(self._status, exit_code=int(ExitCode.INTERRUPTED), message=message)
        self._leave_word()
        return ExitCode.INTERRUPTED

    # own

    def _refuse_other_spec(self, store: Store) -> None:
        """A prefix belongs to one spec as soon as something was committed there."""
        found = store.read(layout.TRAINING_CONFIG)
        if found is None or not self._holds_something(store):
            return
        name = f"{store.uri}/{layout.TRAINING_CONFIG}"
        theirs = parse(found[0], name)
        if digest(theirs) != digest(self.spec):
            changes = "; ".join(differences(self.spec, theirs))
            raise Conflict(f"{store.uri}: belongs to another spec ({changes}); name another output")

    def _holds_something(self, store: Store) -> bool:
        """A run that was refused or left before its first checkpoint has nothing that another could spoil."""
        return transfer.any_committed(store) or transfer.read_manifest(store) is not None

    def _already_published(self, store: Store) -> bool:
        self._manifest = transfer.read_manifest(store)
        if self._manifest is None:
            return False
        transfer.verify_manifest(store, self._manifest, lambda: self.leaving.check("while the result was verified"))
        self._survey(store)
        log.info("%s is already complete and its inputs are unchanged; nothing to do", store.uri)
        return True

    def _survey(self, store: Store) -> tuple[pull.Survey, Sequence[pull.Record]]:
        """The inputs where they lie, seen to be those that earlier attempts read, and what these wrote down.

        Raises:
            Conflict: they changed; the message names which.
        """
        found = store.read(layout.INPUTS)
        recorded = from_json(found[0], layout.INPUTS)["inputs"] if found else []
        # A hub's branch may have moved on; the run stays with the commit it began on.
        commit = next((record["commit"] for record in recorded if record.get("commit")), None)
        survey = pull.survey(self.spec, self._brought, commit=commit, others=_template_file(self.spec))
        changes = survey.changed(recorded) if recorded else []
        if changes:
            raise Conflict(
                f"{store.uri}: the inputs changed since this run began: {', '.join(changes)}; "
                "name another output to train on what is there now"
            )
        return survey, recorded

    def _own(self, store: Store) -> bool:
        """Makes the run ours. False if it was published meanwhile: then nothing is left to do."""
        self._ownership = claim(store, digest(self.spec), is_free_of_specs=lambda: not self._holds_something(store))
        if self._already_published(store):
            return False
        store.sweep("")
        if not self._holds_something(store):
            store.delete(layout.INPUTS)
            store.delete(layout.TRAINING_CONFIG)
        number = self._enter_ledger(store)
        self._sweep_scratch()
        self.workdir.spec.write_text(dump(self.spec), encoding="utf-8")
        self._fetch_so_far(store, layout.TRAINING_LOG, self.workdir.log)
        self._log_handler = log_to(self.workdir.log)
        log.info("run %s, attempt %d: %s of %s", self._status.run, number, self.spec.method, self.spec.model.name)
        if store.read(layout.TRAINING_CONFIG) is None:
            transfer.write_once(store, layout.TRAINING_CONFIG, dump(self.spec).encode())
        self._courier = Courier(
            store,
            self._ownership,
            self.workdir,
            self.spec.checkpoints.keep,
            self._status_now,
            _STATUS_SECONDS,
        )
        self._courier.start()
        return True

    def _sweep_scratch(self) -> None:
        """Removes what attempts that were killed left. Nobody reads it, whatever an orphan of theirs still writes."""
        for left in self.workdir.root.parent.glob(f"{_scratch_prefix(self.uri)}*"):
            if left not in (self.workdir.root, self._brought, self._prepared_here):
                shutil.rmtree(left, ignore_errors=True)

    def _enter_ledger(self, store: Store) -> int:
        """This attempt's number, once the ledger has it and what an attempt that vanished left to be said.

        Raises:
            BudgetSpent: earlier attempts used up `resources.budget`.
        """
        ledger = attempts(store)
        newest = transfer.newest_step(store)
        complete(store, ledger, newest)
        self._status = replace(self._status, committed=newest)
        if self.spec.resources.budget_hours is not None:
            self._budget_left = self.spec.resources.budget_hours * 3600 - seconds_spent(ledger)
        self._status = replace(self._status, attempt=next_number(store))
        self._is_in_ledger = True
        self._record_attempt(store)
        self._require_budget()
        require_progress(ledger, os.environ.get(JOB, ""))
        return self._status.attempt

    def _require_budget(self) -> None:
        if time.monotonic() - self._began > self._budget_left:
            raise BudgetSpent(
                f"resources.budget: {self.spec.resources.budget_hours:g} hours over all attempts are used up; the "
                f"newest committed checkpoint is of step {self._status.committed}. Raise it to go on"
            )

    # pull

    def _pull(self, store: Store) -> Inputs:
        survey, recorded = self._survey(store)

        def tick() -> None:
            self.leaving.check("while the inputs were brought")
            self._scratch.check()
            self._require_ownership()
            self._announcer.pulling(survey.bytes_here, survey.bytes_to_bring)

        self._survey_made = survey
        survey = survey.bring(recorded, tick)
        inspect(survey.inputs.model.path, self.spec.model.name)
        self._cache = PreparedCache(store, self._prepared_here, key_of(self.spec, survey.records))
        if not recorded:
            transfer.write_once(store, layout.INPUTS, to_json({"inputs": survey.records}))
        with translated("the record of the inputs: cannot be written", self.workdir.root):
            write_inputs(self.workdir.inputs, survey.inputs)
        commit = transfer.newest_verified(
            store, self.workdir.resume, lambda: self.leaving.check("while a checkpoint was brought")
        )
        self._status = replace(self._status, committed=commit.step if commit else 0)
        if commit is not None:
            self._fetch_so_far(store, layout.METRICS, self.workdir.metrics)
            log.info("going on from the checkpoint of step %d", commit.step)
        return survey.inputs

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

        def tick() -> None:
            self.leaving.check("while prepared rows were brought")
            self._require_ownership()
            self._announcer.phase("prepare")

        origin = self._cache.take(self.workdir.prepared, tick)
        if origin is not None:
            log.info("the rows are those an earlier attempt prepared, kept by %s", origin)
        else:
            self._attend(launch.python_child("job.data.prepare", self.workdir.root, log.info), ["prepare"])
        self._cache.keep_here(self.workdir.prepared)
        self._courier.send_aside("prepared rows", self._cache.send)

    def _work(self) -> None:
        gpus = self.spec.resources.gpus
        cpu_ranks = os.environ.get(CPU_RANKS, "")
        ranks = gpus or (int(cpu_ranks) if cpu_ranks.isdigit() else 1) or 1
        grace = self.spec.resources.grace_seconds
        child = launch.ranks_child(self.workdir.root, ranks, bool(gpus), grace, log.info)
        processes = [f"rank-{rank}" for rank in range(ranks)]
        try:
            self._attend(child, processes, trains=True)
        except Exception:
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
            if self._courier is not None:
                self._courier.finish()
        except JobError as error:
            log.warning("%s", error)
            self._unsent = error
        finally:
            self._merge_committed()

    def _attend(self, child: launch.Child, processes: list[str], *, trains: bool = False) -> None:
        self._child = child
        try:
            self._attendant.attend(child, processes, trains=trains, at_end=self._flush)
        finally:
            self._child = None

    def _kept(self) -> str:
        if not self._status.committed:
            return "nothing was trained yet"
        return f"the newest committed checkpoint is of step {self._status.committed}"

    def _tick(self) -> None:
        """A few times a second while a child works.

        Raises:
            JobError: what ends the attempt though the child is well.
        """
        if self._status.phase in _WORKER_PHASES:
            with suppress(FileNotFoundError):
                word = read_json(self.workdir.progress)
                known = {key: word[key] for key in ("phase", "step", "steps", "loss") if key in word}
                self._status = replace(self._status, **known)
                self._announcer.progress(word)
        else:
            self._announcer.phase(self._status.phase)
        memory = container.memory()
        self._status = replace(self._status, memory=round(memory.share, 3) if memory else None)
        self._merge_committed()
        if self._courier is not None:
            self._courier.check()
        self._scratch.check()
        self._require_ownership()

    def _merge_committed(self) -> None:
        step = self._courier.committed if self._courier else 0
        if step > self._status.committed:
            self._status = replace(self._status, committed=step, step=max(step, self._status.step))

    def _require_ownership(self) -> None:
        if self._ownership is not None and self._ownership.is_lost:
            self._ownership.check()

    # publish

    def _publish(self, store: Store, inputs: Inputs) -> None:
        if self._ownership is None:
            raise InternalError("publishing without owning the run")
        work = self.workdir
        results = eval_results(
            self._status.run,
            self.spec,
            read_json(work.evaluation),
            read_json(work.data_report),
            read_json(work.verification),
            read_json(work.performance),
            self._seconds,
        )
        write_json(work.results, results)
        work.card.write_text(model_card(self._status.run, self.spec, results), encoding="utf-8")
        log.info("publishing to %s", store.uri)
        files = {path.name: path for path in work.adapter.iterdir()}
        log_so_far = work.outgoing / layout.TRAINING_LOG  # the log itself still grows
        work.outgoing.mkdir(exist_ok=True)
        shutil.copyfile(work.log, log_so_far)
        files |= {
            layout.TRAINING_CONFIG: work.spec,
            layout.TRAINING_LOG: log_so_far,
            layout.METRICS: work.metrics,
            layout.EVAL_RESULTS: work.results,
            layout.MODEL_CARD: work.card,
        }
        self._ownership.check()
        self.leaving.check("before publishing; the next attempt publishes without training")

        def tick() -> None:
            self.leaving.check_time("while publishing; the next attempt publishes without training")
            self._require_ownership()
            self._announcer.phase("publish")

        published = read_json(work.evaluation).get("published_step")
        extra = {"run": self._status.run, "spec_digest": digest(self.spec), "published_step": published}
        self._manifest = transfer.publish(store, files, extra, tick, self._expect_publication)
        for entry in list(store.list(layout.SO_FAR)):
            _best_effort(store.delete, entry.key)
        if self._courier is not None and self._cache is not None:
            self._courier.stop_aside(_LAST_WORDS_SECONDS)
            _best_effort(self._cache.drop)

    def _expect_publication(self) -> None:
        self._may_be_published = True

    # word of it

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.leaving.check(f"before {name}")
        self._status = replace(self._status, phase=name)
        self._announcer.phase(name)
        if self._courier is not None:
            self._courier.tell()
        start = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - start

    def _status_now(self) -> bytes:
        seconds = {name: round(value, 3) for name, value in list(self._seconds.items())}
        return replace(self._status, seconds=seconds, elapsed=round(time.monotonic() - self._began, 3)).dump()

    def _tell_status(self, store: Store) -> None:
        store.write(layout.STATUS, self._status_now())

    def _record_attempt(self, store: Store) -> None:
        """This attempt's line of the ledger: at its start without an end, at its end with one."""
        ended = self._status.exit_code is not None
        record = {
            "attempt": self._status.attempt,
            "generation": self._ownership.generation if self._ownership else None,
            "started": self._started,
            "ended": _now() if ended else None,
            "seconds": round(time.monotonic() - self._began, 3),
            "exit_code": self._status.exit_code,
            "message": self._status.message,
            "committed": self._status.committed,
            "brought": self._survey_made.bytes_verified() if self._survey_made else 0,
            "job": os.environ.get(JOB, ""),
            "pod": os.environ.get(POD, ""),
        }
        record_attempt(store, self._status.attempt, record)

    def _push_log(self, store: Store) -> None:
        """The log so far, for the next attempt and, while there is no result, for people."""
        if self._log_handler is None or self._may_be_published or self._ownership is None:
            return
        self._log_handler.flush()
        for key in (layout.so_far(layout.TRAINING_LOG, self._ownership.generation), layout.TRAINING_LOG):
            send_copy(store, self.workdir.log, key, self.workdir.outgoing)


def _best_effort(act: Callable[..., None], *arguments: Any) -> None:
    try:
        act(*arguments)
    except (JobError, OSError) as error:
        log.warning("could not leave word of the end: %s", error)


def _scratch_prefix(uri: str) -> str:
    """Begins the name of every scratch folder of one run."""
    path = local_path(uri)
    return hashlib.sha256(str(path.resolve() if path else uri).encode()).hexdigest()[:16] + "-"


def _template_file(spec: JobSpec) -> list[Input]:
    """The chat template that is a file of the user's: an input like the data."""
    name = spec.data.chat_template or ""
    return [Input(name, Path(name))] if name.endswith(".jinja") and Path(name).is_file() else []


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _refuse_unoffered(spec: JobSpec) -> None:
    """What a spec may say but this version cannot train, by name."""
    if spec.resources.nodes > 1:
        raise SpecInvalid("resources.nodes: training over several nodes is not offered yet; use one node")
