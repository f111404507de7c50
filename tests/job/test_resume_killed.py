"""Two ranks under accelerate, killed with SIGKILL at a random moment, resumed bit for bit (T22, T44)."""

import os
import random
import signal
from pathlib import Path

import pytest

from job.files import read_json
from tests.job.running import Run, ended, kill, make_run, processes_below, wait_for

pytestmark = pytest.mark.slow

TRAINING = {"max_steps": 40, "batch_size": 4, "micro_batch_size": 1, "max_length": 64, "logging_steps": 1}
RANKS = {"TUNEJOB_CPU_RANKS": "2"}


def made(folder: Path, model: Path, parallelism: str, workers: int) -> Run:
    """A run of 40 steps on two ranks with dropout; folders with the same data are the same run."""
    return make_run(
        folder,
        model,
        environment=dict(RANKS),
        lora={"dropout": 0.2},
        training=TRAINING | {"parallelism": parallelism, "loader_workers": workers, "learning_rate": 5e-3},
        checkpoints={"every_steps": 3},
    )


def ranks_of(run: Run) -> list[int]:
    """Process numbers of the living ranks of a run, rank 0 first."""
    found = {}
    for path in run.scratch.glob("*/outcomes/rank-*.pid"):
        pid = int(path.read_text(encoding="ascii"))
        if Path(f"/proc/{pid}/stat").exists():
            found[path.name] = pid
    return [found[name] for name in sorted(found)]


def progressed(run: Run, step: int) -> bool:
    return int(run.progress().get("step", 0)) >= step


@pytest.mark.parametrize("parallelism", ["replicate", "shard"])
def test_t22_two_ranks_killed_at_a_random_step_go_on_bit_for_bit(  # T22 T44
    tiny_llama: Path, tmp_path: Path, parallelism: str
) -> None:
    """First the supervisor is killed, then a rank alone, which counts as a failure (T44); workers change on the way."""
    straight = made(tmp_path / "straight", tiny_llama, parallelism, workers=0)
    code, said = straight.attempt()
    assert code == 0, said
    assert ("the base is shared by 2 ranks" in said) == (parallelism == "shard")

    run = made(tmp_path / "killed", tiny_llama, parallelism, workers=2)
    chance = random.Random()
    process = run.start()
    at = chance.randint(4, 14)
    wait_for(lambda: progressed(run, at), process, f"step {at}")
    kill(process)

    process = run.start()
    at = chance.randint(18, 30)
    wait_for(lambda: progressed(run, at), process, f"step {at}")
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    code, said = ended(process)
    assert code == 75, said
    assert "vanished without a word" in said
    assert not processes_below(run.scratch)

    code, said = run.attempt()
    assert code == 0, said
    assert "going on from the checkpoint of step" in said
    assert [read_json(run.folder / f"run/attempts/{n:06d}.json")["exit_code"] for n in (1, 2, 3)] == [None, 75, 0]
    assert run.adapter() == straight.adapter()
    assert run.losses() == straight.losses()
