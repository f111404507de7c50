"""Whether a model keeps rows that lie one behind the other apart: by what it is made of, and by trying it.

Attention can be told where a row ends. A state-space layer, linear attention or a convolution along time cannot: it
goes on from the row before, and what it takes along may be too little to tell from rounding in 16 bits. So such models
are told by their parts; the trial is for what nobody thought of.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from job.data.prepared import Ids, Rows
from job.sizing.parts import kind_of

_KINDS = frozenset(["attention", "full_attention", "sliding_attention"])
"""Kinds of layers, as transformers' configs name them, that our attention takes the place of."""

_LEAK = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 5e-4}
"""Largest mean change (nats) of later rows' losses that counts as none where tokens share out experts, by precision."""

_PIECES = (64, 16, 32)
"""Tokens of the three pieces that kernels are compared on, at most. Their logits are held whole, and all that they keep
for the way back: more would not fit beside a model that trains only because it recomputes (70 billion parameters keep
about 30 MB a token)."""


def probe_of(lengths: npt.NDArray[np.int32]) -> list[int]:
    """Three rows to compare kernels on, the longest first; a row stands in more than once where there are fewer."""
    order = np.argsort(lengths, kind="stable")
    return [int(order[-1]), int(order[0]), int(order[min(1, len(order) - 1)])]


class Pieces:
    """Rows cut short, to be read like rows: the piece of each that ends with its last trained token."""

    def __init__(self, rows: Rows, indices: Sequence[int]) -> None:
        self._tokens: list[Ids] = []
        self._labels: list[Any] = []
        for place, index in enumerate(indices):
            tokens, labels = rows.tokens(index), rows.labels(index)
            trained = np.flatnonzero(labels != -100)
            end = int(trained[-1]) + 1 if len(trained) else len(tokens)
            piece = slice(max(0, end - _PIECES[place % len(_PIECES)]), end)
            self._tokens.append(tokens[piece])
            self._labels.append(np.append(np.int64(-100), labels[piece][1:]))
        self.lengths = np.array([len(tokens) for tokens in self._tokens], dtype=np.int32)
        self.supervised = np.array([int((labels != -100).sum()) for labels in self._labels], dtype=np.int32)

    def tokens(self, i: int) -> Ids:
        """Token ids of a piece."""
        return self._tokens[i]

    def labels(self, i: int) -> Any:
        """The same with -100 where nothing is trained; its first token has nothing that could predict it."""
        return self._labels[i]

    def __len__(self) -> int:
        return len(self._tokens)


class _Altered:
    """The same rows with the first one changed: as long, but of other tokens."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def tokens(self, i: int) -> Ids:
        row: Ids = self._rows.tokens(i)
        # Moved on by one: the last token, which is all that some layers look back to, is another one too.
        return np.roll(row, 1) if i == 0 else row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rows, name)


def leaks(model: nn.Module, rows: Any, kernel: Any, precision: torch.dtype) -> bool:
    """Whether the losses of later rows change with the tokens of the first, which stays as long as it is.

    All shapes stay as they are, so that not a bit may change. Only where all tokens share something out (experts, the
    outliers of 8-bit layers) other tokens round otherwise.
    """
    together, altered = range(len(rows)), _Altered(rows)
    with torch.no_grad(), kernel.installed(model):
        one, other = (kernel.score(model, kernel.collate(which, together)).losses for which in (rows, altered))
    after = slice(int(rows.supervised[0]), None)
    if _shares(model):
        return not float((one[after] - other[after]).abs().mean().nan_to_num(0.0)) <= _LEAK[precision]
    return not torch.equal(one[after], other[after])


def _shares(model: nn.Module) -> bool:
    """Whether how a token is rounded may depend on the other tokens of its batch."""
    return any(
        kind_of(name) in ("experts", "router") or type(module).__name__ == "Linear8bitLt"
        for name, module in model.named_modules()
    )


def refusal(core: Any) -> str | None:
    """Why rows cannot lie one behind the other in a causal language model, by what it is made of; None if they can."""
    kinds = sorted(_kinds(core.config) - _KINDS)
    if kinds:
        return f"its layers are {', '.join(kinds)}, which would go on from the row before"
    for name, module in core.named_modules():
        if isinstance(module, nn.Conv1d | nn.RNNBase) and kind_of(name) != "vision":
            return f"{name} is a {type(module).__name__} along time, which would go on from the row before"
    layers = _layers(core)
    if not layers:
        return "its layers are not known"
    bare = [type(layer).__name__ for layer in layers if not any(hasattr(part, "is_causal") for part in layer.modules())]
    return f"a {bare[0]} has no attention that could be told where a row ends" if bare else None


def _kinds(config: Any) -> set[str]:
    """What a config says its layers are."""
    text, found = config.get_text_config(), set[str]()
    for name in ("layer_types", "layers_block_type", "block_types"):
        with suppress(NotImplementedError):
            found |= set(getattr(text, name, None) or ())
    return found


def _layers(core: Any) -> list[nn.Module]:
    """The decoder layers: of the lists of modules the outermost that has as many."""
    count = getattr(core.config.get_text_config(), "num_hidden_layers", None)
    lists = (m for n, m in core.named_modules() if isinstance(m, nn.ModuleList) and kind_of(n) != "vision")
    return next((list(found) for found in lists if len(found) == count), [])
