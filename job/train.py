"""The worker: ``accelerate launch -m job.train WORKDIR``, one process per rank.

It knows directories only: no store, no cluster, no network. What it has to say it leaves in the work directory.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from job import checkpoint, evaluate, kernels, prepared, sharded
from job.checkpoint import State
from job.child import setup_child
from job.device import Placement, place
from job.errors import InternalError
from job.exits import ExitCode
from job.failures import as_torch_failure
from job.files import sealing, write_json
from job.inputs import read_inputs
from job.loop import Loop, Progress, make_optimizer
from job.memory import peak_bytes, reset_peak
from job.model import add_adapter, load_base, save_adapter, save_quantization
from job.order import Order
from job.outcome import record
from job.spec import JobSpec, digest, read
from job.workdir import WorkDir

log = logging.getLogger(__name__)

PROBE_ROWS = 4
PROBE_TOKENS = 64


@dataclass
class Worker:
    """One rank of a run."""

    workdir: WorkDir
    spec: JobSpec
    placement: Placement
    data: prepared.Prepared
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    last_word: float = 0.0
    position: dict[str, Any] = field(default_factory=dict)
    """Step, steps and the step's loss, once they are known; part of every word."""
    resumed_tokens: int = 0
    """Tokens that earlier attempts trained on."""

    @property
    def is_first(self) -> bool:
        """Rank 0 writes what concerns all."""
        return self.placement.rank == 0

    def stop_asked(self) -> bool:
        """The supervisor has asked for a checkpoint and an end."""
        return self.workdir.stop.exists()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase, measures its peak memory, and tells the supervisor."""
        self.tell(phase=name)
        reset_peak(self.placement.device)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self.peaks[name] = peak_bytes(self.placement.device)

    def tell(self, **word: Any) -> None:
        """Leaves the latest word on progress."""
        if self.is_first:
            self.last_word = time.monotonic()
            write_json(self.workdir.progress, self.position | word)

    def pulse(self) -> None:
        """Shows the supervisor that something goes on, where there is nothing to say."""
        if self.is_first and time.monotonic() - self.last_word > 1.0:
            self.last_word = time.monotonic()
            os.utime(self.workdir.progress)

    def barrier(self) -> None:
        """Waits for the other ranks."""
        if self.placement.world > 1:
            dist.barrier()


def run(workdir: WorkDir) -> ExitCode:
    """A rank from its model to evaluated results.

    Returns:
        OK, or INTERRUPTED when it left on request after sealing a checkpoint.
    """
    spec = read(workdir.spec)
    placement = place(spec)
    worker = Worker(workdir, spec, placement, prepared.load(workdir.prepared))
    order = _order(worker)  # what it refuses should not wait for the base
    with worker.phase("load"):
        base = load_base(read_inputs(workdir.inputs).model.path, spec, sharded.loading_place(spec, placement))
        model = add_adapter(base, spec, placement)
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
        _seal(worker, model)
    with worker.phase("evaluate"):
        _evaluate(worker, loop, base_biases)
    if worker.is_first:
        _write_performance(worker, loop, choice)
    return ExitCode.OK


def _order(worker: Worker) -> Order:
    weights = [source.weight for source in worker.spec.data.train]
    return Order(worker.data.train.sources, weights, worker.spec.training, str(worker.data.info["digest"]))


def _ready(worker: Worker, model: PeftModel, order: Order) -> tuple[Loop, dict[str, str]]:
    """The loop, at step 0 or where the checkpoint to resume from stands, and its kernel's record."""
    spec, placement, data = worker.spec, worker.placement, worker.data
    optimizer = make_optimizer(model, spec.training)
    state = _accepted(worker)
    choice = _kernel(worker, model, order, state)
    loop = Loop(model, optimizer, data.train, order, spec.training, choice.kernel, placement)
    if state is not None:
        checkpoint.restore(worker.workdir.resume, model, optimizer)
        loop.scaler.load_state_dict(state.scaler)
        loop.progress = Progress(step=state.step, tokens=state.tokens)
        worker.resumed_tokens = state.tokens
        log.info("resuming after step %d of %d", state.step, order.steps)
    _cut_metrics(worker, loop.progress.step)
    return loop, choice.record()


def _accepted(worker: Worker) -> State | None:
    """The state to resume from, seen to belong to this run; None for a fresh start."""
    if not worker.workdir.resume.exists():
        return None
    state = checkpoint.read_state(worker.workdir.resume)
    here = checkpoint.environment(worker.placement.device, worker.placement.world)
    checkpoint.accept(state, digest(worker.spec), str(worker.data.info["digest"]), here)
    return state


