"""Evaluation is weighted by tokens, whatever the batches were, and leaves the training alone (T5, T7, T19)."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from job.evaluation import generate
from job.evaluation.evaluate import StopAsked, as_base, by_length, dealt, measure, trained_biases
from job.training.adapter import trained
from job.training.kernels import PaddingFree, Reference
from job.training.loop import Loop, make_optimizer
from job.training.order import Order
from tests.job import ranks
from tests.job.made import CPU, made_model, made_rows, made_spec, rows_of
from tests.job.worked import measured

LENGTHS = [17, 5, 33, 9, 21, 12, 40, 7]


def test_the_loss_does_not_depend_on_batches_or_kernel(tiny_llama: Path) -> None:
    """T5: batches of 1, 3 and 8 rows, padded and padding-free, give the token-weighted loss to 1e-6."""
    core = made_model(tiny_llama, made_spec()).get_base_model()
    rows = made_rows(LENGTHS, 300)
    with torch.no_grad():
        total = sum(
            float(functional.cross_entropy(core(input_ids=tokens[None]).logits[0, 1:-1], tokens[2:], reduction="sum"))
            for tokens in (torch.from_numpy(rows.tokens(i).astype("int64")) for i in range(len(rows)))
        )
    expected = total / int(rows.supervised.sum())
    for kernel in (PaddingFree(CPU.device), Reference(0, CPU.device)):
        for budget in (1, 120, 10_000):
            figures = measure(core, rows, kernel, CPU, budget)
            assert figures.loss == pytest.approx(expected, abs=1e-6, rel=0)
            assert figures.perplexity == math.exp(figures.loss)
            assert figures.tokens == int(rows.supervised.sum())
            assert figures.sums[:, 2].tolist() == rows.supervised.tolist()


def test_the_sums_of_a_row_are_those_of_the_row_alone(tiny_llama: Path) -> None:
    """T5: what the uncertainty is computed from is right for each row, not only in all."""
    core = made_model(tiny_llama, made_spec()).get_base_model()
    rows = made_rows(LENGTHS, 300)
    alone = [measure(core, made_rows(LENGTHS, 300), Reference(0, CPU.device), CPU, 1).sums]
    for kernel in (PaddingFree(CPU.device), Reference(0, CPU.device)):
        assert measure(core, rows, kernel, CPU, 10_000).sums == pytest.approx(alone[0], abs=1e-4)
    for row, tokens in enumerate(rows.tokens(i) for i in range(len(rows))):
        mask = [rows.labels(row)[position] >= 0 for position in range(len(tokens))]
        single = measure(core, rows_of([tokens], [mask]), Reference(0, CPU.device), CPU, 1)
        assert alone[0][row] == pytest.approx([single.loss * single.tokens, single.sums[0][1], single.tokens])


BATCHES: dict[str, tuple[int, bool, list[list[int]]]] = {
    "each alone": (1, False, [[2], [0], [3], [1]]),
    "tokens": (15, False, [[2], [0, 3], [1]]),
    "padded": (15, True, [[2], [0], [3, 1]]),
    "padded, the longest counts": (18, True, [[2], [0, 3], [1]]),
    "all": (100, True, [[2, 0, 3, 1]]),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_hold_rows_of_similar_length_up_to_a_budget(case: str) -> None:
    budget, padded, expected = BATCHES[case]
    assert by_length(np.array([9, 4, 20, 5], dtype=np.int32), budget, padded) == expected


@pytest.mark.parametrize(("groups", "world"), [(7, 3), (2, 4), (0, 2), (6, 3)])
def test_ranks_share_batches_and_go_through_equally_many(groups: int, world: int) -> None:
    """T40: a shared base is gathered by all ranks together, so none may stop before the others."""
    every = [[number] for number in range(groups)]
    shares = [dealt(every, replace(CPU, rank=rank, world=world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(group for share in shares for group, counts in share if counts) == every


def test_several_ranks_find_the_figures_of_one(tiny_llama: Path) -> None:
    """T2, T5: the sums of every row, and every answer; some ranks have nothing to do, others share the base."""
    arguments: dict[str, Any] = {"base": str(tiny_llama), "lengths": LENGTHS}
    alone = measured(0, 1, **arguments, parallelism="replicate")
    with ranks.started() as server:
        for world, parallelism in ((4, "replicate"), (2, "shard")):
            found = server.run("tests.job.worked:measured", world, **arguments, parallelism=parallelism)
            assert all(one["sums"] == pytest.approx(alone["sums"], abs=1e-6) for one in found)
            said = [one["said"] for one in found]
            assert sum(len(one) for one in said) == len(LENGTHS)
            assert {row: text for one in said for row, text in one.items()} == alone["said"]


@pytest.mark.parametrize("kind", ["tiny_gpt2", "tiny_qwen"])
def test_a_base_in_4_bits_still_trains_after_an_evaluation(kind: str, request: pytest.FixtureRequest) -> None:
    """T37: bitsandbytes may repack a CPU's weights in an evaluation; then no gradient would pass any more."""
    spec = made_spec(method="qlora", training={"max_steps": 4, "batch_size": 4})
    rows, runs = made_rows(LENGTHS, 300), []
    for evaluates in (False, True):
        model = made_model(request.getfixturevalue(kind), spec)
        core = model.get_base_model()
        names = {name: value.dtype for name, value in core.state_dict().items()}
        order = Order(rows.sources, [1.0], spec.training, "digest")
        kernel = PaddingFree(CPU.device)
        loop = Loop(model, make_optimizer(model, spec.training), rows, order, spec.training, kernel, CPU)
        for progress in loop.run(lambda: False):
            assert progress.grad_norm > 0
            if evaluates:
                measure(core, rows, kernel, CPU, 100)
        assert {name: value.dtype for name, value in core.state_dict().items()} == names
        runs.append({name: parameter.detach().clone() for name, parameter in trained(model).items()})
    assert all(torch.equal(tensor, runs[1][name]) for name, tensor in runs[0].items())


