"""Ownership: one attempt owns a run, a living owner is never taken over, and a fenced one writes nothing more."""

import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from job.errors import Conflict, Fenced, IntegrityFailure, Interrupted, TemporaryFailure
from job.layout import OWNER
from job.process import Identity, Life, life_of, this_process
from job.storage.directory import DirectoryStore
from job.storage.store import PreconditionFailed, to_json
from job.supervision.own import HEARTBEAT_VARIABLE, Owner, Ownership, claim, heartbeat_seconds, read_owner

REPOSITORY = Path(__file__).parents[2]
ELSEWHERE = Identity(pid=1, host="other-pod", boot_id="another-boot", pid_namespace="pid:[1]", start_ticks=7)


class Time:
    """A clock that moves only when somebody sleeps; ``during`` is what happens meanwhile."""

    def __init__(self, during: Callable[[float], None] = lambda now: None) -> None:
        self.now = 0.0
        self.during = during

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.during(self.now)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path, "file:out")


def claimed(
    store: DirectoryStore, spec: str = "spec-1", identity: Identity | None = None, time: Time | None = None
) -> Ownership:
    time = time or Time()
    return claim(store, spec, identity, interval_seconds=20, heartbeat=False, clock=time.clock, sleep=time.sleep)


def owner_of(store: DirectoryStore) -> Owner:
    found = read_owner(store)
    assert found is not None
    return found[0]


def test_a_run_nobody_owned_is_the_first_generation(store: DirectoryStore) -> None:
    ownership = claimed(store)
    assert ownership.generation == 1
    assert owner_of(store).nonce == ownership.nonce
    assert owner_of(store).identity == this_process()
    ownership.check()


def test_another_spec_is_a_conflict_even_when_the_owner_ended(store: DirectoryStore) -> None:
    claimed(store).release("ok")
    with pytest.raises(Conflict, match="another spec"):
        claimed(store, spec="spec-2")


def test_a_run_where_nothing_was_committed_may_become_another_spec_s(store: DirectoryStore) -> None:
    claimed(store).release("CONFIG")
    new = claim(store, "spec-2", heartbeat=False, is_free_of_specs=lambda: True)
    assert (new.generation, owner_of(store).spec) == (2, "spec-2")


def test_what_is_committed_while_the_owner_is_watched_keeps_its_spec(store: DirectoryStore) -> None:
    claimed(store, identity=ELSEWHERE)
    time = Time()
    with pytest.raises(Conflict, match="another spec"):
        claim(
            store,
            "spec-2",
            interval_seconds=20,
            heartbeat=False,
            is_free_of_specs=lambda: time.now < 30,  # the owner commits after half a minute, and then falls silent
            clock=time.clock,
            sleep=time.sleep,
        )
    assert owner_of(store).spec == "spec-1"


def test_a_living_owner_of_this_machine_is_refused_at_once_and_named(store: DirectoryStore) -> None:
    claimed(store)
    time = Time()
    with pytest.raises(
        Fenced, match=f"output in use by process {os.getpid()} .* since .*; wait for it or name another"
    ):
        claimed(store, time=time)
    assert time.now == 0


def test_a_released_run_is_taken_over_at_once(store: DirectoryStore) -> None:
    first = claimed(store, identity=ELSEWHERE)
    first.release("interrupted")
    time = Time()
    assert owner_of(store).ended == "interrupted"
    assert claimed(store, time=time).generation == 2
    assert time.now == 0


def test_a_dead_owner_of_this_machine_is_taken_over_at_once(store: DirectoryStore) -> None:
    code = "import sys; from pathlib import Path; from job.supervision.own import claim\n"
    code += "from job.storage.directory import DirectoryStore\n"
    code += "claim(DirectoryStore(Path(sys.argv[1])), 'spec-1'); print('mine', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(store.root)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"mine\n"
    with pytest.raises(Fenced, match=f"process {process.pid}"):
        claimed(store)
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie is as dead as a reaped one
    time = Time()
    assert claimed(store, time=time).generation == 2
    assert time.now == 0
    process.communicate()


def test_a_reused_process_number_is_not_the_owner(store: DirectoryStore) -> None:
    me = this_process()
    assert me.start_ticks is not None
    claimed(store, identity=replace(me, start_ticks=me.start_ticks - 1))
    assert claimed(store).generation == 2


def test_an_owner_elsewhere_is_taken_over_only_after_three_intervals_of_silence(store: DirectoryStore) -> None:
    old = claimed(store, identity=ELSEWHERE)
    time = Time()
    new = claimed(store, time=time)
    assert new.generation == 2
    assert time.now >= 60
    with pytest.raises(Fenced, match="publishes nothing"):
        old.check()
    assert old.is_lost
    new.check()


def test_a_fenced_owner_that_leaves_does_not_touch_its_successor(store: DirectoryStore) -> None:
    old = claimed(store, identity=ELSEWHERE)
    new = claimed(store)
    old.release("ok")
    assert owner_of(store).nonce == new.nonce
    assert owner_of(store).ended is None


def test_an_owner_elsewhere_whose_heart_beats_is_never_taken_over(store: DirectoryStore) -> None:
    old = claimed(store, identity=ELSEWHERE)

    def beat_late(now: float) -> None:
        if now >= 59:
            old.check()

    time = Time(beat_late)
    with pytest.raises(Fenced, match="whose heartbeat goes on"):
        claimed(store, time=time)
    old.check()


