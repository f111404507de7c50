"""How many useful tokens a CPU-second trains, beside TRL's SFTTrainer and a plain PEFT loop: `make bench-train`.

SmolLM2-135M, LoRA of rank 16 on all linear layers, float32, dropout 0, one thread, the same rows in the same order
from the same first adapter. Every arm is a process of its own and takes its turn once per round, so that a busy
machine slows them all; each round has other rows. Padding is not counted as work done; medians are compared. An arm
whose loss is not that of the others stops the bench. TRL's settings are tried in the first round, and the fastest
goes on.

Leaves with 1 if a target is missed. `--profile ARM` prints instead where an arm's time goes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.train_arms import ARMS, Measured
from tests.bench.train_data import DATA, DATA_SETS, MODEL, ROOT, Data, Task

OURS, PRIVATE, DEFAULTS, PLAIN = "ours", "ours, oneDNN", "TRL, defaults", "plain PEFT loop"
CANDIDATES = ("TRL, row by row", "TRL, padded", "TRL, padding-free", "TRL, packing")
EVAL_OURS, EVAL_PRIVATE, EVAL_TRAINER = "evaluation, ours", "evaluation, ours, oneDNN", "evaluation, HF Trainer"
BEST = "TRL's best"

SAME_LOSS = 1e-4
"""Largest relative difference of a step's loss between arms."""

TARGETS = {
    "GSM8K": [
        (OURS, DEFAULTS, 2.0),
        (OURS, BEST, 1.2),
        (PRIVATE, BEST, 1.5),
        (EVAL_OURS, EVAL_TRAINER, 2.0),
        (EVAL_PRIVATE, EVAL_TRAINER, 2.0),
    ],
    "wide mix": [
        (OURS, DEFAULTS, 2.5),
        (OURS, BEST, 1.8),
        (PRIVATE, BEST, 1.8),
        (EVAL_OURS, EVAL_TRAINER, 2.0),
        (EVAL_PRIVATE, EVAL_TRAINER, 2.0),
    ],
}
"""An arm, what it is compared with, and how many times as many useful tokens a CPU-second it has to reach."""


@dataclass
class Table:
    """What one data set's arms took, round by round."""

    data: Data
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)

    @property
    def best(self) -> str:
        """TRL's fastest settings."""
        tried = [arm for arm in CANDIDATES if arm in self.measured]
        return max(tried, key=lambda arm: (len(self.measured[arm]), self.rate(arm)))

    def rate(self, arm: str) -> float:
        """Median of the useful tokens per CPU-second."""
        return statistics.median(one.rate for one in self.measured[self.best if arm == BEST else arm])

    def peak(self, arm: str) -> float:
        """Largest peak memory in MiB."""
        return max(one.peak_mib for one in self.measured[arm])

    def round(self, number: int, quick: bool) -> None:
        """Every arm once."""
        task = self.data.task(number, batch=8, held_out=8 if quick else 16)
        self.tasks.append(task)
        tried = CANDIDATES[:2] if quick else CANDIDATES
        candidates = tried if number == 0 else (self.best,)
        trained = [OURS, *candidates, PRIVATE, PLAIN, DEFAULTS]
        evaluated = [EVAL_OURS, EVAL_TRAINER, EVAL_PRIVATE]
        with tempfile.TemporaryDirectory() as folder:
            path = task.write(Path(folder, "task.json"))
            for arms in (trained, evaluated):
                losses = {arm: self._run(arm, path).losses for arm in arms}
                if wrong := unlike(losses):
                    raise SystemExit(f"{self.data.name}, round {number + 1}: the loss is not the same\n{wrong}")

    def _run(self, arm: str, task: Path) -> Measured:
        start = time.monotonic()
        measured = run(arm, task)
        self.measured.setdefault(arm, []).append(measured)
        print(
            f"{self.data.name:9} {arm:26} {measured.rate:7.1f} tok/CPU-s {measured.peak_mib:6.0f} MiB "
            f"({time.monotonic() - start:.0f} s) {measured.note}",
            flush=True,
        )
        return measured


def unlike(losses: dict[str, list[float]]) -> str:
    """The losses, if any arm's differ from the first arm's; the evaluation of the Trainer may, and is only shown."""
    first = next(iter(losses.values()))
    lines, wrong = [], False
    for arm, values in losses.items():
        worst = max(abs(a - b) / abs(b) for a, b in zip(values, first, strict=True))
        lines.append(f"  {arm}: {values}, {worst:.1e}")
        # The Trainer's evaluation loss is a mean of the batches' means (transformers issue 39241).
        wrong |= not worst <= SAME_LOSS and arm != EVAL_TRAINER
    return "\n".join(lines) if wrong else ""


