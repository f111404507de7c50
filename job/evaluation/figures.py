"""What two models score on the same rows, and how sure the difference is. Pure arithmetic on sums kept for each row."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Metric = Callable[[Array], Array]
"""A figure out of sums ``[..., columns]`` over any set of rows."""

RESAMPLES = 2000
BLOCKS = 2048
"""Rows beyond this many are drawn in as many blocks: the interval is the same, the work is bounded."""
_SEED = 2004
_CHUNK = 250
_LEVEL = (2.5, 97.5)


def _perplexity(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(_share(sums, 0, 2))


def _share(sums: Array, part: int, whole: int) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., part] / sums[..., whole]


def chrf(sums: Array) -> Array:
    """chrF2 (Popović 2015, W15-3049), 0 to 100, as sacrebleu computes it.

    Args:
        sums: for each order of character n-grams three counts: in the answer, in the reference, in both.
    """
    answer, reference, both = (sums[..., start::3] for start in range(3))
    counts = (answer > 0) & (reference > 0)
    orders = np.maximum(counts.sum(-1), 1)
    precision = np.where(counts, both / np.maximum(answer, 1), 0.0).sum(-1) / orders
    recall = np.where(counts, both / np.maximum(reference, 1), 0.0).sum(-1) / orders
    total = 4 * precision + recall
    return np.where(total > 0, 100 * 5 * precision * recall / np.where(total > 0, total, 1.0), 0.0)


OF_TOKENS: Mapping[str, Metric] = {
    "loss": lambda sums: _share(sums, 0, 2),
    "perplexity": _perplexity,
    "token_accuracy": lambda sums: _share(sums, 1, 2),
}
"""Of the columns loss, tokens ranked first, tokens."""

OF_ANSWERS: Mapping[str, Metric] = {
    "exact_match": lambda sums: _share(sums, 1, 0),
    "extracted_match": lambda sums: _share(sums, 2, 0),
    "rouge_l": lambda sums: _share(sums, 3, 0),
    "chrf": lambda sums: chrf(sums[..., 4:]),
}
"""Of the columns that ``job.evaluation.metrics.statistics`` has."""

YES_OR_NO: Mapping[str, int] = {"exact_match": 1, "extracted_match": 2}
"""Figures that are the share of rows answered rightly, and the column that says which."""


@dataclass(frozen=True)
class Difference:
    """Tuned less base."""

    value: float | None
    standard_error: float | None
    """None with fewer than two rows; so are the ends."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval."""


def figures(sums: Array, metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Each metric over all rows of ``sums [rows, columns]``."""
    total = sums.sum(0)
    return {name: float(metric(total)) for name, metric in metrics.items()}


def differences(base: Array, tuned: Array, metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    """Each metric's difference and its uncertainty, by name; None with a ``reason`` for what is not finite.

    The rows are drawn anew with replacement, the same for both models, and the figures taken of every draw (paired
    bootstrap: Koehn 2004, W04-3250; Efron and Tibshirani 1993). What both models find hard then cancels out, and
    tokens of one row are not taken for independent ones. Where a row is either right or wrong, the interval is that
    of Agresti and Min (2005, Statistics in Medicine 24): draws of rows that all came out alike would leave no doubt.

    Args:
        base: sums ``[rows, columns]`` of one model; ``tuned`` of the other, on the same rows.
    """
    scores = figures(base, metrics), figures(tuned, metrics)
    whole = {name: scores[1][name] - scores[0][name] for name in metrics}
    if len(base) < 2:
        return {name: _record(Difference(value, None, None, None)) for name, value in whole.items()}
    drawn = _drawn(_blocks(base), _blocks(tuned))
    found = {}
    for name, metric in metrics.items():
        if name in YES_OR_NO:
            found[name] = _record(_of_pairs(base[:, YES_OR_NO[name]], tuned[:, YES_OR_NO[name]]))
            continue
        with np.errstate(invalid="ignore"):
            spread = np.concatenate([metric(after) - metric(before) for before, after in drawn])
            low, high = np.percentile(spread, _LEVEL)
            found[name] = _record(Difference(whole[name], float(spread.std(ddof=1)), float(low), float(high)))
    return found


def _record(difference: Difference) -> dict[str, Any]:
    """As it stands in JSON, which has no word for infinity."""
    if difference.value is None or not math.isfinite(difference.value):
        return asdict(Difference(None, None, None, None)) | {"reason": "not finite"}
    uncertainty = (difference.standard_error, difference.low, difference.high)
    if all(number is None or math.isfinite(number) for number in uncertainty):
        return asdict(difference)
    return asdict(Difference(difference.value, None, None, None)) | {"reason": "not finite on some draws of the rows"}


def finite(base: Mapping[str, float], tuned: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Both models' figures without those that are not finite for one of them, which nothing can be compared with."""
    names = [name for name in base if math.isfinite(base[name]) and math.isfinite(tuned[name])]
    return {name: base[name] for name in names}, {name: tuned[name] for name in names}


def _of_pairs(base: Array, tuned: Array) -> Difference:
    """Of two shares on the same rows, with half a row more of each of the four outcomes."""
    rows = len(base)
    won, lost = float((tuned > base).sum()), float((tuned < base).sum())
    more = rows + 2
    centre = (won - lost) / more
    error = math.sqrt(won + lost + 1 - (won - lost) ** 2 / more) / more
    return Difference((won - lost) / rows, error, max(-1.0, centre - 1.96 * error), min(1.0, centre + 1.96 * error))


def _blocks(sums: Array) -> Array:
    """Rows of a set that is larger than needed, added up in blocks."""
    if len(sums) <= BLOCKS:
        return sums
    blocks = np.zeros((BLOCKS, sums.shape[1]))
    np.add.at(blocks, np.arange(len(sums)) % BLOCKS, sums)
    return blocks


def _drawn(base: Array, tuned: Array) -> list[tuple[Array, Array]]:
    """Sums over rows drawn with replacement, ``[draws, columns]`` of both models, in portions."""
    random = np.random.Generator(np.random.PCG64(_SEED))
    rows = len(base)
    portions = []
    for _ in range(RESAMPLES // _CHUNK):
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=_CHUNK).astype(np.float64)
        portions.append((counts @ base, counts @ tuned))
    return portions
