"""The worker: ``accelerate launch -m job.training.train WORKDIR``, one process per rank.

It knows directories only: no store, no cluster, no network. What it has to say it leaves in the work directory.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel

from job.child import setup_child
from job.data import prepared
from job.errors import InternalError
from job.evaluation import assess, evaluate
from job.exits import ExitCode
from job.files import sealing, write_json
from job.inputs import read_inputs
from job.outcome import record
from job.sizing import parts
from job.sizing.activations import Setting
from job.sizing.estimate import Estimate
from job.sizing.fits import expected
from job.spec import digest, read
from job.training import checkpoint, kernels, sharded
from job.training.adapter import add_adapter, foreseen, save_adapter
from job.training.apart import probe_of
from job.training.checkpoint import State
from job.training.course import Course
from job.training.device import place
from job.training.failures import as_torch_failure
from job.training.loop import Loop, Progress, make_optimizer
from job.training.memory import available_bytes, be_frugal
from job.training.model import load_base, own_dropout, save_generation, save_quantization
from job.training.new_tokens import Tokens
from job.training.order import Order, costliest
from job.training.worker import Worker
from job.workdir import WorkDir

log = logging.getLogger(__name__)


def run(workdir: WorkDir) -> ExitCode:
    """A rank from its model to evaluated results.

    Returns:
        OK, or INTERRUPTED when it left on request after sealing a checkpoint.
    """
    spec = read(workdir.spec)
    placement = place(spec)
    worker = Worker(workdir, spec, placement, prepared.load(workdir.prepared))
    order = _order(worker)  # what it refuses should not wait for the base
    assess.require(worker)
    with worker.phase("load"):
        folder, tokens = read_inputs(workdir.inputs).model.path, Tokens.of(spec, worker.data.info)
        worker.parts = foreseen(folder, spec, tokens)
        if worker.is_first:
            for line in parts.lines(worker.parts):
                log.info("%s", line)
        needs = _expected(worker, order, folder)
        base = load_base(folder, spec, sharded.loading_place(spec, placement))
        model = add_adapter(base, spec, placement, tokens)
        if sharded.shards(spec, placement):
            sharded.shard(model.get_base_model(), placement)
        base_biases = evaluate.trained_biases(model)
        loop, choice = _ready(worker, model, order)
    worker.position = {"step": loop.progress.step, "steps": order.steps}
    with worker.phase("train"):
        finished = _train(worker, loop, choice)
    if not finished:
        return ExitCode.INTERRUPTED
    with worker.phase("seal"):
        assess.choose(worker, loop)
        _seal(worker, model)
    with worker.phase("evaluate"):
        assess.compare(worker, loop, base_biases)
    if worker.is_first:
        _write_performance(worker, loop, choice, needs)
    return ExitCode.OK


def _order(worker: Worker) -> Order:
    weights = [source.weight for source in worker.spec.data.train]
    return Order(worker.data.train.sources, weights, worker.spec.training, str(worker.data.info["digest"]))


def _ready(worker: Worker, model: PeftModel, order: Order) -> tuple[Loop, dict[str, str]]:
    """The loop, at step 0 or where the checkpoint to resume from stands, and its kernel's record."""
    spec, placement, data = worker.spec, worker.placement, worker.data
    optimizer = make_optimizer(model, spec.training)
    state = _accepted(worker)
    choice = _kernel(worker, model, state)
    loop = Loop(model, optimizer, data.train, order, spec.training, choice.kernel, placement)
    if state is not None:
        checkpoint.restore(worker.workdir.resume, model, optimizer)
        loop.scaler.load_state_dict(state.scaler)
        loop.room = state.room
        loop.progress = Progress(step=state.step, tokens=state.tokens)
        worker.resumed_tokens, worker.course = state.tokens, Course(**state.course)
        assess.resume_best(worker, state.step)
        log.info("resuming after step %d of %d", state.step, order.steps)
    _cut_metrics(worker, loop.progress.step, worker.course.step)
    return loop, choice.record()


def _accepted(worker: Worker) -> State | None:
    """The state to resume from, seen to belong to this run; None for a fresh start."""
    if not worker.workdir.resume.exists():
        return None
    state = checkpoint.read_state(worker.workdir.resume)
    here = checkpoint.environment(worker.placement.device, worker.placement.world)
    checkpoint.accept(state, digest(worker.spec), str(worker.data.info["digest"]), here)
    return state