def run(arm: str, task: Path, *words: str) -> Measured:
    """One arm in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.bench.train_arms", arm, str(task), *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}: left with {done.returncode}\n{done.stderr[-3000:]}")
    if words:
        print(done.stderr)
    return Measured(**json.loads(done.stdout.rsplit("MEASURED ", 1)[1]))


def peaks() -> dict[str, float]:
    """GFLOP a CPU-second of a large matrix product, by what computes it: MKL, and oneDNN where it may be used."""
    import torch

    from job.training import linear

    torch.set_num_threads(1)
    x, weight = torch.randn(1024, 1536), torch.randn(1536, 1536)
    found = {"MKL": _gflops(lambda: torch.nn.functional.linear(x, weight))}
    if linear.refusal(x.device, x.dtype) is None:
        found[linear.NAME] = _gflops(lambda: linear.product(x, weight))
    return found


def _gflops(product: Callable[[], object]) -> float:
    product()
    seconds = []
    for _ in range(7):
        start = time.process_time()
        product()
        seconds.append(time.process_time() - start)
    return float(2 * 1024 * 1536 * 1536 / statistics.median(seconds) / 1e9)


def flops_per_token(task: Task) -> float:
    """Floating-point operations that a useful token needs, attention and element-wise work left out.

    A frozen matrix is met twice (forward, and back to its input), an adapter's three times, the head only by trained
    tokens; each meeting of a parameter is a multiplication and an addition.
    """
    config = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    width, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = [(width, width), (width, keys), (width, keys), (width, width), *[(width, inner)] * 3]
    frozen = layers * sum(a * b for a, b in shapes)
    adapter = layers * sum(16 * (a + b) for a, b in shapes)
    head = width * config["vocab_size"] * task.supervised / task.useful
    return 4.0 * (frozen + head) + 6.0 * adapter


def report(table: Table, found: dict[str, float]) -> bool:
    """Prints a data set's medians and whether each target was met."""
    rounds = len(table.tasks)
    work = statistics.median(flops_per_token(task) for task in table.tasks) / 1e9
    print(f"\n{table.data.name}: medians of {rounds} round{'s' * (rounds > 1)}; TRL's best: {table.best}")
    print("| arm | tok / CPU-s | peak RSS MiB | share of the matmul peak |\n|---|---|---|---|")
    for arm, measured in sorted(table.measured.items(), key=lambda item: table.rate(item[0])):
        peak = found.get("oneDNN" if "oneDNN" in measured[0].note else "MKL", found["MKL"])
        share = f"{table.rate(arm) * work / peak:.0%}" if "evaluation" not in arm else ""
        once = "" if len(measured) == rounds else " (first round)"
        print(f"| {arm}{once} | {table.rate(arm):.1f} | {table.peak(arm):.0f} | {share} |")
    lines = [(f"{arm} / {other}", table.rate(arm) / table.rate(other), f">= {wanted}", wanted) for arm, other, wanted in
             TARGETS[table.data.name]]  # fmt: skip
    memory = [(f"peak memory, {table.best} / {arm}", table.peak(table.best) / table.peak(arm), ">= 1", 1.0)
              for arm in (OURS, PRIVATE)]  # fmt: skip
    said = [_said(*line) for line in [*lines, *memory]]
    return all(said)


def _said(what: str, found: float, target: str, wanted: float) -> bool:
    print(f"{'met   ' if found >= wanted else 'MISSED'} {what}: {found:.2f} (target {target})")
    return found >= wanted


def profile(arm: str, sets: Iterable[Data]) -> None:
    """Where an arm's time goes, by torch's profiler."""
    for data in sets:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{data.name}, {arm}")
            run(arm, data.task(0).write(Path(folder, "task.json")), "--profile")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one round, two of TRL's settings, half the rows to evaluate"
    )
    parser.add_argument("--profile", choices=ARMS, metavar="ARM", help=f"one of: {'; '.join(ARMS)}")
    arguments = parser.parse_args()
    for needed, remedy in (
        (DATA, "put the public data sets beside the checkout"),
        (MODEL, "make models/" + MODEL.name),
    ):
        if not needed.is_dir():
            raise SystemExit(f"bench-train: {needed.name} is absent; {remedy}")
    sets = [make() for make in DATA_SETS]
    if arguments.profile:
        profile(arguments.profile, sets)
        return 0
    tables = [Table(data) for data in sets]
    before = peaks()
    for number in range(1 if arguments.quick else arguments.rounds):
        for table in tables:
            table.round(number, arguments.quick)
    after = peaks()
    found = {name: statistics.median([before[name], after[name]]) for name in before}
    print("\nmatmul peak, GFLOP / CPU-s: " + ", ".join(f"{name} {value:.0f}" for name, value in found.items()))
    met = [report(table, found) for table in tables]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
