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

from job.data.prepared import Rows
from job.errors import Diverged
from job.spec_sections import Training
from job.training.adapter import trained
from job.training.device import Numbers, Placement
from job.training.failures import is_out_of_memory
from job.training.kernels import Kernel
from job.training.order import Indices, Order, costliest, micro_batches, share
from job.training.sharded import idle_passes, is_shared

log = logging.getLogger(__name__)

SKIPS_IN_A_ROW = 20
"""Steps the float16 loss scale may skip in a row before the run is called diverged; each halves the scale."""

REHEARSAL_SHARE = 0.02
"""Share of the work ahead that trying the costliest micro-batch first may take; on a GPU it is always tried."""


@dataclass
class Progress:
    """Where the training stands after a step."""

    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on so far, prompts included."""
    loss: float = math.nan
    """Mean cross entropy (nats) of the trained tokens of the newest step whose figures were read."""
    grad_norm: float = math.nan
    """Global L2 norm of that step's gradient before clipping."""
    learning_rate: float = 0.0
    trained_tokens: int = 0
    """Trained tokens of the step."""
    stop_asked: bool = False
    """Some rank saw the request to leave; every rank knows it after the same step."""


@dataclass(frozen=True)
class _Figures:
    """What a step came to."""

    step: int
    rows: Indices
    numbers: Numbers
    """Loss, norm of the gradient, and how many ranks want to leave."""


def _always(step: int) -> bool:
    return True


