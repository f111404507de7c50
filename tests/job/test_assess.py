"""Evaluations in a whole life of the worker: they change no bit, stop the training in time, and find the best state."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from job.errors import DataInvalid, IntegrityFailure, SpecInvalid
from job.evaluation import assess
from job.exits import ExitCode
from job.files import entries_of, read_json
from job.storage import transfer
from job.storage.store import open_store
from job.supervision import courier
from job.supervision.results import model_card
from job.training import checkpoint, train
from job.training.course import Course
from job.workdir import WorkDir
from tests.job import tiny
from tests.job.made import made_spec
from tests.job.running import Run, kill, make_run, wait_for
from tests.job.worked import adapter, evaluation, losses_on_the_way, made_workdir, resume, work

RESTLESS = {"learning_rate": 0.05}
"""So fast that the loss goes up and down, and the last step is not the best."""
BEST = {"every_steps": 1, "publish": "best"}


@pytest.fixture(scope="module")
def best(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkDir:
    """A run that publishes its best state, and what it left after each step. Not to be changed."""
    workdir = made_workdir(tmp_path_factory.mktemp("best"), tiny_llama, training=RESTLESS, evaluation=BEST)
    assert work(workdir) == ExitCode.OK
    return workdir


def copied(workdir: WorkDir, to: Path) -> WorkDir:
    """The same run elsewhere, as it is now."""
    shutil.copytree(workdir.root, to, dirs_exist_ok=True)
    return WorkDir(to)


def best_step(losses: dict[int, float]) -> int:
    return min(losses, key=lambda step: (losses[step], step))


def test_t35_evaluations_on_the_way_leave_every_bit_of_the_training_alone(tiny_llama: Path, tmp_path: Path) -> None:
    """T35, T5: the same adapter, byte for byte, without evaluations on the way and with one after every step."""
    evaluations: list[dict[str, Any]] = [{}, {"every_steps": 1, "max_rows": 5, "generate_rows": 2, "max_new_tokens": 3}]
    bytes_of = []
    for number, wanted in enumerate(evaluations):
        folder = tmp_path / str(number)
        folder.mkdir()
        workdir = made_workdir(folder, tiny_llama, evaluation=wanted, training={"max_steps": 4})
        assert work(workdir) == ExitCode.OK
        bytes_of.append(adapter(workdir.adapter))
        assert list(losses_on_the_way(workdir)) == ([1, 2, 3] if wanted else [])
    assert bytes_of[0] == bytes_of[1]
    assert evaluation(WorkDir(tmp_path / "1"))["rows"] == 5


def test_the_best_state_is_published_and_said_to_be(best: WorkDir) -> None:
    losses, found = losses_on_the_way(best), evaluation(best)
    step = best_step(losses)
    assert 1 < step < 8
    assert list(losses) == list(range(1, 9))
    assert adapter(best.adapter) == adapter(best.checkpoints / f"checkpoint-{step}")
    assert adapter(best.adapter) != adapter(best.checkpoints / "checkpoint-8")
    assert (found["published_step"], found["steps"], found["stopped_early"]) == (step, 8, None)
    assert found["best"] == {"step": step, "loss": losses[step]}
    assert found["tuned"]["loss"] == pytest.approx(losses[step], abs=1e-6)


@pytest.mark.parametrize("later", [0, 2], ids=["at the best step", "after it"])
def test_a_resumed_run_publishes_the_same_best_state(best: WorkDir, tmp_path: Path, later: int) -> None:
    """T22: the best adapter travels inside the checkpoints that come after it."""
    losses = losses_on_the_way(best)
    workdir = copied(best, tmp_path)
    step = best_step(losses) + later
    resume(workdir, step)
    assert (workdir.resume / "best").exists() is (later > 0)
    shutil.rmtree(workdir.best)
    shutil.rmtree(workdir.adapter)
    assert work(workdir) == ExitCode.OK
    assert adapter(workdir.adapter) == adapter(best.adapter)
    assert losses_on_the_way(workdir) == losses
    assert evaluation(workdir) == evaluation(best)


def test_a_checkpoint_that_lost_its_best_adapter_is_refused(best: WorkDir, tmp_path: Path) -> None:
    workdir = copied(best, tmp_path)
    resume(workdir, best_step(losses_on_the_way(best)) + 1)
    shutil.rmtree(workdir.resume / "best")
    with pytest.raises(IntegrityFailure, match="best adapter"):
        work(workdir)


def test_a_checkpoint_with_a_best_adapter_comes_back_from_the_store_as_it_was(best: WorkDir, tmp_path: Path) -> None:
    """T25: what lies deeper in the folder is sent, listed, and brought back too."""
    step = best_step(losses_on_the_way(best)) + 1
    folder = best.checkpoints / f"checkpoint-{step}"
    store = open_store(f"file:{tmp_path / 'store'}")
    transfer.push_checkpoint(store, folder, step, 1, {})
    commit = transfer.newest_verified(store, tmp_path / "back")
    assert commit is not None
    assert "best/adapter_model.safetensors" in {entry.name for entry in commit.files}
    assert entries_of(tmp_path / "back") == entries_of(folder)


def test_without_improvement_the_training_stops_early_and_is_finished(tiny_llama: Path, tmp_path: Path) -> None:
    wanted = {"every_steps": 2, "early_stopping": 1, "min_improvement": 10.0}
    workdir = made_workdir(tmp_path, tiny_llama, evaluation=wanted)
    assert work(workdir) == ExitCode.OK
    found = evaluation(workdir)
    assert list(losses_on_the_way(workdir)) == [2, 4]
    assert found["stopped_early"] == {"planned_steps": 8, "evaluations": 1}
    assert (found["steps"], found["published_step"]) == (4, 4)
    assert adapter(workdir.adapter) == adapter(workdir.checkpoints / "checkpoint-4")
    assert not (workdir.checkpoints / "checkpoint-5").exists()
    assert read_json(workdir.performance)["steps"] == 4
    progress = read_json(workdir.progress)
    assert (progress["step"], progress["steps"]) == (4, 4)


@pytest.fixture(scope="module")
def stopped(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> WorkDir:
    """A run that stopped two steps after its best. Not to be changed."""
    wanted = BEST | {"early_stopping": 2}
    workdir = made_workdir(tmp_path_factory.mktemp("early"), tiny_llama, training=RESTLESS, evaluation=wanted)
    assert work(workdir) == ExitCode.OK
    found, losses = evaluation(workdir), losses_on_the_way(workdir)
    assert found["stopped_early"] == {"planned_steps": 8, "evaluations": 2}
    assert found["steps"] == max(losses) == best_step(losses) + 2
    return workdir


@pytest.mark.parametrize("before", [4, 1, 0])
def test_a_resumed_run_stops_early_at_the_same_step(
    stopped: WorkDir, tmp_path: Path, caplog: pytest.LogCaptureFixture, before: int
) -> None:
    """T22: resumed before the best step, between two evaluations that brought nothing, and at the very stop."""
    workdir, end = copied(stopped, tmp_path), evaluation(stopped)["steps"]
    resume(workdir, end - before)
    for left in (workdir.best, workdir.adapter):
        shutil.rmtree(left)
    with caplog.at_level(logging.INFO):
        assert work(workdir) == ExitCode.OK
    assert f"stopped early at step {end} of 8" in caplog.text
    assert evaluation(workdir) == evaluation(stopped)
    assert losses_on_the_way(workdir) == losses_on_the_way(stopped)
    assert adapter(workdir.adapter) == adapter(stopped.adapter)


@pytest.mark.parametrize("step", [3, 8])
def test_an_evaluation_that_was_cut_off_is_made_up_for_once(
    best: WorkDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """T22, T27: a request to leave in the middle of an evaluation costs no figure and counts none twice.

    Asked again while it is made up for, the worker leaves again; also at the last step, whose loss is still owed.
    """
    workdir = copied(best, tmp_path)
    for left in (workdir.best, workdir.adapter, workdir.checkpoints):
        shutil.rmtree(left)
    workdir.metrics.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(train.Worker, "stop_asked", lambda self: self.position["step"] == step)
        assert work(workdir) == ExitCode.INTERRUPTED
        state = checkpoint.read_state(workdir.checkpoints / f"checkpoint-{step}")
        assert (state.eval_loss, state.course["step"]) == (None, step - 1)
        resume(workdir, step)
        assert work(workdir) == ExitCode.INTERRUPTED
    with workdir.metrics.open("a", encoding="utf-8") as stream:  # of a life that was killed right after it
        stream.write(json.dumps({"step": step, "eval_loss": 0.0}) + "\n")
    assert work(workdir) == ExitCode.OK
    assert losses_on_the_way(workdir) == losses_on_the_way(best)
    assert adapter(workdir.adapter) == adapter(best.adapter)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "best without rows": ({"eval_split": 0.0}, BEST, DataInvalid, r"evaluation\.publish: best: needs evaluation rows"),
    "a stop without rows": (
        {"eval_split": 0.0},
        {"every_steps": 1, "early_stopping": 3},
        DataInvalid,
        r"evaluation\.early_stopping: needs evaluation rows",
    ),
    "nothing to extract": (
        {"eval_split": 0.3},
        {"generate_rows": 4, "extract": "answer: (.*)"},
        SpecInvalid,
        r"evaluation\.extract: 'answer: \(\.\*\)' finds nothing in any of the 4 answers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_evaluated_is_refused_before_the_base_is_loaded(
    tiny_llama: Path, tmp_path: Path, case: str
) -> None:
    data, wanted, kind, words = REFUSED[case]
    workdir = made_workdir(tmp_path, tiny_llama, data=data, evaluation=wanted)
    shutil.move(workdir.inputs, tmp_path / "hidden.json")  # the base cannot even be found
    with pytest.raises(kind, match=words):
        work(workdir)


def test_generated_answers_are_compared_by_every_metric(tiny_llama: Path, tmp_path: Path) -> None:
    """Trained until it knows its rows: exact match, extracted number, chrF and ROUGE-L all say so, and how surely."""
    fruits = ("apple", "lemon", "lime", "plum")
    rows = [{"prompt": f"{fruit}?", "completion": f"{fruit} #### {n}"} for n, fruit in enumerate(fruits, 5)]
    seen = tiny.write_rows(tmp_path / "eval.jsonl", rows)
    workdir = made_workdir(
        tmp_path,
        tiny_llama,
        rows=rows,
        data={"eval": str(seen)},
        lora={"r": 16, "alpha": 32, "dropout": 0.0, "modules_to_save": ["lm_head"]},
        training={"max_steps": 80, "learning_rate": 3e-3},
        checkpoints={"every_steps": None},
        evaluation={"generate_rows": 4, "extract": "number", "max_new_tokens": 12},
    )
    assert work(workdir) == ExitCode.OK
    found = evaluation(workdir)
    assert (found["generated_rows"], found["extract"]) == (4, "number")
    perfect = {"exact_match": 1.0, "extracted_match": 1.0, "rouge_l": 1.0, "chrf": 100.0}
    assert {name: found["tuned"][name] for name in perfect} == pytest.approx(perfect)
    assert all(found["base"][name] < 0.5 * value for name, value in perfect.items())
    for name in (*perfect, "loss", "perplexity", "token_accuracy"):
        difference = found["difference"][name]
        assert difference["value"] == pytest.approx(found["tuned"][name] - found["base"][name])
        assert difference["low"] <= difference["value"] <= difference["high"]


def test_a_perplexity_that_overflows_is_in_no_record_and_on_no_card() -> None:
    """What is not finite would make the record no JSON, and the card of a trained run must not fail for it."""
    spec = made_spec()
    worker: Any = SimpleNamespace(spec=spec, data=SimpleNamespace(info={"eval_digest": "0"}))
    high, low = (np.array([[loss, 1.0, 10.0]] * 3) for loss in (8000.0, 10.0))
    for base, tuned in ((high, low), (low, high)):
        found = assess._side_by_side(worker, (base, None), (tuned, None))
        found |= {"steps": 8, "published_step": 8, "best": None, "stopped_early": None}
        record = json.loads(json.dumps({"evaluation": found}, allow_nan=False))
        assert record["evaluation"]["difference"]["perplexity"]["reason"] == "not finite"
        card = model_card("made", spec, record)
        assert "| loss" in card
        assert "perplexity" not in card


COURSES: dict[str, tuple[list[float], float, tuple[int, int]]] = {
    "every one lower": ([3.0, 2.0, 1.0], 0.0, (3, 0)),
    "up again": ([3.0, 2.0, 2.5, 2.6], 0.0, (2, 2)),
    "equal is not lower, and the first of equals is the best": ([2.0, 2.0, 2.0], 0.0, (1, 2)),
    "lower, but not by enough": ([2.0, 1.95, 1.9], 0.2, (3, 2)),
    "small steps that add up": ([2.0, 1.9, 1.75], 0.2, (3, 0)),
    "not finite at first": ([float("nan"), 2.0], 0.0, (2, 0)),
    "not finite later": ([2.0, float("inf"), float("nan")], 0.0, (1, 2)),
    "never finite": ([float("nan")], 0.0, (0, 1)),
}


@pytest.mark.parametrize("case", COURSES)
def test_the_course_knows_the_best_step_and_how_long_nothing_got_better(case: str) -> None:
    losses, least, (step, since) = COURSES[case]
    course = Course()
    found = [course.note(number, loss, least) for number, loss in enumerate(losses, 1)]
    assert (course.best_step, course.since) == (step, since)
    assert max((number for number, is_best in enumerate(found, 1) if is_best), default=0) == step
    assert Course(**course.record()) == course
    assert not course.is_over(None)
    assert course.is_over(since + 1) is False
    if since:
        assert course.is_over(since)


def test_a_course_says_the_loss_of_the_step_it_was_evaluated_at_only() -> None:
    course = replace(Course(), step=4, loss=1.5)
    assert (course.loss_at(4), course.loss_at(5)) == (1.5, None)


def test_the_best_checkpoint_in_the_store_is_that_of_the_lowest_loss_and_the_first_of_equals(tmp_path: Path) -> None:
    """T25: it stays when older ones are pruned; a loss of exactly 0 is one too."""
    store = open_store(f"file:{tmp_path / 'store'}")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "weights").write_bytes(b"w")
    losses = {1: 0.5, 2: 0.0, 3: 0.0, 4: None, 5: 1.0, 6: None}
    for step, loss in losses.items():
        transfer.push_checkpoint(store, tmp_path / "checkpoint", step, 1, {"eval_loss": loss})
    assert courier._best(store) == 2
    transfer.prune(store, 1, courier._best(store))
    assert [commit.step for commit in transfer.committed(store)] == [6, 2]


@pytest.mark.slow
def test_a_run_killed_after_its_best_step_stops_early_and_publishes_the_same_through_the_store(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """T22, T25: whole attempts; the best adapter comes back inside the newest checkpoint."""
    sections: dict[str, Any] = {
        "training": {"max_steps": 60, "learning_rate": 0.05, "batch_size": 4, "max_length": 64, "logging_steps": 1},
        "checkpoints": {"every_steps": 1, "keep": "all"},
        "evaluation": {"every_steps": 1, "early_stopping": 4, "publish": "best"},
    }
    straight = make_run(tmp_path / "straight", tiny_llama, **sections)
    code, said = straight.attempt()
    assert code == 0, said
    found = straight.result()["evaluation"]
    assert found["stopped_early"]["planned_steps"] == 60
    assert found["published_step"] == found["best"]["step"] == found["steps"] - 4
    assert read_json(straight.folder / "run" / "manifest.json")["published_step"] == found["published_step"]

    cut = Run(straight.spec, tmp_path / "cut", tmp_path / "scratch", {})
    process = cut.start()
    later = cut.folder / f"checkpoints/checkpoint-{found['published_step'] + 1}/COMMIT.json"
    wait_for(later.exists, process, "a checkpoint after the best step")
    kill(process)
    code, said = cut.attempt()
    assert code == 0, said
    assert cut.result()["evaluation"] == found
    assert cut.adapter() == straight.adapter()
