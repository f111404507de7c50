"""Several gloo ranks for a test, without paying for the imports each time: one server imports torch, forks do the rest.

A process that has run a backward pass must not fork (autograd's threads do not survive it), so the server never
computes: it reads a scenario, forks its ranks, and waits for them.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 120
"""No scenario takes longer, unless its ranks wait for each other in vain."""

_IMPORTED_ONCE = (
    "bitsandbytes",
    "datasets",
    "tests.job.scenarios",
    "transformers.generation.utils",
    *(f"transformers.models.{kind}.modeling_{kind}" for kind in ("gpt2", "llama", "qwen3")),
)
"""What every rank would import anyway."""


class Ranks:
    """A server that runs scenarios on ranks."""

    def __init__(self) -> None:
        home = Path(__file__).parents[2]
        # Its errors go to the test's own output; its answers come on a line each.
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.job.ranks"],
            cwd=home,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, scenario: str, world: int, **arguments: Any) -> list[Any]:
        """What each rank of ``world`` returned from the function named ``module:function``; the rank comes first.

        Arguments and results travel as JSON. Fails with the traceback of the first rank that raised.
        """
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory(prefix="tunejob-ranks-") as folder:
            order = {"scenario": scenario, "world": world, "folder": folder, "arguments": arguments}
            self._server.stdin.write(json.dumps(order) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
            assert answer, (
                f"the server of ranks ended with {self._server.wait()}; its traceback is in this test's output"
            )
            codes = json.loads(answer)
            said = [_read(Path(folder) / f"{rank}.json") for rank in range(world)]
        broken = [one["error"] for one in said if one and "error" in one]
        assert not broken, f"{scenario} on {world} ranks: {broken[0]}"
        assert codes == [0] * world, f"{scenario} on {world} ranks: exit codes {codes}"
        return [one["result"] for one in said if one]

    def close(self) -> None:
        """Ends the server."""
        if self._server.stdin and self._server.stdout:
            self._server.stdin.close()
            self._server.wait(10)
            self._server.stdout.close()


@contextmanager
def started() -> Iterator[Ranks]:
    """A server while the block runs."""
    ranks = Ranks()
    try:
        yield ranks
    finally:
        ranks.close()


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _rank(order: dict[str, Any], rank: int) -> None:
    """One rank, in a fork of its own: never returns."""
    import signal
    from datetime import timedelta

    import torch.distributed as dist

    signal.alarm(SECONDS)
    folder, world = Path(order["folder"]), order["world"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    word: dict[str, Any]
    try:
        if world > 1:
            store = dist.FileStore(str(folder / "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        module, name = order["scenario"].split(":")
        word = {"result": getattr(importlib.import_module(module), name)(rank, world, **order["arguments"])}
    except BaseException:
        word = {"error": traceback.format_exc()}
    part = folder / f"{rank}.json.part"
    part.write_text(json.dumps(word), encoding="utf-8")
    part.rename(folder / f"{rank}.json")
    os._exit(0)


def _serve() -> None:
    import torch

    for module in _IMPORTED_ONCE:
        importlib.import_module(module)
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not pass for an answer
    for line in sys.stdin:
        order = json.loads(line)
        children = []
        for rank in range(order["world"]):
            child = os.fork()
            if child == 0:
                _rank(order, rank)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        out.write(json.dumps(codes) + "\n")
        out.flush()


if __name__ == "__main__":
    _serve()
