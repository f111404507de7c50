"""Waiting and following: what ends them, what does not, and how often the cluster is asked."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from launcher.codes import ClusterUnreachable, Code, Deleted, LauncherError, Refused, Stuck, TimedOut
from launcher.labels import QUEUE
from launcher.runs import Run, of
from launcher.stream import Line
from launcher.watch import follow, outcome, wait
from tests.launcher.standin import BREAKS, ID, JOB, Story, kube_job, pod

WORD = json.dumps({"manifest_sha256": "abc"})
PENDING, RUNNING = (kube_job(), [pod("p-1", "Pending")]), (kube_job(), [pod("p-1")])
DONE = (kube_job("Complete"), [pod("p-1", "Succeeded", 0, WORD)])
FAILED = (kube_job("Failed"), [pod("p-1", "Failed", 66)])
GONE: tuple[None, list[Any]] = (None, [])
QUEUED = kube_job(spec={"suspend": True})
QUEUED["metadata"]["labels"][QUEUE] = "team"


@dataclass(frozen=True)
class Why:
    """A cause."""

    name: str = "image"
    sentence: str = "the image cannot be pulled"
    remedy: str = "mend its name"
    code: Code = Code.STUCK


def waited(story: Story, *limits: float | None, why: Why | None = None) -> tuple[Run, list[str]]:
    """The ended run of a story, and what was said."""
    said: list[str] = []
    run = wait(story, story.run, *limits, say=said.append, problem=lambda _: why, clock=story)  # type: ignore[arg-type]
    return run, said


@pytest.mark.parametrize(
    ("scenes", "state"),
    [
        ({0: DONE}, "complete"),
        ({0: PENDING, 20: RUNNING, 60: DONE}, "complete"),
        ({0: RUNNING, 30: FAILED}, "failed"),
        ({0: (QUEUED, []), 100: PENDING, 120: RUNNING, 900: DONE}, "complete"),
    ],
    ids=["at once", "complete", "failed", "queued first"],
)
def test_waiting_ends_when_the_run_does(scenes: dict[float, Any], state: str) -> None:
    run, said = waited(Story(scenes))
    assert (run.state, said) == (state, [])


def test_an_hour_of_nothing_new_is_a_look_every_ten_seconds_and_a_change_is_seen_soon() -> None:
    story = Story({0: RUNNING, 3600: DONE})
    waited(story)
    assert len(story.looks) < 380
    assert story.looks[-1] <= 3610


@pytest.mark.parametrize(
    ("scenes", "limits", "why", "error", "words"),
    [
        ({0: RUNNING}, (30.0,), None, TimedOut, "is still running after 30 s; it goes on"),
        ({0: RUNNING}, (0.0,), None, TimedOut, "is still running after 0 s"),
        (
            {0: RUNNING, 5: GONE},
            (),
            None,
            Deleted,
            "was deleted meanwhile; what it committed is kept below s3://bucket",
        ),
        ({0: PENDING}, (), Why(), Stuck, "cannot begin: the image cannot be pulled; mend its name"),
        ({0: PENDING}, (), Why(code=Code.REFUSED), Refused, "cannot begin"),
        ({0: (QUEUED, [])}, (), Why("no-queue", code=Code.REFUSED), Refused, "cannot begin"),
        ({0: PENDING}, (None, 60.0), None, Stuck, "has not begun after 60 s: it is pending"),
        ({0: (QUEUED, [])}, (None, 60.0), None, Stuck, "has not begun after 60 s: it is queued"),
    ],
    ids=["timeout", "no time", "deleted", "image", "quota", "no queue", "start", "start in a queue"],
)
def test_waiting_ends_with_one_sentence(
    scenes: dict[float, Any], limits: tuple[float | None, ...], why: Why | None, error: type[LauncherError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        waited(Story(scenes), *limits, why=why)
    assert "\n" not in str(caught.value)


def test_a_run_that_has_begun_is_not_stuck_and_one_that_begins_late_neither() -> None:
    assert waited(Story({0: RUNNING, 500: DONE}), None, 60.0, why=Why())[0].state == "complete"
    assert waited(Story({0: PENDING, 50: RUNNING, 500: DONE}), None, 60.0)[0].state == "complete"


def test_a_problem_that_passes_does_not_end_the_waiting() -> None:
    story = Story({0: PENDING, 40: RUNNING, 50: DONE})
    asked = iter([Why(), None, Why("secret"), Why("image"), None, None, None])
    run = wait(story, story.run, problem=lambda _: next(asked), clock=story)  # type: ignore[arg-type]
    assert run.state == "complete"


def test_a_cluster_that_is_away_for_a_while_is_borne_and_that_is_said_once() -> None:
    run, said = waited(Story({0: RUNNING, 200: DONE}, away=[(50, 250)]))
    assert run.state == "complete"
    assert [line.partition(".")[0] for line in said] == ["https://cluster", "the cluster answers again"]


def test_a_cluster_that_stays_away_ends_the_waiting() -> None:
    story = Story({0: RUNNING}, away=[(50, 1e9)])
    with pytest.raises(ClusterUnreachable):
        waited(story)
    assert 350 <= story.now < 400


def test_a_cluster_that_is_away_does_not_make_a_timeout_longer() -> None:
    story = Story({0: RUNNING}, away=[(50, 1e9)])
    with pytest.raises(TimedOut, match="the cluster is away"):
        waited(story, 100.0)
    assert story.now < 120


@pytest.mark.parametrize(
    ("workloads", "is_over"),
    [
        ([{"metadata": {"ownerReferences": [{"uid": "u-1"}]}, "spec": {"active": False}}], True),
        ([{"metadata": {"ownerReferences": [{"uid": "u-2"}]}, "spec": {"active": False}}], False),
        ([{"metadata": {"ownerReferences": [{"uid": "u-1"}]}, "spec": {"active": True}}], False),
        (None, False),
    ],
    ids=["deactivated", "another's", "active", "no Kueue"],
)
def test_a_job_that_kueue_gave_up_has_failed(workloads: list[Any] | None, is_over: bool) -> None:
    story = Story({0: (QUEUED, [])}, workloads=workloads)
    if is_over:
        assert outcome(waited(story)[0]) == Code.JOB_FAILED
    else:
        with pytest.raises(TimedOut):
            waited(story, 100.0)


@pytest.mark.parametrize(
    ("scene", "has_manifest", "code"),
    [
        (DONE, False, Code.OK),
        ((kube_job("Complete"), []), False, Code.NO_RESULT),
        ((kube_job("Complete"), []), True, Code.OK),
        ((kube_job("Complete"), [pod("p-1", "Succeeded", 0)]), False, Code.NO_RESULT),
        (FAILED, True, Code.JOB_FAILED),
    ],
)
def test_a_complete_job_counts_only_with_a_manifest(scene: Any, has_manifest: bool, code: Code) -> None:
    assert outcome(of(*scene), lambda: has_manifest) == code


def test_a_schedule_is_not_waited_for() -> None:
    story = Story({0: ({**kube_job(), "kind": "CronJob"}, [])})
    with pytest.raises(Refused, match="every fire a run of its own"):
        waited(story)


def followed(story: Story, causes: list[Why] | None = None) -> tuple[Run, list[str], list[Line]]:
    """The ended run, what was said, and the lines that were shown."""
    said: list[str] = []
    shown: list[Line] = []
    run = follow(
        story,  # type: ignore[arg-type]
        story.run,
        said.append,
        shown.append,
        causes and (lambda _: causes),
        problem=lambda _: None,
        clock=story,
    )
    return run, said, shown


def test_following_shows_every_line_of_both_attempts_and_says_the_stages() -> None:
    first, second = pod("p-1", "Failed", 143), pod("p-2", "Succeeded", 0, WORD)
    story = Story(
        {
            0: PENDING,
            30: (kube_job(), [pod("p-1")]),
            40: (kube_job(), [first]),
            50: (kube_job(), [first, pod("p-2")]),
            60: (kube_job("Complete"), [first, second]),
        },
        logs={
            "p-1": [(30.5, "one"), (33, BREAKS), (39, "leaving")],
            "p-2": [(52, "two"), (59.5, "done")],
        },
    )
    run, said, shown = followed(story, [Why(sentence="no node has the GPUs")])
    assert run.state == "complete"
    assert [(line.attempt, line.text) for line in shown] == [(1, "one"), (1, "leaving"), (2, "two"), (2, "done")]
    assert said == [
        "pending",
        "pending: no node has the GPUs",
        "attempt 1 runs on node1 as p-1",
        "pending",
        "attempt 2 runs on node1 as p-2",
    ]


def test_following_ends_when_the_run_is_deleted() -> None:
    story = Story({0: RUNNING, 10: GONE}, logs={"p-1": [(1, "one"), (9.5, "last words")]})
    with pytest.raises(Deleted, match=f"{JOB} was deleted meanwhile"):
        followed(story)


def test_following_an_ended_run_without_a_log_says_where_it_is() -> None:
    _, said, shown = followed(Story({0: (kube_job("Complete"), [])}))
    assert shown == []
    assert said == [f"no pod of {JOB} has a log any more; tunejob logs {ID} reads that of the store"]


def test_lines_lost_with_a_pod_whose_connection_broke_are_told_of() -> None:
    story = Story(
        {0: RUNNING, 10: (kube_job(), []), 12: (kube_job("Failed"), [])},
        logs={"p-1": [(1, "one"), (11, BREAKS), (11.5, "never read")]},
    )
    _, said, shown = followed(story)
    assert [line.text for line in shown] == ["one"]
    assert said[1] == "p-1 is gone: its last lines may be missing here; the store has them"
