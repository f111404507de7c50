"""Tokenised rows as ``job.data.prepare`` left them: memory-mapped; ranks of a node share the pages. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from job.files import read_json

IGNORED = -100
"""Label of a token that is not trained (Hugging Face's convention)."""

Ids = npt.NDArray[np.int32]

TRAIN, EVAL = "train/data.arrow", "eval/data.arrow"
REPORT, INFO, TOKENIZER = "report.json", "prepared.json", "tokenizer"


class Rows:
    """The rows of one set, in order."""

    def __init__(self, table: Any, names: list[str]) -> None:
        """
        Args:
            table: a pyarrow table with the columns of ``job.data.row_writer``.
            names: the user's names of the files; ``source`` is an index into them.
        """
        self.lengths: Ids = _flat(table, "length", np.int32)
        """Tokens in each row."""
        self.supervised: Ids = _flat(table, "supervised", np.int32)
        """Trained tokens in each row."""
        self.sources: npt.NDArray[np.int16] = _flat(table, "source", np.int16)
        """Index into ``data.train``; in an evaluation set of its own all 0."""
        self._numbers: npt.NDArray[np.int64] = _flat(table, "number", np.int64)
        self._names = names
        self._table = table
        self._tokens, self._trained, self._prompts = (_Lists(table, name) for name in ("tokens", "trained", "prompt"))

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, i: int) -> Ids:
        """Token ids of a row, read-only."""
        return self._tokens[i]

    def labels(self, i: int) -> Ids:
        """The token ids where they are trained, else ``IGNORED``; not shifted."""
        return np.where(self._trained[i], self._tokens[i], np.int32(IGNORED))

    def origin(self, i: int) -> str:
        """Where the row came from, for messages: ``train.jsonl:17``."""
        return f"{self._names[self.sources[i]]}:{self._numbers[i]}"

    def prompt(self, i: int) -> Ids:
        """Token ids the model is given when it is asked for the last answer; empty for rows that are trained on."""
        return self._prompts[i]

    def answer(self, i: int) -> str:
        """The last answer as text, without end-of-turn."""
        return str(self._table.column("answer")[i].as_py())


class Prepared:
    """A prepared folder."""

    def __init__(self, train: Rows, evaluation: Rows | None, info: dict[str, Any]) -> None:
        self.train = train
        self.eval = evaluation
        """None where there is nothing to evaluate on; the report says why."""
        self.info = info
        """What prepared.json holds: digest, sources, eos_id, pad_id, end_of_turn, end_ids, template, masks, no_eval."""


def load(folder: Path) -> Prepared:
    """What ``job.data.prepare`` left in ``folder``, mapped and not read."""
    info: dict[str, Any] = read_json(folder / INFO)
    evaluation = Rows(_table(folder / EVAL), info["eval_sources"]) if (folder / EVAL).exists() else None
    return Prepared(Rows(_table(folder / TRAIN), info["sources"]), evaluation, info)


def _table(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(path)).data.table


class _Lists:
    """A column of integer lists, each read as a view of the mapped file."""

    def __init__(self, table: Any, name: str) -> None:
        chunks = [chunk for chunk in table.column(name).chunks if len(chunk)]
        self._parts = [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks]
        self._starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])

    def __getitem__(self, i: int) -> Ids:
        part = int(np.searchsorted(self._starts, i, side="right")) - 1
        offsets, values = self._parts[part]
        at = i - self._starts[part]
        row: Ids = values[offsets[at] : offsets[at + 1]]
        return row


def _flat(table: Any, name: str, kind: Any) -> Any:
    pieces: Iterator[Any] = (chunk.to_numpy() for chunk in table.column(name).chunks)
    return np.concatenate([np.array([], dtype=kind), *pieces]).astype(kind, copy=False)