def _kernel(worker: Worker, model: PeftModel, order: Order, state: State | None) -> kernels.Choice:
    """The kernel of a run: the one it began with, else what spec and comparison choose."""
    placement, rows = worker.placement, worker.data.train
    # Any token will do for padding: attention and labels go by position.
    reference = kernels.Reference(int(worker.data.info["pad_id"] or 0), placement.device)
    if worker.spec.training.kernels == "reference":
        return kernels.Choice(reference, "training.kernels: reference")
    if state is not None:
        return kernels.named(model.get_base_model(), state.kernels["name"], reference, state.kernels["reason"])
    first = sorted((int(row) for row in order.rows(0)), key=lambda row: int(rows.lengths[row]))
    probe = [first[-1], *first[: min(2, len(first) - 1)]]
    core = model.get_base_model()
    return kernels.choose(core, rows, probe, reference, placement.autocast, placement.precision)


def _train(worker: Worker, loop: Loop, choice: dict[str, str]) -> bool:
    """Steps to the end, with checkpoints, evaluations and metrics on the way.

    Returns:
        False if a stop was asked for before the last step.
    """
    checkpoints = worker.spec.checkpoints
    _catch_up(worker, loop)
    metrics = _Metrics(worker, loop.progress.tokens)
    saved_at, saved_step = time.monotonic(), loop.progress.step
    for progress in loop.run(worker.stop_asked, _reads(worker)):
        last = progress.step == loop.order.steps
        metrics.step(progress, loop.order, last)
        eval_loss, stopping = _evaluate_on_the_way(worker, loop, last)
        due = checkpoints.every_steps is not None and progress.step % checkpoints.every_steps == 0
        minutes = (time.monotonic() - saved_at) / 60
        late = worker.placement.world == 1 and checkpoints.every_minutes and minutes >= checkpoints.every_minutes
        if due or late or last or stopping:
            _save(worker, loop, choice, eval_loss)
            saved_at, saved_step = time.monotonic(), progress.step
        if stopping and not last:
            return False
    if loop.progress.step == 0 or saved_step != loop.order.steps:
        raise InternalError("the training ended without a checkpoint of its last step")
    return True


def _reads(worker: Worker) -> Callable[[int], bool]:
    """Whether a step's figures are needed at once: they are logged, or a checkpoint or an evaluation follows."""
    spec = worker.spec
    every = [spec.training.logging_steps, spec.checkpoints.every_steps, spec.evaluation.every_steps]
    return lambda step: step == 1 or any(n is not None and step % n == 0 for n in every)


def _catch_up(worker: Worker, loop: Loop) -> None:
    """Makes up for the evaluation that the request to leave cut off at the step resumed from."""
    resume = worker.workdir.resume
    if resume.exists() and checkpoint.read_state(resume).eval_loss is None:
        _evaluate_on_the_way(worker, loop, last=loop.progress.step == loop.order.steps)


def _evaluate_on_the_way(worker: Worker, loop: Loop, last: bool) -> tuple[float | None, bool]:
    """The evaluation loss where the spec asks for one at this step, and whether a stop was asked for."""
    every, rows = worker.spec.evaluation.every_steps, worker.data.eval
    stopping = loop.progress.stop_asked
    if rows is None or every is None or loop.progress.step % every or last or stopping:
        return None, stopping
    alone = worker.placement.world == 1  # ranks would not agree where to leave; they do after the next step
    try:
        figures = _measure(worker, loop, worker.stop_asked if alone else lambda: False)
    except evaluate.StopAsked:
        return None, True
    log.info("step %d: evaluation loss %.4f", loop.progress.step, figures.loss)
    if worker.is_first:
        _append(worker.workdir.metrics, {"step": loop.progress.step, "eval_loss": figures.loss})
    return figures.loss, False


def _measure(worker: Worker, loop: Loop, should_stop: Any = lambda: False) -> evaluate.Figures:
    rows = worker.data.eval
    if rows is None:
        raise InternalError("evaluation without rows")
    training = worker.spec.training
    budget = training.micro_batch_size * training.max_length
    core = loop.model.get_base_model()
    limit = worker.spec.evaluation.max_rows
    return evaluate.measure(core, rows, loop.kernel, worker.placement, budget, limit, should_stop, worker.pulse)


def _save(worker: Worker, loop: Loop, choice: dict[str, str], eval_loss: float | None) -> None:
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
            eval_loss=eval_loss,
        )
        folder = worker.workdir.checkpoints
        checkpoint.save(folder, loop.model, loop.optimizer, state, worker.spec.output.adapter_format)
    worker.barrier()


