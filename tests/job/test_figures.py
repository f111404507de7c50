"""What two models score on the same rows, and how sure the difference is."""

import json
import math
from typing import Any

import numpy as np
import pytest

from job.evaluation.figures import BLOCKS, OF_ANSWERS, OF_TOKENS, chrf, differences, figures, finite
from job.evaluation.metrics import COLUMNS


def of_tokens(rows: int, seed: int = 0, shift: float = 0.0, spread: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Sums of two models on rows of unequal length and difficulty; the second is better by ``shift`` a token."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 40, rows).astype(float)
    hard = random.normal(3.0, 1.0, rows)
    losses = [(hard - gain + random.normal(0, spread, rows)) * tokens for gain in (0.0, shift)]
    right = [np.floor(tokens * random.uniform(0, 1, rows)) for _ in range(2)]
    base, tuned = (np.stack([loss, hits, tokens], 1) for loss, hits in zip(losses, right, strict=True))
    return base, tuned


def test_figures_are_weighted_by_tokens() -> None:
    sums = np.array([[2.0, 1.0, 1.0], [3.0, 2.0, 9.0]])
    found = figures(sums, OF_TOKENS)
    assert found == pytest.approx({"loss": 0.5, "perplexity": np.exp(0.5), "token_accuracy": 0.3})
    assert found["loss"] != pytest.approx((2.0 / 1 + 3.0 / 9) / 2)  # the mean of the rows' means


def test_the_standard_error_is_that_of_the_delta_method() -> None:
    """Of a ratio of sums: sum((d - D n)^2) / (sum n)^2 over the rows (Cochran 1977, 6.3)."""
    base, tuned = of_tokens(400, shift=0.1)
    found = differences(base, tuned, OF_TOKENS)["loss"]
    d, n = tuned[:, 0] - base[:, 0], base[:, 2]
    value = d.sum() / n.sum()
    error = np.sqrt(((d - value * n) ** 2).sum()) / n.sum()
    assert found["value"] == pytest.approx(value)
    assert found["standard_error"] == pytest.approx(error, rel=0.06)
    assert (found["low"], found["high"]) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.2 * error)


def test_what_both_models_find_hard_cancels_out() -> None:
    """Not paired, the same rows would leave a difference of 0.1 in doubt."""
    base, tuned = of_tokens(400, shift=0.1)
    paired = differences(base, tuned, OF_TOKENS)["loss"]
    assert paired["high"] < 0
    shuffled = differences(base, tuned[np.random.default_rng(1).permutation(400)], OF_TOKENS)["loss"]
    assert shuffled["standard_error"] > 3 * paired["standard_error"]
    assert shuffled["low"] < 0 < shuffled["high"]


def test_intervals_hold_the_true_difference_about_as_often_as_they_say() -> None:
    within = 0
    for seed in range(60):
        found = differences(*of_tokens(80, seed=seed, shift=0.1), {"loss": OF_TOKENS["loss"]})["loss"]
        within += found["low"] <= -0.1 <= found["high"]
    assert 51 <= within <= 60  # of 60 at 95 %; fewer than 51 has a chance of 1 in 5,000


def test_equal_models_differ_by_nothing_and_surely_so() -> None:
    base, _ = of_tokens(30)
    for found in differences(base, base, OF_TOKENS).values():
        assert found == {"value": 0.0, "standard_error": 0.0, "low": 0.0, "high": 0.0}


