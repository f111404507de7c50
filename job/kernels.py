"""Two ways to the logits of trained tokens: padding-free, and the model's own forward on padded rows.

The second is the reference. The first is compared with it at the start of every run; a model whose parts cannot be
kept apart by rows (recurrent layers, soft-capped attention, sinks) falls back to the reference, and the run says so.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from job.batch import Documents, Packed, Padded, pack, pad
from job.prepared import Rows

log = logging.getLogger(__name__)

PACKED_ATTENTION = "tunejob_documents"
STOCK_ATTENTION = "sdpa"

_AGREE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Largest relative difference of loss and gradient that counts as the same, by precision."""


class UnsupportedAttention(Exception):
    """The model asks attention for something that the padding-free path does not have."""


def _documents_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each row of a padding-free batch.

    Args:
        query: ``[1, heads, tokens, width]``; ``key`` and ``value`` may have fewer heads.

    Returns:
        ``[1, tokens, heads, width]``, and no weights.
    """
    if documents is None:
        raise UnsupportedAttention("the model does not pass on where its rows end")
    refused = [name for name in ("softcap", "s_aux", "position_bias") if unknown.get(name) is not None]
    if refused:
        raise UnsupportedAttention(f"attention with {', '.join(refused)}")
    window = sliding_window if sliding_window and max(documents.lengths) > sliding_window else None
    if _has_varlen(query, dropout):
        return _varlen(query, key, value, scaling, documents, window), None
    gqa = query.shape[1] != key.shape[1]
    parts = [
        functional.scaled_dot_product_attention(
            q, k, v, _window(q, window), dropout, is_causal=window is None, scale=scaling, enable_gqa=gqa
        )
        for q, k, v in zip(*(torch.split(t, documents.lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _window(query: Tensor, window: int | None) -> Tensor | None:
    """Causal mask of the last ``window`` tokens, bool ``[tokens, tokens]``."""
    if window is None:
        return None
    ones = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
    return ones.tril() & ones.triu(1 - window)


def _has_varlen(query: Tensor, dropout: float) -> bool:
    """torch's variable-length kernel: CUDA from Ampere on, 16 bit, heads up to 256 wide, without dropout."""
    return (
        query.is_cuda
        and torch.version.hip is None
        and dropout == 0.0
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, documents: Documents, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(documents.lengths)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        documents.starts,
        documents.starts,
        longest,
        longest,
        scale=scaling,
        window_size=(window - 1 if window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    if isinstance(output, tuple):
        raise UnsupportedAttention("torch's variable-length attention returned more than its output")
    return output[None]


AttentionInterface.register(PACKED_ATTENTION, _documents_attention)
# Without a mask function of its own, a registered attention is called with no mask and no warning; ours needs none,
# and says so.
AttentionMaskInterface.register(PACKED_ATTENTION, lambda *args, **kwargs: None)


class Kernel(Protocol):
    """A way from rows to the logits of their trained tokens."""

    @property
    def name(self) -> str:
        """As records name it."""
        ...

    @property
    def padded(self) -> bool:
        """Whether a micro-batch costs its longest row times its rows."""
        ...

    @property
    def implementation(self) -> str:
        """The attention that ``attention`` has to switch on while it is used."""
        ...

    def collate(self, rows: Rows, indices: Sequence[int]) -> Any:
        """The rows as tensors on the device; safe to call in another thread."""
        ...

    def logits(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Logits ``[trained, vocabulary]`` and the trained tokens ``[trained]``, in the rows' order."""
        ...


@dataclass(frozen=True)
class Reference:
    """The model's own forward on padded rows."""

    padding: int
    device: torch.device
    name: str = "reference"
    padded: bool = True
    implementation: str = STOCK_ATTENTION

    def collate(self, rows: Rows, indices: Sequence[int]) -> Padded:
        return pad(rows, indices, self.padding, self.device)

    def logits(self, model: nn.Module, batch: Padded) -> tuple[Tensor, Tensor]:
        output = model(input_ids=batch.tokens, attention_mask=batch.attention, use_cache=False)
        return output.logits[batch.predicts], batch.targets


@dataclass(frozen=True)
class PaddingFree:
    """Rows one after the other, attention inside each row, the head on trained tokens only."""

    device: torch.device
    name: str = "padding-free"
    padded: bool = False
    implementation: str = PACKED_ATTENTION

    def collate(self, rows: Rows, indices: Sequence[int]) -> Packed:
        return pack(rows, indices, self.device)

    def logits(self, model: nn.Module, batch: Packed) -> tuple[Tensor, Tensor]:
        output = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=batch.predictors,
            documents=batch.documents,
        )
        return output.logits[0], batch.targets


@contextmanager
def attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Has the model's layers use an attention implementation inside the block.

    Walks the model's modules, so it stands around a loop, never inside a step.
    """
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation_internal = implementation
    try:
        yield
    finally:
        for config, implementation_before in before:
            config._attn_implementation_internal = implementation_before


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross entropies (nats) in float32; the caller divides by the tokens of the whole step."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


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
    candidates: tuple[PaddingFree, Reference],
    autocast: Callable[[], Any],
    precision: torch.dtype,
) -> Choice:
    """Runs ``probe`` through both kernels without dropout and takes the padding-free one if they agree.

    Args:
        probe: rows to compare on; several, or nothing is seen to leak from one into the next.
        autocast: context in which the run computes.
    """
    fast, reference = candidates
    was_training = model.training
    model.eval()
    try:
        with autocast():
            expected = _loss_and_gradient(model, rows, probe, reference)
            found = _loss_and_gradient(model, rows, probe, fast)
    except (UnsupportedAttention, TypeError, ValueError) as error:
        return _fall_back(reference, f"padding-free batches do not work with this model: {error}")
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
    differences = [_relative(a, b) for a, b in zip(found, expected, strict=True)]
    worst = max(differences)
    if not worst <= _AGREE[precision]:
        return _fall_back(reference, f"padding-free batches differ from the reference by {worst:.2e}")
    return Choice(fast, f"agrees with the reference: largest relative difference {worst:.1e}")


def _fall_back(reference: Reference, reason: str) -> Choice:
    log.warning("kernels: %s; going on with the reference", reason)
    return Choice(reference, reason)


def _loss_and_gradient(model: nn.Module, rows: Rows, indices: Sequence[int], kernel: Kernel) -> list[Tensor]:
    """Loss, and the gradient of every trained parameter."""
    model.zero_grad(set_to_none=True)
    with attention(model, kernel.implementation):
        logits, targets = kernel.logits(model, kernel.collate(rows, indices))
        loss = cross_entropy_sum(logits, targets) / max(1, len(targets))
        torch.autograd.backward(loss)
    trained = (p for p in model.parameters() if p.requires_grad)
    flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained])
    return [loss.detach(), flat]


def _relative(found: Tensor, expected: Tensor) -> float:
    scale = max(float(expected.norm()), 1e-12)
    return float((found - expected).norm()) / scale
