"""Which rows belong to which step, and how a step's rows are cut into micro-batches. Pure arithmetic.

Step k's rows depend on the seed, the data and k alone: not on the number of ranks, the micro-batch, or on where an
earlier attempt stopped. That is what makes a resumed run the same run.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from job.errors import DataInvalid
from job.spec_sections import Training

Indices = npt.NDArray[np.int64]

_ROWS_LOOKED_AT = 1 << 16


def _copies_of(source: int, rows: int, weight: float) -> int:
    """Copies per epoch of an input's rows, a whole number. Raises DataInvalid for rows that come to none."""
    copies = round(weight * rows)
    if rows and not copies:
        raise DataInvalid(
            f"data.train.{source}.weight: {rows} rows with weight {weight:g} come to no row per epoch; raise it, "
            "or leave the input out"
        )
    return copies


class Order:
    """The order in which a run meets its rows."""

    def __init__(self, sources: npt.NDArray[Any], weights: Sequence[float], training: Training, digest: str) -> None:
        """
        Args:
            sources: for each row, which input it came from (index into ``weights``).
            weights: expected copies of a row per epoch, by input.
            training: batch size, epochs, steps and seed.
            digest: of the prepared data; other data is another order.
        """
        self._sources = sources
        self._weights = np.asarray(weights, dtype=np.float64)
        self._batch_size = training.batch_size
        self._seed = training.seed
        self._digest = digest
        self.rows_per_epoch = sum(
            _copies_of(source, int(np.count_nonzero(sources == source)), float(weight))
            for source, weight in enumerate(self._weights)
        )
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / self._batch_size)
        # 0.07 * 100 is 7.000000000000001, and that is 7 steps.
        passes = round(training.epochs * self.steps_per_epoch, 6)
        self.steps = training.max_steps or max(1, math.ceil(passes))
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def rows(self, step: int) -> Indices:
        """Row indices of a step (from 0). The last step of an epoch may be shorter; no row is dropped."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[position * self._batch_size : (position + 1) * self._batch_size]

    def _shuffled(self, epoch: int) -> Indices:
        seed = hashlib.sha256(f"{self._seed}/{self._digest}/{epoch}".encode()).digest()
        random = np.random.Generator(np.random.PCG64(int.from_bytes(seed, "big")))
        parts = [self._copies(source, random) for source in range(len(self._weights))]
        rows = np.concatenate(parts)
        random.shuffle(rows)
        return rows

    def _copies(self, source: int, random: np.random.Generator) -> Indices:
        """Whole copies of an input's rows, and a random choice of them for the fraction that is left."""
        rows = np.flatnonzero(self._sources == source).astype(np.int64)
        wanted = round(float(self._weights[source]) * len(rows))
        whole, rest = divmod(wanted, len(rows)) if len(rows) else (0, 0)
        return np.concatenate([np.tile(rows, whole), random.permutation(rows)[:rest]])


def micro_batches(lengths: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """Groups rows so that no group costs more than ``budget`` tokens (first fit, longest row first).

    Args:
        lengths: tokens of each row.
        budget: tokens a micro-batch may cost; a row alone may exceed it.
        padded: a group costs its longest row times its rows; otherwise the sum of its rows.

    Returns:
        Positions in ``lengths``, grouped; every position once, groups in order of their longest row.
    """
    groups: list[list[int]] = []
    costs: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda p: (-lengths[p], p)):
        for number, group in enumerate(groups):
            cost = lengths[group[0]] * (len(group) + 1) if padded else costs[number] + lengths[position]
            if cost <= budget:
                group.append(position)
                costs[number] = cost
                break
        else:
            groups.append([position])
            costs.append(lengths[position])
    return groups


def costliest(lengths: npt.NDArray[Any], order: Order, budget: int, padded: bool) -> list[int]:
    """The rows of the costliest micro-batch of a run: the most tokens, and of those the longest row.

    Looks through the first epoch, of long ones through steps spread over it evenly; the longest row of all, where it
    alone costs more, stands for those between.
    """
    looks = min(order.steps, order.steps_per_epoch, max(1, _ROWS_LOOKED_AT // max(1, len(order.rows(0)))))
    found = [int(np.argmax(lengths))]
    for look in range(looks):
        rows = order.rows(look * min(order.steps, order.steps_per_epoch) // looks)
        own = [int(length) for length in lengths[rows]]
        groups = ([int(rows[p]) for p in group] for group in micro_batches(own, budget, padded))
        found = max(found, *groups, key=lambda group: _cost(lengths[group], padded))
    return found


def _cost(lengths: npt.NDArray[Any], padded: bool) -> tuple[int, int]:
    longest = int(lengths.max())
    return (longest * len(lengths) if padded else int(lengths.sum())), longest


def share(groups: Sequence[list[int]], lengths: Sequence[int], rank: int, world: int) -> list[list[int]]:
    """The micro-batches of one rank: the largest first to whoever has least, so that ranks finish together.

    A rank may get none. Together the ranks' shares are ``groups``, each once.
    """
    loads = [0] * world
    mine: list[list[int]] = []
    for group in sorted(groups, key=lambda g: -sum(lengths[p] for p in g)):
        least = loads.index(min(loads))
        loads[least] += sum(lengths[p] for p in group)
        if least == rank:
            mine.append(group)
    return mine