def answered(base: list[int], tuned: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of two models that answered rows rightly (1) or not, word for word."""
    sums = np.zeros((2, len(base), COLUMNS))
    sums[:, :, 0] = 1
    sums[:, :, 1] = [base, tuned]
    return sums[0], sums[1]


def test_rows_that_all_came_out_alike_still_leave_a_doubt_that_shrinks_with_their_number() -> None:
    widths = []
    for rows in (5, 50, 500):
        found = differences(*answered([0] * rows, [0] * rows), OF_ANSWERS)["exact_match"]
        assert found["value"] == 0
        assert found["low"] == -found["high"] < 0
        widths.append(found["high"])
    assert widths[0] > 4 * widths[1] > 16 * widths[2]
    sure = differences(*answered([0] * 50, [1] * 50), OF_ANSWERS)["exact_match"]
    assert 0.85 < sure["low"] < sure["value"] == sure["high"] == 1.0


def test_the_interval_of_right_answers_counts_only_rows_where_the_models_disagree() -> None:
    """Agresti and Min 2005: b = 7, c = 25 of 200 rows; half a row is added to each outcome."""
    base = [1] * 7 + [0] * 25 + [1] * 90 + [0] * 78
    tuned = [0] * 7 + [1] * 25 + [1] * 90 + [0] * 78
    found = differences(*answered(base, tuned), OF_ANSWERS)["exact_match"]
    error = np.sqrt(33 - 18**2 / 202) / 202
    assert found["value"] == pytest.approx(0.09)
    assert found["standard_error"] == pytest.approx(error)
    assert (found["low"], found["high"]) == pytest.approx((18 / 202 - 1.96 * error, 18 / 202 + 1.96 * error))


def test_one_row_says_nothing_of_the_uncertainty() -> None:
    base, tuned = of_tokens(1, shift=0.1)
    found = differences(base, tuned, OF_TOKENS)["loss"]
    assert (found["standard_error"], found["low"], found["high"]) == (None, None, None)
    assert found["value"] != 0


UNCERTAIN = {"standard_error": None, "low": None, "high": None}
UNBOUNDED: dict[str, tuple[list[float], list[float], dict[str, Any]]] = {
    "base": ([8000, 9000, 7000], [10, 9, 7], {"value": None, "reason": "not finite"} | UNCERTAIN),
    "tuned": ([10, 9, 7], [8000, 9000, 7000], {"value": None, "reason": "not finite"} | UNCERTAIN),
    "both": ([8000, 9000, 7000], [8000, 9000, 7000], {"value": None, "reason": "not finite"} | UNCERTAIN),
    "one row": ([8000], [10], {"value": None, "reason": "not finite"} | UNCERTAIN),
    "not a number": ([math.nan, 1, 1], [1, 1, 1], {"value": None, "reason": "not finite"} | UNCERTAIN),
    "some draws": ([10_000, 9, 7], [10, 9, 7], {"reason": "not finite on some draws of the rows"} | UNCERTAIN),
}
"""Losses of both models on rows of 10 tokens, and what becomes of the perplexity's difference."""


@pytest.mark.parametrize("case", UNBOUNDED)
def test_what_is_not_finite_is_left_out_with_a_reason(case: str) -> None:
    *losses, expected = UNBOUNDED[case]
    base, tuned = (np.array([[loss, 1.0, 10.0] for loss in each]) for each in losses)
    found = differences(base, tuned, OF_TOKENS)
    assert found["perplexity"] == {"value": found["perplexity"]["value"]} | expected
    sides = finite(figures(base, OF_TOKENS), figures(tuned, OF_TOKENS))
    assert all(("perplexity" in side) is (found["perplexity"]["value"] is not None) for side in sides)
    assert all("token_accuracy" in side for side in sides)
    json.dumps([found, sides], allow_nan=False)


def test_many_rows_are_drawn_in_blocks_with_the_same_uncertainty() -> None:
    base, tuned = of_tokens(3 * BLOCKS + 5, shift=0.05)
    found = differences(base, tuned, OF_TOKENS)["loss"]
    d, n = tuned[:, 0] - base[:, 0], base[:, 2]
    value = d.sum() / n.sum()
    assert found["value"] == pytest.approx(value)
    error = np.sqrt(((d - value * n) ** 2).sum()) / n.sum()
    assert found["standard_error"] == pytest.approx(error, rel=0.08)


def test_the_interval_is_the_same_whenever_it_is_asked_for() -> None:
    base, tuned = of_tokens(50, shift=0.1)
    assert differences(base, tuned, OF_TOKENS) == differences(base, tuned, OF_TOKENS)


def test_shares_of_answers_go_by_rows_and_nothing_said_scores_nothing() -> None:
    sums = np.zeros((4, COLUMNS))
    sums[:, 0] = 1
    sums[0, 1:4] = 1
    assert figures(sums, OF_ANSWERS) == {"exact_match": 0.25, "extracted_match": 0.25, "rouge_l": 0.25, "chrf": 0.0}
    assert chrf(np.zeros((3, 18))).tolist() == [0.0, 0.0, 0.0]
