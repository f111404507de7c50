"""The private operator's door: the same numbers as PEFT on MKL, and a name for every reason not to use it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from job.training import linear

CPU, EXACT = torch.device("cpu"), 1e-5
TOKENS = torch.arange(5, 101).view(2, 48)


@pytest.fixture(autouse=True)
def _no_product_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := linear.refusal(CPU, torch.float32)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(linear, "SMALLEST", 0)


class Operators(TorchDispatchMode):
    """Counts the operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def private(self) -> int:
        return self.counts["mkldnn::_linear_pointwise"]


def adapted(folder: Path, **settings: Any) -> PeftModel:
    """A tiny model whose adapter already has an effect."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def loss_and_gradient(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.detach(), gradient


def assert_same(found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert float((a - b).norm() / b.norm()) <= EXACT


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_qwen", "tiny_gpt2"])
def test_loss_and_gradient_are_those_of_peft(kind: str, dropout: float, request: pytest.FixtureRequest) -> None:
    """T18, T20: also through GPT-2's Conv1D, and with the adapter's dropout drawing the same numbers."""
    model = adapted(request.getfixturevalue(kind), lora_dropout=dropout)
    model.train()
    model.get_base_model().config.use_cache = False
    expected = loss_and_gradient(model)
    with linear.plugged(model) as layers, Operators() as seen:
        found = loss_and_gradient(model)
    assert layers > 0
    # Forward and back, each layer multiplies by its own matrix and by A and B at least.
    assert seen.private > 4 * layers
    assert_same(found, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_torchs_own_product_in_the_same_place_needs_no_private_operator(dropout: float, tiny_llama: Path) -> None:
    model = adapted(tiny_llama, lora_dropout=dropout)
    model.train()
    expected = loss_and_gradient(model)
    with linear.plugged(model, torch.nn.functional.linear), Operators() as seen:
        found = loss_and_gradient(model)
    assert seen.private == 0
    assert_same(found, expected)


def test_a_wrong_adapter_scale_would_be_seen(tiny_llama: Path) -> None:
    """The comparison's own control."""
    model = adapted(tiny_llama)
    expected = loss_and_gradient(model)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] *= 1.01
    with linear.plugged(model), pytest.raises(AssertionError):
        assert_same(loss_and_gradient(model), expected)


def disabled(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()


def two_adapters(model: PeftModel) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear"))
    model.base_model.set_adapter(["default", "second"])


def merged(model: PeftModel) -> None:
    model.merge_adapter()


def nothing(model: PeftModel) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "settings"),
    [(disabled, {}), (two_adapters, {}), (merged, {}), (nothing, {"use_dora": True}), (nothing, {"lora_bias": True})],
    ids=["adapter switched off", "two adapters", "merged", "DoRA", "bias of the adapter"],
)
def test_adapters_that_are_more_than_a_and_b_keep_pefts_own_forward(
    prepare: Callable[[PeftModel], None], settings: dict[str, Any], tiny_llama: Path
) -> None:
    model = adapted(tiny_llama, **settings)
    prepare(model)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        with linear.plugged(model), Operators() as seen:
            found = model(input_ids=TOKENS).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert seen.private > 0 or settings.get("use_dora"), "the base layers still go through the operator"


def test_weights_are_neither_changed_nor_copied_and_forwards_are_put_back(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}  # type: ignore[attr-defined]
    with linear.plugged(model):
        loss_and_gradient(model)
        inside = {name: value.data_ptr() for name, value in model.state_dict().items()}
    assert inside == {name: pointer for name, (pointer, _) in before.items()}
    assert all(torch.equal(value, before[name][1]) for name, value in model.state_dict().items())
    assert {name: module.forward.__func__ for name, module in model.named_modules()} == forwards  # type: ignore


def test_what_trains_or_is_not_float32_stays_as_it_is(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    with linear.plugged(model) as all_layers:
        pass
    for parameter in model.get_base_model().lm_head.parameters():
        parameter.requires_grad_(True)
    with linear.plugged(model) as without_head:
        assert "forward" not in vars(model.get_base_model().lm_head)
    assert without_head == all_layers - 1
    with linear.plugged(model.to(torch.bfloat16)) as layers, Operators() as seen, torch.no_grad():
        model(input_ids=TOKENS)
    assert (layers, seen.private) == (0, 0)


def test_autocast_does_not_go_through_the_operator(tiny_llama: Path) -> None:
    model = adapted(tiny_llama)
    with linear.plugged(model), torch.autocast("cpu", torch.bfloat16), Operators() as seen, torch.no_grad():
        model(input_ids=TOKENS)
    assert seen.private == 0


@pytest.mark.parametrize(("rows", "expected"), [(1, 0), (2, 1)])
def test_a_products_size_alone_decides(rows: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 2 * 8 * 16)
    with Operators() as seen:
        linear.product(torch.ones(rows, 8), torch.ones(16, 8))
    assert seen.private == expected


def test_a_product_of_another_precision_is_torchs() -> None:
    with Operators() as seen:
        found = linear.product(torch.ones(3, 8, dtype=torch.float64), torch.ones(4, 8, dtype=torch.float64))
    assert seen.private == 0
    assert found.dtype == torch.float64


@pytest.mark.parametrize(
    ("device", "precision", "words"),
    [
        ("cuda", torch.float32, "runs on cuda"),
        ("cpu", torch.bfloat16, "runs in bfloat16"),
        ("cpu", torch.float32, None),
    ],
)
def test_device_and_precision_are_refused_by_name(device: str, precision: torch.dtype, words: str | None) -> None:
    reason = linear.refusal(torch.device(device), precision)
    assert reason is None if words is None else words in str(reason)


def gone(*_: Any) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")


def other_arguments(*_: Any) -> torch.Tensor:
    raise RuntimeError("mkldnn::_linear_pointwise() is missing value for argument 'beta'\nmore lines")


def other_result(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return x @ weight.t()


@pytest.mark.parametrize(
    ("operator", "words"),
    [(gone, "no attribute"), (other_arguments, "argument 'beta'"), (other_result, "differs from a matrix product by")],
)
def test_an_operator_that_is_no_longer_what_it_was_is_refused_by_name(
    operator: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_operator", operator)
    reason = str(linear._missing.__wrapped__())
    assert words in reason
    assert "\n" not in reason


def test_a_processor_without_the_flags_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "with DEFAULT" in str(linear._missing.__wrapped__())
