"""What preparing many rows takes: `make bench-data`. Leaves with 1 if a part took more memory than is promised.

Rows are made up (seeded, all different, some 200 tokens of a small tokenizer). Each part is a process of its own; its
memory is that of all processes below it together, which counts pages that they share twice. Pages of mapped files count
in it and can be taken back at any time, so the rest (``RssAnon``) is printed beside it.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from job.inputs import Input, Inputs, write_inputs
from job.workdir import WorkDir
from tests.job import tiny

ROWS = 2_000_000
LIMIT_GIB = 2.0

_ITERATE = """
import sys, time
from pathlib import Path
from job.training.order import Order
from job.data.prepared import load
from job.spec import read
from job.workdir import WorkDir
work = WorkDir(Path(sys.argv[1]))
begin = time.monotonic()
data, spec = load(work.prepared), read(work.spec)
order = Order(data.train.sources, [1.0], spec.training, data.info["digest"])
first = order.rows(0)
print(f"loaded and ordered: {time.monotonic() - begin:.1f} s", flush=True)
seen = 0
for step in range(order.steps_per_epoch):
    for row in order.rows(step):
        seen += len(data.train.tokens(int(row)))
print(f"one epoch read in its order: {time.monotonic() - begin:.1f} s, {seen:,} tokens", flush=True)
"""


def rows(count: int, seed: int = 0) -> Iterator[str]:
    """Lines of JSON: questions and answers of some fifty words, of unequal length."""
    chance = random.Random(seed)
    words = [
        f"{a}{b}" for a in ("ta", "ko", "mi", "ne", "ru", "so", "ya", "hi") for b in ("n", "shi", "ra", "to", "ku")
    ]
    for number in range(count):
        question = " ".join(chance.choices(words, k=chance.randint(8, 40)))
        answer = " ".join(chance.choices(words, k=chance.randint(5, 40)))
        yield json.dumps({"question": f"{number}: {question}?", "answer": f"{answer}. #### {number % 97}"})


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds a command took, and its peaks in GiB: everything, and what cannot be taken back."""
    begin = time.monotonic()
    process = subprocess.Popen(command)
    peak = anonymous = 0
    while process.poll() is None:
        found = [_status(pid) for pid in _family(process.pid)]
        peak = max(peak, sum(one.get("VmRSS", 0) for one in found))
        anonymous = max(anonymous, sum(one.get("RssAnon", 0) for one in found))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{command[1:3]} ended with {process.returncode}")
    return time.monotonic() - begin, peak / 2**20, anonymous / 2**20


def _family(pid: int) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    return [pid]


def _status(pid: int) -> dict[str, int]:
    """The numbers (KiB) of a process's status; empty once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {parts[0].rstrip(":"): int(parts[1]) for parts in fields if len(parts) == 3 and parts[2] == "kB"}


def made(folder: Path, count: int, ending: str) -> WorkDir:
    """A work directory with model and data, as the supervisor leaves it."""
    work = WorkDir(folder / "work")
    work.root.mkdir()
    model = tiny.tiny_llama(folder / "model")
    data = folder / f"train{ending}"
    with data.open("w", encoding="utf-8") as stream:
        between = ",\n" if ending == ".json" else "\n"
        stream.write("[" if ending == ".json" else "")
        for number, line in enumerate(rows(count)):
            stream.write((between if number else "") + line)
        stream.write("]" if ending == ".json" else "\n")
    spec = {"name": "bench", "model": "tiny", "data": {"train": data.name, "eval_split": 0.001}}
    work.spec.write_text(yaml.safe_dump(spec), encoding="utf-8")
    write_inputs(work.inputs, Inputs(Input("tiny", model), (Input(data.name, data),), None))
    print(f"{count:,} rows, {data.stat().st_size / 2**20:,.0f} MiB of {ending}", flush=True)
    return work


def main() -> None:
    """Prints a line for each part; exit 1 where more memory was taken than is promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--ending", choices=(".jsonl", ".json"), default=".jsonl")
    parser.add_argument("--folder", type=Path, help="where it works; needs 3 KiB a row")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-data-") as folder:
        work = made(Path(folder), options.rows, options.ending)
        most = 0.0
        for words, command in (
            ("prepare", ["-m", "job.data.prepare", str(work.root)]),
            ("read in order", ["-c", _ITERATE, str(work.root)]),
        ):
            seconds, peak, anonymous = measured([sys.executable, *command])
            most = max(most, peak)
            print(
                f"{words}: {seconds:,.0f} s, {options.rows / seconds:,.0f} rows/s, peak {peak:.2f} GiB, "
                f"{anonymous:.2f} GiB of it cannot be taken back",
                flush=True,
            )
        size = sum(path.stat().st_size for path in work.prepared.rglob("*") if path.is_file())
        print(f"prepared folder: {size / 2**20:,.0f} MiB")
    sys.exit(most > LIMIT_GIB)


if __name__ == "__main__":
    main()