def _kernel(worker: Worker, model: PeftModel, state: State | None) -> kernels.Choice:
    """The kernel of a run: the one it began with, else what spec and comparison choose."""
    placement, rows, core = worker.placement, worker.data.train, model.get_base_model()
    # Any token will do for padding: attention and labels go by position.
    reference = kernels.Reference(int(worker.data.info["pad_id"] or 0), placement.device)
    if worker.spec.training.kernels == "reference":
        return kernels.Choice(reference, "training.kernels: reference")
    if state is not None:
        begun_with = kernels.named(core, state.kernels["name"], reference, placement, state.kernels["reason"])
        if begun_with is not None:
            return begun_with
    return kernels.choose(core, rows, probe_of(rows.lengths), reference, placement)


def _train(worker: Worker, loop: Loop, choice: dict[str, str]) -> bool:
    """Steps to the end, with checkpoints, evaluations and metrics on the way.

    Returns:
        False if a stop was asked for before the last step.
    """
    checkpoints = worker.spec.checkpoints
    if assess.catch_up(worker, loop):
        return False
    if assess.is_over(worker):
        return _stopped_early(worker, loop)
    metrics = _Metrics(worker, loop.progress.tokens)
    saved_at, saved_step = time.monotonic(), loop.progress.step
    for progress in loop.run(worker.stop_asked, _reads(worker)):
        last = progress.step == loop.order.steps
        metrics.step(progress, loop.order, last)
        stopping = assess.on_the_way(worker, loop, last)
        over = assess.is_over(worker)
        due = checkpoints.every_steps is not None and progress.step % checkpoints.every_steps == 0
        if due or last or stopping or over or _is_late(worker, progress.step, time.monotonic() - saved_at):
            _save(worker, loop, choice)
            saved_at, saved_step = time.monotonic(), progress.step
        if over and not last:
            return _stopped_early(worker, loop)
        if stopping and (not last or assess.is_owed(worker)):
            return False
    if loop.progress.step == 0 or saved_step != loop.order.steps:
        raise InternalError("the training ended without a checkpoint of its last step")
    return True


def _is_late(worker: Worker, step: int, seconds: float) -> bool:
    """Whether `checkpoints.every_minutes` have passed since the last checkpoint, by the clock of rank 0.

    Several ranks compare only where they read a step's figures anyway: after steps that are logged.
    """
    minutes, placement = worker.spec.checkpoints.every_minutes, worker.placement
    if minutes is None or (placement.world > 1 and step % worker.spec.training.logging_steps):
        return False
    late = seconds / 60 >= minutes
    if placement.world == 1:
        return late
    of_rank_0 = torch.tensor(float(late), device=placement.device)
    dist.broadcast(of_rank_0, 0)
    return bool(of_rank_0)


def _stopped_early(worker: Worker, loop: Loop) -> bool:
    """Says so. The run has as many steps as it took: whoever watches it waits for no more."""
    step, planned = loop.progress.step, loop.order.steps
    log.info(
        "stopped early at step %d of %d: %d evaluations in a row without a lower loss",
        step,
        planned,
        worker.course.since,
    )
    worker.position |= {"step": step, "steps": step}
    worker.tell(phase="train")
    return True


def _reads(worker: Worker) -> Callable[[int], bool]:
    """Whether a step's figures are needed at once: they are logged, or a checkpoint or an evaluation follows."""
    spec = worker.spec
    every = [spec.training.logging_steps, spec.checkpoints.every_steps, spec.evaluation.every_steps]
    return lambda step: step == 1 or any(n is not None and step % n == 0 for n in every)


def _save(worker: Worker, loop: Loop, choice: dict[str, str]) -> None:
    """Seals a checkpoint. Rank 0's copy serves all: adapter and optimizer are the same on every rank."""
    loop.settle()  # a step that was not finite is not worth keeping
    if worker.is_first:
        state = State(
            step=loop.progress.step,
            tokens=loop.progress.tokens,
            spec_digest=digest(worker.spec),
            data_digest=str(worker.data.info["digest"]),
            kernels=choice,
            environment=checkpoint.environment(worker.placement.device, worker.placement.world),
            scaler=loop.scaler.state_dict(),
            room=loop.room,
            eval_loss=worker.course.loss_at(loop.progress.step),
            course=worker.course.record(),
        )
        folder = worker.workdir.checkpoints
        best = worker.workdir.best
        checkpoint.save(folder, loop.model, loop.optimizer, state, worker.spec.output.adapter_format, best)
    worker.barrier()


def _seal(worker: Worker, model: PeftModel) -> None:
    """The adapter as it will be published, before anything that may still fail."""
    if worker.is_first:
        with sealing(worker.workdir.adapter) as scratch:
            save_adapter(model, scratch, worker.spec.output.adapter_format)
            worker.tokenizer().save_pretrained(scratch)
            save_generation(model.get_base_model(), worker.data.info["end_ids"], scratch)
            if worker.spec.method == "qlora":
                save_quantization(model.get_base_model(), scratch)
    worker.barrier()


