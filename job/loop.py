"""The training loop: one optimizer step after the other, exact in its loss, exact in its resume.

The loss of a step is the sum of the cross entropies of all its trained tokens divided by their number, whatever the
micro-batches and ranks they were spread over. Every rank knows that number beforehand, because it knows every row.
"""

import logging
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import get_constant_schedule_with_warmup, get_polynomial_decay_schedule_with_warmup
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from job.device import Placement
from job.errors import Diverged
from job.kernels import Kernel, attention, cross_entropy_sum
from job.model import trained
from job.order import Indices, Order, micro_batches, share
from job.prepared import Rows
from job.spec import Training

log = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 20
"""Steps the float16 loss scale may skip in a row before the run is called diverged; each halves the scale."""


@dataclass
class Progress:
    """Where the training stands after a step."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on so far, prompts included."""
    loss: float = math.nan
    """Mean cross entropy (nats) of the step's trained tokens."""
    grad_norm: float = math.nan
    """Global L2 norm of the step's gradient before clipping."""
    learning_rate: float = 0.0
    trained_tokens: int = 0
    """Trained tokens of the step."""
    stop_asked: bool = False
    """Some rank saw the request to leave; every rank knows it after the same step."""


@dataclass
class Loop:
    """Model, optimizer and rows of one rank, advanced a step at a time."""

    model: PeftModel
    optimizer: Optimizer
    rows: Rows
    order: Order
    training: Training
    kernel: Kernel
    placement: Placement
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self._core = self.model.get_base_model()
        self._parameters = list(trained(self.model).values())
        self._rate = learning_rates(self.training, self.order.steps)
        self.scaler = torch.amp.GradScaler(self.placement.device.type, enabled=self.placement.scales_loss)
        self._skipped = 0
        workers = self.training.loader_workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._ahead: dict[int, list[Future[Any]]] = {}

    def run(self, should_stop: Callable[[], bool]) -> Iterator[Progress]:
        """Yields after every step; ends after the last, or after the step in which a stop was asked for."""
        self.model.train()
        with attention(self._core, self.kernel.implementation):
            for step in range(self.progress.step, self.order.steps):
                self._step(step, should_stop())
                yield self.progress
                if self.progress.stop_asked:
                    return

    def _step(self, step: int, stop: bool) -> None:
        rows = self.order.rows(step)
        # Dropout, too, is a function of seed, step and rank: nothing random needs to be saved.
        torch.manual_seed(_mixed(self.training.seed, step, self.placement.rank))
        count = max(1, int(self.rows.supervised[rows].sum()))
        loss = torch.zeros((), dtype=torch.float64, device=self.placement.device)
        for batch in self._batches(step):
            with self.placement.autocast():
                part = cross_entropy_sum(*self.kernel.logits(self._core, batch))
            loss += part.detach()
            torch.autograd.backward(self.scaler.scale(part / count))
        loss, stop = self._reduce(loss, stop)
        self._apply(step, rows, float(loss) / count)
        self.progress.step = step + 1
        self.progress.tokens += int(self.rows.lengths[rows].sum())
        self.progress.trained_tokens = count
        self.progress.stop_asked = stop

    def _batches(self, step: int) -> Iterator[Any]:
        """This rank's micro-batches of a step, prepared while the step before was computed if there are workers."""
        if self._pool is None:
            for group in self._groups(step):
                yield self.kernel.collate(self.rows, group)
            return
        pending = self._ahead.pop(step, None) or self._prepare(step, self._pool)
        if step + 1 < self.order.steps:
            self._ahead[step + 1] = self._prepare(step + 1, self._pool)
        for future in pending:
            yield future.result()

    def _prepare(self, step: int, pool: ThreadPoolExecutor) -> list[Future[Any]]:
        return [pool.submit(self.kernel.collate, self.rows, group) for group in self._groups(step)]

    def _groups(self, step: int) -> list[list[int]]:
        """The rows of this rank's micro-batches."""
        rows = self.order.rows(step)
        lengths = [int(self.rows.lengths[row]) for row in rows]
        budget = self.training.micro_batch_size * self.training.max_length
        groups = micro_batches(lengths, budget, self.kernel.padded)
        mine = share(groups, lengths, self.placement.rank, self.placement.world)
        return [[int(rows[position]) for position in group] for group in mine]

    def _reduce(self, loss: Tensor, stop: bool) -> tuple[Tensor, bool]:
        """Sums gradients, loss and the request to leave over all ranks, in one all-reduce."""
        if self.placement.world == 1:
            return loss, stop
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        extra = torch.stack([loss.float(), torch.tensor(float(stop), device=loss.device)])
        flat = torch.cat([*(g.flatten() for g in gradients), extra])
        dist.all_reduce(flat)
        offset = 0
        for parameter in self._parameters:
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter).clone()
            offset += parameter.numel()
        return flat[-2], bool(flat[-1] > 0)

    def _apply(self, step: int, rows: Indices, loss: float) -> None:
        """Clips and steps, unless loss or gradient is not finite: then the weights stay as they are.

        Raises:
            Diverged: it is not the loss scale that explains it.
        """
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.training.max_grad_norm))
        finite = math.isfinite(norm) and math.isfinite(loss)
        if not finite and not self._scale_explains(loss):
            raise Diverged(
                f"step {step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}; the step was not applied. Its rows: "
                f"{', '.join(self.rows.origin(int(row)) for row in rows[:8])}{' …' if len(rows) > 8 else ''}. "
                "Lower training.learning_rate, or look at these rows"
            )
        self._skipped = 0 if finite else self._skipped
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.loss, self.progress.grad_norm, self.progress.learning_rate = loss, norm, rate

    def _scale_explains(self, loss: float) -> bool:
        self._skipped += 1
        return self.placement.scales_loss and math.isfinite(loss) and self._skipped <= SKIPS_IN_A_ROW


def _mixed(seed: int, step: int, rank: int) -> int:
    """A seed of 63 bits; the multipliers are odd and large, so that neighbours share nothing."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63


def make_optimizer(model: PeftModel, training: Training) -> Optimizer:
    """The optimizer over what trains; weight decay on matrices only."""
    parameters = list(trained(model).values())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "paged_adamw_8bit":
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

        kind = PagedAdamW8bit if parameters[0].is_cuda else AdamW8bit  # pages are CUDA's unified memory
        eight_bit: Optimizer = kind(groups, lr=training.learning_rate, betas=training.betas)
        return eight_bit
    fused = parameters[0].is_cuda
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=fused)


def learning_rates(training: Training, steps: int) -> Callable[[int], float]:
    """The learning rate of each step (from 0), by transformers' schedules, as a function of the step alone."""
    warmup = math.ceil(training.warmup_ratio * steps)
    probe = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    schedule: Any
    if training.schedule == "constant" or training.min_lr == training.learning_rate:
        schedule = get_constant_schedule_with_warmup(probe, warmup)
    elif training.schedule == "linear":
        schedule = get_polynomial_decay_schedule_with_warmup(probe, warmup, steps, lr_end=training.min_lr, power=1.0)
    else:
        schedule = get_cosine_with_min_lr_schedule_with_warmup(probe, warmup, steps, min_lr=training.min_lr)
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    # One later than transformers' own loop: there the first step has rate 0 and trains nothing.
    return lambda step: training.learning_rate * factor(step + 1 if step < warmup else step)
