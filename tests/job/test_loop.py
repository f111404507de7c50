"""The training loop is exact in its loss, its clipping and its resume (T1, T3, T18, T19, T22, T23, T29, T35, T38)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from job.errors import Conflict, Diverged
from job.spec import JobSpec
from job.spec_sections import Training
from job.training import checkpoint
from job.training.adapter import trained
from job.training.attention import attention, stock_attention
from job.training.checkpoint import State
from job.training.head import chunked_head, cross_entropy_sum
from job.training.kernels import Kernel, PaddingFree, Reference
from job.training.loop import Loop, Progress, learning_rates, make_optimizer
from job.training.order import Order
from tests.job.made import CPU, made_model, made_rows, made_spec
from tests.job.tiny import BASES

LENGTHS = [17, 5, 33, 9, 21, 12, 40, 7, 15, 28]


def loop_of(folder: Path, spec: JobSpec, kernel: Kernel | None = None, lengths: list[int] = LENGTHS) -> Loop:
    rows = made_rows(lengths, 300)
    model = made_model(folder, spec)
    if spec.lora.dropout == 0:
        switch_off_dropout(model)
    order = Order(rows.sources, [1.0], spec.training, "digest")
    optimizer = make_optimizer(model, spec.training)
    return Loop(model, optimizer, rows, order, spec.training, kernel or PaddingFree(CPU.device), CPU)


def switch_off_dropout(model: torch.nn.Module) -> None:
    """GPT-2 has dropout of its own, which is on in training as its config says."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def losses_of(loop: Loop, stop_after: int | None = None) -> list[float]:
    losses = []
    for progress in loop.run(lambda: False):
        losses.append(progress.loss)
        if progress.step == stop_after:
            break
    return losses


def adapter_of(loop: Loop) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained(loop.model).items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(params=BASES)
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def gradients_of(loop: Loop) -> list[torch.Tensor]:
    """Filled as the loop goes: the gradient of each step, as the optimizer sees it."""
    seen: list[torch.Tensor] = []
    loop.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in trained(loop.model).values()]))  # type: ignore[union-attr]
    )
    return seen


def first_gradient(folder: Path, micro: int, kernel: Kernel) -> torch.Tensor:
    """The gradient of step 1 before clipping."""
    training = {"batch_size": 8, "micro_batch_size": micro, "max_length": 40, "max_grad_norm": 1e9}
    loop = loop_of(folder, made_spec(training=training), kernel)
    seen = gradients_of(loop)
    losses_of(loop, stop_after=1)
    return seen[0]


