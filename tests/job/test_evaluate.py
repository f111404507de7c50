"""Evaluation is weighted by tokens, whatever the batches were, and leaves the training alone (T5, T7, T19)."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from job.evaluate import StopAsked, as_base, exact_match, measure, trained_biases
from job.kernels import PaddingFree, Reference
from job.model import trained
from tests.job.made import CPU, made_model, made_rows, made_spec, rows_of

LENGTHS = [17, 5, 33, 9, 21, 12, 40, 7]


def test_t5_the_loss_does_not_depend_on_batches_or_kernel(tiny_llama: Path) -> None:
    core = made_model(tiny_llama, made_spec()).get_base_model()
    rows = made_rows(LENGTHS, 300)
    with torch.no_grad():
        total = sum(
            float(functional.cross_entropy(core(input_ids=tokens[None]).logits[0, 1:-1], tokens[2:], reduction="sum"))
            for tokens in (torch.from_numpy(rows.tokens(i).astype("int64")) for i in range(len(rows)))
        )
    expected = total / int(rows.supervised.sum())
    for kernel in (PaddingFree(CPU.device), Reference(0, CPU.device)):
        for budget in (1, 60, 10_000):
            figures = measure(core, rows, kernel, CPU, budget)
            assert figures.loss == pytest.approx(expected, abs=1e-6)
            assert figures.perplexity == math.exp(figures.loss)
            assert figures.tokens == int(rows.supervised.sum())


def test_a_mean_of_batch_means_would_be_another_loss(tiny_llama: Path) -> None:
    core = made_model(tiny_llama, made_spec()).get_base_model()
    rows = made_rows(LENGTHS, 300)
    whole = measure(core, rows, PaddingFree(CPU.device), CPU, 10_000).loss
    alone = [
        measure(core, rows_of([rows.tokens(i)], [[False, False] + [True] * 40]), PaddingFree(CPU.device), CPU, 1).loss
        for i in range(len(rows))
    ]
    assert abs(sum(alone) / len(alone) - whole) > 1e-4


def test_a_row_cap_takes_the_first_rows(tiny_llama: Path) -> None:
    core = made_model(tiny_llama, made_spec()).get_base_model()
    few, first = made_rows(LENGTHS, 300), made_rows(LENGTHS[:3], 300)
    capped = measure(core, few, PaddingFree(CPU.device), CPU, 100, limit=3)
    assert capped.tokens == int(first.supervised.sum())


def test_an_evaluation_leaves_mode_and_random_numbers_as_they_were(tiny_llama: Path) -> None:
    core = made_model(tiny_llama, made_spec(lora={"dropout": 0.5})).get_base_model().train()
    state = torch.get_rng_state()
    first = measure(core, made_rows(LENGTHS, 300), PaddingFree(CPU.device), CPU, 50)
    assert first == measure(core, made_rows(LENGTHS, 300), PaddingFree(CPU.device), CPU, 50)
    assert core.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_request_to_leave_ends_an_evaluation_between_two_batches(tiny_llama: Path) -> None:
    core = made_model(tiny_llama, made_spec()).get_base_model()
    asked: list[bool] = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 2

    with pytest.raises(StopAsked):
        measure(core, made_rows(LENGTHS, 300), PaddingFree(CPU.device), CPU, 20, should_stop=stop)
    assert len(asked) == 2


def test_the_base_figures_are_of_the_untouched_base_even_when_biases_train(tiny_gpt2: Path) -> None:
    model = made_model(tiny_gpt2, made_spec(lora={"bias": "all"}))
    rows = made_rows(LENGTHS, 300)
    before = measure(model.get_base_model(), rows, PaddingFree(CPU.device), CPU, 100)
    biases = trained_biases(model)
    assert biases
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.5)
    tuned = measure(model.get_base_model(), rows, PaddingFree(CPU.device), CPU, 100)
    with as_base(model, biases):
        assert measure(model.get_base_model(), rows, PaddingFree(CPU.device), CPU, 100) == before
    assert measure(model.get_base_model(), rows, PaddingFree(CPU.device), CPU, 100) == tuned != before


def test_t7_a_tuned_model_ends_its_answers_although_padding_and_end_are_one_token(tiny_gpt2: Path) -> None:
    """GPT-2 has one special token for all; trained on a few rows until it knows them, it must stop by itself."""
    from transformers import AutoTokenizer

    from job.loop import Loop, make_optimizer
    from job.order import Order

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    end = tokenizer.eos_token_id
    pairs = [("apple?", " red"), ("lemon?", " yellow"), ("lime, what colour?", " green")]
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    answers = [tokenizer(answer)["input_ids"] + [end] for _, answer in pairs]
    tokens = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    masks = [[False] * len(p) + [True] * len(a) for p, a in zip(prompts, answers, strict=True)]
    rows = rows_of(tokens, masks, prompts, [answer for _, answer in pairs])

    spec = made_spec(lora={"r": 16, "modules_to_save": ["wte"]}, training={"max_steps": 60, "learning_rate": 2e-2})
    model = made_model(tiny_gpt2, spec)
    order = Order(rows.sources, [1.0], spec.training, "digest")
    # The reference pads with the very token that ends an answer: padding must not hide the end from the loss.
    kernel = Reference(end, CPU.device)
    loop = Loop(model, make_optimizer(model, spec.training), rows, order, spec.training, kernel, CPU)
    for _ in loop.run(lambda: False):
        pass
    core = model.get_base_model()
    assert exact_match(core, rows, tokenizer, [end], CPU, count=3, max_new_tokens=8) == 1.0
    assert exact_match(core, rows, tokenizer, [end], CPU, count=3, max_new_tokens=8, batch_rows=1) == 1.0


def test_an_answer_ends_where_the_model_has_no_more_positions(tiny_gpt2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    core = made_model(tiny_gpt2, made_spec()).get_base_model()  # 256 positions
    rows = rows_of([[7, 8, 9]] * 2, [[False, False, True]] * 2, [[7] * 250, [7] * 256], ["x", "x"])
    for batch_rows in (1, 2):
        share = exact_match(core, rows, tokenizer, [0], CPU, count=2, max_new_tokens=64, batch_rows=batch_rows)
        assert share == 0.0
