"""The supervisor: one attempt of a run, from spec to published manifest. It never imports torch.

It owns the run in the store, moves the bytes, starts ``prepare``, the worker and ``verify``, commits what they seal,
and decides the exit code. Its phases are those of docs/design.md.
"""

import hashlib
import logging
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from job import launch, layout, transfer
from job.announce import Announcer, log_to
from job.basemodel import inspect
from job.errors import BudgetSpent, Conflict, InternalError, Interrupted, JobError, SpecInvalid, TemporaryFailure
from job.exits import ExitCode
from job.files import read_json, write_json
from job.inputs import Input, Inputs
from job.ledger import attempts, complete, record_attempt, seconds_spent
from job.outcome import as_foreseen, cause, recorded
from job.own import Ownership, claim
from job.results import eval_results, model_card
from job.spec import JobSpec, differences, digest, dump, parse
from job.status import Status
from job.store import Store, from_json, local_path, open_store, probe, to_json
from job.workdir import WorkDir

log = logging.getLogger(__name__)

CPU_RANKS = "TUNEJOB_CPU_RANKS"
"""Environment variable: ranks on a machine without a GPU, for tests of several processes."""

_WORKER_PHASES = ("worker", "load", "train", "seal", "evaluate")
"""Phases in which the worker's word counts; `worker` until it has said one."""

_POLL_SECONDS = 0.2
_STATUS_SECONDS = 5.0


def supervise(spec: JobSpec, uri: str, work: Path, outcome: Path | None = None) -> ExitCode:
    """Runs one attempt. Every failure becomes an exit code here and nowhere else.

    Args:
        uri: the run's own prefix in a store.
        work: folder for scratch; each attempt has one of its own in it, removed at its end.
        outcome: where to leave the code and its sentence for the process that started this one.
    """
    attempt = Attempt(spec, uri, WorkDir(work / f"{_scratch_prefix(uri)}{secrets.token_hex(4)}"))
    with _asked_to_leave(attempt.stop):
        try:
            attempt.run()
            code, message = ExitCode.OK, ""
        except Exception as error:
            foreseen = as_foreseen(error)
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