def test_a_mean_of_batch_means_would_be_another_loss(tiny_llama: Path) -> None:
    """T5: the negative control."""
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


@pytest.mark.parametrize("is_special", [True, False], ids=["special token", "ordinary token"])
def test_a_tuned_model_ends_its_answers_although_padding_and_end_are_one_token(
    tiny_gpt2: Path, is_special: bool
) -> None:
    """T7: GPT-2 has one special token for all; trained on a few rows until it knows them, it must stop by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    end = tokenizer.eos_token_id if is_special else tokenizer("!")["input_ids"][0]
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
    wanted = {row: answer for row, (_, answer) in enumerate(pairs)}
    for budget in (10_000, 1):
        assert generate.answers(core, rows, tokenizer, [end], CPU, 3, max_new_tokens=8, budget=budget) == wanted


PROMPTS: dict[str, tuple[list[list[int]], list[list[int]], list[int]]] = {
    "no room for some": ([[7] * 250, [7] * 256, [8] * 3, [9] * 260], [[2], [0]], [1, 3]),
    "less room for some": ([[7] * 3, [7] * 246, [8] * 251, [8] * 249, [9] * 251], [[0], [1], [3], [2, 4]], []),
    "room for none": ([[7] * 256, [8] * 300], [], [0, 1]),
    "nothing to begin with": ([[], [7] * 3, []], [[0, 2, 1]], []),
}
"""Prompts for a model of 256 positions that is asked for 12 tokens; the batches; rows that are put aside."""


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1, [[0], [1], [2], [3], [4]]),
        (40, [[0, 1], [2], [3], [4]]),
        (120, [[0, 1, 2, 3], [4]]),
        (10_000, [[0, 1, 2, 3, 4]]),
    ],
)
def test_a_batch_of_answers_costs_no_more_tokens_than_a_micro_batch(budget: int, expected: list[list[int]]) -> None:
    """Prompts of 8, 10, 20, 20 and 200 tokens, 10 for each answer: a row counts as its batch's longest and its room."""
    prompts = [np.zeros(length, dtype=np.int32) for length in (8, 10, 20, 20, 200)]
    assert generate._batches(prompts, [10] * 5, budget) == expected


def test_not_more_rows_are_answered_together_than_the_host_keeps_up_with() -> None:
    prompts = [np.zeros(2, dtype=np.int32)] * 40
    assert [len(batch) for batch in generate._batches(prompts, [2] * 40, 10_000)] == [16, 16, 8]


@pytest.mark.parametrize("case", PROMPTS)
def test_a_greedy_answer_is_the_same_whatever_is_asked_beside_it(
    tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """T5: room is that of the prompt alone; an empty prompt, which plain text has, is the token a text begins with."""
    from transformers import AutoTokenizer

    prompts, batches, aside = PROMPTS[case]
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    core = made_model(tiny_gpt2, made_spec()).get_base_model()
    ask = generate._generate
    asked: list[tuple[list[list[int]], int]] = []

    def noted(core: Any, asking: Any, *others: Any) -> list[str]:
        asked.append(([prompt.tolist() for prompt in asking], others[-1]))
        return ask(core, asking, *others)

    monkeypatch.setattr(generate, "_generate", noted)

    def said(chosen: list[list[int]], world: int = 1, budget: int = 100_000) -> dict[int, str]:
        rows = rows_of([[7, 8]] * len(chosen), [[False, True]] * len(chosen), chosen)
        every = [replace(CPU, rank=rank, world=world) for rank in range(world)]
        shares = [generate.answers(core, rows, tokenizer, [0], rank, len(chosen), 12, budget) for rank in every]
        assert sum(map(len, shares)) == len(chosen)
        return {row: text for share in shares for row, text in share.items()}

    together = said(prompts)
    full = [prompt or [tokenizer.eos_token_id] for prompt in prompts]  # this tokenizer has no BOS
    assert asked == [([full[row] for row in batch], min(12, 256 - len(full[batch[0]]))) for batch in batches]
    assert not any(together[row] for row in aside)
    assert together == said(prompts, budget=1) == said(prompts, world=3) == said(full)
    assert together == {row: said([prompt])[0] for row, prompt in enumerate(prompts)}
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(9)
    asked.clear()
    assert said(prompts) == said([prompt or [9] for prompt in prompts])
    assert asked[: len(batches)] == asked[len(batches) :]
