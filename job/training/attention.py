"""Causal attention inside each row of a padding-free batch, as an implementation that transformers knows by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import AttentionInterface

from job.training.batch import Documents

PACKED_ATTENTION = "tunejob_documents"


class UnsupportedModel(Exception):
    """The model asks for something that a kernel does not have."""


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
        raise UnsupportedModel("the model does not pass on where its rows end")
    refused = [name for name in ("softcap", "s_aux", "position_bias") if unknown.get(name) is not None]
    if refused:
        raise UnsupportedModel(f"attention with {', '.join(refused)}")
    window = sliding_window if sliding_window and max(documents.lengths) > sliding_window else None
    if _has_varlen(query, dropout):
        return _varlen(query, key, value, scaling, documents, window), None
    gqa = query.shape[1] != key.shape[1]
    if gqa and _repeats(query):
        groups = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    parts = [
        functional.scaled_dot_product_attention(
            q, k, v, _window(q, window), dropout, is_causal=window is None, scale=scaling, enable_gqa=gqa
        )
        for q, k, v in zip(*(torch.split(t, documents.lengths, dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _repeats(query: Tensor) -> bool:
    """Whether each head needs keys of its own.

    On CUDA, where the variable-length kernel cannot be had, only the memory-efficient one is left, and it knows no
    shared keys: torch would make all scores of a row at once. The CPU's knows them.
    """
    return query.is_cuda and torch.version.hip is None


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
        raise UnsupportedModel("torch's variable-length attention returned more than its output")
    return output[None]


# Registered without a mask function of its own, which for transformers means: no mask (masking_utils). That is what it
# needs; with one, transformers would first look through the positions for packed rows and make the host wait for them.
AttentionInterface.register(PACKED_ATTENTION, _documents_attention)


def stock_attention(core: Any) -> str:
    """transformers' own implementation for a model: SDPA, or the eager one where scores are bounded or have sinks."""
    config = core.config
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap is not None or not core._supports_sdpa else "sdpa"


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