@dataclass
class Loop:
    """Model, optimizer and rows of one rank, advanced a step at a time.

    A step enqueues its work and waits for nothing: whether the update may happen is decided on the device, and the
    host reads a step's figures when the next one is on its way, or where somebody needs them.
    """

    model: PeftModel
    optimizer: Optimizer
    rows: Rows
    order: Order
    training: Training
    kernel: Kernel
    placement: Placement
    progress: Progress = field(default_factory=Progress)
    room: int | None = None
    """Tokens a micro-batch may cost since the device's memory ran out, as the spec may ask for."""

    def __post_init__(self) -> None:
        self._core = self.model.get_base_model()
        self._shared = is_shared(self._core)
        self._parameters = list(trained(self.model).values())
        self._rate = learning_rates(self.training, self.order.steps)
        self.scaler = torch.amp.GradScaler(self.placement.device.type, enabled=self.placement.scales_loss)
        self._skipped = 0
        self._unread: _Figures | None = None
        workers = self.training.loader_workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if workers else None
        self._ahead: dict[int, list[Future[Any]]] = {}

    @property
    def budget(self) -> int:
        """Tokens a micro-batch may cost."""
        wanted = self.training.micro_batch_size * self.training.max_length
        return wanted if self.room is None else min(wanted, self.room)

    def run(self, should_stop: Callable[[], bool], reads: Callable[[int], bool] = _always) -> Iterator[Progress]:
        """Yields after every step; ends after the last, or after a step whose ranks know of a request to leave.

        Args:
            should_stop: asked before every step.
            reads: whether the figures of a step (from 1) are needed at once; every rank must say the same.

        Raises:
            Diverged: at the latest after the step that follows the one whose loss or gradient was not finite.
        """
        self.model.train()
        with self.kernel.installed(self._core):
            self._rehearse()
            while self.progress.step < self.order.steps:
                step = self.progress.step
                if not self._step(step, should_stop()):
                    continue
                if reads(step + 1) or step + 1 == self.order.steps:
                    self.settle()
                yield self.progress
                if self.progress.stop_asked:
                    return

    def settle(self) -> None:
        """Reads the figures that are still on their way into ``progress``. Raises Diverged if they are not finite."""
        if self._unread is None:
            return
        figures, self._unread = self._unread, None
        self._take(figures)

    def _take(self, figures: _Figures) -> None:
        loss, norm, stops = figures.numbers.read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._require_scale_explains(figures, loss, norm)
        else:
            self._skipped = 0
        self.progress.loss, self.progress.grad_norm = loss, norm
        self.progress.stop_asked = self.progress.stop_asked or stops > 0

    def _step(self, step: int, stop: bool) -> bool:
        """Enqueues a step; False if it has to be done again with smaller micro-batches."""
        rows = self.order.rows(step)
        count = max(1, int(self.rows.supervised[rows].sum()))
        own = self._accumulated(step, count)
        loss, flags = self._reduced(own, stop)
        if self._halved(own is None, flags[1]):
            return False
        earlier, self._unread = self._unread, self._apply(step, rows, loss / count, flags[0])
        self.progress.step = step + 1
        self.progress.tokens += int(self.rows.lengths[rows].sum())
        self.progress.trained_tokens = count
        if self.placement.world == 1:
            self.progress.stop_asked = stop
        if earlier is not None:
            self._take(earlier)
        return True

    def _accumulated(self, step: int, count: int) -> Tensor | None:
        """Adds up the step's gradients; its summed loss, float64, or None if memory ran out and may be halved for."""
        # Dropout, too, is a function of seed, step and rank: nothing random needs to be saved.
        torch.manual_seed(_mixed(self.training.seed, step, self.placement.rank))
        loss = torch.zeros((), dtype=torch.float64, device=self.placement.device)
        size = 0
        try:
            for group, batch in self._batches(step):
                size = len(group)
                with self.placement.autocast():
                    part = self.kernel.loss(self._core, batch)
                loss += part.detach()
                torch.autograd.backward(self.scaler.scale(part / count))
            self._idle(step)
        except RuntimeError as error:
            self._require_may_halve(error, size)
        else:
            return loss
        self._forget()
        return None

    def _require_may_halve(self, error: RuntimeError, size: int) -> None:
        """Raises the error again unless smaller micro-batches may help and are wanted."""
        if self.training.on_out_of_memory != "halve" or size < 2 or not is_out_of_memory(error):
            raise error

    def _forget(self) -> None:
        """Gives back what a step that ran out of memory holds."""
        self.optimizer.zero_grad(set_to_none=True)
        self._ahead.clear()
        if self.placement.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halved(self, mine: bool, all_ranks: Tensor) -> bool:
        """Halves the budget if a rank ran out of memory. With several ranks it waits for them: the price of `halve`."""
        if self.training.on_out_of_memory != "halve":
            return False
        if not (mine if self.placement.world == 1 else bool(all_ranks > 0)):
            return False
        self._forget()
        self.room = self.budget // 2
        log.warning("device memory ran out; going on with micro-batches of %d tokens", self.budget)
        return True

    def _batches(self, step: int) -> Iterator[tuple[list[int], Any]]:
        """This rank's micro-batches of a step, prepared while the step before was computed if there are workers."""
        groups = self._groups(step)
        if self._pool is None:
            for group in groups:
                yield group, self.kernel.collate(self.rows, group)
            return
        pending = self._ahead.pop(step, None) or self._prepare(groups, self._pool)
        if step + 1 < self.order.steps:
            self._ahead[step + 1] = self._prepare(self._groups(step + 1), self._pool)
        for group, future in zip(groups, pending, strict=True):
            yield group, future.result()

    def _prepare(self, groups: list[list[int]], pool: ThreadPoolExecutor) -> list[Future[Any]]:
        return [pool.submit(self.kernel.collate, self.rows, group) for group in groups]

    def _groups(self, step: int) -> list[list[int]]:
        """The rows of this rank's micro-batches."""
        rows = self.order.rows(step)
        lengths = [int(self.rows.lengths[row]) for row in rows]
        groups = micro_batches(lengths, self.budget, self.kernel.padded)
        mine = share(groups, lengths, self.placement.rank, self.placement.world)
        return [[int(rows[position]) for position in group] for group in mine]

    def _idle(self, step: int) -> None:
        """Passes without weight where the base is shared and another rank has more micro-batches: all gather alike."""
        if not self._shared:
            return
        rows = self.order.rows(step)
        lengths = [int(self.rows.lengths[row]) for row in rows]
        groups = micro_batches(lengths, self.budget, self.kernel.padded)
        shortest = int(rows[lengths.index(min(lengths))])
        for _ in range(idle_passes(groups, lengths, self.placement.rank, self.placement.world)):
            with self.placement.autocast():
                part = self.kernel.loss(self._core, self.kernel.collate(self.rows, [shortest]))
            torch.autograd.backward(part * 0.0)

    def _rehearse(self) -> None:
        """Tries the costliest micro-batch of the run, so that memory that does not suffice shows in the first minute.

        Leaves no trace: gradients go, and every step seeds its own random numbers.
        """
        group = costliest(self.rows.lengths, self.order, self.budget, self.kernel.padded)
        cost = int(self.rows.lengths[group].sum())
        ahead = (self.order.steps - self.progress.step) * self.training.batch_size * float(self.rows.lengths.mean())
        if self.placement.device.type != "cuda" and cost > REHEARSAL_SHARE * ahead:
            return
        failed = torch.zeros((), device=self.placement.device)
        try:
            with self.placement.autocast():
                loss = self.kernel.loss(self._core, self.kernel.collate(self.rows, group))
            torch.autograd.backward(loss * 0.0)
        except RuntimeError as error:
            self._require_may_halve(error, len(group))
            failed.fill_(1.0)
        self._forget()
        if self.placement.world > 1 and self.training.on_out_of_memory == "halve":
            dist.all_reduce(failed)
        if self._halved(bool(failed), failed):
            self._rehearse()

    def _reduced(self, loss: Tensor | None, stop: bool) -> tuple[Tensor, Tensor]:
        """Sums gradients, loss and flags over all ranks, in one all-reduce.

        Returns:
            The loss, and two flags: how many ranks want to leave, and how many ran out of memory.
        """
        device = self.placement.device
        flags = torch.tensor([float(stop), float(loss is None)])
        flags = (flags.pin_memory() if device.type == "cuda" else flags).to(device, non_blocking=True)
        loss = torch.zeros((), dtype=torch.float64, device=device) if loss is None else loss
        if self.placement.world == 1:
            return loss, flags
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), loss.float()[None], flags])
        dist.all_reduce(flat)
        offset = 0
        for parameter in self._parameters:
            parameter.grad = flat[offset : offset + parameter.numel()].view_as(parameter).clone()
            offset += parameter.numel()
        return flat[-3].double(), flat[-2:]

    def _apply(self, step: int, rows: Indices, loss: Tensor, stops: Tensor) -> _Figures:
        """Clips and steps, unless loss or gradient is not finite: then the weights stay as they are."""
        rate = self._rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.training.max_grad_norm)
        step_unless(~(torch.isfinite(norm) & torch.isfinite(loss)), self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.learning_rate = rate
        return _Figures(step, rows, Numbers(torch.stack([loss, norm.double(), stops.double()])))

    def _require_scale_explains(self, figures: _Figures, loss: float, norm: float) -> None:
        """Raises Diverged unless it is the loss scale that made a gradient overflow."""
        self._skipped += 1
        if self.placement.scales_loss and math.isfinite(loss) and self._skipped <= SKIPS_IN_A_ROW:
            return
        rows = figures.rows
        raise Diverged(
            f"step {figures.step + 1}: loss {loss:.4g}, gradient norm {norm:.4g}; the step was not applied. Its rows: "
            f"{', '.join(self.rows.origin(int(row)) for row in rows[:8])}{' …' if len(rows) > 8 else ''}. "
            "Lower training.learning_rate, or look at these rows"
        )


def step_unless(bad: Tensor, optimizer: Optimizer) -> None:
    """Steps, unless ``bad`` (a bool scalar on the device) is true: then weights and optimizer states stay as they are.

    torch's fused optimizers decide it on the device. bitsandbytes' cannot: with them the host waits for the answer. To
    put weights and states back afterwards would not be the same: they count their steps on the host.
    """
    if optimizer.defaults.get("fused"):
        gated: Any = optimizer
        gated.found_inf = bad.float()
        optimizer.step()
        del gated.found_inf
    elif not bool(bad):
        optimizer.step()


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
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def learning_rates(training: Training, steps: int) -> Callable[[int], float]:
    """The learning rate of each step (from 0), by transformers' schedules, as a function of the step alone."""
    warmup = math.ceil(training.warmup_ratio * steps)
    probe = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
    schedule: Any
    if training.schedule == "constant" or training.min_lr == training.learning_rate or warmup >= steps:
        schedule = get_constant_schedule_with_warmup(probe, warmup)
    elif training.schedule == "linear":
        schedule = get_polynomial_decay_schedule_with_warmup(probe, warmup, steps, lr_end=training.min_lr, power=1.0)
    else:
        schedule = get_cosine_with_min_lr_schedule_with_warmup(probe, warmup, steps, min_lr=training.min_lr)
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    # One later than transformers' own loop: there the first step has rate 0 and trains nothing.
    return lambda step: training.learning_rate * factor(step + 1 if step < warmup else step)
