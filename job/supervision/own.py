"""Who may publish: one attempt at a time owns a run, and proves it before every commit.

``run/owner.json`` is changed only on condition of its etag. A living owner is never taken over: on one machine its
process is asked for, from elsewhere its heartbeat is watched by the newcomer's own clock.
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from job.errors import Conflict, Fenced, IntegrityFailure, JobError, TemporaryFailure
from job.layout import OWNER
from job.process import Identity, Life, life_of, this_process
from job.storage.parallel import TICK_SECONDS, nothing
from job.storage.store import PreconditionFailed, Store, from_json, to_json

log = logging.getLogger(__name__)

HEARTBEAT_VARIABLE = "TUNEJOB_HEARTBEAT_SECONDS"
HEARTBEAT_SECONDS = 20.0
LEASE_HEARTBEATS = 3
"""An owner whose heartbeat stands still for so many intervals may be taken over."""
LOOKS_PER_HEARTBEAT = 4
TRIES = 8
"""Lost races for one takeover before giving up; every one of them had a winner."""


@dataclass(frozen=True)
class Owner:
    """What owner.json says."""

    spec: str
    """Digest of the spec the run belongs to."""
    generation: int
    """Counts owners, from 1."""
    nonce: str
    """This owner's own random word: by it a lost reply is told from a lost race."""
    identity: Identity
    started: str
    """When it took the run, UTC; for people, never compared."""
    interval_seconds: float
    beats: int = 0
    """Heartbeats so far; only that it changes means something."""
    ended: str | None = None
    """How the owner left the run; None while it holds it."""

    def record(self) -> dict[str, Any]:
        """As it stands in JSON."""
        return asdict(self)


def heartbeat_seconds() -> float:
    """Seconds between two heartbeats: the environment's, else 20."""
    text = os.environ.get(HEARTBEAT_VARIABLE, "")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86400:
        if text:
            log.warning("%s=%r is no number of seconds; taking %g", HEARTBEAT_VARIABLE, text, HEARTBEAT_SECONDS)
        return HEARTBEAT_SECONDS
    return seconds


def read_owner(store: Store) -> tuple[Owner, str] | None:
    """The run's owner and the etag of its record; None if nobody ever owned it.

    Raises:
        IntegrityFailure: the record is there and cannot be understood.
    """
    found = store.read(OWNER)
    if found is None:
        return None
    name = f"{store.uri}/{OWNER}"
    record = from_json(found[0], name)
    try:
        known = {key: record[key] for key in Owner.__dataclass_fields__}
        identity = {key: record["identity"].get(key) for key in Identity.__dataclass_fields__}
        owner = Owner(**known | {"identity": Identity(**identity)})
        numbers = (owner.generation, owner.interval_seconds, owner.beats, owner.identity.pid)
        if not all(isinstance(number, int | float) for number in numbers) or not isinstance(owner.spec, str):
            raise TypeError("a number or the spec's digest is of another type")
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityFailure(f"{name}: no owner's record ({error}); delete it if no attempt is running") from error
    return owner, found[1]


class Ownership:
    """The right to commit and publish, as long as it is kept up."""

    def __init__(self, store: Store, owner: Owner, etag: str) -> None:
        self._store = store
        self._owner = owner
        self._etag = etag
        self._lost = ""
        self._lock = threading.Lock()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_left, name="heartbeat", daemon=True)

    @property
    def generation(self) -> int:
        """Counts the owners of this run, from 1; checkpoints carry it."""
        return self._owner.generation

    @property
    def nonce(self) -> str:
        """This owner's random word."""
        return self._owner.nonce

    @property
    def is_lost(self) -> bool:
        """Whether another attempt is known to own the run; asks nobody."""
        return bool(self._lost)

    def check(self) -> None:
        """Proves by a heartbeat, now, that the run is still ours. To be called before every commit.

        Raises:
            Fenced: another attempt took it.
            JobError: the store could not be asked, which is not a no.
        """
        self._write(ended=None)

    def release(self, outcome: str) -> None:
        """Marks the run as left, so that the next attempt need not wait. Nothing is written if it is not ours.

        Raises nothing: how the run ended is settled, and without the mark the next attempt only waits longer.
        """
        self._leave.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._owner.ended is None and not self._lost:
            try:
                self._write(ended=outcome)
            except JobError as error:
                log.warning("leaving: %s", error)

    def start(self) -> None:
        """Begins the heartbeat, in a thread of its own."""
        self._thread.start()

    def _beat_until_left(self) -> None:
        while not self._leave.wait(self._owner.interval_seconds):
            try:
                self.check()
            except Fenced as error:
                log.error("%s", error)
                return
            except JobError as error:
                log.warning("heartbeat: %s", error)
            except Exception:  # a heart that stops unseen loses the run
                log.exception("heartbeat: a failure nobody foresaw; please report it")

    def _write(self, ended: str | None) -> None:
        """One heartbeat, and perhaps the last. Under a lock: the thread's and a check's must not meet."""
        with self._lock:
            if self._lost:
                raise Fenced(self._lost)
            owner = replace(self._owner, beats=self._owner.beats + 1, ended=ended)
            for _ in range(TRIES):
                try:
                    self._etag = self._store.write(OWNER, to_json(owner.record()), if_match=self._etag)
                    break
                except PreconditionFailed as error:
                    present, self._etag = self._present(error)
                    if present == owner:
                        break
            else:
                raise TemporaryFailure(f"{self._store.uri}/{OWNER}: {TRIES} writes in a row met another of our own")
            self._owner = owner

    def _present(self, error: PreconditionFailed) -> tuple[Owner, str]:
        """Our record as it stands, after a refusal: an earlier write of ours may have landed, only its reply been lost.

        Raises:
            Fenced: it is not ours.
        """
        found = read_owner(self._store)
        if found is not None and found[0].nonce == self.nonce:
            return found
        holder = _words_for(found[0]) if found else "nobody: its record was deleted"
        self._lost = f"{self._store.uri}: no longer ours, it belongs to {holder}; this attempt publishes nothing"
        raise Fenced(self._lost) from error


