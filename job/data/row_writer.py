"""One set of tokenised rows on its way to disk: encoded in batches, cut or dropped by policy, counted, digested."""

import hashlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from job.data.encode import Encoded, Encoder
from job.data.row_maker import Made
from job.errors import DataInvalid, SpecInvalid

_BATCH_ROWS = 1000
_BATCH_TOKENS = 1_000_000
"""Bounds of what is held in memory before it is written."""

TOO_LONG, NOTHING_TRAINED = "longer than training.max_length", "nothing left to train"
CUT = {"truncate": "end cut off", "truncate_prompt": "beginning of the prompt cut off"}
"""What was done to a long row that is kept, by ``training.long_rows``."""


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
    cut: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    """Tokens in rows dropped and in what was cut off, by the reasons of ``dropped`` and ``cut``."""
    tokens: int = 0
    supervised: int = 0
    longest: int = 0
    """Tokens of the longest row as it was read."""
    unlike_prompt: int = 0
    """Rows whose text does not begin with the prompt the model is asked with."""
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    endings: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    source_rows: Counter[int] = field(default_factory=Counter)
    source_tokens: Counter[int] = field(default_factory=Counter)

    def record(self) -> dict[str, Any]:
        """For report.json."""
        names = ("read", "kept", "tokens", "supervised", "longest", "unlike_prompt")
        lengths = np.frombuffer(self.lengths, dtype=np.int32) if self.lengths else np.zeros(1, dtype=np.int32)
        marks = {f"p{q}": int(np.percentile(lengths, q, method="lower")) for q in (50, 90, 99)}
        return {name: getattr(self, name) for name in names} | {
            "cut": self.cut.total(),
            "cut_by": dict(self.cut),
            "dropped": dict(self.dropped),
            "lost_tokens": self.lost.total(),
            "lost_by": dict(self.lost),
            "length": marks | {"max": int(lengths.max())},
            "histogram": histogram(lengths) if self.lengths else [],
            "masks": dict(self.ways),
        }


def histogram(lengths: npt.NDArray[np.int32]) -> list[list[int]]:
    """How many rows have how many tokens: pairs of an upper bound (a power of two, inclusive) and rows up to it.

    Each row counts once, below the smallest bound that holds it; bounds without rows at either end are left out.
    """
    bounds, counts = np.unique(np.ceil(np.log2(np.maximum(lengths, 1))).astype(int), return_counts=True)
    found = dict(zip(bounds.tolist(), counts.tolist(), strict=True))
    return [[2**bound, found.get(bound, 0)] for bound in range(min(found), max(found) + 1)]


class RowWriter:
    """Takes rows, leaves ``data.arrow``."""

    def __init__(self, path: Path, encoder: Encoder, limits: Limits) -> None:
        from datasets.arrow_writer import ArrowWriter

        path.parent.mkdir(parents=True)
        self.counts = Counts()
        self._path = path
        self._encoder = encoder
        self._limits = limits
        self._waiting: list[tuple[Made, Encoded]] = []
        self._tokens = 0
        self._digest = hashlib.sha256()
        self._writer: Any = ArrowWriter(path=str(path), features=_features())

    def add(self, row: Made) -> bool:
        """Takes one row, cuts or drops it by policy; it is written with its batch. Whether it was kept.

        Raises:
            DataInvalid: it is too long and ``training.long_rows`` is ``error``.
            SpecInvalid: a token id is outside the model's vocabulary.
        """
        fitted = self._fit(row)
        if fitted is None:
            return False
        self._count(row, fitted)
        self._waiting.append((row, fitted))
        self._tokens += len(fitted.tokens)
        if len(self._waiting) >= _BATCH_ROWS or self._tokens >= _BATCH_TOKENS:
            self._flush()
        return True

    def close(self) -> str:
        """Writes what is waiting; a set without rows leaves no file. Returns the digest (hex) of all rows."""
        self._flush()
        self._writer.finalize()
        if not self.counts.kept:
            self._path.unlink()
            self._path.parent.rmdir()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(_table(self._waiting))
        self._waiting, self._tokens = [], 0

    def _fit(self, row: Made) -> Encoded | None:
        """The row as the policy leaves it; None if it is dropped."""
        counts, limit, policy = self.counts, self._limits.max_length, self._limits.long_rows
        one = row.encoded
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
            why = TOO_LONG if fitted is None else NOTHING_TRAINED
            counts.dropped[why] += 1
            counts.lost[why] += length
            return None
        if fitted is not one:
            counts.cut[CUT[policy]] += 1
            counts.lost[CUT[policy]] += length - len(fitted.tokens)
        return fitted

    def _check_vocabulary(self, row: Made, one: Encoded) -> None:
        size = self._limits.vocabulary
        if size is not None and len(one.tokens) and int(one.tokens.max()) >= size:
            raise SpecInvalid(
                f"model.from: {row.origin} has token id {int(one.tokens.max())}, the model knows {size} (vocab_size in "
                "its config.json); its tokenizer and its weights do not belong together"
            )

    def _count(self, row: Made, one: Encoded) -> None:
        counts = self.counts
        counts.kept += 1
        counts.tokens += len(one.tokens)
        counts.supervised += one.supervised
        counts.lengths.append(len(one.tokens))
        counts.source_rows[row.file] += 1
        counts.source_tokens[row.file] += len(one.tokens)
        counts.ways[row.way] += 1
        counts.unlike_prompt += not row.begins_with_prompt
        counts.endings[row.ending] += 1
        self._digest.update(np.array([row.file, len(one.tokens)], dtype="<i8").tobytes())
        self._digest.update(one.tokens.astype("<i4").tobytes() + one.trained.tobytes())


def _features() -> Any:
    from datasets import Features, List, Value

    numbers = {"length": "int32", "supervised": "int32", "source": "int16", "number": "int64", "answer": "string"}
    lists = {"tokens": "int32", "trained": "int8", "prompt": "int32"}
    return Features(
        {name: List(Value(kind)) for name, kind in lists.items()}
        | {name: Value(kind) for name, kind in numbers.items()}
    )


def _table(kept: list[tuple[Made, Encoded]]) -> Any:
    import pyarrow as pa

    encoded = [one for _, one in kept]
    columns = {
        "tokens": _lists([one.tokens for one in encoded], np.int32),
        "trained": _lists([one.trained for one in encoded], np.int8),
        "prompt": _lists([one.prompt for one in encoded], np.int32),
        "length": pa.array([len(one.tokens) for one in encoded], pa.int32()),
        "supervised": pa.array([one.supervised for one in encoded], pa.int32()),
        "source": pa.array([row.file for row, _ in kept], pa.int16()),
        "number": pa.array([row.number for row, _ in kept], pa.int64()),
        "answer": pa.array([one.answer for one in encoded], pa.string()),
    }
    return pa.table(columns)


def _lists(arrays: list[Any], kind: Any) -> Any:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays).astype(kind)))
