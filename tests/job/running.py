"""Whole runs as processes of their own, as a user or a pod would start them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from job.files import read_json
from tests.job import tiny

SECONDS = 240
"""No run of these tests takes longer, unless it hangs."""


@dataclass
class Run:
    """A spec on disk, the folder it goes to, and the attempts made."""

    spec: Path
    folder: Path
    scratch: Path
    environment: dict[str, str]

    def start(self) -> subprocess.Popen[str]:
        """An attempt in the background."""
        command = [sys.executable, "-m", "job", "run", "--spec", str(self.spec), "--folder", str(self.folder)]
        return subprocess.Popen(
            [*command, "--work", str(self.scratch)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def attempt(self) -> tuple[int, str]:
        """An attempt to its end: exit code and everything it said."""
        return ended(self.start())

    def progress(self) -> dict[str, Any]:
        """The worker's latest word; empty while it has said none."""
        for path in self.scratch.glob("*/progress.json"):
            with suppress(FileNotFoundError):
                record: dict[str, Any] = read_json(path)
                return record
        return {}

    def result(self) -> dict[str, Any]:
        """eval_results.json."""
        record: dict[str, Any] = read_json(self.folder / "eval_results.json")
        return record

    def losses(self) -> dict[int, float]:
        """Loss of each step in metrics.jsonl; a step logged twice with different values fails."""
        found: dict[int, float] = {}
        for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "loss" in record:
                assert found.setdefault(record["step"], record["loss"]) == record["loss"]
        return found

    def adapter(self) -> bytes:
        """The published adapter's bytes."""
        return (self.folder / "adapter_model.safetensors").read_bytes()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Waits for an attempt."""
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, said


def make_run(folder: Path, model: Path, rows: list[Any] | None = None, environment: Any = None, **sections: Any) -> Run:
    """A run of a tiny model on the toy task: 6 steps, a checkpoint every 2, evaluated on a share of the rows."""
    data = tiny.write_rows(folder / "train.jsonl", rows or tiny.numbered_rows(60))
    spec: dict[str, Any] = {
        "name": "toy",
        "model": str(model),
        "data": {"train": str(data), "eval_split": 0.2} | sections.pop("data", {}),
        "lora": {"r": 4, "dropout": 0.1} | sections.pop("lora", {}),
        "training": {"max_steps": 6, "batch_size": 4, "max_length": 64, "logging_steps": 1, "learning_rate": 5e-3}
        | sections.pop("training", {}),
        "checkpoints": {"every_steps": 2} | sections.pop("checkpoints", {}),
    } | sections
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return Run(path, folder / "out", folder / "scratch", environment or {})


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Returns once the condition holds; fails if the process ends before."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before {what}: {process.communicate()[0]}"
        assert time.monotonic() < deadline, f"no {what} in {SECONDS} s"
        time.sleep(0.02)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to the supervisor alone."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    if process.stdout:
        process.stdout.close()


def processes_below(scratch: Path) -> list[str]:
    """Command lines of living processes that work in a scratch folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(scratch) in line and "job run" not in line:
            found.append(line)
    return found
