"""Micro-batches as tensors: padding-free, and padded for the reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from job.data.prepared import Rows


@dataclass(frozen=True)
class Documents:
    """Where one row ends and the next begins in a padding-free batch."""

    lengths: list[int]
    """Tokens of each row."""
    starts: Tensor
    """Running sum of the lengths, from 0 (``cu_seqlens``): int32 ``[rows + 1]``, on the batch's device."""


@dataclass(frozen=True)
class Packed:
    """Rows one after the other, nothing between them."""

    tokens: Tensor
    """int64 ``[1, tokens]``."""
    positions: Tensor
    """int64 ``[1, tokens]``, from 0 in each row."""
    documents: Documents
    predictors: Tensor
    """int64 ``[trained]``: positions whose logits predict a trained token."""
    targets: Tensor
    """int64 ``[trained]``: the trained tokens."""


@dataclass(frozen=True)
class Padded:
    """Rows side by side, padded on the right."""

    tokens: Tensor
    """int64 ``[rows, longest]``."""
    attention: Tensor
    """int64 ``[rows, longest]``: 1 on tokens, 0 on padding, by position, whatever the padding token is."""
    predictors: Tensor
    """int64 ``[trained]``: positions in the flattened batch whose logits predict a trained token."""
    targets: Tensor
    """int64 ``[trained]``: the trained tokens, row by row."""


def pack(rows: Rows, indices: Sequence[int], device: torch.device) -> Packed:
    """Puts rows together without padding."""
    tokens = [rows.tokens(index) for index in indices]
    labels = [rows.labels(index) for index in indices]
    lengths = [len(row) for row in tokens]
    # A row's last token predicts nothing, and its first is predicted by nothing: shifting inside each row keeps
    # rows apart.
    shifted = np.concatenate([np.append(row[1:], -100) for row in labels])
    predictors = np.flatnonzero(shifted != -100)
    return Packed(
        tokens=_tensor(np.concatenate(tokens), device)[None],
        positions=_tensor(np.concatenate([np.arange(length) for length in lengths]), device)[None],
        documents=Documents(lengths, _moved(torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32), device)),
        predictors=_tensor(predictors, device),
        targets=_tensor(shifted[predictors], device),
    )


def pad(rows: Rows, indices: Sequence[int], padding: int, device: torch.device) -> Padded:
    """Puts rows side by side; ``padding`` is the token id put behind shorter ones."""
    longest = max(int(rows.lengths[index]) for index in indices)
    tokens = np.full((len(indices), longest), padding, dtype=np.int64)
    attention = np.zeros_like(tokens)
    shifted = np.full_like(tokens, -100)
    for line, index in enumerate(indices):
        row = rows.tokens(index)
        tokens[line, : len(row)] = row
        attention[line, : len(row)] = 1
        shifted[line, : len(row) - 1] = rows.labels(index)[1:]
    predictors = np.flatnonzero(shifted != -100)
    return Padded(
        tokens=_tensor(tokens, device),
        attention=_tensor(attention, device),
        predictors=_tensor(predictors, device),
        targets=_tensor(shifted.flatten()[predictors], device),
    )


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return _moved(torch.from_numpy(values.astype(np.int64)), device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; only a copy out of pinned memory does not wait for what the device is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