def _write_performance(worker: Worker, loop: Loop, choice: dict[str, str], needs: Estimate | None) -> None:
    placement = worker.placement
    here = loop.progress.tokens - worker.resumed_tokens
    write_json(
        worker.workdir.performance,
        {
            "phases": {name: round(seconds, 3) for name, seconds in worker.seconds.items()},
            "steps": loop.progress.step,
            "tokens": loop.progress.tokens,
            "tokens_per_second": round(here / worker.seconds["train"], 1) if here else None,
            "peak_memory_bytes": {"load": worker.peaks["load"], "train": worker.peaks["train"]},
            "expected_memory_bytes": None if needs is None else needs.record(),
            "device": placement.device.type,
            "ranks": placement.world,
            "parallelism": "shard" if sharded.is_shared(loop.model.get_base_model()) else "replicate",
            "precision": placement.precision_name,
            "kernels": choice,
            "trained_parameters": sum(p.numel() for p in loop.model.parameters() if p.requires_grad),
            "parameters": parts.record(worker.parts),
            "base_dropout": own_dropout(loop.model.get_base_model()),
            "environment": checkpoint.environment(placement.device, placement.world),
        },
    )


def _expected(worker: Worker, order: Order, model: Path) -> Estimate | None:
    """What the training should hold at its peak, provided for; None for a family whose sizes nobody knows."""
    place, lengths, training = worker.placement, worker.data.train.lengths, worker.spec.training

    def here(padded: bool) -> Setting:
        group = lengths[costliest(lengths, order, training.micro_batch_size * training.max_length, padded)]
        longest = int(group.max())
        tokens = longest * len(group) if padded else int(group.sum())
        return Setting(place.device.type, place.precision.itemsize, tokens, longest, place.world)

    needs = expected(model, worker.spec, here)
    if needs is not None and place.device.type == "cpu" and be_frugal(needs.bytes, available_bytes()):
        log.info("memory is scarce (%.1f GiB expected): freed blocks are given back at once", needs.gib)
    return needs


class _Metrics:
    """Writes metrics.jsonl every few steps, and the latest word a few times a second."""

    def __init__(self, worker: Worker, tokens: int) -> None:
        self._worker = worker
        self._start, self._tokens_before = time.monotonic(), tokens

    def step(self, progress: Progress, order: Order, last: bool) -> None:
        """After every step of the loop."""
        every = self._worker.spec.training.logging_steps
        seconds = time.monotonic() - self._start
        word = {
            "step": progress.step,
            "epoch": round(progress.step / order.steps_per_epoch, 4),
            "loss": progress.loss,
            "grad_norm": progress.grad_norm,
            "learning_rate": progress.learning_rate,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
            "tokens_per_second": round((progress.tokens - self._tokens_before) / max(seconds, 1e-9), 1),
        }
        if progress.step % every == 0 or progress.step == 1 or last:
            self._worker.note(word)
        self._worker.position = {"step": progress.step, "steps": order.steps, "loss": progress.loss}
        if last or time.monotonic() - self._worker.last_word > 0.3:
            self._worker.tell(phase="train", **word)


def _cut_metrics(worker: Worker, step: int, evaluated: int) -> None:
    """Lines of steps that will be trained again go, those of evaluations that will be made again, and half lines."""
    path = worker.workdir.metrics
    if not worker.is_first or not path.exists():
        return
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in lines if line["step"] <= (evaluated if "eval_loss" in line else step)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept), encoding="utf-8")


def main() -> int:
    """One rank, as accelerate starts it."""
    workdir = WorkDir(Path(sys.argv[1]))
    setup_child()
    process = f"rank-{os.environ.get('RANK', '0')}"
    write_json(workdir.pid(process), os.getpid())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    expected = int(os.environ["TUNEJOB_RANKS"])

    def body() -> ExitCode:
        if world != expected:
            raise InternalError(f"accelerate started {world} ranks where {expected} were asked for")
        if world > 1:
            PartialState(timeout=timedelta(minutes=30))
        return run(workdir)

    code = record(workdir.outcome(process), body, as_torch_failure)
    if dist.is_initialized():
        dist.destroy_process_group()
    # A rank that left on request is no failure to torchrun, which would say so at length.
    return 0 if code == ExitCode.INTERRUPTED else code


if __name__ == "__main__":
    sys.exit(main())
