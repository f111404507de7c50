"""Padding-free batches give the reference's loss and gradient (T7, T14, T16, T43), or the run falls back."""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as functional

from job.data.prepared import Rows
from job.training import kernels
from job.training.attention import _documents_attention, _repeats
from job.training.batch import Documents
from job.training.head import chunked_head, cross_entropy_sum
from job.training.kernels import PaddingFree, Reference
from tests.job.made import CPU, made_model, made_rows, made_spec
from tests.job.test_loop import loop_of, losses_of
from tests.job.tiny import BASES

LENGTHS = [17, 5, 33, 9]
DEVICE = torch.device("cpu")
OURS = ("padding-free", "padding-free, oneDNN")
"""Whether torch's private operator is used depends on the processor."""


@pytest.fixture(params=BASES)
def model_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def logits_of(kernel: PaddingFree | Reference, core: torch.nn.Module, rows: Rows, indices: list[int]) -> tuple:  # type: ignore[type-arg]
    with torch.no_grad(), kernel.installed(core):
        batch = kernel.collate(rows, indices)
        return kernel.logits(core, batch), batch.targets


def chosen(core: torch.nn.Module, rows: Rows, probe: list[int], *first: kernels.Kernel) -> kernels.Choice:
    """What is chosen, with kernels of the test's own tried before all others."""
    with ExitStack() as stack:
        for kernel in first:
            stack.enter_context(kernels.registered(lambda *_, kernel=kernel: kernel))  # type: ignore[misc]
        return kernels.choose(core, rows, probe, Reference(0, DEVICE), CPU)


def test_packed_rows_do_not_see_each_other(model_folder: Path) -> None:  # T14
    core = made_model(model_folder, made_spec()).get_base_model().eval()
    rows = made_rows(LENGTHS, 300)
    together, targets = logits_of(PaddingFree(DEVICE), core, rows, [0, 1, 2, 3])
    alone = [logits_of(PaddingFree(DEVICE), core, rows, [row]) for row in range(4)]
    assert torch.equal(targets, torch.cat([t for _, t in alone]))
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), atol=1e-5, rtol=1e-5)


def test_packed_equals_padded_whatever_the_padding_token_is(model_folder: Path) -> None:  # T7
    core = made_model(model_folder, made_spec()).get_base_model().eval()
    rows = made_rows(LENGTHS, 300)
    packed, targets = logits_of(PaddingFree(DEVICE), core, rows, [0, 1, 2, 3])
    for padding in (0, 7):
        padded, same = logits_of(Reference(padding, DEVICE), core, rows, [0, 1, 2, 3])
        assert torch.equal(targets, same)
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)


def test_as_many_tokens_are_trained_in_every_kernel(tiny_llama: Path) -> None:  # T16
    rows = made_rows(LENGTHS, 300)
    expected = int(rows.supervised.sum())
    core = made_model(tiny_llama, made_spec()).get_base_model()
    head = chunked_head(core)
    for kernel in (PaddingFree(DEVICE), PaddingFree(DEVICE, head), Reference(0, DEVICE), Reference(0, DEVICE, head)):
        batch = kernel.collate(rows, [0, 1, 2, 3])
        assert len(batch.targets) == expected
        with torch.no_grad(), kernel.installed(core):
            assert len(kernel.score(core, batch).losses) == expected


def test_the_comparison_at_the_start_accepts_models_that_keep_rows_apart(model_folder: Path) -> None:
    model = made_model(model_folder, made_spec())
    choice = chosen(model.get_base_model(), made_rows(LENGTHS, 300), [2, 1, 3])
    assert choice.kernel.name in OURS, choice.reason
    assert all(p.grad is None for p in model.parameters())


class Leaking(PaddingFree):
    """Padding-free batches under an attention that knows of no rows: what silence would look like."""

    name = "leaking"

    def _inputs(self, batch):  # type: ignore[no-untyped-def]
        return {
            "input_ids": batch.tokens,
            "position_ids": batch.positions,
            "attention_mask": torch.ones_like(batch.tokens),
            "use_cache": False,
        }


class SoftCapped(PaddingFree):
    """A model that bounds its attention scores."""

    name = "soft-capped"

    def _inputs(self, batch):  # type: ignore[no-untyped-def]
        return super()._inputs(batch) | {"softcap": 50.0}


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (Leaking(DEVICE, implementation="sdpa"), "with leaking a row's loss depends on the row before it"),
        (SoftCapped(DEVICE), "attention with softcap"),
    ],
)
def test_a_kernel_that_is_wrong_for_the_model_is_passed_over_by_name(  # T14 T43
    tiny_llama: Path, kernel: PaddingFree, reason: str
) -> None:
    core = made_model(tiny_llama, made_spec()).get_base_model()
    choice = chosen(core, made_rows(LENGTHS, 300), [2, 1, 3], kernel)
    assert choice.kernel.name in OURS
    assert reason in choice.reason


