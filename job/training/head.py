"""The output head on trained tokens only, and in chunks: no tensor of trained tokens x vocabulary ever exists.

A chunk's logits live until its loss and the gradient of its hidden states are known; since the head is frozen nothing
else is needed of them, and the backward pass is a multiplication (as in cut cross-entropy, arXiv:2411.09009, with
torch's own products instead of a kernel that has to be compiled).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from job.training.attention import UnsupportedModel

CHUNK_BYTES = 1 << 26
"""Bytes that a chunk's logits may take in float32."""


class Scores(NamedTuple):
    """How a model does on the trained tokens of a batch, in the rows' order."""

    losses: Tensor
    """Cross entropies (nats), float32 ``[trained]``."""
    right: Tensor
    """bool ``[trained]``: the token ranks first."""


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies (nats) in float32; the caller divides by the tokens of the whole step."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def scores_of(logits: Tensor, targets: Tensor) -> Scores:
    """Scores by whole logits ``[trained, vocabulary]``."""
    losses = functional.cross_entropy(logits.float(), targets, reduction="none")
    return Scores(losses, logits.argmax(-1) == targets)


@dataclass(frozen=True)
class ChunkedHead:
    """A frozen output head and what its model does to its logits."""

    weight: Tensor
    """``[vocabulary, width]``."""
    bias: Tensor | None
    scale: float = 1.0
    """What logits are multiplied by."""
    softcap: float | None = None
    """Logits are bounded by ``softcap * tanh(logits / softcap)``, after the scale (Gemma 2, arXiv:2408.00118)."""
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = functional.linear
    """Multiplies ``[rows, in]`` by ``[out, in]`` transposed, and adds a bias; need not be differentiable."""

    @property
    def rows(self) -> int:
        """Tokens in a chunk."""
        return max(1, CHUNK_BYTES // (4 * self.weight.shape[0]))

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross entropies (nats), a float64 scalar; no token gives 0 that can still be differentiated.

        Args:
            hidden: what the head is given at the positions that predict the targets, ``[trained, width]``.
            targets: int64 ``[trained]``.
        """
        total: Tensor = _ChunkedLoss.apply(hidden, targets, self)  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def scores(self, hidden: Tensor, targets: Tensor) -> Scores:
        """What ``loss`` adds up, and whether each target ranks first."""
        losses, right = torch.empty(len(targets), device=hidden.device), torch.empty_like(targets, dtype=torch.bool)
        for start in range(0, len(targets), self.rows):
            part = slice(start, start + self.rows)
            logits, wanted = self._logits(hidden[part]), targets[part, None]
            top = logits.argmax(-1, keepdim=True)
            right[part] = (top == wanted)[:, 0]
            losses[part] = (logits.logsumexp(-1, keepdim=True) - logits.gather(-1, wanted))[:, 0]
        return Scores(losses, right)

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 ``[chunk, vocabulary]``, a buffer of the caller's own."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.product(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def _loss_and_gradient(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of a chunk's losses, and its gradient by ``hidden``; the logits' buffer becomes their gradient."""
        logits = self._logits(hidden)
        slope = None if self.softcap is None else (logits / self.softcap).square_().neg_().add_(1.0)
        chosen = logits.gather(-1, wanted)
        highest = logits.amax(-1, keepdim=True)
        total = logits.sub_(highest).exp_().sum(-1, keepdim=True)
        losses = total.log().add_(highest).sub_(chosen)
        logits.div_(total).scatter_add_(-1, wanted, torch.full_like(chosen, -1.0))
        if slope is not None:
            logits.mul_(slope)
        if self.scale != 1.0:
            logits.mul_(self.scale)
        with torch.autocast(hidden.device.type, enabled=False):
            gradient = self.product(logits.to(self.weight.dtype), self.weight.t(), None)
            return losses.double().sum(), gradient


class _ChunkedLoss(torch.autograd.Function):
    """Computes the gradient along with the loss, so that no logits are kept for later or computed again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: ChunkedHead) -> Tensor:
        # A loss scale reaches this gradient only later: float16 would have lost its small values by then.
        kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        gradient = torch.empty(hidden.shape, dtype=kept, device=hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, len(targets), head.rows):
            part = slice(start, start + head.rows)
            loss, gradient[part] = head._loss_and_gradient(hidden[part], targets[part, None])
            total += loss
        ctx.save_for_backward(gradient)
        ctx.kind = hidden.dtype
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer.to(gradient.dtype)).to(ctx.kind), None, None


_PLAIN: Callable[[Any], tuple[float, float | None]] = lambda config: (1.0, None)  # noqa: E731
_FAMILIES: dict[str, Callable[[Any], tuple[float, float | None]]] = {
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "phi3": _PLAIN,
    "smollm3": _PLAIN,
    "olmo2": _PLAIN,
    "gemma": _PLAIN,
    "gpt2": _PLAIN,
    "gemma2": lambda config: (1.0, config.final_logit_softcapping),
    "gemma3_text": lambda config: (1.0, config.final_logit_softcapping),
    "granite": lambda config: (1.0 / config.logits_scaling, None),
    "cohere": lambda config: (config.logit_scale, None),
}
"""Scale and soft-cap of the logits, for the model types whose equality with the model's own forward a test proves."""


def chunked_head(core: Any) -> ChunkedHead:
    """The head of a causal language model.

    Raises:
        UnsupportedModel: the head trains, is not whole on this device, or the model's own maths around it is not
            known; then only the model's own forward is right.
    """
    family = core.config.model_type
    if family not in _FAMILIES:
        raise UnsupportedModel(f"what {family} does to its logits is not proven for the chunked head")
    head = core.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise UnsupportedModel(f"the output head is a {type(head).__name__} and no plain layer")
    if any(parameter.requires_grad for parameter in head.parameters()):
        raise UnsupportedModel("the output head is trained")
    if type(head.weight.data) is not Tensor:
        raise UnsupportedModel(f"the output head is held as {type(head.weight.data).__name__}")
    scale, softcap = _FAMILIES[family](core.config)
    return ChunkedHead(head.weight, head.bias, scale, softcap=softcap)
