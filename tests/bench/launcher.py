"""How long the launcher's commands take, as ratios to what their interpreter and client library take by themselves:
`make bench-launcher`. Leaves with 1 if a target is missed.

Whole processes are measured, every case once per round, and round after round, so that a busy machine slows
them all; what is compared are medians. The API server is a stub out of memory that holds 1,000 Jobs.

The stub answers in 0.1 ms and without TLS, which flatters what asks often. So with TUNEJOB_TEST_KUBECONFIG what
only reads is measured on that cluster too, where 1,000 suspended Jobs are made in a namespace of its own.
"""

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.labels import Manifest
from tests.bench.stub import NAMESPACE, Objects, complete, serving
from tests.cluster.kubectl import Kubectl

ROOT = Path(__file__).resolve().parents[2]
JOBS = 1000
RUN_SECONDS = 6.0
"""How long a run of the stub takes; what is counted while it is followed depends on it."""

ARGPARSE = "import argparse"
CLIENT = "from kubernetes import client, config"
TUNEJOB = "import sys; from launcher.cli import main; sys.exit(main())"
SPEC = """\
name: bench
model: s3://models/small
data: {train: s3://corpus/rows.jsonl, eval_split: 0.1}
training: {max_steps: 10}
"""
PROFILE = f"""\
namespace: {NAMESPACE}
image: localhost/tunejob:test
store: {{output: "s3://training/runs", secret: s3-credentials}}
"""


@dataclass(frozen=True)
class Case:
    """One command, what it is compared with, and how many times as long it may take."""

    name: str
    words: Callable[[int], Sequence[str]]
    """The command's words in a round."""
    baseline: str
    target: float


@dataclass(frozen=True)
class Row:
    """What was measured of one case."""

    case: Case
    seconds: float
    baseline_seconds: float

    @property
    def ratio(self) -> float:
        """To the baseline."""
        return self.seconds / self.baseline_seconds

    @property
    def is_missed(self) -> bool:
        """Whether it is over its target."""
        return self.ratio > self.case.target


