"""How ranks that find different things choose their kernel; runs in ``tests.job.ranks``."""

from dataclasses import replace
from pathlib import Path

from job.training import kernels, linear
from job.training.kernels import Reference
from tests.job.made import CPU, made_model, made_rows, made_spec

LENGTHS = [17, 5, 33, 9]


def chosen(rank: int, world: int, base: str, trouble: str) -> list[str]:
    """Name and reason of what this rank chooses, and the name of what it goes on with after a checkpoint.

    Args:
        trouble: what is special about the last rank: `rounds` otherwise than the reference, `lacks` the private
            operator, or nothing.
    """
    here = replace(CPU, rank=rank, world=world)
    if rank == world - 1 and trouble == "rounds":
        kernels._AGREE = dict.fromkeys(kernels._AGREE, -1.0)
    if trouble == "lacks":
        linear._missing = lambda: "no oneDNN" if rank == world - 1 else None  # type: ignore[assignment]
    core = made_model(Path(base), made_spec()).get_base_model()
    reference = Reference(0, here.device)
    choice = kernels.choose(core, made_rows(LENGTHS, 300), [2, 1, 3], reference, here)
    resumed = kernels.named(core, "padding-free, oneDNN", reference, here, "-")
    return [choice.kernel.name, choice.reason, "" if resumed is None else resumed.kernel.name]
