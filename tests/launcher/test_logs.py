"""Logs: every line once, whatever the connection does; progress told from text; the store where no pod is left."""

from pathlib import Path

import pytest

from job import layout
from job.storage.directory import DirectoryStore
from launcher import logs
from launcher.codes import ClusterUnreachable, NotFound
from launcher.runs import Run, of
from launcher.stream import Seen, latest_progress, progress, stream
from tests.launcher.standin import BREAKS, ENDS, ID, JOB, Story, kube_job, pod, stamp

PROGRESS = '{"run": "toy", "attempt": 1, "step": 3, "steps": 6, "phase": "train"}'
TEN = [(at / 2, f"line {at}") for at in range(1, 11)]


def cut(*cuts: tuple[float, str]) -> list[tuple[float, str]]:
    """Ten lines, two in a second, and where their stream is cut."""
    return sorted([*TEN, *cuts], key=lambda line: line[0])


@pytest.mark.parametrize(
    "log",
    [
        cut(),
        cut((2.1, BREAKS)),
        cut((0.1, BREAKS)),
        cut((2.1, BREAKS), (2.2, BREAKS), (3.3, ENDS), (4.9, BREAKS)),
        cut((2.1, ENDS)),
        cut((0.1, ENDS), (0.2, ENDS)),
        cut((5.1, BREAKS)),
    ],
    ids=["whole", "breaks", "breaks first", "breaks often", "ends too early", "ends at once", "breaks at the end"],
)
def test_every_line_of_a_container_comes_once_and_in_order(log: list[tuple[float, str]]) -> None:
    story = Story(
        {0: (kube_job(), [pod("p-1")]), 6: (kube_job("Complete"), [pod("p-1", "Succeeded", 0)])}, logs={"p-1": log}
    )
    lines = list(stream(story, "p-1", 1, lambda _: story.now >= 6, clock=story))  # type: ignore[arg-type]
    assert [line.text for line in lines] == [text for _, text in TEN]


def test_the_same_text_twice_is_two_lines_even_over_a_break() -> None:
    log = [(1.0, "again"), (1.5, "again"), (1.6, BREAKS), (1.7, "again"), (2.0, "")]
    story = Story({0: (kube_job(), [pod("p-1")])}, logs={"p-1": log})
    lines = list(stream(story, "p-1", 1, lambda _: story.now >= 6, clock=story))  # type: ignore[arg-type]
    assert [line.text for line in lines] == ["again", "again", "again", ""]


def test_a_line_that_was_stamped_before_the_last_one_seen_is_not_lost() -> None:
    seen = Seen()
    assert seen.new(f"{stamp(5.9)} stdout") == "stdout"
    assert seen.begin_again() == "2026-01-01T00:00:03Z"
    assert seen.new(f"{stamp(5.8)} stderr") == "stderr"
    assert seen.new(f"{stamp(5.9)} stdout") is None


def test_a_log_that_was_rotated_while_its_stream_was_broken_shows_in_its_first_line() -> None:
    seen = Seen()
    for number, gaps in ((1, [False, False]), (1, [False, False]), (7, [True, False])):
        seen.begin_again()
        found = []
        for line in (number, number + 1):
            seen.new(f"{stamp(number)} line {line}")
            found.append(seen.has_gap)
        assert found == gaps


def test_a_tail_that_breaks_does_not_bring_what_was_before_it() -> None:
    log = [(0.1, "one"), (0.2, "two"), (0.3, "three"), (1.0, BREAKS), (2.0, "four")]
    story = Story({0: (kube_job(), [pod("p-1")])}, logs={"p-1": log}, now=0.5)
    lines = stream(story, "p-1", 1, lambda _: story.now >= 6, tail=1, clock=story)  # type: ignore[arg-type]
    assert [line.text for line in lines] == ["three", "four"]


def test_what_the_kubelet_says_itself_is_no_line_of_the_log() -> None:
    assert Seen().new("unable to retrieve container logs for containerd://0123") is None


def test_a_log_that_never_ends_well_is_given_up_once_its_container_has_ended() -> None:
    story = Story({0: (kube_job(), [])}, away=[(0, 1e9)])
    with pytest.raises(ClusterUnreachable):
        list(stream(story, "p-1", 1, lambda _: True, clock=story))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "is_progress"),
    [
        (PROGRESS, True),
        ("loss 3.2", False),
        ("{not json", False),
        ('{"a": 1}', False),
        ('["run", "attempt", "phase"]', False),
        ("", False),
    ],
)
def test_progress_is_told_from_text(text: str, is_progress: bool) -> None:
    assert (progress(text) is not None) == is_progress


def finished(*names: str) -> tuple[Story, Run]:
    """A complete run whose pods are left, each with a line."""
    pods = [pod(name, "Failed", 1) for name in names]
    story = Story(
        {0: (kube_job("Complete"), pods)}, logs={name: [(0.0, f"of {name}"), (0.0, PROGRESS)] for name in names}
    )
    return story, of(kube_job("Complete"), pods)


def test_the_log_is_that_of_every_attempt_oldest_first() -> None:
    story, run = finished("p-2", "p-1")
    found = [(line.attempt, line.pod, line.text) for line in logs.lines(story, run)]  # type: ignore[arg-type]
    assert found == [(1, "p-1", "of p-1"), (1, "p-1", PROGRESS), (2, "p-2", "of p-2"), (2, "p-2", PROGRESS)]


def test_the_tail_is_taken_of_each_attempt() -> None:
    story, run = finished("p-1", "p-2")
    assert [line.text for line in logs.lines(story, run, tail=1)] == [PROGRESS, PROGRESS]  # type: ignore[arg-type]


def test_the_latest_progress_is_that_of_the_newest_pod_that_has_begun() -> None:
    story, run = finished("p-1")
    word, trouble = latest_progress(story, run)  # type: ignore[arg-type]
    assert (word["step"], trouble) == (3, None)
    assert latest_progress(story, of(kube_job(), [])) == ({}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({layout.TRAINING_LOG: "published\n", layout.so_far(layout.TRAINING_LOG, 2): "so far\n"}, ["published"]),
        ({layout.so_far(layout.TRAINING_LOG, 2): "a\nb\n", layout.so_far(layout.TRAINING_LOG, 1): "old\n"}, ["a", "b"]),
    ],
    ids=["published", "not published yet"],
)
def test_without_pods_the_log_of_all_attempts_is_read_in_the_store(
    keys: dict[str, str], text: list[str], tmp_path: Path
) -> None:
    store = DirectoryStore(tmp_path / "runs")
    for key, content in keys.items():
        store.write(key, content.encode())
    story, run = finished()
    for follow in (False, True):
        lines = logs.lines(story, run, follow, store=lambda: store)  # type: ignore[arg-type]
        assert [line.text for line in lines] == text
    last = logs.lines(story, run, tail=1, store=lambda: store)  # type: ignore[arg-type]
    assert [line.text for line in last] == text[-1:]


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (of(kube_job("Failed"), []), f"no pod of {JOB} has a log any more and none below"),
        (of(kube_job(), [pod("p-1", "Pending")]), f"{ID}: no log yet, it is pending; tunejob logs -f"),
    ],
    ids=["gone", "not begun"],
)
def test_no_log_is_a_sentence_and_never_silence(run: Run, words: str, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "empty")
    story = Story({0: (run.kube_job, [one.manifest for one in run.pods])})
    with pytest.raises(NotFound, match=words):
        list(logs.lines(story, run, store=lambda: store))  # type: ignore[arg-type]
