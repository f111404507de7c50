"""Which rows belong to which step (T3, T35, T40, T41)."""

import numpy as np
import pytest
import torch

from job.errors import DataInvalid
from job.spec_sections import Training
from job.training import checkpoint
from job.training.order import Order, micro_batches, share


def order_of(rows: int, **training: object) -> Order:
    weights = training.pop("weights", [1.0])
    sources = training.pop("sources", np.zeros(rows, dtype=np.int16))
    return Order(sources, weights, Training.model_validate(training), "digest")  # type: ignore[arg-type]


def test_every_row_is_met_once_per_epoch_and_none_is_dropped_at_its_end() -> None:
    order = order_of(10, batch_size=4, epochs=2.0)
    assert (order.steps_per_epoch, order.steps) == (3, 6)
    for epoch in range(2):
        steps = [order.rows(step) for step in range(epoch * 3, epoch * 3 + 3)]
        assert [len(rows) for rows in steps] == [4, 4, 2]
        assert sorted(np.concatenate(steps)) == list(range(10))


def test_epochs_differ_in_order_and_a_step_does_not_depend_on_what_was_asked_before() -> None:
    order = order_of(50, batch_size=50, epochs=3.0)
    assert list(order.rows(0)) != list(order.rows(1))
    fresh = order_of(50, batch_size=50, epochs=3.0)
    assert list(fresh.rows(2)) == list(order.rows(2))


@pytest.mark.parametrize(("change"), [{"seed": 1}])
def test_another_seed_is_another_order(change: dict[str, int]) -> None:
    assert list(order_of(50, batch_size=50).rows(0)) != list(order_of(50, batch_size=50, **change).rows(0))


def test_weights_are_copies_per_epoch() -> None:
    sources = np.array([0] * 10 + [1] * 10 + [2] * 10, dtype=np.int16)
    order = order_of(30, batch_size=100, weights=[1.0, 0.5, 2.0], sources=sources)
    counts = np.bincount(order.rows(0), minlength=30)
    assert list(counts[:10]) == [1] * 10
    assert counts[10:20].sum() == 5
    assert set(counts[10:20]) == {0, 1}
    assert list(counts[20:]) == [2] * 10


@pytest.mark.parametrize(
    ("training", "steps"),
    [({"epochs": 0.5}, 5), ({"epochs": 3.0}, 30), ({"epochs": 0.01}, 1), ({"epochs": 3.0, "max_steps": 7}, 7)],
)
def test_steps_in_all(training: dict[str, float], steps: int) -> None:
    assert order_of(100, batch_size=10, **training).steps == steps


def test_a_product_that_is_not_exact_costs_no_step() -> None:
    assert order_of(100, batch_size=1, epochs=0.07).steps == 7
    assert order_of(100, batch_size=1, epochs=0.0701).steps == 8


def test_an_input_of_several_that_comes_to_no_row_is_refused_by_its_place() -> None:
    sources = np.array([0] * 20 + [1] * 4, dtype=np.int16)
    with pytest.raises(DataInvalid, match=r"data\.train\.1\.weight: 4 rows with weight 0\.1"):
        order_of(24, weights=[1.0, 0.1], sources=sources)


def test_weights_that_come_to_no_row_are_refused() -> None:
    with pytest.raises(DataInvalid, match="come to no row"):
        order_of(10, weights=[0.01])


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_hold_every_row_once_within_the_budget(padded: bool) -> None:
    random = np.random.default_rng(0)
    lengths = [int(length) for length in random.integers(1, 100, 200)]
    groups = micro_batches(lengths, 128, padded)
    assert sorted(position for group in groups for position in group) == list(range(200))
    for group in groups:
        cost = max(lengths[p] for p in group) * len(group) if padded else sum(lengths[p] for p in group)
        assert cost <= 128
    if not padded:
        assert sum(lengths) / (128 * len(groups)) >= 0.95  # first-fit decreasing fills well


def test_a_row_longer_than_the_budget_has_a_micro_batch_of_its_own() -> None:
    assert micro_batches([300, 10, 20], 128, padded=False) == [[0], [2, 1]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_micro_batches_without_loss(world: int) -> None:
    lengths = list(range(1, 11))
    groups = micro_batches(lengths, 12, padded=False)
    shares = [share(groups, lengths, rank, world) for rank in range(world)]
    assert sorted(map(tuple, (g for mine in shares for g in mine))) == sorted(map(tuple, groups))


def test_more_ranks_than_micro_batches_leave_some_without() -> None:
    groups = micro_batches([5, 5], 5, padded=False)
    assert [len(share(groups, [5, 5], rank, 4)) for rank in range(4)] == [1, 1, 0, 0]


def test_a_checkpoint_knows_the_version_that_orders_the_rows() -> None:  # T41
    """numpy keeps a generator's bits from one version to the next, but not what it makes of them."""
    assert checkpoint.environment(torch.device("cpu"), 1)["versions"]["numpy"] == np.__version__