def seconds(program: str, words: Sequence[str], env: dict[str, str], folder: Path) -> float:
    """How long one process takes; fails with its message if it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    took = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(words) or program}: left with {done.returncode}\n{done.stderr}")
    return took


def measured(cases: Sequence[Case], rounds: int, env: dict[str, str], folder: Path) -> list[Row]:
    """Medians over interleaved rounds; the first round, which fills caches, does not count."""
    baselines = sorted({case.baseline for case in cases})
    times: dict[str, list[float]] = {name: [] for name in [*baselines, *(case.name for case in cases)]}
    for number in range(rounds + 1):
        for program in baselines:
            times[program].append(seconds(program, [], env, folder))
        for case in cases:
            times[case.name].append(seconds(TUNEJOB, case.words(number), env, folder))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    return [Row(case, medians[case.name], medians[case.baseline]) for case in cases]


def table(rows: Sequence[Row]) -> str:
    """The figures as Markdown."""
    lines = ["| command | median | compared with | median | ratio | target |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours, base = f"{row.seconds * 1000:,.0f} ms", f"{row.baseline_seconds * 1000:,.0f} ms"
        verdict = " **missed**" if row.is_missed else ""
        case = row.case
        lines.append(
            f"| {case.name} | {ours} | `{case.baseline}` | {base} | {row.ratio:.2f}{verdict} | {case.target:g} |"
        )
    return "\n".join(lines)


def many(folder: Path) -> tuple[list[Manifest], str]:
    """1,000 Jobs, each of a run of its own, and the run id of one of them."""
    from job.spec import parse
    from launcher.labels import RUN
    from launcher.profile import read
    from launcher.render import render

    rendered = render(parse(SPEC, "spec"), read(folder / "profile.yaml"))
    made = []
    for number in range(JOBS):
        kube_job = json.loads(json.dumps(rendered.workload))
        metadata = kube_job["metadata"]
        metadata["name"] = f"{rendered.name[:-8]}{number:08x}"
        metadata["labels"][RUN] = f"filler{number:04d}-{rendered.run[-8:]}"
        made.append(kube_job)
    return made, f"filler0500-{rendered.run[-8:]}"


def kubeconfig(path: Path, server: str) -> Path:
    """Writes a kubeconfig for the stub."""
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "stub", "cluster": {"server": server}}],
        "users": [{"name": "stub", "user": {"token": "none"}}],
        "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "stub", "namespace": NAMESPACE}}],
        "current-context": "stub",
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def counted(objects: Objects, words: Sequence[str], env: dict[str, str], folder: Path) -> str:
    """What one command asked of the stub."""
    objects.asked.clear()
    seconds(TUNEJOB, words, env, folder)
    parts = ", ".join(f"{count} {what}" for what, count in sorted(objects.asked.items()))
    return f"| `tunejob {' '.join(words)}` | {objects.asked.total()} | {parts} |"


def on_stub(rounds: int, folder: Path, env: dict[str, str]) -> tuple[list[Row], list[str]]:
    """Every case, and the requests counted."""
    objects = Objects(RUN_SECONDS)
    kube_jobs, run = many(folder)
    for kube_job in kube_jobs:
        objects.put("jobs", kube_job | {"status": complete()})

    def submit(number: int) -> list[str]:
        # Another run every time: the same again would be followed, not made.
        return ["submit", "-d", "spec.yaml", "--set", f"name=bench{number}"]

    cases = [
        Case("tunejob --help", lambda _: ["--help"], ARGPARSE, 4),
        Case("tunejob render", lambda _: ["render", "spec.yaml"], ARGPARSE, 12),
        Case("tunejob submit -d", submit, CLIENT, 2),
        Case("tunejob status", lambda _: ["status", run], CLIENT, 2),
        Case(f"tunejob list, {JOBS:,} runs", lambda _: ["list"], CLIENT, 2),
    ]
    with serving(objects) as server:
        env = env | {"KUBECONFIG": str(kubeconfig(folder / "stub.kubeconfig", server))}
        rows = measured(cases, rounds, env, folder)
        calls = [counted(objects, words, env, folder) for words in (submit(rounds + 1), ["status", run], ["list"])]
        for number, verb in enumerate((["wait"], ["logs", "-f"]), rounds + 2):
            seconds(TUNEJOB, submit(number), env, folder)
            # The name's beginning is what a person types.
            calls.append(counted(objects, [*verb, f"bench{number}-"], env, folder))
    return rows, calls


def on_cluster(named: Path, rounds: int, folder: Path, env: dict[str, str]) -> list[Row]:
    """What reads, on a real cluster. Submitting waits for its pod there, which is the cluster's time."""
    kubectl = Kubectl(named, f"tunejob-bench-{secrets.token_hex(4)}")
    kube_jobs, run = many(folder)
    for kube_job in kube_jobs:
        del kube_job["metadata"]["namespace"]
        kube_job["spec"]["suspend"] = True
    (folder / "cluster.yaml").write_text(PROFILE.replace(NAMESPACE, kubectl.namespace), encoding="utf-8")
    cases = [
        Case("tunejob status, on the cluster", lambda _: ["status", run], CLIENT, 2),
        Case(f"tunejob list, {JOBS:,} runs, on the cluster", lambda _: ["list"], CLIENT, 2),
    ]
    kubectl("create", "namespace", kubectl.namespace)
    try:
        kubectl("create", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "List", "items": kube_jobs}))
        return measured(cases, rounds, env | {"KUBECONFIG": str(named), "TUNEJOB_PROFILE": "cluster.yaml"}, folder)
    finally:
        kubectl.ask("delete", "namespace", kubectl.namespace, "--wait=false")


def main() -> int:
    """Measures, prints, and gives 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "spec.yaml").write_text(SPEC, encoding="utf-8")
        (folder / "profile.yaml").write_text(PROFILE, encoding="utf-8")
        env = os.environ | {"PYTHONPATH": str(ROOT), "TUNEJOB_PROFILE": "profile.yaml"}
        rows, calls = on_stub(rounds, folder, env)
        if named := os.environ.get("TUNEJOB_TEST_KUBECONFIG"):
            rows += on_cluster(Path(named).resolve(), rounds, folder, env)
    print(table(rows))
    print(f"\n| command (a run of {RUN_SECONDS:g} s) | requests | which |\n|---|---|---|")
    print("\n".join(calls))
    return int(any(row.is_missed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
