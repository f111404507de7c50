"""The supervisor as pid 1 with a read-only root: it leaves in time in every phase, and says how it ended."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job.files import read_json
from tests.job.pod import REPOSITORY, Pod, cannot_run, ended, pid_1, pod_folder, terminate, wait_for

pytestmark = pytest.mark.skipif(bool(cannot_run()), reason=cannot_run() or "-")


@pytest.fixture(scope="module")
def folder(tiny_llama: Path) -> Iterator[Path]:
    with pod_folder(tiny_llama) as path:
        yield path


def published(output: Path) -> list[Path]:
    return list(output.glob("*/run/manifest.json"))


def status(output: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in output.glob("*/run/status.json"):
        found = read_json(path)
    return found


def test_a_whole_run_under_a_random_user_with_a_read_only_root(folder: Path) -> None:
    pod = Pod(folder, f"{folder}/out/whole", user=1000660000)
    code, said = pod.attempt()
    assert code == 0, said
    (manifest,) = published(folder / "out/whole")
    word = pod.word
    assert (word["code"], word["name"], word["message"]) == (0, "OK", "")
    assert word["step"] == word["steps"] == word["committed"] == 40
    digest = subprocess.run(["sha256sum", str(manifest)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert word["manifest_sha256"] == digest
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    phases = list(dict.fromkeys(line["phase"] for line in lines))
    assert phases == [phase for phase in PHASES if phase in phases]
    assert {"pull", "prepare", "train", "evaluate", "verify", "publish"} <= set(phases)
    assert all(line["run"] == word["run"] for line in lines)

    code, said = pod.attempt()  # the same again is a no-op that says which result stands
    assert code == 0, said
    assert pod.word["manifest_sha256"] == digest
    assert '"train"' not in said


PHASES = ("preflight", "own", "pull", "prepare", "worker", "load", "train", "seal", "evaluate", "verify", "publish")

MOMENTS: dict[str, Callable[[Pod, Path], bool]] = {
    "the start": lambda pod, out: (pod.scratch / "cache").exists(),
    "prepare": lambda pod, out: status(out).get("phase") == "prepare",
    "load": lambda pod, out: pod.progress().get("phase") == "load",
    "a step": lambda pod, out: pod.progress().get("step", 0) >= 3,
    "a checkpoint being sealed": lambda pod, out: any(pod.scratch.glob("*/checkpoints/.checkpoint-*.partial")),
    "evaluate": lambda pod, out: pod.progress().get("phase") == "evaluate",
    "verify": lambda pod, out: status(out).get("phase") == "verify",
}


CHOSEN = (("load", 1), ("a step", 2), ("a checkpoint being sealed", 2))
"""Of the moments that take long these are tried on every change, all others in the full tier."""
QUICK = ("the start", "prepare")


@pytest.mark.parametrize(
    ("moment", "ranks"),
    [
        pytest.param(moment, ranks, marks=() if moment in QUICK or (moment, ranks) in CHOSEN else pytest.mark.full)
        for moment in MOMENTS
        for ranks in (1, 2)
    ],
)
def test_asked_to_leave_at_any_moment_it_leaves_in_time_and_says_so(  # T27
    moment: str, ranks: int, folder: Path, tmp_path: Path
) -> None:
    output = folder / "out" / f"{moment.replace(' ', '-')}-{ranks}"
    pod = Pod(folder, str(output), {"TUNEJOB_CPU_RANKS": str(ranks)})
    process = pod.start()
    wait_for(lambda: MOMENTS[moment](pod, output), process, moment)
    terminate(process)
    code, said = ended(process, 20.0)  # the grace period of the spec
    assert code == 143, said
    assert "Traceback" not in said
    assert not published(output)
    if moment == "the start":
        return
    assert pod.word["name"] == "INTERRUPTED"
    step = pod.word["committed"]
    markers = [path.parent.name for path in output.glob("*/checkpoints/*/COMMIT.json")]
    assert (f"checkpoint-{step}" in markers) if step else not markers
    if moment in ("a step", "a checkpoint being sealed"):
        assert step >= 3


def test_a_rank_that_is_killed_is_lost_and_no_interruption(folder: Path) -> None:
    output = folder / "out" / "lost"
    pod = Pod(folder, str(output), {"TUNEJOB_CPU_RANKS": "2"})
    process = pod.start()
    wait_for(lambda: pod.progress().get("step", 0) >= 12, process, "step 12")
    (pid_file,) = pod.scratch.glob("*/outcomes/rank-1.pid")
    inner = pid_file.read_text().strip()
    subprocess.run(["nsenter", "-t", str(pid_1(process)), "-p", "-m", "kill", "-KILL", inner], check=True)
    code, said = ended(process)
    assert code == 75, said
    assert "rank-1" in pod.word["message"]
    assert pod.word["committed"] >= 10


def test_a_worker_that_hangs_is_ended_with_its_stacks(folder: Path) -> None:
    output = folder / "out" / "hung"
    pod = Pod(folder, str(output), {"TUNEJOB_CPU_RANKS": "2", "TUNEJOB_HANG_SECONDS": "10"})
    process = pod.start()
    wait_for(lambda: pod.progress().get("step", 0) >= 12, process, "step 12")
    (pid_file,) = pod.scratch.glob("*/outcomes/rank-1.pid")
    subprocess.run(
        ["nsenter", "-t", str(pid_1(process)), "-p", "-m", "kill", "-STOP", pid_file.read_text().strip()], check=True
    )
    code, said = ended(process)
    assert code == 85, said
    assert "most recent call first" in said  # the stacks of rank 0, wherever it waits for the other
    assert "/job/training/loop.py" in said or "/job/training/train.py" in said
    assert "no progress for" in pod.word["message"]


ORPHANS = """
    import os, subprocess, sys, time
    from job.supervision.launch import Child
    assert os.getpid() == 1
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'pass']); raise SystemExit(7)"
    for _ in range(3):
        child = Child([sys.executable, "-c", code], dict(os.environ), print)
        while (ended := child.wait(0.05)) is None:
            pass
        assert ended == 7, ended
    keeper = Child([sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ), print)
    deadline = time.monotonic() + 30
    while True:
        keeper.wait(0.05)
        states = [line.split()[0] for line in subprocess.run(["ps", "-eo", "stat="], capture_output=True, text=True)
                  .stdout.splitlines()]
        if not [state for state in states if state.startswith("Z")]:
            break
        assert time.monotonic() < deadline, states
    keeper.end(0.1)
    print("reaped", flush=True)
"""


def test_processes_that_lost_their_parents_are_reaped_and_exit_codes_kept() -> None:
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", textwrap.dedent(ORPHANS)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "reaped"), done.stderr
