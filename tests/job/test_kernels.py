"""Padding-free batches give the reference's loss and gradient (T7, T14, T16, T43), or the run falls back."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from job import kernels
from job.kernels import PaddingFree, Reference, attention, cross_entropy_sum
from tests.job.made import CPU, made_model, made_rows, made_spec

LENGTHS = [17, 5, 33, 9]
DEVICE = torch.device("cpu")


@pytest.fixture(params=["tiny_llama", "tiny_qwen", "tiny_gpt2"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def logits_of(kernel: kernels.Kernel, core: torch.nn.Module, rows: object, indices: list[int]) -> tuple:  # type: ignore[type-arg]
    with torch.no_grad(), attention(core, kernel.implementation):
        return kernel.logits(core, kernel.collate(rows, indices))  # type: ignore[arg-type]


def test_packed_rows_do_not_see_each_other(model_folder: Path) -> None:
    core = made_model(model_folder, made_spec()).get_base_model().eval()
    rows = made_rows(LENGTHS, 300)
    together, targets = logits_of(PaddingFree(DEVICE), core, rows, [0, 1, 2, 3])
    alone = [logits_of(PaddingFree(DEVICE), core, rows, [row]) for row in range(4)]
    assert torch.equal(targets, torch.cat([t for _, t in alone]))
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), atol=1e-5, rtol=1e-5)


def test_packed_equals_padded_whatever_the_padding_token_is(model_folder: Path) -> None:
    core = made_model(model_folder, made_spec()).get_base_model().eval()
    rows = made_rows(LENGTHS, 300)
    packed, targets = logits_of(PaddingFree(DEVICE), core, rows, [0, 1, 2, 3])
    for padding in (0, 7):
        padded, same = logits_of(Reference(padding, DEVICE), core, rows, [0, 1, 2, 3])
        assert torch.equal(targets, same)
        torch.testing.assert_close(packed, padded, atol=1e-4, rtol=1e-4)


def test_supervised_tokens_are_the_same_in_both_kernels(tiny_llama: Path) -> None:
    rows = made_rows(LENGTHS, 300)
    expected = int(rows.supervised.sum())
    core = made_model(tiny_llama, made_spec()).get_base_model()
    for kernel in (PaddingFree(DEVICE), Reference(0, DEVICE)):
        assert len(logits_of(kernel, core, rows, [0, 1, 2, 3])[1]) == expected


def test_the_comparison_at_the_start_accepts_models_that_keep_rows_apart(model_folder: Path) -> None:
    model = made_model(model_folder, made_spec())
    choice = kernels.choose(
        model.get_base_model(),
        made_rows(LENGTHS, 300),
        [2, 1, 3],
        (PaddingFree(DEVICE), Reference(0, DEVICE)),
        nullcontext,
        torch.float32,
    )
    assert choice.kernel.name == "padding-free", choice.reason
    assert all(p.grad is None for p in model.parameters())


def test_a_kernel_that_leaks_between_rows_falls_back_to_the_reference(tiny_llama: Path) -> None:
    class Leaking(PaddingFree):
        """Padding-free batches under an attention that knows of no rows: what silence would look like."""

        def __init__(self) -> None:
            super().__init__(DEVICE, implementation="sdpa")

        def logits(self, model, batch):  # type: ignore[no-untyped-def]
            output = model(
                input_ids=batch.tokens,
                position_ids=batch.positions,
                attention_mask=torch.ones_like(batch.tokens),
                use_cache=False,
                logits_to_keep=batch.predictors,
            )
            return output.logits[0], batch.targets

    core = made_model(tiny_llama, made_spec()).get_base_model()
    rows = made_rows(LENGTHS, 300)
    choice = kernels.choose(core, rows, [2, 1, 3], (Leaking(), Reference(0, DEVICE)), nullcontext, torch.float32)
    assert choice.kernel.name == "reference"
    assert "differ from the reference" in choice.reason


def test_attention_with_soft_cap_falls_back_by_name(tiny_llama: Path) -> None:
    core = made_model(tiny_llama, made_spec()).get_base_model()

    class SoftCapped(PaddingFree):
        def logits(self, model, batch):  # type: ignore[no-untyped-def]
            output = model(
                input_ids=batch.tokens, position_ids=batch.positions, documents=batch.documents, softcap=50.0
            )
            return output.logits[0], batch.targets

    choice = kernels.choose(
        core, made_rows(LENGTHS, 300), [0, 1], (SoftCapped(DEVICE), Reference(0, DEVICE)), nullcontext, torch.float32
    )
    assert (choice.kernel.name, "softcap" in choice.reason) == ("reference", True)


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


def test_cross_entropy_is_a_sum_in_float32() -> None:
    logits, targets = torch.randn(7, 11, dtype=torch.bfloat16), torch.randint(0, 11, (7,))
    expected = -torch.log_softmax(logits.float(), -1)[torch.arange(7), targets].sum()
    torch.testing.assert_close(cross_entropy_sum(logits, targets), expected)
    assert CPU.precision == torch.float32
