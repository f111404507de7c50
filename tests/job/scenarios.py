"""What several ranks, or one, do in tests of the loop: a training, cut off and resumed at will.

The functions run in this process for one rank, and in ``tests.job.ranks`` for several; all they take and give is JSON.
"""

import hashlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from job.spec import JobSpec
from job.training import checkpoint, sharded
from job.training import train as worker_process
from job.training.adapter import add_adapter, trained
from job.training.checkpoint import State
from job.training.head import chunked_head
from job.training.kernels import PaddingFree, Reference
from job.training.loop import Loop, Progress, make_optimizer
from job.training.model import load_base
from job.training.order import Order
from job.training.worker import Worker
from job.workdir import WorkDir
from tests.job.made import CPU, made_rows, made_spec

LENGTHS = [17, 5, 33, 9, 21, 12, 40, 7, 15, 28]
"""Ten rows; with batches of four an epoch has three steps, the last of two rows."""


ROOM = 50
"""Tokens for which rank 0 has memory, with the kernel ``scarce``."""


class Scarce(PaddingFree):
    """Memory for so many tokens and no more."""

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        if batch.tokens.numel() > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().loss(model, batch)


def made_loop(rank: int, world: int, base: str, spec: JobSpec, kernel: str = "padding-free") -> Loop:
    """A loop at step 0 on one of ``world`` ranks; dropout of the base's own is off."""
    placement = replace(CPU, rank=rank, world=world)
    rows = made_rows(LENGTHS, 300)
    model = add_adapter(load_base(Path(base), spec, placement), spec, placement)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_" not in name:
            module.p = 0.0
    if sharded.shards(spec, placement):
        sharded.shard(model.get_base_model(), placement)
    core = model.get_base_model()
    kernels = {
        "padding-free": lambda: PaddingFree(placement.device, chunked_head(core)),
        "scarce": lambda: (Scarce if rank == 0 else PaddingFree)(placement.device, chunked_head(core)),
        "own head": lambda: PaddingFree(placement.device),
        "reference": lambda: Reference(0, placement.device),
    }
    order = Order(rows.sources, [1.0], spec.training, "digest")
    return Loop(model, make_optimizer(model, spec.training), rows, order, spec.training, kernels[kernel](), placement)


def randomness(rank: int, world: int, base: str, sections: dict[str, Any]) -> dict[str, Any]:
    """What is drawn in training: a digest of the first values, and the seed that each step's dropout draws by."""
    loop = made_loop(rank, world, base, made_spec(**sections))
    first = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in trained(loop.model).values())).hexdigest()
    met: dict[int, int] = {}
    dropout = next(m for n, m in loop.model.named_modules() if n.endswith("lora_dropout.default"))
    dropout.register_forward_pre_hook(lambda *_: met.update({loop.progress.step: torch.initial_seed()}))
    for _ in loop.run(lambda: False):
        pass
    return {"first values": first, "dropout": list(met.values())}


def train(
    rank: int,
    world: int,
    base: str,
    sections: dict[str, Any],
    kernel: str = "padding-free",
    stop_after: int | None = None,
    save: str | None = None,
    resume: str | None = None,
    adapter: str | None = None,
    forget_optimizer: bool = False,
) -> dict[str, Any]:
    """Trains to the end or to ``stop_after``.

    Args:
        save: folder for a checkpoint at the end.
        resume: checkpoint to begin from.
        adapter: file for the adapter's tensors at the end.
        forget_optimizer: begin with fresh optimizer states.

    Returns:
        losses of the steps, a digest of adapter and optimizer, how many base tensors are shared out, and the reduced
        gradient of the first step before clipping as a file beside ``adapter``.
    """
    torch.manual_seed(99 + rank)  # nothing may depend on what was drawn before
    spec = made_spec(**sections)
    loop = made_loop(rank, world, base, spec, kernel)
    if resume is not None:
        state = checkpoint.read_state(Path(resume))
        checkpoint.restore(Path(resume), loop.model, loop.optimizer)
        loop.progress = Progress(step=state.step, tokens=state.tokens)
    if forget_optimizer:
        loop.optimizer = make_optimizer(loop.model, spec.training)
    gradients: list[dict[str, torch.Tensor]] = []
    loop.optimizer.register_step_pre_hook(lambda *_: gradients.append(_gradients(loop)))
    losses = []
    for progress in loop.run(lambda: False):
        losses.append(progress.loss)
        if progress.step == stop_after:
            break
    if save is not None and rank == 0:
        folder = checkpoint.save(Path(save), loop.model, loop.optimizer, _state(loop), "safetensors")
        assert folder.is_dir()
    if adapter is not None and rank == 0:
        save_file(_adapter(loop), adapter)
        save_file(gradients[0], f"{adapter}.gradient")
    if world > 1:
        dist.barrier()
    return {
        "losses": losses,
        "digest": _digest(loop),
        "shared": _shared(loop),
        "tokens": loop.progress.tokens,
        "room": loop.room,
    }


def mean_of_means(rank: int, world: int, base: str, sections: dict[str, Any], gradient: str) -> None:
    """The gradient as DDP averages it: each rank divides by its own tokens, then by the number of ranks."""
    loop = made_loop(rank, world, base, made_spec(**sections))
    rows = [row for group in loop._groups(0) for row in group]
    with loop.kernel.installed(loop.model.get_base_model()):
        loss = loop.kernel.loss(loop.model.get_base_model(), loop.kernel.collate(loop.rows, rows))
    torch.autograd.backward(loss / int(loop.rows.supervised[rows].sum()) / world)
    found = _gradients(loop)
    for tensor in found.values():
        dist.all_reduce(tensor)
    if rank == 0:
        save_file(found, gradient)
    dist.barrier()


def whole_worker(rank: int, world: int, workdir: str, stop_at: int | None = None) -> int:
    """``job.training.train`` itself on a prepared work directory; rank 0 alone is asked to leave, after ``stop_at``.

    Returns:
        How the rank ended (``job.exits``).
    """
    work = WorkDir(Path(workdir))
    if stop_at is not None:

        def asks(self: Worker) -> bool:
            return rank == 0 and int(self.position.get("step", 0)) >= stop_at

        Worker.stop_asked = asks  # type: ignore[method-assign]
    return int(worker_process.run(work))


def started_by_mistake(rank: int, world: int, workdir: str, expected: int) -> int:
    """The worker's own ``main`` on ``world`` ranks where ``expected`` were asked for."""
    os.environ["TUNEJOB_RANKS"] = str(expected)
    sys.argv = ["job.training.train", workdir]
    return worker_process.main()


def largest_difference(one: Path, other: Path) -> float:
    """Largest absolute difference of the tensors of two files; their names must be the same."""
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert ours
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


def _state(loop: Loop) -> State:
    return State(loop.progress.step, loop.progress.tokens, "spec", "data", {}, {}, loop.scaler.state_dict())


def _adapter(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained(loop.model).items()}


def _gradients(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: p.grad.detach().clone() for name, p in trained(loop.model).items() if p.grad is not None}


def _digest(loop: Loop) -> str:
    """Of every bit of adapter and optimizer."""
    tensors, numbers = checkpoint._flatten(loop.optimizer, list(trained(loop.model)))
    digest = hashlib.sha256(repr(sorted(numbers.items())).encode())
    for _, tensor in sorted((_adapter(loop) | tensors).items()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _shared(loop: Loop) -> int:
    return sum(type(parameter.data).__name__ == "DTensor" for parameter in loop.model.parameters())
