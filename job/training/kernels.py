"""Ways from rows to the loss of their trained tokens. The reference is the model's own forward on padded rows.

The others are tried in order and compared with the reference at the start of every run: the first that gives its loss
and gradient is used, on all ranks the same. A model whose parts cannot be kept apart by rows (recurrent layers,
soft-capped attention, sinks) or whose head is not plain falls back, and the run says so.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor, nn

from job.data.prepared import Rows
from job.training import apart, linear
from job.training.apart import Pieces
from job.training.attention import PACKED_ATTENTION, UnsupportedModel, attention, stock_attention
from job.training.batch import Packed, Padded, pack, pad
from job.training.device import Placement
from job.training.failures import is_out_of_memory
from job.training.head import ChunkedHead, Scores, chunked_head, cross_entropy_sum, scores_of

log = logging.getLogger(__name__)

_AGREE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest relative difference of loss and gradient that counts as the same, by precision."""


class Kernel(Protocol):
    """A way from rows to the loss of their trained tokens."""

    @property
    def name(self) -> str:
        """As records name it."""
        ...

    @property
    def padded(self) -> bool:
        """Whether a micro-batch costs its longest row times its rows."""
        ...

    def installed(self, model: nn.Module) -> AbstractContextManager[None]:
        """Switches on in the model what ``loss`` and ``score`` need; around a loop, never inside a step."""
        ...

    def collate(self, rows: Rows, indices: Sequence[int]) -> Any:
        """The rows as tensors on the device; safe to call in another thread."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Sum of the cross entropies (nats) of the trained tokens, a scalar to differentiate."""
        ...

    def score(self, model: nn.Module, batch: Any) -> Scores:
        """Loss and rank of each trained token, without gradients."""
        ...


class _Layout(ABC):
    """What both layouts do with their logits or hidden states; a head of None is the model's own."""

    head: ChunkedHead | None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        if self.head is None:
            return cross_entropy_sum(self.logits(model, batch), batch.targets)
        return self.head.loss(self.hidden(model, batch), batch.targets)

    def score(self, model: nn.Module, batch: Any) -> Scores:
        if self.head is None:
            return scores_of(self.logits(model, batch), batch.targets)
        return self.head.scores(self.hidden(model, batch), batch.targets)

    @abstractmethod
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Logits that predict trained tokens, ``[trained, vocabulary]``, by the model's own head."""

    @abstractmethod
    def hidden(self, model: nn.Module, batch: Any) -> Tensor:
        """What the head is given at the positions that predict trained tokens, ``[trained, width]``."""


@dataclass(frozen=True)
class Reference(_Layout):
    """The model's own forward on padded rows; with a chunked head only its backbone."""

    padding: int
    device: torch.device
    head: ChunkedHead | None = None
    padded: bool = True

    @property
    def name(self) -> str:
        return "reference" if self.head is None else "padded, chunked head"

    def installed(self, model: nn.Module) -> AbstractContextManager[None]:
        return attention(model, stock_attention(model))

    def collate(self, rows: Rows, indices: Sequence[int]) -> Padded:
        return pad(rows, indices, self.padding, self.device)

    def logits(self, model: nn.Module, batch: Padded) -> Tensor:
        output = model(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False).logits
        return output.flatten(0, 1).index_select(0, batch.predictors)  # type: ignore[no-any-return]

    def hidden(self, model: nn.Module, batch: Padded) -> Tensor:
        backbone: Any = model.base_model
        output = backbone(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False).last_hidden_state
        return output.flatten(0, 1).index_select(0, batch.predictors)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PaddingFree(_Layout):
    """Rows one after the other, attention inside each row."""

    device: torch.device
    head: ChunkedHead | None = None
    implementation: str = PACKED_ATTENTION
    private: bool = False
    """Frozen layers go through an operator that torch gives no public name (``job.training.linear``)."""
    padded: bool = False

    @property
    def name(self) -> str:
        private = f", {linear.NAME}" if self.private else ""
        return f"padding-free{private}" if self.head is not None else "padding-free, own head"

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        product = linear.product if self.private else functional.linear
        with attention(model, self.implementation), linear.plugged(model, product):
            yield

    def collate(self, rows: Rows, indices: Sequence[int]) -> Packed:
        return pack(rows, indices, self.device)

    def logits(self, model: nn.Module, batch: Packed) -> Tensor:
        return model(**self._inputs(batch), logits_to_keep=batch.predictors).logits[0]  # type: ignore[no-any-return]

    def hidden(self, model: nn.Module, batch: Packed) -> Tensor:
        backbone: Any = model.base_model
        output = backbone(**self._inputs(batch)).last_hidden_state
        return output[0].index_select(0, batch.predictors)  # type: ignore[no-any-return]

    def _inputs(self, batch: Packed) -> dict[str, Any]:
        return {
            "input_ids": batch.tokens,
            "position_ids": batch.positions,
            "use_cache": False,
            "documents": batch.documents,
        }


Factory = Callable[[Any, torch.device, int], Kernel]
"""Makes a kernel for a causal language model, a device and a padding token. Raises UnsupportedModel, saying why not."""


def _through_private_operators(core: Any, device: torch.device, padding: int) -> Kernel:
    refusal = linear.refusal(device, core.dtype)
    if refusal is not None:
        raise UnsupportedModel(refusal)
    return PaddingFree(device, replace(chunked_head(core), product=linear.product), private=True)


