"""Which rows are equal, in eight bytes a row: duplicates, and evaluation rows that are trained on."""

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class EqualRows:
    """Collects the keys (``job.data.formats.key_of``) of rows that were kept; of two million different ones none is
    taken for another but with a probability of one in ten million.
    """

    _train: "array[int]" = field(default_factory=lambda: array("Q"))
    _evaluation: "array[int]" = field(default_factory=lambda: array("Q"))

    def train(self, key: bytes) -> None:
        """Notes a training row."""
        self._train.append(int.from_bytes(key[8:16], "big"))

    def evaluate(self, key: bytes) -> None:
        """Notes an evaluation row."""
        self._evaluation.append(int.from_bytes(key[8:16], "big"))

    def in_train(self) -> dict[str, int]:
        """For the report: how many training rows were there before."""
        return {"duplicates": len(self._train) - len(_unique(self._train))}

    def in_evaluation(self) -> dict[str, int]:
        """For the report: how many evaluation rows were there before, and how many are trained on."""
        overlap = np.isin(_values(self._evaluation), _unique(self._train))
        return {
            "duplicates": len(self._evaluation) - len(_unique(self._evaluation)),
            "also_in_train": int(np.count_nonzero(overlap)),
        }


def _values(keys: "array[int]") -> Any:
    return np.frombuffer(keys, dtype=np.uint64) if keys else np.zeros(0, dtype=np.uint64)


def _unique(keys: "array[int]") -> Any:
    return np.unique(_values(keys))
