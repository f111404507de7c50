"""16 bits on a real device: what a fake one cannot see (T34)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from job.errors import Diverged
from job.training import checkpoint
from job.training.adapter import add_adapter, trained
from job.training.checkpoint import State
from job.training.device import Numbers, Placement
from job.training.kernels import PaddingFree, Reference, choose, chunked_head
from job.training.loop import SKIPS_IN_A_ROW, Loop, make_optimizer
from job.training.model import load_base
from job.training.order import Order
from tests.job.made import CPU, made_rows, made_spec

BF16 = replace(CPU, precision=torch.bfloat16)
LENGTHS = [17, 5, 33, 9, 21, 12, 40, 7]


def loop_at(folder: Path, place: Placement, **training: object) -> Loop:
    spec = made_spec(training={"batch_size": 8, "max_length": 40, "max_steps": 8} | training)
    model = add_adapter(load_base(folder, spec, place), spec, place)
    rows = made_rows(LENGTHS, 300)
    order = Order(rows.sources, [1.0], spec.training, "digest")
    kernel = PaddingFree(place.device, chunked_head(model.get_base_model()))
    return Loop(model, make_optimizer(model, spec.training), rows, order, spec.training, kernel, place)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen", "tiny_gpt2"])
def test_a_step_in_bfloat16_trains_a_float32_adapter_on_a_16_bit_base(
    family: str, recompute: bool, request: pytest.FixtureRequest
) -> None:  # T34
    folder = request.getfixturevalue(family)
    loop = loop_at(folder, BF16, gradient_checkpointing=recompute)
    losses = [progress.loss for progress in loop.run(lambda: False)]
    whole = [progress.loss for progress in loop_at(folder, CPU).run(lambda: False)]
    assert losses[0] == pytest.approx(whole[0], rel=2e-2)
    assert losses[-1] < losses[0]
    frozen = {p.dtype for p in loop.model.parameters() if not p.requires_grad}
    assert {p.dtype for p in trained(loop.model).values()} == {torch.float32}
    assert frozen == {torch.bfloat16}


def test_the_kernel_agrees_with_the_reference_in_bfloat16(tiny_llama: Path) -> None:
    loop = loop_at(tiny_llama, BF16)
    core, rows = loop.model.get_base_model(), loop.rows
    choice = choose(core, rows, [0, 1, 2], Reference(0, CPU.device), BF16)
    assert choice.kernel.name == "padding-free", choice.reason


def test_updates_too_small_for_16_bits_are_not_lost(tiny_llama: Path) -> None:  # T34
    """The same update added to bfloat16 weights changes none of them: the negative control."""
    loop = loop_at(tiny_llama, BF16, learning_rate=1e-6, max_steps=1)
    before = {name: p.detach().clone() for name, p in trained(loop.model).items()}
    for _ in loop.run(lambda: False):
        pass
    after = trained(loop.model)
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before if "lora_B" in name}
    assert all(0 < most < 2e-6 for most in moved.values())
    large = [name for name in before if "lora_A" in name]
    kept = torch.cat([before[name].flatten() for name in large])
    kept = kept[kept.abs() > 1e-3].bfloat16()
    assert torch.equal(kept + 1e-6, kept)


FP16 = replace(CPU, precision=torch.float16)


def test_the_loss_scale_is_part_of_a_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:  # T34
    """A GPU before Ampere is stood in for by the CPU, which knows float16 and its scaler too."""
    loop = loop_at(tiny_llama, FP16)
    assert loop.scaler.is_enabled()
    next(loop.run(lambda: False))
    loop.scaler.update(1024.0)  # type: ignore[no-untyped-call]
    state = State(1, 1, "spec", "data", kernels={}, environment={}, scaler=loop.scaler.state_dict())
    folder = checkpoint.save(tmp_path, loop.model, loop.optimizer, state, "safetensors")
    other = loop_at(tiny_llama, FP16)
    assert other.scaler.get_scale() != 1024.0
    other.scaler.load_state_dict(checkpoint.read_state(folder).scaler)
    assert other.scaler.get_scale() == 1024.0


@pytest.mark.parametrize(("skips", "diverges"), [(SKIPS_IN_A_ROW, False), (SKIPS_IN_A_ROW + 1, True)])
def test_a_step_the_loss_scale_skips_is_no_divergence_and_many_in_a_row_are(
    tiny_llama: Path, skips: int, diverges: bool
) -> None:  # T34
    from job.training.loop import _Figures

    loop = loop_at(tiny_llama, FP16)
    figures = _Figures(0, loop.order.rows(0), Numbers(torch.tensor([1.0, float("inf"), 0.0], dtype=torch.float64)))
    for _ in range(skips - 1):
        loop._take(figures)
    if diverges:
        with pytest.raises(Diverged):
            loop._take(figures)
    else:
        loop._take(figures)
        loop._take(_Figures(1, loop.order.rows(1), Numbers(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))))
        loop._take(figures)  # counted from the start again


def test_a_loss_that_is_not_finite_is_no_matter_of_scale(tiny_llama: Path) -> None:  # T34
    from job.training.loop import _Figures

    loop = loop_at(tiny_llama, FP16)
    with pytest.raises(Diverged):
        loop._take(_Figures(0, loop.order.rows(0), Numbers(torch.tensor([float("nan")] * 3, dtype=torch.float64))))