def by_definition(loop: Loop, step: int, count: int | None = None) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step with nothing of the loop's or a kernel's: one row after the other.

    Each goes through the model's own forward; the cross entropies are added up and divided by the number of trained
    tokens, or by ``count``.
    """
    core, rows = loop.model.get_base_model(), loop.rows
    total, found = torch.zeros((), dtype=torch.float64), 0
    with attention(core, stock_attention(core)):
        for row in map(int, loop.order.rows(step)):
            labels = torch.from_numpy(rows.labels(row).astype("int64"))
            tokens = torch.from_numpy(rows.tokens(row).astype("int64"))
            logits = core(input_ids=tokens[None], use_cache=False).logits[0]
            total = (
                total
                + functional.cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] != -100].double().sum()
            )
            found += int((labels[1:] != -100).sum())
    loss = total / (count or found)
    gradients = torch.autograd.grad(loss, list(trained(loop.model).values()))
    return float(loss.detach()), torch.cat([gradient.flatten() for gradient in gradients])


@pytest.mark.parametrize("head", ["chunked head", "own head"])
def test_t1_loss_and_gradient_of_every_step_are_the_definition(folder: Path, head: str) -> None:  # T1 T3
    training = {"batch_size": 4, "micro_batch_size": 1, "max_length": 40, "epochs": 1.0, "max_grad_norm": 1e9}
    loop = loop_of(folder, made_spec(training=training))
    if head == "chunked head":
        loop.kernel = PaddingFree(CPU.device, chunked_head(loop.model.get_base_model()))
    seen, steps = gradients_of(loop), loop.run(lambda: False)
    for step in range(loop.order.steps):
        loop.model.train()
        loss, gradient = by_definition(loop, step)
        progress = next(steps)
        assert progress.loss == pytest.approx(loss, abs=1e-6)
        assert float((seen[step] - gradient).abs().max()) < 1e-6
    assert [len(loop.order.rows(step)) for step in range(loop.order.steps)] == [4, 4, 2]


def test_t1_gradients_do_not_depend_on_the_micro_batch(folder: Path) -> None:
    whole = first_gradient(folder, 8, PaddingFree(CPU.device))
    for micro in (1, 4):
        for kernel in (PaddingFree(CPU.device), Reference(0, CPU.device)):
            assert float((first_gradient(folder, micro, kernel) - whole).abs().max()) < 1e-6


def test_t1_the_mean_of_micro_batch_means_is_another_loss(tiny_llama: Path) -> None:
    """The tempting formula: if it gave the same, the test above could not fail."""
    loop = loop_of(tiny_llama, made_spec(training={"batch_size": 8, "micro_batch_size": 1, "max_length": 40}))
    rows = loop.order.rows(0)
    means = []
    for _, batch in loop._batches(0):
        with torch.no_grad():
            logits, targets = loop.kernel.logits(loop.model.get_base_model(), batch), batch.targets
        means.append(float(cross_entropy_sum(logits, targets)) / len(targets))
    exact = losses_of(loop, stop_after=1)[0]
    assert len(means) < len(rows)
    assert abs(sum(means) / len(means) - exact) > 1e-4


def test_t1_twenty_steps_follow_one_course_for_any_micro_batch(tiny_llama: Path) -> None:
    courses = [
        losses_of(
            loop_of(tiny_llama, made_spec(training={"batch_size": 4, "micro_batch_size": micro, "max_steps": 20}))
        )
        for micro in (4, 1)
    ]
    assert max(abs(a - b) for a, b in zip(*courses, strict=True)) < 1e-5


def test_t3_the_last_step_of_an_epoch_is_normalised_by_its_own_tokens(tiny_llama: Path) -> None:
    loop = loop_of(tiny_llama, made_spec(training={"batch_size": 4, "epochs": 1.0, "max_grad_norm": 1e9}))
    seen, steps = gradients_of(loop), loop.run(lambda: False)
    counts = [next(steps).trained_tokens for _ in range(2)]
    loss, gradient = by_definition(loop, 2)
    tempting, other = by_definition(loop, 2, count=counts[0])  # by the tokens of a full step
    progress = next(steps)
    assert progress.loss == pytest.approx(loss, abs=1e-6)
    assert float((seen[2] - gradient).abs().max()) < 1e-6
    assert abs(progress.loss - tempting) > 1e-2
    assert float((seen[2] - other).abs().max()) > 1e-4
    assert sum(counts) + progress.trained_tokens == int(loop.rows.supervised.sum())


def test_t18_every_lora_b_moves_and_the_base_does_not(folder: Path) -> None:
    for recompute in (False, True):
        loop = loop_of(folder, made_spec(training={"batch_size": 4, "gradient_checkpointing": recompute}))
        base = {n: p.detach().clone() for n, p in loop.model.named_parameters() if not p.requires_grad}
        losses_of(loop, stop_after=1)
        moved = {n: float(p.detach().norm()) for n, p in trained(loop.model).items() if "lora_B" in n}
        assert moved
        assert min(moved.values()) > 0
        for name, parameter in loop.model.named_parameters():
            if name in base:
                assert torch.equal(parameter, base[name]), name


def test_t19_a_fresh_adapter_changes_nothing_and_switched_off_it_leaves_the_base(folder: Path) -> None:
    from job.evaluation.evaluate import as_base
    from job.training.model import load_base

    spec = made_spec(training={"batch_size": 4, "max_steps": 2})
    tokens = torch.randint(5, 300, (1, 12))
    with torch.no_grad():
        expected = load_base(folder, spec, CPU).eval()(input_ids=tokens).logits
        loop = loop_of(folder, spec)
        core = loop.model.get_base_model().eval()
        assert torch.equal(core(input_ids=tokens).logits, expected)
    losses_of(loop)
    core.eval()
    with torch.no_grad(), as_base(loop.model, {}):
        assert torch.equal(core(input_ids=tokens).logits, expected)
    with torch.no_grad():
        assert not torch.equal(core(input_ids=tokens).logits, expected)


@pytest.mark.parametrize(
    "training",
    [
        {"batch_size": 4, "micro_batch_size": 1},
        {"batch_size": 4, "loader_workers": 2},
        {"batch_size": 4, "optimizer": "paged_adamw_8bit"},
        {"batch_size": 3, "schedule": "cosine", "warmup_ratio": 0.3},
    ],
    ids=["accumulation", "loader workers", "8-bit states", "schedule, mid-epoch"],
)
def test_t22_a_resumed_training_is_the_same_training(
    tiny_llama: Path, tmp_path: Path, training: dict[str, Any]
) -> None:
    spec = made_spec(lora={"dropout": 0.2, "r": 64}, training={"max_steps": 6} | training)
    straight = loop_of(tiny_llama, spec)
    expected = losses_of(straight)

    first = loop_of(tiny_llama, spec)
    before = losses_of(first, stop_after=2)
    state = State(2, first.progress.tokens, "s", "d", {}, {}, first.scaler.state_dict())
    folder = checkpoint.save(tmp_path, first.model, first.optimizer, state, "both")

    torch.manual_seed(12345)
    second = loop_of(tiny_llama, spec)
    read = checkpoint.read_state(folder)
    assert read == state
    checkpoint.restore(folder, second.model, second.optimizer)
    second.progress = Progress(step=read.step, tokens=read.tokens)
    assert before + losses_of(second) == expected
    assert_equal(adapter_of(second), adapter_of(straight))
    assert second.progress.tokens == straight.progress.tokens


def test_t22_without_the_optimizer_state_the_course_is_another(tiny_llama: Path, tmp_path: Path) -> None:
    """If this passed, the test above would not see a lost optimizer."""
    spec = made_spec(training={"batch_size": 4, "max_steps": 6})
    expected = losses_of(loop_of(tiny_llama, spec))
    first = loop_of(tiny_llama, spec)
    losses_of(first, stop_after=2)
    first.optimizer = make_optimizer(first.model, spec.training)
    assert losses_of(first) != expected[2:]


def test_t35_the_same_seed_trains_the_same_bits_and_another_seed_others(tiny_llama: Path) -> None:
    adapters = []
    for seed in (1, 1, 2):
        loop = loop_of(tiny_llama, made_spec(lora={"dropout": 0.2}, training={"seed": seed, "max_steps": 3}))
        losses_of(loop)
        adapters.append(adapter_of(loop))
    assert_equal(adapters[0], adapters[1])
    assert any(not torch.equal(adapters[0][name], adapters[2][name]) for name in adapters[0])


def test_t29_a_loss_that_is_not_finite_leaves_the_weights_and_names_the_rows(tiny_llama: Path) -> None:
    loop = loop_of(tiny_llama, made_spec(training={"batch_size": 4, "max_steps": 5}))
    before = adapter_of(loop)
    with torch.no_grad():
        loop.model.get_input_embeddings().weight[int(loop.rows.tokens(int(loop.order.rows(0)[0]))[0])] = float("nan")
    with pytest.raises(Diverged, match=r"step 1: loss nan.*made.jsonl:\d+"):
        losses_of(loop)
    assert_equal(adapter_of(loop), before)


def test_t38_the_bound_on_the_gradient_holds_for_the_whole_step(tiny_llama: Path) -> None:
    norms: dict[int, float] = {}
    for micro in (1, 4):
        spec = made_spec(training={"batch_size": 8, "micro_batch_size": micro, "max_length": 40, "max_grad_norm": 1e-3})
        loop = loop_of(tiny_llama, spec)
        seen = gradients_of(loop)
        losses_of(loop, stop_after=1)
        norms[micro] = float(seen[0].norm())
    assert norms[1] == pytest.approx(1e-3, rel=1e-3)
    assert norms[4] == pytest.approx(norms[1], rel=1e-5)


def test_a_checkpoint_of_another_spec_or_of_other_data_is_refused() -> None:
    state = State(3, 10, "spec", "data", {}, {}, {})
    checkpoint.accept(state, "spec", "data", {})
    with pytest.raises(Conflict, match="another spec"):
        checkpoint.accept(state, "other", "data", {})
    with pytest.raises(Conflict, match="other data"):
        checkpoint.accept(state, "spec", "other", {})


def test_a_checkpoint_made_elsewhere_lowers_the_promise_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    state = State(3, 10, "spec", "data", {}, {"threads": 8}, {})
    checkpoint.accept(state, "spec", "data", {"threads": 2})
    assert "threads: 8 then, 2 now" in caplog.text


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"schedule": "constant", "warmup_ratio": 0.0}, [1.0] * 10),
        ({"schedule": "constant", "warmup_ratio": 0.4}, [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "linear", "warmup_ratio": 0.0}, [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (
            {"schedule": "linear", "warmup_ratio": 0.0, "min_lr": 0.5},
            [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55],
        ),
        ({"schedule": "linear", "min_lr": 1.0, "warmup_ratio": 0.0}, [1.0] * 10),
    ],
)
def test_learning_rates(training: dict[str, Any], expected: list[float]) -> None:
    rate = learning_rates(Training.model_validate({"learning_rate": 1.0} | training), 10)
    assert [rate(step) for step in range(10)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("ratio", "steps"), [(0.03, 1), (1.0, 4), (0.95, 10)])
def test_a_warm_up_over_all_steps_rises_to_the_peak(schedule: str, ratio: float, steps: int) -> None:
    rate = learning_rates(Training(schedule=schedule, warmup_ratio=ratio, learning_rate=1e-3), steps)  # type: ignore[arg-type]
    assert [rate(step) for step in range(steps)] == pytest.approx([1e-3 * (k + 1) / steps for k in range(steps)])


def test_the_cosine_falls_from_its_peak_to_min_lr() -> None:
    rate: Callable[[int], float] = learning_rates(
        Training.model_validate({"learning_rate": 1.0, "min_lr": 0.1, "warmup_ratio": 0.1}), 100
    )
    course = [rate(step) for step in range(100)]
    assert max(course) == pytest.approx(1.0)
    assert course[10:] == sorted(course[10:], reverse=True)
    assert course[0] > 0
    assert 0.1 <= course[-1] < 0.11
