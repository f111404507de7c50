"""The chunked head gives what the model's own head gives, and never holds all logits (T16, T17, T42)."""

from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from job.training import head as head_module
from job.training import kernels
from job.training.attention import UnsupportedModel
from job.training.head import ChunkedHead, chunked_head
from job.training.kernels import PaddingFree, Reference
from tests.job.made import CPU, made_rows

VOCABULARY = 300
DEVICE = torch.device("cpu")
LENGTHS = [17, 5, 33, 9]

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "smollm3": {},
    "olmo2": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


def core_of(family: str) -> Any:
    torch.manual_seed(0)
    core = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | FAMILIES[family])).eval()
    # Large enough that a bound on the logits is felt.
    core.get_output_embeddings().weight.data.mul_(8.0)
    core.requires_grad_(False)
    core.base_model.layers[0].requires_grad_(True) if hasattr(core.base_model, "layers") else core.base_model.h[
        0
    ].requires_grad_(True)
    return core


def test_every_family_that_is_offered_is_proven() -> None:
    assert set(head_module._FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chunked_head_has_the_models_own_maths(family: str, monkeypatch: pytest.MonkeyPatch) -> None:  # T42
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * VOCABULARY * 7)  # seven tokens a chunk
    core, rows = core_of(family), made_rows(LENGTHS, VOCABULARY)
    choice = kernels.choose(core, rows, [0, 1, 2, 3], Reference(0, DEVICE), CPU)
    expected = ("padded, chunked head",) if family == "gemma2" else ("padding-free", "padding-free, oneDNN")
    assert choice.kernel.name in expected, choice.reason
    reference = Reference(0, DEVICE)
    with torch.no_grad():
        with choice.kernel.installed(core):
            found = choice.kernel.score(core, choice.kernel.collate(rows, [0, 1, 2, 3]))
        scores = reference.score(core, reference.collate(rows, [0, 1, 2, 3]))
    torch.testing.assert_close(found.losses, scores.losses, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.right, scores.right)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 4.0), (0.5, 4.0)])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_loss_and_gradient_are_those_of_whole_logits(  # T17
    scale: float, softcap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * VOCABULARY * chunk)
    torch.manual_seed(1)
    weight, bias = torch.randn(VOCABULARY, 16), torch.randn(VOCABULARY)
    hidden, targets = torch.randn(23, 16, requires_grad=True), torch.randint(0, VOCABULARY, (23,))
    head = ChunkedHead(weight, bias, scale, softcap)
    found = head.loss(hidden, targets)
    (found_gradient,) = torch.autograd.grad(found / 23, hidden)
    logits = functional.linear(hidden, weight, bias) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(expected / 23, hidden)
    torch.testing.assert_close(float(found), float(expected), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(found_gradient, gradient, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(float(head.scores(hidden, targets).losses.sum()), float(expected), rtol=1e-6, atol=0.0)


def test_no_trained_token_gives_zero_with_a_graph() -> None:  # T17
    hidden = torch.randn(0, 16, requires_grad=True)
    loss = ChunkedHead(torch.randn(VOCABULARY, 16), None).loss(hidden, torch.empty(0, dtype=torch.int64))
    torch.autograd.backward(loss)
    assert float(loss) == 0.0
    assert hidden.grad is not None


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_sixteen_bit_hidden_states_get_a_gradient_of_their_type(kind: torch.dtype) -> None:
    torch.manual_seed(2)
    weight, targets = torch.randn(VOCABULARY, 16).to(kind), torch.randint(0, VOCABULARY, (9,))
    hidden = torch.randn(9, 16).to(kind).requires_grad_()
    torch.autograd.backward(ChunkedHead(weight, None).loss(hidden, targets) / 9)
    exact = hidden.detach().float().requires_grad_()
    torch.autograd.backward(functional.cross_entropy(exact @ weight.float().T, targets))
    assert hidden.grad is not None
    assert hidden.grad.dtype == kind
    assert exact.grad is not None
    assert float((hidden.grad.float() - exact.grad).norm() / exact.grad.norm()) < 2e-2


class Largest(TorchDispatchMode):
    """The largest tensor, in elements, that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple | list) else (made,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def test_nothing_of_trained_tokens_times_vocabulary_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK_BYTES", 4 * VOCABULARY * 8)
    core, rows = core_of("llama"), made_rows([60] * 20, VOCABULARY)
    largest: dict[str, int] = {}
    for kernel in (PaddingFree(DEVICE, chunked_head(core)), PaddingFree(DEVICE)):
        batch = kernel.collate(rows, range(20))
        with Largest() as seen, kernel.installed(core):
            torch.autograd.backward(kernel.loss(core, batch))
            kernel.score(core, batch)
        largest[kernel.name] = seen.elements
    whole = len(batch.targets) * VOCABULARY
    assert largest["padding-free"] < whole / 2
    assert largest["padding-free, own head"] >= whole  # what the measure would have seen


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda core: core.lm_head.requires_grad_(True), "is trained"),
        (lambda core: setattr(core, "lm_head", torch.nn.Sequential(core.lm_head)), "Sequential"),
        (lambda core: setattr(core.config, "model_type", "unheard-of"), "unheard-of"),
    ],
)
def test_a_head_that_is_not_plain_is_left_to_the_model(change: Any, reason: str) -> None:  # T42
    core = core_of("llama")
    change(core)
    with pytest.raises(UnsupportedModel, match=reason):
        chunked_head(core)