def test_a_kernel_of_ones_own_plugs_in_without_touching_the_loop(tiny_llama: Path) -> None:
    class Counting(PaddingFree):
        """A right kernel that counts its micro-batches."""

        name = "counting"
        calls = 0

        def loss(self, model, batch):  # type: ignore[no-untyped-def]
            Counting.calls += 1
            return super().loss(model, batch)

    model = made_model(tiny_llama, made_spec())
    rows = made_rows(LENGTHS, 300)
    choice = chosen(model.get_base_model(), rows, [2, 1, 3], Counting(DEVICE))
    assert choice.record()["name"] == "counting"
    tried = Counting.calls
    loop = loop_of(tiny_llama, made_spec(training={"batch_size": 4, "max_steps": 2}), choice.kernel, LENGTHS)
    assert len(losses_of(loop)) == 2
    assert Counting.calls > tried


def test_a_sliding_window_is_respected(tiny_qwen: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tiny_qwen)
    config.use_sliding_window, config.sliding_window = True, 8
    config.layer_types = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    core = AutoModelForCausalLM.from_config(config).eval()
    rows = made_rows([40, 12], 300)
    packed, _ = logits_of(PaddingFree(DEVICE), core, rows, [0, 1])
    padded, _ = logits_of(Reference(0, DEVICE), core, rows, [0, 1])
    torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)


def test_keys_are_repeated_where_only_a_kernel_without_shared_ones_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable-length kernel a GPU would else hold all scores of a row; the numbers are the same."""
    assert [_repeats(SimpleNamespace(is_cuda=on)) for on in (True, False)] == [True, False]  # type: ignore[arg-type]
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 12, 4) for heads in (8, 2, 2))
    documents = Documents([7, 5], torch.tensor([0, 7, 12], dtype=torch.int32))
    whole, seen, found = functional.scaled_dot_product_attention, [], []

    def noted(query: torch.Tensor, key: torch.Tensor, *others: Any, enable_gqa: bool, **more: Any) -> torch.Tensor:
        seen.append((key.shape[1], enable_gqa))
        return whole(query, key, *others, enable_gqa=enable_gqa, **more)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", noted)
    for repeats in (True, False):
        monkeypatch.setattr("job.training.attention._repeats", lambda _, repeats=repeats: repeats)
        found.append(_documents_attention(torch.nn.Identity(), query, key, value, None, documents=documents)[0])
    assert seen == [(8, False)] * 2 + [(2, True)] * 2
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-6)


def test_cross_entropy_is_a_sum_in_float32() -> None:
    logits, targets = torch.randn(7, 11, dtype=torch.bfloat16), torch.randint(0, 11, (7,))
    expected = -torch.log_softmax(logits.float(), -1)[torch.arange(7), targets].sum()
    torch.testing.assert_close(cross_entropy_sum(logits, targets), expected)
    assert CPU.precision == torch.float32


def test_a_kernel_that_cannot_be_had_any_more_is_chosen_anew(tiny_llama: Path) -> None:
    core = made_model(tiny_llama, made_spec()).get_base_model()
    reference = Reference(0, DEVICE)
    assert kernels.named(core, "padding-free of another age", reference, CPU, "-") is None
    for name in ("reference", "padding-free", "padded, chunked head"):
        choice = kernels.named(core, name, reference, CPU, "as it was")
        assert choice is not None
        assert choice.record() == {"name": name, "reason": "as it was"}


def test_a_model_that_breaks_a_kernel_falls_back(tiny_llama: Path) -> None:  # T43
    class Breaking(PaddingFree):
        name = "breaking"

        def loss(self, model, batch):  # type: ignore[no-untyped-def]
            raise RuntimeError("view size is not compatible with input tensor's size and stride")

    core = made_model(tiny_llama, made_spec()).get_base_model()
    choice = chosen(core, made_rows(LENGTHS, 300), [2, 1, 3], Breaking(DEVICE))
    assert "breaking does not work with this model" in choice.reason


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_models_without_sdpa_are_loaded_and_trained(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8, "n_head": 4, "n_layer": 2}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 48, "num_key_value_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(tmp_path)
    model = made_model(tmp_path, made_spec())
    choice = chosen(model.get_base_model(), made_rows(LENGTHS, 300), [2, 1, 3])
    assert choice.kernel.name == {"gemma2": "padded, chunked head", "bloom": "reference"}[family], choice.reason
    loop = loop_of(tmp_path, made_spec(training={"batch_size": 4, "max_steps": 3}), choice.kernel, LENGTHS)
    losses = losses_of(loop)
    assert losses[-1] < losses[0]