def claim(
    store: Store,
    spec_digest: str,
    identity: Identity | None = None,
    *,
    interval_seconds: float | None = None,
    heartbeat: bool = True,
    tick: Callable[[], None] = nothing,
    is_free_of_specs: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Ownership:
    """The ownership of a run, its heartbeat begun.

    Args:
        spec_digest: of the spec; a run belongs to one.
        identity: left out: this process.
        interval_seconds: between two heartbeats; left out: ``heartbeat_seconds()``.
        is_free_of_specs: asked where the owner has another spec; True where nothing was committed that it could spoil.
        heartbeat: False leaves the heartbeat to ``start`` or ``check``.
        tick: called a few times a second while another's heartbeat is watched; what it raises ends the waiting.

    Raises:
        Conflict: the run belongs to another spec.
        Fenced: another attempt owns it and lives.
    """
    me = identity or this_process()
    interval = interval_seconds or heartbeat_seconds()
    nonce = secrets.token_hex(16)
    for _ in range(TRIES):
        found = read_owner(store)
        if found is not None:
            _require_spec(store, found[0], spec_digest, is_free_of_specs)
            found = _once_free(store, found, interval, tick, clock, sleep)
        if found is not None:  # once more: the owner may have committed while it was watched
            _require_spec(store, found[0], spec_digest, is_free_of_specs)
        generation = found[0].generation + 1 if found else 1
        started = datetime.now(UTC).isoformat(timespec="seconds")
        owner = Owner(spec_digest, generation, nonce, me, started, interval)
        etag = _take(store, owner, found[1] if found else None)
        if etag is not None:
            ownership = Ownership(store, owner, etag)
            if heartbeat:
                ownership.start()
            return ownership
    raise Fenced(f"{store.uri}: {TRIES} others were faster; another attempt owns the run")


def _take(store: Store, owner: Owner, etag: str | None) -> str | None:
    """The etag of our record; None if somebody else's was written first."""
    try:
        return store.write(OWNER, to_json(owner.record()), if_absent=etag is None, if_match=etag)
    except PreconditionFailed:
        found = read_owner(store)
        return found[1] if found is not None and found[0].nonce == owner.nonce else None


def _require_spec(store: Store, owner: Owner, spec_digest: str, is_free_of_specs: Callable[[], bool]) -> None:
    """Raises Conflict where the run belongs to another spec."""
    if owner.spec != spec_digest and not is_free_of_specs():
        raise Conflict(
            f"{store.uri}: belongs to another spec (digest {owner.spec[:12]}, this one is {spec_digest[:12]}); "
            "name another output, or another run"
        )


def _once_free(
    store: Store,
    found: tuple[Owner, str],
    interval: float,
    tick: Callable[[], None],
    clock: Callable[[], float],
    sleep: Callable[[float], None],
) -> tuple[Owner, str] | None:
    """The record that may be replaced: its owner ended, is dead, or stands still. None if it was deleted meanwhile.

    Raises:
        Fenced: it lives.
    """
    owner, etag = found
    if owner.ended is not None:
        return found
    life = life_of(owner.identity)
    if life is Life.DEAD:
        log.info("taking over from %s, which is gone", _words_for(owner))
        return found
    if life is Life.ALIVE:
        raise Fenced(f"{store.uri}: output in use by {_words_for(owner)}; wait for it or name another output")
    lease = LEASE_HEARTBEATS * max(interval, owner.interval_seconds)
    log.info("watching the heartbeat of %s for %g s", _words_for(owner), lease)
    deadline = clock() + lease
    while clock() < deadline:
        look_at = clock() + lease / (LEASE_HEARTBEATS * LOOKS_PER_HEARTBEAT)
        while (left := look_at - clock()) > 0:
            tick()
            sleep(min(TICK_SECONDS, left))
        now = read_owner(store)
        if now is None or now[0].ended is not None:
            return now
        if now[1] != etag:
            raise Fenced(
                f"{store.uri}: output in use by {_words_for(now[0])}, whose heartbeat goes on; "
                "wait for it or name another output"
            )
    log.warning("taking over from %s: no heartbeat for %g s", _words_for(owner), lease)
    return found


def _words_for(owner: Owner) -> str:
    return f"process {owner.identity.pid} on {owner.identity.host} since {owner.started}"