def _seal(worker: Worker, model: PeftModel) -> None:
    """The adapter as it will be published, before anything that may still fail."""
    if worker.is_first:
        with sealing(worker.workdir.adapter) as scratch:
            save_adapter(model, scratch, worker.spec.output.adapter_format)
            _tokenizer(worker).save_pretrained(scratch)
            if worker.spec.method == "qlora":
                save_quantization(model.get_base_model(), scratch)
    worker.barrier()


def _tokenizer(worker: Worker) -> PreTrainedTokenizerBase:
    """The tokenizer as ``prepare`` used it, its chat template included."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        worker.workdir.prepared / "tokenizer", local_files_only=True
    )
    return tokenizer


def _evaluate(worker: Worker, loop: Loop, base_biases: dict[str, torch.Tensor]) -> None:
    """Base against tuned on the same rows, and a probe for the fresh process that verifies the adapter."""
    _write_probe(worker, loop.model)
    if worker.data.eval is None:
        write_json(worker.workdir.evaluation, {"skipped": worker.data.info["no_eval"]})
        return
    worker.tell(phase="evaluate", what="tuned")
    tuned = _figures(worker, loop)
    worker.tell(phase="evaluate", what="base")
    with evaluate.as_base(loop.model, base_biases):
        base = _figures(worker, loop)
    if worker.is_first:
        rows = len(worker.data.eval)
        figures = {
            "rows": min(rows, worker.spec.evaluation.max_rows or rows),
            "rows_digest": worker.data.info["eval_digest"],
            "tokens": tuned.tokens,
        }
        write_json(worker.workdir.evaluation, figures | {"base": base.record(), "tuned": tuned.record()})


def _figures(worker: Worker, loop: Loop) -> evaluate.Figures:
    figures, settings, rows = _measure(worker, loop), worker.spec.evaluation, worker.data.eval
    if rows is None or not settings.generate_rows:
        return figures
    count = min(settings.generate_rows, len(rows))
    ends = [int(token) for token in worker.data.info["end_ids"]]
    core = loop.model.get_base_model()
    share = evaluate.exact_match(
        core, rows, _tokenizer(worker), ends, worker.placement, count, settings.max_new_tokens, on_batch=worker.pulse
    )
    return replace(figures, exact_match=share, generated_rows=count)


@torch.no_grad()
def _write_probe(worker: Worker, model: PeftModel) -> None:
    """A few rows and the tuned model's logits on them, float32 ``[tokens, vocabulary]``."""
    if not worker.is_first:
        return
    rows = worker.data.eval or worker.data.train
    core, tensors = model.get_base_model(), {}
    core.eval()
    for row in range(min(PROBE_ROWS, len(rows))):
        tokens = torch.from_numpy(rows.tokens(row)[:PROBE_TOKENS].astype("int64"))[None]
        with worker.placement.autocast():
            logits = core(input_ids=tokens.to(worker.placement.device), use_cache=False).logits
        tensors[f"tokens.{row}"] = tokens[0]
        tensors[f"logits.{row}"] = logits[0].float().cpu().contiguous()
    save_file(tensors, worker.workdir.probe)


def _write_performance(worker: Worker, loop: Loop, choice: dict[str, str]) -> None:
    placement = worker.placement
    here = loop.progress.tokens - worker.resumed_tokens
    write_json(
        worker.workdir.performance,
        {
            "phases": {name: round(seconds, 3) for name, seconds in worker.seconds.items()},
            "steps": loop.order.steps,
            "tokens": loop.progress.tokens,
            "tokens_per_second": round(here / worker.seconds["train"], 1) if here else None,
            "peak_memory_bytes": {"load": worker.peaks["load"], "train": worker.peaks["train"]},
            "device": placement.device.type,
            "ranks": placement.world,
            "precision": placement.precision_name,
            "kernels": choice,
            "trained_parameters": sum(p.numel() for p in loop.model.parameters() if p.requires_grad),
            "base_dropout": _base_dropout(loop.model),
            "environment": checkpoint.environment(placement.device, placement.world),
        },
    )


def _base_dropout(model: PeftModel) -> float:
    """The base's own dropout (GPT-2 has 0.1), which is on in training as its config says."""
    config = model.get_base_model().config
    names = ("resid_pdrop", "attn_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout")
    return max((float(getattr(config, name, 0.0) or 0.0) for name in names), default=0.0)


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
        if self._worker.is_first and (progress.step % every == 0 or progress.step == 1 or last):
            _append(self._worker.workdir.metrics, word)
        self._worker.position = {"step": progress.step, "steps": order.steps, "loss": progress.loss}
        if last or time.monotonic() - self._worker.last_word > 0.3:
            self._worker.tell(phase="train", **word)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def _cut_metrics(worker: Worker, step: int) -> None:
    """Lines of steps that will be trained again go."""
    path = worker.workdir.metrics
    if not worker.is_first or not path.exists():
        return
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


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
