"""The worker itself on two gloo ranks: trained, asked to leave, resumed, evaluated, sealed (T22, T41, T45, T46)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from job.exits import ExitCode
from job.files import read_json
from job.workdir import WorkDir
from tests.job import ranks, worked
from tests.job.scenarios import largest_difference

WORKER = "tests.job.scenarios:whole_worker"
SECTIONS: dict[str, Any] = {
    "lora": {"dropout": 0.2},
    "training": {"max_steps": 5, "micro_batch_size": 1},
    "evaluation": {"every_steps": 2, "generate_rows": 3, "max_new_tokens": 4},
}


def copied(workdir: WorkDir, to: Path) -> WorkDir:
    """The same prepared work directory, for another life."""
    shutil.copytree(workdir.root, to)
    return WorkDir(to)


def losses(workdir: WorkDir) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in workdir.metrics.read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in ("step", "loss", "eval_loss") if key in line} for line in lines]


@pytest.mark.parametrize("parallelism", ["replicate", pytest.param("shard", marks=pytest.mark.slow)])
def test_t45_two_ranks_leave_together_and_go_on_bit_for_bit(  # T22 T45
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path, parallelism: str
) -> None:
    """Only rank 0 sees the request; both stop after the same step (T45), and what follows is the same run (T22).

    It comes in the middle of an evaluation, which both leave at the same batch and make up for later.
    """
    sections = SECTIONS | {"training": SECTIONS["training"] | {"parallelism": parallelism, "max_length": 48}}
    (tmp_path / "cut").mkdir()
    cut = worked.made_workdir(tmp_path / "cut", tiny_llama, **sections)
    straight = copied(cut, tmp_path / "straight")
    assert several.run(WORKER, 2, workdir=str(straight.root)) == [ExitCode.OK] * 2

    assert several.run(WORKER, 2, workdir=str(cut.root), stop_at=2) == [ExitCode.INTERRUPTED] * 2
    steps = sorted(int(path.name.split("-")[1]) for path in cut.checkpoints.iterdir())
    assert steps[-1] == 2
    assert not cut.adapter.exists()
    assert [line["step"] for line in losses(cut) if "eval_loss" in line] == []
    worked.resume(cut, steps[-1])
    assert several.run(WORKER, 2, workdir=str(cut.root)) == [ExitCode.OK] * 2

    assert worked.adapter(cut.adapter) == worked.adapter(straight.adapter)
    assert losses(cut) == losses(straight)
    assert worked.evaluation(cut) == worked.evaluation(straight)


def test_checkpoints_by_the_clock_are_sealed_by_several_ranks_too(  # T45
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path
) -> None:
    """Clocks differ from rank to rank, so rank 0's counts (T45), after steps that are logged."""
    training = {"max_steps": 5, "logging_steps": 2}
    checkpoints = {"every_steps": None, "every_minutes": 1e-6}
    workdir = worked.made_workdir(tmp_path, tiny_llama, training=training, checkpoints=checkpoints)
    assert several.run(WORKER, 2, workdir=str(workdir.root)) == [ExitCode.OK] * 2
    assert sorted(path.name for path in workdir.checkpoints.iterdir()) == [f"checkpoint-{n}" for n in (2, 4, 5)]


def test_a_shared_base_ends_as_a_replicated_one_and_as_one_rank(  # T2 T5 T41
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path
) -> None:
    """Adapter, evaluation (T5), generated answers and the probe for ``verify``, by one rank and by two."""
    sections = SECTIONS | {"lora": {"dropout": 0.0}}
    (tmp_path / "1").mkdir()
    alone = worked.made_workdir(tmp_path / "1", tiny_llama, **sections)
    shared = copied(alone, tmp_path / "2")
    text = shared.spec.read_text(encoding="utf-8")
    assert "parallelism: replicate" in text
    shared.spec.write_text(text.replace("parallelism: replicate", "parallelism: shard"), encoding="utf-8")
    assert several.run(WORKER, 1, workdir=str(alone.root)) == [ExitCode.OK]
    assert several.run(WORKER, 2, workdir=str(shared.root)) == [ExitCode.OK] * 2
    name = "adapter_model.safetensors"
    assert largest_difference(alone.adapter / name, shared.adapter / name) < 1e-5
    assert largest_difference(alone.probe, shared.probe) < 1e-4
    ours, theirs = worked.evaluation(alone), worked.evaluation(shared)
    for side in ("base", "tuned"):
        assert theirs[side]["loss"] == pytest.approx(ours[side]["loss"], abs=1e-5)
        assert theirs[side]["exact_match"] == ours[side]["exact_match"]
    assert {path.name for path in shared.adapter.iterdir()} == {path.name for path in alone.adapter.iterdir()}
    performance = read_json(shared.performance)
    assert (performance["ranks"], performance["parallelism"]) == (2, "shard")
    assert read_json(alone.performance)["parallelism"] == "replicate"
    assert performance["kernels"]["name"] == read_json(alone.performance)["kernels"]["name"]


def test_t46_a_launcher_that_starts_another_number_of_ranks_is_caught(  # T46
    several: ranks.Ranks, tmp_path: Path
) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one rank (T46): the worker counts, and trains nothing."""
    found = several.run("tests.job.scenarios:started_by_mistake", 1, workdir=str(tmp_path), expected=2)
    assert found == [ExitCode.INTERNAL]
    said = read_json(WorkDir(tmp_path).outcome("rank-0"))
    assert said["message"] == "accelerate started 1 ranks where 2 were asked for"
