"""A step applies nothing that is not finite, and goes on with less where memory runs out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from job.errors import Diverged
from job.training.kernels import PaddingFree, Reference
from job.training.loop import Loop, make_optimizer, step_unless
from job.training.order import Order, costliest
from tests.job.made import CPU, made_spec
from tests.job.test_loop import LENGTHS, adapter_of, assert_equal, loop_of, losses_of
from tests.job.tiny import BASES


@pytest.fixture(params=BASES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def test_figures_that_are_read_late_are_the_same(tiny_llama: Path) -> None:
    spec = made_spec(training={"batch_size": 4, "max_steps": 6})
    at_once, late = loop_of(tiny_llama, spec), loop_of(tiny_llama, spec)
    expected = losses_of(at_once)
    for progress in late.run(lambda: False, reads=lambda step: False):
        if progress.step > 1:
            assert progress.loss == expected[progress.step - (1 if progress.step == 6 else 2)]
    assert_equal(adapter_of(at_once), adapter_of(late))


def test_a_step_that_is_not_finite_leaves_no_trace_until_it_is_read(tiny_llama: Path) -> None:  # T29
    loop = loop_of(tiny_llama, made_spec(training={"batch_size": 4, "max_steps": 5}))
    steps = loop.run(lambda: False, reads=lambda step: False)
    next(steps)
    before = adapter_of(loop)
    states = {name: value.clone() for one in loop.optimizer.state.values() for name, value in one.items()}
    embeddings = loop.model.get_input_embeddings().weight
    with torch.no_grad():
        kept = embeddings.clone()
        embeddings.fill_(float("inf"))
    next(steps)
    assert_equal(adapter_of(loop), before)
    found = {name: value for one in loop.optimizer.state.values() for name, value in one.items()}
    assert_equal(found, states)
    with torch.no_grad():
        embeddings.copy_(kept)
    with pytest.raises(Diverged, match="step 2: loss"):
        next(steps)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_a_gated_step_leaves_weights_and_states(tiny_llama: Path, optimizer: str) -> None:  # T29
    spec = made_spec(training={"optimizer": optimizer})
    loop = loop_of(tiny_llama, spec)
    optimiser = make_optimizer(loop.model, spec.training)
    before = adapter_of(loop)
    for bad in (True, False):
        for parameter in loop._parameters:
            parameter.grad = torch.full_like(parameter, float("nan") if bad else 1.0)
        step_unless(torch.tensor(bad), optimiser)
        same = all(torch.equal(value, before[name]) for name, value in adapter_of(loop).items())
        assert same == bad


class Scarce(PaddingFree):
    """Memory for so many tokens and no more."""

    room = 0
    seen: list[int]

    def loss(self, model, batch):  # type: ignore[no-untyped-def]
        tokens = batch.tokens.numel()
        if tokens > self.room:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} MiB")
        return super().loss(model, batch)


def scarce(room: int) -> Scarce:
    kernel = Scarce(CPU.device)
    object.__setattr__(kernel, "room", room)
    return kernel


HALVING = {"batch_size": 8, "micro_batch_size": 4, "max_length": 64, "max_steps": 4, "max_grad_norm": 1e9}


def test_on_request_memory_that_runs_out_halves_the_micro_batch_and_changes_no_loss(tiny_llama: Path) -> None:  # T30
    spec = made_spec(training=HALVING | {"on_out_of_memory": "halve"})
    plenty = loop_of(tiny_llama, spec)
    loop = loop_of(tiny_llama, spec, scarce(70))
    torch.testing.assert_close(losses_of(loop), losses_of(plenty), atol=1e-5, rtol=1e-5)
    assert (plenty.budget, loop.budget) == (256, 64)
    resumed = loop_of(tiny_llama, made_spec(training=HALVING | {"micro_batch_size": 1, "on_out_of_memory": "halve"}))
    resumed.room = loop.room
    assert resumed.budget == 64, "a micro-batch that was made smaller meanwhile is not halved again"


def test_without_the_request_it_is_the_end(tiny_llama: Path) -> None:  # T30
    with pytest.raises(torch.OutOfMemoryError):
        losses_of(loop_of(tiny_llama, made_spec(training=HALVING), scarce(70)))


def test_a_row_that_alone_is_too_much_is_the_end_and_no_endless_halving(tiny_llama: Path) -> None:  # T30
    spec = made_spec(training=HALVING | {"on_out_of_memory": "halve"})
    with pytest.raises(torch.OutOfMemoryError):
        losses_of(loop_of(tiny_llama, spec, scarce(20)))


def test_another_runtime_error_is_never_taken_for_memory(tiny_llama: Path) -> None:  # T30
    class Broken(PaddingFree):
        def loss(self, model, batch):  # type: ignore[no-untyped-def]
            raise RuntimeError("CUDA error: device-side assert triggered")

    spec = made_spec(training=HALVING | {"on_out_of_memory": "halve"})
    with pytest.raises(RuntimeError, match="device-side assert"):
        losses_of(loop_of(tiny_llama, spec, Broken(CPU.device)))


@pytest.mark.parametrize(
    ("lengths", "budget", "batch_size", "padded", "tokens"),
    [
        ([2500, *[2000] * 7], 4096, 8, False, 4000),
        ([2100, *[2048] * 7], 4096, 8, False, 4096),
        ([2100, *[2048] * 7], 4096, 8, True, 4096),
        ([1000] * 8, 4096, 2, False, 2000),
        ([5000, *[100] * 7], 4096, 8, False, 5000),
        ([3, 9, 5, 7], 100, 4, True, 24),
    ],
)
def test_the_costliest_micro_batch_is_one_of_the_runs_own(
    lengths: list[int], budget: int, batch_size: int, padded: bool, tokens: int
) -> None:
    training = made_spec(training={"batch_size": batch_size, "max_length": 10000}).training
    order = Order(np.zeros(len(lengths), dtype=np.int16), [1.0], training, "digest")
    rows = np.array(lengths, dtype=np.int32)
    group = costliest(rows, order, budget, padded)
    assert int(rows[group].sum()) == tokens


def test_memory_that_does_not_suffice_shows_before_the_first_step(tiny_llama: Path) -> None:
    """The longest rows come late in this order; they are tried at once, and leave no trace."""
    spec = made_spec(training={"batch_size": 1, "micro_batch_size": 1, "max_length": 40, "epochs": 20, "seed": 7})
    loop = loop_of(tiny_llama, spec, scarce(39))
    assert int(loop.rows.lengths[loop.order.rows(0)].max()) < max(LENGTHS)
    with pytest.raises(torch.OutOfMemoryError):
        next(loop.run(lambda: False))
    assert loop.progress.step == 0


@pytest.mark.parametrize("kernel", [PaddingFree(CPU.device), Reference(0, CPU.device)], ids=["free", "padded"])
def test_the_rehearsal_changes_no_bit(tiny_llama: Path, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = made_spec(training={"batch_size": 2, "max_steps": 3}, lora={"dropout": 0.2})

    def trained(share: float) -> dict[str, torch.Tensor]:
        monkeypatch.setattr("job.training.loop.REHEARSAL_SHARE", share)
        calls: list[int] = []
        loop = loop_of(tiny_llama, spec, kernel)
        _count(loop, calls)
        losses_of(loop)
        assert (len(calls) > 3) == (share > 1)
        return adapter_of(loop)

    assert_equal(trained(0.0), trained(1e9))


def _count(loop: Loop, calls: list[int]) -> None:
    before: Callable[..., Any] = loop.model.get_base_model().forward
    core: Any = loop.model.get_base_model()

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return before(*args, **kwargs)

    core.forward = forward


def test_the_loss_is_ours_and_no_models_own(folder: Path) -> None:  # T4
    """Labels never reach a model, so none can ignore how many tokens the step has."""
    loop = loop_of(folder, made_spec(training={"batch_size": 4, "micro_batch_size": 1, "max_steps": 2}))
    core: Any = loop.model.get_base_model()
    seen: list[set[str]] = []
    for module in (core, core.base_model):
        module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    losses_of(loop)
    assert seen
    assert not any({"labels", "num_items_in_batch"} & names for names in seen)