_factories: list[Factory] = [
    _through_private_operators,
    lambda core, device, padding: PaddingFree(device, chunked_head(core)),
    lambda core, device, padding: PaddingFree(device),
    lambda core, device, padding: Reference(padding, device, chunked_head(core)),
]


@contextmanager
def registered(factory: Factory) -> Iterator[None]:
    """Has ``choose`` try a kernel before all others inside the block."""
    _factories.insert(0, factory)
    try:
        yield
    finally:
        _factories.remove(factory)


@dataclass(frozen=True)
class Choice:
    """Which kernel a run uses, and why; recorded in checkpoints and results."""

    kernel: Kernel
    reason: str

    def record(self) -> dict[str, str]:
        """As it stands in JSON."""
        return {"name": self.kernel.name, "reason": self.reason}


def choose(
    model: nn.Module,
    rows: Rows,
    probe: Sequence[int],
    reference: Reference,
    placement: Placement,
) -> Choice:
    """The first kernel that gives the reference's loss and gradient on pieces of ``probe``, else the reference.

    Every rank comes to the same: rows are dealt out by what a kernel makes of their lengths, so that ranks of unlike
    kernels would train some rows twice and others never. What one rank refuses, none takes.

    Args:
        probe: rows to compare on; several, or nothing is seen to leak from one into the next.
    """
    was_training = model.training
    model.eval()
    refused: list[str] = []
    try:
        with placement.autocast():
            trial = _Trial(model, Pieces(rows, probe), reference, placement)
            for kernel in _made(model, reference, refused, placement):
                objection, found = trial.of(kernel)
                if all_say(objection is None, placement):
                    return Choice(kernel, "; ".join([found, *refused]))
                refused.append(objection or f"another rank refuses {kernel.name}")
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    reason = "; ".join(refused)
    log.warning("kernels: %s; going on with the reference", reason)
    return Choice(reference, reason)


def all_say(here: bool, placement: Placement) -> bool:
    """Whether every rank says so; all of them have to ask."""
    if placement.world == 1:
        return here
    said = torch.tensor(float(here), device=placement.device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return bool(said)


def named(model: nn.Module, name: str, reference: Reference, placement: Placement, reason: str) -> Choice | None:
    """The kernel that a checkpoint names; None, saying so, if it can no longer be had here or on another rank."""
    if name == reference.name:
        return Choice(reference, reason)
    refused: list[str] = []
    for kernel in _made(model, reference, refused, placement):
        if kernel.name == name:
            return Choice(kernel, reason)
    why = "; ".join(refused) or "unknown"
    log.warning(
        "kernels: the run began with %s, which is not to be had here (%s): not bit for bit from here", name, why
    )
    return None


def _made(model: nn.Module, reference: Reference, refused: list[str], placement: Placement) -> Iterator[Kernel]:
    """Every kernel that the model can have on all ranks, by what it is made of."""
    mixed = apart.refusal(model)
    if mixed is not None:
        refused.append(f"rows one behind the other: {mixed}")
    for factory in _factories:
        kernel: Kernel | None = None
        try:
            kernel = factory(model, reference.device, reference.padding)
        except UnsupportedModel as error:
            refused.append(str(error))
        if kernel is not None and not kernel.padded and mixed is not None:
            kernel = None
        if all_say(kernel is not None, placement):
            yield kernel  # type: ignore[misc]
        elif kernel is not None:
            refused.append(f"another rank has no {kernel.name}")


class _Trial:
    """A comparison of kernels with the reference."""

    def __init__(self, model: nn.Module, pieces: Pieces, reference: Reference, placement: Placement) -> None:
        self._model, self._pieces, self._precision = model, pieces, placement.precision
        self._expected = _loss_and_gradient(model, pieces, reference)

    def of(self, kernel: Kernel) -> tuple[str | None, str]:
        """What there is to object to a kernel, None if nothing; and how well it agrees."""
        try:
            found = _loss_and_gradient(self._model, self._pieces, kernel)
        except (UnsupportedModel, TypeError, ValueError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            return f"{kernel.name} does not work with this model: {error}", ""
        worst = max(_relative(a, b) for a, b in zip(found, self._expected, strict=True))
        if not kernel.padded and apart.leaks(self._model, self._pieces, kernel, self._precision):
            return f"with {kernel.name} a row's loss depends on the row before it", ""
        if not worst <= _AGREE[self._precision]:
            return f"{kernel.name} differs from the reference by {worst:.2e}", ""
        return None, f"agrees with the reference: largest relative difference {worst:.1e}"


def _loss_and_gradient(model: nn.Module, pieces: Any, kernel: Kernel) -> list[Tensor]:
    """Loss, and the gradient of every trained parameter."""
    model.zero_grad(set_to_none=True)
    with kernel.installed(model):
        batch = kernel.collate(pieces, range(len(pieces)))
        loss = kernel.loss(model, batch) / max(1, len(batch.targets))
        torch.autograd.backward(loss)
    trained = (p for p in model.parameters() if p.requires_grad)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained])
    return [loss.detach(), flat]


def _relative(found: Tensor, expected: Tensor) -> float:
    scale = max(float(expected.norm()), 1e-12)
    difference = float((found - expected).norm()) / scale
    return difference if difference == difference else float("inf")