def test_the_longer_interval_of_the_two_counts(store: DirectoryStore) -> None:
    claim(store, "spec-1", ELSEWHERE, interval_seconds=100, heartbeat=False)
    time = Time()
    claimed(store, time=time)
    assert time.now >= 300


def test_an_owner_that_ends_while_it_is_watched_is_not_waited_for(store: DirectoryStore) -> None:
    old = claimed(store, identity=ELSEWHERE)
    time = Time(lambda now: old.release("ok"))
    assert claimed(store, time=time).generation == 2
    assert time.now <= 20


def test_of_two_watchers_one_takes_over(store: DirectoryStore) -> None:
    claimed(store, identity=ELSEWHERE)
    rival: list[Ownership] = []

    def rival_now(now: float) -> None:
        if not rival and now >= 60:
            rival.append(claimed(store))

    with pytest.raises(Fenced):
        claimed(store, time=Time(rival_now))
    rival[0].check()
    assert owner_of(store).generation == 2


def test_who_watches_a_heartbeat_may_be_asked_to_leave_at_any_moment(store: DirectoryStore) -> None:
    claimed(store, identity=ELSEWHERE)
    time, asked = Time(), []

    def tick() -> None:
        asked.append(time.now)
        if time.now > 30:
            raise Interrupted("asked to leave")

    with pytest.raises(Interrupted):
        claim(store, "spec-1", interval_seconds=20, heartbeat=False, tick=tick, clock=time.clock, sleep=time.sleep)
    assert max(after - before for before, after in itertools.pairwise(asked)) < 1.0
    assert owner_of(store).generation == 1


class LosesReplies(DirectoryStore):
    """Stores what it is sent, and answers some writes as if they had been refused, or not at all."""

    refused = 0
    unanswered = 0

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        etag = super().write(key, data, if_absent=if_absent, if_match=if_match)
        if self.refused:
            self.refused -= 1
            raise PreconditionFailed("a retried request met its own first try")
        if self.unanswered:
            self.unanswered -= 1
            raise TemporaryFailure("the reply was lost")
        return etag


def test_a_claim_refused_because_it_had_landed_is_ours(tmp_path: Path) -> None:
    store = LosesReplies(tmp_path)
    store.refused = 1
    ownership = claimed(store)
    assert ownership.generation == 1
    ownership.check()


def test_a_heartbeat_whose_reply_was_lost_is_found_to_be_ours(tmp_path: Path) -> None:
    store = LosesReplies(tmp_path)
    ownership = claimed(store)
    store.unanswered = 1
    with pytest.raises(TemporaryFailure):
        ownership.check()
    assert not ownership.is_lost
    ownership.check()
    store.refused = 1
    ownership.check()


def test_leaving_is_recorded_even_after_a_lost_reply(tmp_path: Path) -> None:
    store = LosesReplies(tmp_path)
    ownership = claimed(store)
    store.unanswered = 1
    with pytest.raises(TemporaryFailure):
        ownership.check()
    ownership.release("ok")
    assert owner_of(store).ended == "ok"


def test_the_heart_beats_by_itself_until_it_is_released(store: DirectoryStore) -> None:
    ownership = claim(store, "spec-1", interval_seconds=0.01)
    for _ in range(3000):
        if owner_of(store).beats >= 3:
            break
        threading.Event().wait(0.01)
    ownership.release("ok")
    beats = owner_of(store).beats
    assert beats >= 3
    assert owner_of(store).ended == "ok"
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def test_of_eight_processes_one_owns_the_run(store: DirectoryStore) -> None:
    code = """
import sys
from pathlib import Path
from job.errors import Fenced
from job.supervision.own import claim
from job.storage.directory import DirectoryStore
sys.stdin.readline()
try:
    print(claim(DirectoryStore(Path(sys.argv[1])), "spec-1").generation, flush=True)
except Fenced as error:
    print("fenced", flush=True)
sys.stdin.readline()
"""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(store.root)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.stdout.readline().strip() for racer in racers if racer.stdout is not None]
    for racer in racers:
        racer.communicate("leave\n", timeout=60)
    assert sorted(said) == ["1"] + ["fenced"] * 7


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Life.ALIVE),
        ({"start_ticks": 1}, Life.DEAD),
        ({"pid": 2**22 + 1}, Life.DEAD),
        ({"boot_id": "another"}, Life.UNKNOWN),
        ({"pid_namespace": "pid:[1]"}, Life.UNKNOWN),
        ({"start_ticks": None}, Life.UNKNOWN),
    ],
)
def test_what_this_machine_knows_of_a_process(change: dict[str, object], expected: Life) -> None:
    assert life_of(replace(this_process(), **change)) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"identity": 3}', b'{"generation": "one"}'])
def test_an_owner_record_that_cannot_be_understood_is_not_overwritten(content: bytes, store: DirectoryStore) -> None:
    store.write(OWNER, content)
    with pytest.raises(IntegrityFailure, match=r"owner\.json"):
        claimed(store)
    assert (store.root / OWNER).read_bytes() == content


def test_keys_of_a_newer_version_are_ignored(store: DirectoryStore) -> None:
    claimed(store).release("ok")
    store.write(OWNER, to_json(owner_of(store).record() | {"colour": "blue"}))
    assert claimed(store).generation == 2


@pytest.mark.parametrize(("text", "seconds"), [("", 20), ("5", 5), ("0.5", 0.5), ("0", 20), ("soon", 20), ("nan", 20)])
def test_the_interval_comes_from_the_environment(text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HEARTBEAT_VARIABLE, text)
    assert heartbeat_seconds() == seconds