@contextmanager
def _asked_to_leave(stop: threading.Event) -> Iterator[None]:
    """Sets ``stop`` on SIGTERM, SIGINT or SIGHUP, however often they come."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Attempt:
    """One attempt of one run."""

    spec: JobSpec
    uri: str
    workdir: WorkDir
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._announcer = Announcer()
        self._seconds: dict[str, float] = {}
        self._status = Status(run=self.uri.rstrip("/").rsplit("/", 1)[-1], attempt=1, phase="preflight")
        self._status_at = 0.0
        self._store: Store | None = None
        self._ownership: Ownership | None = None
        self._log_handler: logging.Handler | None = None
        self._pushed: set[str] = set()
        self._began = time.monotonic()
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        self._budget_left = float("inf")

    def run(self) -> None:
        """All phases.

        Raises:
            JobError: as the exit contract names them; Interrupted if it was asked to leave.
        """
        with self._phase("preflight"):
            _refuse_unoffered(self.spec)
            store = self._store = open_store(self.uri)
            if not probe(store):
                log.warning(
                    "%s: keeps no conditions on writes; see to it that only one attempt runs at a time", store.uri
                )
        with self._phase("own"):
            self._refuse_other_spec(store)
            if self._already_published(store):
                return
            self._own(store)
        with self._phase("pull"):
            inputs = self._pull(store)
        with self._phase("prepare"):
            child = launch.python_child("job.prepare", self.workdir.root, log.info)
            self._attend(child, ["prepare"], store)
        with self._phase("worker"):
            self._work(store)
        with self._phase("verify"):
            self._attend(launch.python_child("job.verify", self.workdir.root, log.info), ["verify"], store)
        with self._phase("publish"):
            self._publish(store, inputs)

    def close(self, code: ExitCode, message: str) -> None:
        """Leaves word of how it ended, as far as the store still takes it, and gives the run up."""
        self._announcer.close()
        if self._ownership is not None and self._store is not None and code != ExitCode.FENCED:
            self._status = replace(self._status, exit_code=int(code), message=message)
            for act in (self._tell_status, self._record_attempt, self._push_log):
                _best_effort(act, self._store)
            self._sweep_scratch()
            _best_effort(self._ownership.release, code.name)
        if self._log_handler is not None:
            logging.getLogger().removeHandler(self._log_handler)
            self._log_handler.close()
        if code not in (ExitCode.CRASH, ExitCode.INTERNAL):
            shutil.rmtree(self.workdir.root, ignore_errors=True)

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
        manifest = transfer.read_manifest(store)
        if manifest is None:
            return False
        transfer.verify_manifest(store, manifest)
        self._inputs(store)
        log.info("%s is already complete and its inputs are unchanged; nothing to do", store.uri)
        return True

    def _inputs(self, store: Store) -> Inputs:
        """The inputs, here, and seen to be those that earlier attempts read.

        Raises:
            Conflict: they changed; the message names which.
        """
        found = store.read(layout.INPUTS)
        recorded = from_json(found[0], layout.INPUTS)["inputs"] if found else []
        # A hub's branch may have moved on; the run stays with the commit it began on.
        commit = next((record["commit"] for record in recorded if record.get("commit")), None)
        inputs = transfer.pull_inputs(self.spec, self.workdir, revision=commit)
        inspect(inputs.model.path, self.spec.model.name)
        here = transfer.fingerprint(inputs, recorded, _template_file(self.spec))
        changes = transfer.changed(recorded, here) if recorded else []
        if changes:
            raise Conflict(
                f"{store.uri}: the inputs changed since this run began: {', '.join(changes)}; "
                "name another output to train on what is there now"
            )
        if not recorded and self._ownership is not None:
            store.write(layout.INPUTS, to_json({"inputs": here}), if_absent=True)
        return inputs

    def _own(self, store: Store) -> None:
        self._ownership = claim(store, digest(self.spec), is_free_of_specs=lambda: not self._holds_something(store))
        store.sweep("")
        if not self._holds_something(store):
            store.delete(layout.INPUTS)
            store.delete(layout.TRAINING_CONFIG)
        number = self._enter_ledger(store)
        self._sweep_scratch()
        self.workdir.root.mkdir(parents=True, exist_ok=True)
        self.workdir.spec.write_text(dump(self.spec), encoding="utf-8")
        self._fetch_if_there(store, layout.TRAINING_LOG, self.workdir.log)
        self._log_handler = log_to(self.workdir.log)
        log.info("run %s, attempt %d: %s of %s", self._status.run, number, self.spec.method, self.spec.model.name)
        if store.read(layout.TRAINING_CONFIG) is None:
            store.write(layout.TRAINING_CONFIG, dump(self.spec).encode(), if_absent=True)

    def _sweep_scratch(self) -> None:
        """Removes what attempts that were killed left. Nobody reads it, whatever an orphan of theirs still writes."""
        for left in self.workdir.root.parent.glob(f"{_scratch_prefix(self.uri)}*"):
            if left != self.workdir.root:
                shutil.rmtree(left, ignore_errors=True)

    def _enter_ledger(self, store: Store) -> int:
        """This attempt's number, once the ledger has it and what an attempt that vanished left to be said.

        Raises:
            BudgetSpent: earlier attempts used up `resources.budget`.
        """
        ledger = attempts(store)
        complete(store, ledger)
        if self.spec.resources.budget_hours is not None:
            self._budget_left = self.spec.resources.budget_hours * 3600 - seconds_spent(ledger)
        self._status = replace(self._status, attempt=len(ledger) + 1)
        self._record_attempt(store)
        self._require_budget()
        return self._status.attempt

    def _require_budget(self) -> None:
        if time.monotonic() - self._began > self._budget_left:
            raise BudgetSpent(
                f"resources.budget: {self.spec.resources.budget_hours:g} hours over all attempts are used up; the "
                f"newest committed checkpoint is of step {self._status.committed}. Raise it to go on"
            )

    # pull

    def _pull(self, store: Store) -> Inputs:
        inputs = self._inputs(store)
        commit = transfer.newest_verified(store, self.workdir.resume)
        if commit is not None:
            self._status = replace(self._status, committed=commit.step)
            self._fetch_if_there(store, layout.METRICS, self.workdir.metrics)
            log.info("going on from the checkpoint of step %d", commit.step)
        return inputs

    def _fetch_if_there(self, store: Store, key: str, to: Path) -> None:
        if store.stat(key) is not None:
            store.get(key, to)

    # train, seal, evaluate

    def _work(self, store: Store) -> None:
        gpus = self.spec.resources.gpus
        cpu_ranks = os.environ.get(CPU_RANKS, "")
        ranks = gpus or (int(cpu_ranks) if cpu_ranks.isdigit() else 1) or 1
        grace = self.spec.resources.grace_seconds
        child = launch.ranks_child(self.workdir.root, ranks, bool(gpus), grace, log.info)
        try:
            self._attend(child, [f"rank-{rank}" for rank in range(ranks)], store)
        finally:
            # What was sealed before a failure is worth as much as what was sealed before success.
            self._commit_sealed(store)

    def _attend(self, child: launch.Child, processes: list[str], store: Store) -> None:
        """Stays with a child to its end: commits, announces, passes on the request to leave.

        Raises:
            JobError: what the child wrote down, or TemporaryFailure if it vanished without a word.
        """
        asked_at = None
        grace = self.spec.resources.grace_seconds
        try:
            while (code := child.wait(_POLL_SECONDS)) is None:
                self._tick(store)
                if not self.stop.is_set() and time.monotonic() - self._began <= self._budget_left:
                    continue
                if asked_at is None:
                    asked_at = time.monotonic()
                    self._ask_to_leave()
                if not self.workdir.stop.exists() or self._phase_now() != "train":
                    break  # only a training step has something to save
                if time.monotonic() - asked_at > max(2.0, grace - 8.0):
                    break  # the last committed checkpoint has to do
        finally:
            child.end(3.0)
        self._tick(store)
        self._settle(processes, code)

    def _kept(self) -> str:
        if not self._status.committed:
            return "nothing was trained yet"
        return f"the newest committed checkpoint is of step {self._status.committed}"

    def _ask_to_leave(self) -> None:
        why = "asked to leave" if self.stop.is_set() else "resources.budget is used up"
        log.warning("%s; %s", why, "sealing a checkpoint" if self._phase_now() == "train" else "leaving")
        if self._phase_now() == "train":
            self.workdir.stop.touch()

    def _settle(self, processes: list[str], code: int | None) -> None:
        """Raises how a group of processes ended: a real cause, then a request to leave, then a vanished one.

        A rank that lost its peers, or was ended with them, is none of the first: torchrun ends the healthy ranks when
        one dies.
        """
        outcomes = {process: recorded(self.workdir.outcome(process)) for process in processes}
        failure = cause(outcomes.values())
        if failure is not None and not isinstance(failure, TemporaryFailure):
            raise failure
        if self.stop.is_set():
            raise Interrupted(f"asked to leave; {self._kept()}")
        self._require_budget()
        silent = [process for process, outcome in outcomes.items() if outcome is None]
        if silent:
            raise TemporaryFailure(
                f"{', '.join(silent)} vanished without a word (exit {code}): killed from outside, or for memory; "
                "see the lines above"
            )
        if failure is not None:
            raise failure
        if code != 0:
            raise InternalError(f"{', '.join(processes)} ended well but the launcher exited with {code}")

    def _phase_now(self) -> str:
        """The worker's phase by its own word, else the supervisor's."""
        if self._status.phase in _WORKER_PHASES:
            with suppress(FileNotFoundError):
                return str(read_json(self.workdir.progress)["phase"])
        return self._status.phase

    def _tick(self, store: Store) -> None:
        """A few times a second while a child works."""
        if self._status.phase in _WORKER_PHASES:
            with suppress(FileNotFoundError):
                word = read_json(self.workdir.progress)
                self._announcer.progress(word)
                known = {key: word[key] for key in ("phase", "step", "steps", "loss") if key in word}
                self._status = replace(self._status, **known)
        self._commit_sealed(store)
        if time.monotonic() - self._status_at > _STATUS_SECONDS:
            self._tell_status(store)

    def _commit_sealed(self, store: Store) -> None:
        """Sends every sealed checkpoint that is not in the store yet, and prunes what is no longer kept."""
        if not self.workdir.checkpoints.exists() or self._ownership is None:
            return
        sealed = [path for path in self.workdir.checkpoints.iterdir() if layout.parse_checkpoint(path.name)]
        for folder in sorted(sealed, key=lambda path: layout.parse_checkpoint(path.name) or (0, 0)):
            if folder.name in self._pushed:
                continue
            self._ownership.check()
            state = read_json(folder / layout.CHECKPOINT_STATE)
            extra = {"spec_digest": state["spec_digest"], "eval_loss": state["eval_loss"]}
            # Before the marker: who resumes from it must find the lines of every step that led to it.
            self._push_metrics(store)
            transfer.push_checkpoint(store, folder, state["step"], self._ownership.generation, extra)
            self._pushed.add(folder.name)
            newest = max(state["step"], self._status.committed)
            self._status = replace(self._status, committed=newest, step=max(newest, self._status.step))
            log.info("committed the checkpoint of step %d", state["step"])
            transfer.prune(store, self.spec.checkpoints.keep, _best(store))
            shutil.rmtree(folder, ignore_errors=True)

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
        files |= {
            layout.TRAINING_CONFIG: work.spec,
            layout.TRAINING_LOG: work.log,
            layout.METRICS: work.metrics,
            layout.EVAL_RESULTS: work.results,
            layout.MODEL_CARD: work.card,
        }
        self._ownership.check()
        if self.stop.is_set():
            raise Interrupted("asked to leave before publishing; the next attempt publishes without training")
        transfer.publish(store, files, {"run": self._status.run, "spec_digest": digest(self.spec)})

    # word of it

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        if self.stop.is_set():
            raise Interrupted(f"asked to leave before {name}")
        self._status = replace(self._status, phase=name)
        if self._store is not None and self._ownership is not None:
            self._tell_status(self._store)
        start = time.monotonic()
        yield
        self._seconds[name] = time.monotonic() - start

    def _tell_status(self, store: Store) -> None:
        self._status_at = time.monotonic()
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        self._status = replace(self._status, seconds=seconds, elapsed=round(time.monotonic() - self._began, 3))
        store.write(layout.STATUS, self._status.dump())

    def _record_attempt(self, store: Store) -> None:
        """This attempt's line of the ledger: at its start without an end, at its end with one."""
        ended = self._status.exit_code is not None
        record = {
            "attempt": self._status.attempt,
            "generation": self._ownership.generation if self._ownership else None,
            "started": self._started,
            "ended": datetime.now(UTC).isoformat(timespec="seconds") if ended else None,
            "seconds": round(time.monotonic() - self._began, 3),
            "exit_code": self._status.exit_code,
            "message": self._status.message,
            "committed": self._status.committed,
        }
        record_attempt(store, self._status.attempt, record)

    def _push_log(self, store: Store) -> None:
        """After publication the manifest holds the log's hash: what comes then is not for it."""
        if self._log_handler is not None and self._status.exit_code != ExitCode.OK:
            self._log_handler.flush()
            store.put(self.workdir.log, layout.TRAINING_LOG)

    def _push_metrics(self, store: Store) -> None:
        for path, key in ((self.workdir.metrics, layout.METRICS), (self.workdir.log, layout.TRAINING_LOG)):
            if path.exists():
                store.put(path, key)


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


def _best(store: Store) -> int | None:
    """Step of the committed checkpoint with the lowest evaluation loss; None if none was measured."""
    measured = [(c.record["eval_loss"], c.step) for c in transfer.committed(store) if c.record.get("eval_loss")]
    return min(measured)[1] if measured else None


def _refuse_unoffered(spec: JobSpec) -> None:
    """What a spec may say but this version cannot train, by name."""
    if spec.resources.nodes > 1:
        raise SpecInvalid("resources.nodes: training over several nodes is not offered yet; use one node")
