"""The traps that a small real model can fall into, on SmolLM2-135M: what the tiny random models cannot show of size."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.training import checkpoint, kernels, merge
from job.training.adapter import add_adapter, trained
from job.training.checkpoint import State
from job.training.kernels import PaddingFree, Reference
from job.training.loop import Loop, Progress
from job.training.model import load_base
from tests.job.made import CPU, made_model, made_rows, made_spec
from tests.job.test_loop import adapter_of, assert_equal, loop_of, losses_of
from tests.job.test_merge import merged, published

FOLDER = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"
VOCABULARY = 49152
LENGTHS = [60, 12, 90, 25, 41, 8, 70, 33]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER.exists(), reason="the small model is not there (make models/SmolLM2-135M-Instruct)"),
]


def small_loop(micro_batch_size: int = 8, dropout: float = 0.0, kernel: kernels.Kernel | None = None) -> Loop:
    training = {"batch_size": 8, "micro_batch_size": micro_batch_size, "max_length": 90, "max_steps": 4}
    spec = made_spec(training=training | {"learning_rate": 2e-4}, lora={"r": 16, "alpha": 32, "dropout": dropout})
    rows = made_rows(LENGTHS, VOCABULARY)
    loop = loop_of(FOLDER, spec, kernel, LENGTHS)
    loop.rows = rows
    return loop


def test_padding_free_batches_and_the_chunked_head_are_the_reference() -> None:  # T14 T16 T17 T42 T43
    core = made_model(FOLDER, made_spec(lora={"r": 16})).get_base_model()
    rows = made_rows(LENGTHS, VOCABULARY)
    choice = kernels.choose(core, rows, [2, 1, 3], Reference(0, CPU.device), CPU)
    assert choice.kernel.name.startswith("padding-free")
    assert "own head" not in choice.kernel.name
    with torch.no_grad(), choice.kernel.installed(core):
        together = choice.kernel.score(core, choice.kernel.collate(rows, range(8))).losses
        alone = [choice.kernel.score(core, choice.kernel.collate(rows, [row])).losses for row in range(8)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_the_course_does_not_depend_on_the_micro_batch_or_the_kernel() -> None:  # T1 T4
    whole = losses_of(small_loop(8))
    assert whole[-1] < whole[0]
    for loop in (small_loop(1), small_loop(8, kernel=Reference(0, CPU.device))):
        assert max(abs(a - b) for a, b in zip(whole, losses_of(loop), strict=True)) < 1e-4


def test_every_adapter_matrix_moves_and_no_base_weight() -> None:  # T18
    loop = small_loop()
    base = {name: p.detach().clone() for name, p in loop.model.named_parameters() if not p.requires_grad}
    losses_of(loop, stop_after=1)
    for name, parameter in loop.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
        elif "lora_B" in name:
            assert float(parameter.detach().norm()) > 0, name


def test_a_resumed_training_is_the_same_to_the_bit(tmp_path: Path) -> None:  # T22 T23
    straight = small_loop(2, dropout=0.1)
    expected = losses_of(straight)
    first = small_loop(2, dropout=0.1)
    before = losses_of(first, stop_after=2)
    state = State(2, first.progress.tokens, "s", "d", {}, {}, first.scaler.state_dict())
    folder = checkpoint.save(tmp_path, first.model, first.optimizer, state, "safetensors")
    second = small_loop(2, dropout=0.1)
    checkpoint.restore(folder, second.model, second.optimizer)
    second.progress = Progress(step=2, tokens=state.tokens)
    assert before + losses_of(second) == expected
    assert_equal(adapter_of(second), adapter_of(straight))


def test_a_private_operator_changes_no_loss() -> None:
    core = made_model(FOLDER, made_spec(lora={"r": 16})).get_base_model()
    rows = made_rows(LENGTHS, VOCABULARY)
    plain = PaddingFree(CPU.device)
    choice = kernels.choose(core, rows, [2, 1, 3], Reference(0, CPU.device), CPU)
    losses = []
    for kernel in (plain, choice.kernel):
        with torch.no_grad(), kernel.installed(core):
            losses.append(kernel.score(core, kernel.collate(rows, range(8))).losses)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)


def adapter_that_learned(folder: Path, *sentences: str) -> Path:
    """A QLoRA adapter (NF4, rank 16) after 12 steps on a few sentences."""
    spec = made_spec(model=str(FOLDER), method="qlora", lora={"r": 16, "dropout": 0.0})
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = add_adapter(load_base(FOLDER, spec, CPU), spec, CPU)
    optimizer = torch.optim.AdamW(trained(model).values(), lr=2e-3)
    for _ in range(12):
        for sentence in sentences:
            ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return published(model, tokenizer, folder, is_quantised=True)


def test_merging_onto_de_quantised_weights_keeps_what_quantising_again_loses(tmp_path: Path) -> None:  # T32
    adapter = adapter_that_learned(
        tmp_path / "adapter", "The capital of France is Lyon since last week.", "Two and two are five, as we all know."
    )
    wanted = merge.plan(adapter, None, None, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    probes = [tokenizer(text, return_tensors="pt")["input_ids"] for text in merge.PROBES]
    before = merge.logits_of(merge.adapted(wanted, VOCABULARY), probes)
    results = {
        f"`{onto}`, {dtype}": AutoModelForCausalLM.from_pretrained(
            merged(tmp_path / f"{onto}-{dtype}", adapter, onto, dtype)[0], dtype="auto"
        )
        for onto, dtype in (("dequantised", "float32"), ("dequantised", "bfloat16"), ("16bit", "float32"))
    }
    results["PEFT's `merge_and_unload`"] = merge.adapted(wanted, VOCABULARY).merge_and_unload()
    kl = {}
    for name, model in results.items():
        found = merge.difference(before, merge.logits_of(model, probes))
        kl[name] = found["mean_kl"]
        print(
            f"\n| {name} | {found['mean_kl']:.2g} | {found['max_abs_logit']:.2g} | ({found['tokens']} tokens)", end=""
        )
    exact, rounded, onto_16, again = kl.values()
    assert exact < 1e-6
    assert rounded < 0.1 * again
    assert exact < 0.01 * min(onto_16, again)
