"""A pod as far as one machine can imitate it: pid 1 of a namespace, another user, a read-only root, one scratch folder.

The real thing is in tests/cluster; here every phase can be met at a chosen moment.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.files import read_json
from tests.job import tiny

REPOSITORY = Path(__file__).parents[2]
SECONDS = 240
USER = 10001

_INSIDE = """
set -e
folder=$1 user=$2
shift 2
mount --make-rprivate /
mount --bind "$folder" "$folder"
# Checkout, packages and interpreter may lie where only their owner looks: show them, and nothing beside them.
kept=()
while [ "$1" != -- ]; do
    mkdir -p "$folder/kept/${#kept[@]}"
    mount --bind "$1" "$folder/kept/${#kept[@]}"
    kept+=("$1")
    shift
done
shift
for number in "${!kept[@]}"; do
    above=
    IFS=/ read -ra parts <<< "${kept[number]#/}"
    for part in "${parts[@]}"; do
        above="$above/$part"
        [ -d "$above" ] || break
        case $(stat -c %A "$above") in *[xt]) ;; *) mount -t tmpfs -o mode=755 tmpfs "$above"; break ;; esac
    done
    mkdir -p "${kept[number]}" 2>/dev/null || true
    mount --bind "$folder/kept/$number" "${kept[number]}"
done
mount -o remount,ro,bind /
for place in /dev/shm /run; do mount -t tmpfs -o mode=1777 tmpfs $place; done
cd /
exec setpriv --reuid "$user" --regid 0 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


@dataclass
class Pod:
    """A spec, a scratch folder, and an environment; started as often as wanted."""

    folder: Path
    output: str
    environment: dict[str, str] = field(default_factory=dict)
    user: int = USER

    @property
    def scratch(self) -> Path:
        """The only place that can be written."""
        return self.folder / "scratch"

    @property
    def word(self) -> dict[str, Any]:
        """The container's last word."""
        text = (self.scratch / "termination-log").read_text(encoding="utf-8")
        assert text.count("\n") == 1
        assert len(text.encode()) <= 4096
        found: dict[str, Any] = json.loads(text)
        return found

    def start(self) -> subprocess.Popen[str]:
        """A pod in the background."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        (self.scratch / "termination-log").touch()
        for path in (self.scratch, self.scratch / "termination-log"):
            path.chmod(0o777)
        shown = [str(REPOSITORY), sys.prefix, sys.base_prefix]
        inside = ["bash", "-c", _INSIDE, "pod", str(self.folder), str(self.user), *shown, "--"]
        command = [sys.executable, "-m", "job", "run", "--spec", str(self.folder / "spec.yaml")]
        return subprocess.Popen(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", *inside, *command],
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def _environment(self) -> dict[str, str]:
        scratch = str(self.scratch)
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HOME": f"{scratch}/home",
            "TMPDIR": f"{scratch}/tmp",
            "XDG_CACHE_HOME": f"{scratch}/cache",
            "TUNEJOB_SCRATCH": scratch,
            "TUNEJOB_TERMINATION_LOG": f"{scratch}/termination-log",
            "TUNEJOB_LOG": "json",
            "TUNEJOB_OUTPUT": self.output,
            "TUNEJOB_JOB": "toy",
            "TUNEJOB_HEARTBEAT_SECONDS": "0.5",
        } | self.environment

    def attempt(self) -> tuple[int, str]:
        """A pod to its end."""
        return ended(self.start())

    def progress(self) -> dict[str, Any]:
        """The worker's latest word; empty while it has said none."""
        for path in self.scratch.glob("*/progress.json"):
            with suppress(FileNotFoundError):
                record: dict[str, Any] = read_json(path)
                return record
        return {}


def ended(process: subprocess.Popen[str], seconds: float = SECONDS) -> tuple[int, str]:
    """Waits for a pod's end: exit code and everything it said."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        said, _ = process.communicate()
        pytest.fail(f"still there after {seconds:g} s:\n{said}")
    return process.returncode, said


def pid_1(process: subprocess.Popen[str]) -> int:
    """The pod's pid 1, by its number here."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def terminate(process: subprocess.Popen[str]) -> None:
    """SIGTERM to pid 1 of the pod, as the kubelet sends it."""
    os.kill(pid_1(process), signal.SIGTERM)


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to pid 1, and so to everything in the pod. Not to unshare: another user's child would outlive it."""
    with suppress(IndexError, FileNotFoundError):
        os.kill(pid_1(process), signal.SIGKILL)
    process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Returns once the condition holds; fails if the pod ends before."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode} before {what}: {process.communicate()[0]}")
        if time.monotonic() > deadline:
            kill(process)
            pytest.fail(f"no {what} in {SECONDS} s: {process.communicate()[0]}")
        time.sleep(0.002)


@contextmanager
def pod_folder(tiny_model: Path, **sections: Any) -> Iterator[Path]:
    """A folder any user may read: spec.yaml, the model and its data; the output goes below it, too."""
    with tempfile.TemporaryDirectory(prefix="tunejob-pod-") as name:
        folder = Path(name)
        shutil.copytree(tiny_model, folder / "model")
        data = tiny.write_rows(folder / "train.jsonl", tiny.numbered_rows(60))
        spec: dict[str, Any] = {
            "name": "toy",
            "model": str(folder / "model"),
            "data": {"train": str(data), "eval_split": 0.2} | sections.pop("data", {}),
            "lora": {"r": 4, "dropout": 0.1},
            "training": {"max_steps": 40, "batch_size": 4, "max_length": 64, "logging_steps": 1}
            | sections.pop("training", {}),
            "checkpoints": {"every_steps": 10} | sections.pop("checkpoints", {}),
            "resources": {"grace_seconds": 20} | sections.pop("resources", {}),
        } | sections
        (folder / "spec.yaml").write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
        (folder / "out").mkdir()
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o644)
        yield folder


def cannot_run() -> str:
    """Why no pod can be imitated here; empty if one can."""
    if os.geteuid() != 0:
        return "needs root, for namespaces of its own"
    probe = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "setpriv", "--version"],
        capture_output=True,
        check=False,
    )
    return "" if probe.returncode == 0 else "needs unshare and setpriv (util-linux), and the right to use namespaces"
