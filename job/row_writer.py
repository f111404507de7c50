"""One set of tokenised rows on its way to disk: encoded in batches, cut or dropped by policy, counted, digested."""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from job.chat import Rendered
from job.encode import Encoded, Encoder
from job.errors import DataInvalid, SpecInvalid
from job.rows import Row

_BATCH_ROWS = 1000
_BATCH_CHARACTERS = 4_000_000
"""Bounds of what is held in memory before it is tokenised and written."""

TOO_LONG, NOTHING_TRAINED = "longer than training.max_length", "nothing left to train"


@dataclass(frozen=True)
class Limits:
    """What a row may be."""

    max_length: int
    """Tokens."""
    long_rows: str
    """``training.long_rows``."""
    vocabulary: int | None
    """Token ids of the model; None if its config does not say."""


@dataclass
class Counts:
    """What became of the rows of one set."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    supervised: int = 0
    lost_tokens: int = 0
    """In rows dropped and in what was cut off."""
    longest: int = 0
    """Tokens of the longest row as it was read."""
    unlike_prompt: int = 0
    """Rows whose text does not begin with the prompt the model is asked with."""
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    endings: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)

    def record(self) -> dict[str, Any]:
        """For report.json."""
        names = ("read", "kept", "cut", "tokens", "supervised", "lost_tokens", "longest", "unlike_prompt")
        lengths = np.frombuffer(self.lengths, dtype=np.int32) if self.lengths else np.zeros(1, dtype=np.int32)
        marks = {f"p{q}": int(np.percentile(lengths, q, method="lower")) for q in (50, 90, 99)}
        return {name: getattr(self, name) for name in names} | {
            "dropped": dict(self.dropped),
            "length": marks | {"max": int(lengths.max())},
            "masks": dict(self.ways),
        }


class RowWriter:
    """Takes rendered rows, leaves ``data.arrow``."""

    def __init__(self, path: Path, encoder: Encoder, limits: Limits) -> None:
        from datasets.arrow_writer import ArrowWriter

        path.parent.mkdir(parents=True)
        self.counts = Counts()
        self._path = path
        self._encoder = encoder
        self._limits = limits
        self._waiting: list[tuple[Row, int, Rendered]] = []
        self._characters = 0
        self._digest = hashlib.sha256()
        self._writer: Any = ArrowWriter(path=str(path), features=_features())

    def add(self, row: Row, source: int, rendered: Rendered) -> None:
        """Takes one row; it is written with its batch.

        Args:
            source: index of its file.

        Raises:
            DataInvalid: a row is too long and ``training.long_rows`` is ``error``.
            SpecInvalid: a token id is outside the model's vocabulary.
        """
        self._waiting.append((row, source, rendered))
        self._characters += len(rendered.text)
        if len(self._waiting) >= _BATCH_ROWS or self._characters >= _BATCH_CHARACTERS:
            self._flush()

    def close(self) -> str:
        """Writes what is waiting; a set without rows leaves no file. Returns the digest (hex) of all rows."""
        self._flush()
        self._writer.finalize()
        if not self.counts.kept:
            self._path.unlink()
            self._path.parent.rmdir()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        encoded = self._encoder.encode([rendered for _, _, rendered in self._waiting])
        fitted = [self._fit(row, one) for (row, _, _), one in zip(self._waiting, encoded, strict=True)]
        kept = [(waiting, one) for waiting, one in zip(self._waiting, fitted, strict=True) if one is not None]
        for (_, source, rendered), one in kept:
            self._count(one, source, rendered)
        if kept:
            self._writer.write_table(_table(kept))
        self._waiting, self._characters = [], 0

    def _fit(self, row: Row, one: Encoded) -> Encoded | None:
        """The row as the policy leaves it; None if it is dropped."""
        counts, limit, policy = self.counts, self._limits.max_length, self._limits.long_rows
        length = len(one.tokens)
        counts.read += 1
        counts.longest = max(counts.longest, length)
        self._check_vocabulary(row, one)
        fitted: Encoded | None = one
        if length > limit:
            if policy == "error":
                raise DataInvalid(
                    f"{row.origin}: {length} tokens, over training.max_length {limit}, and long_rows is error; "
                    "raise max_length, or choose drop, truncate or truncate_prompt"
                )
            cut = {"truncate": self._encoder.cut_end, "truncate_prompt": self._encoder.cut_prompt}.get(policy)
            fitted = cut(one, limit) if cut is not None else None
        if fitted is None or not fitted.supervised:
            counts.dropped[TOO_LONG if fitted is None else NOTHING_TRAINED] += 1
            counts.lost_tokens += length
            return None
        counts.cut += fitted is not one
        counts.lost_tokens += length - len(fitted.tokens)
        return fitted

    def _check_vocabulary(self, row: Row, one: Encoded) -> None:
        size = self._limits.vocabulary
        if size is not None and len(one.tokens) and int(one.tokens.max()) >= size:
            raise SpecInvalid(
                f"model.from: {row.origin} has token id {int(one.tokens.max())}, the model knows {size} (vocab_size in "
                "its config.json); its tokenizer and its weights do not belong together"
            )

    def _count(self, one: Encoded, source: int, rendered: Rendered) -> None:
        counts = self.counts
        counts.kept += 1
        counts.tokens += len(one.tokens)
        counts.supervised += one.supervised
        counts.lengths.append(len(one.tokens))
        counts.ways[rendered.way] += 1
        counts.unlike_prompt += not rendered.text.startswith(rendered.prompt)
        counts.endings[rendered.ending] += 1
        self._digest.update(np.array([source, len(one.tokens)], dtype="<i8").tobytes())
        self._digest.update(one.tokens.astype("<i4").tobytes() + one.trained.tobytes())


def _features() -> Any:
    from datasets import Features, List, Value

    numbers = {"length": "int32", "supervised": "int32", "source": "int16", "number": "int64", "answer": "string"}
    lists = {"tokens": "int32", "trained": "int8", "prompt": "int32"}
    return Features(
        {name: List(Value(kind)) for name, kind in lists.items()}
        | {name: Value(kind) for name, kind in numbers.items()}
    )


def _table(kept: list[tuple[tuple[Row, int, Rendered], Encoded]]) -> Any:
    import pyarrow as pa

    rows = [row for (row, _, _), _ in kept]
    encoded = [one for _, one in kept]
    columns = {
        "tokens": _lists([one.tokens for one in encoded], np.int32),
        "trained": _lists([one.trained for one in encoded], np.int8),
        "prompt": _lists([one.prompt for one in encoded], np.int32),
        "length": pa.array([len(one.tokens) for one in encoded], pa.int32()),
        "supervised": pa.array([one.supervised for one in encoded], pa.int32()),
        "source": pa.array([source for (_, source, _), _ in kept], pa.int16()),
        "number": pa.array([row.number for row in rows], pa.int64()),
        "answer": pa.array([one.answer for one in encoded], pa.string()),
    }
    return pa.table(columns)


def _lists(arrays: list[Any], kind: Any) -> Any:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays).astype(kind)))
