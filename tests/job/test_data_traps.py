"""Traps between data and loss: padding that is the end token, rows put together, packs that lose tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from job.data import chat
from job.data.encode import Encoder
from job.data.formats import PlainText
from job.training.batch import pack, pad
from job.training.order import micro_batches
from tests.job.made import made_rows, rows_of
from tests.job.tiny import END_OF_TEXT

CPU = torch.device("cpu")
lengths_of_rows = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of_rows, budget=st.integers(8, 200), padded=st.booleans())
def test_micro_batches_hold_the_tokens_of_every_row_whole_and_once(
    lengths: list[int], budget: int, padded: bool
) -> None:
    """T15: the multiset of tokens is the same before and after, no row is split, none shares a place with another."""
    rows = made_rows(lengths, 300)
    groups = micro_batches(lengths, budget, padded)
    found: list[Any] = []
    trained = 0
    for group in groups:
        cost = max(lengths[i] for i in group) * len(group) if padded else sum(lengths[i] for i in group)
        assert cost <= budget or len(group) == 1
        packed = pack(rows, group, CPU)
        cut = packed.tokens[0].split(packed.documents.lengths)
        found += [(index, tokens.tolist()) for index, tokens in zip(group, cut, strict=True)]
        assert packed.positions[0].tolist() == [p for index in group for p in range(lengths[index])]
        trained += len(packed.targets)
    assert sorted(found) == [(index, rows.tokens(index).tolist()) for index in range(len(lengths))]
    assert trained == rows.supervised.sum()


@pytest.mark.parametrize("seed", [0, 1])
def test_packs_of_rows_of_usual_lengths_are_full(seed: int) -> None:
    """T15: over 95 % of the budget is tokens, with lengths as conversations have them (log-normal, cut at 1,024)."""
    random = np.random.default_rng(seed)
    lengths = np.clip(random.lognormal(5.2, 0.8, 512), 8, 1024).astype(int).tolist()
    groups = micro_batches(lengths, 4096, padded=False)
    assert sum(lengths) / (4096 * len(groups)) > 0.95


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Any:
    """A tokenizer whose padding is its end of text, as GPT-2's users set it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_gpt2, pad_token=END_OF_TEXT)


def encoded(tokenizer: Any, *pairs: tuple[str, str]) -> Any:
    rendered = [(chat.render(PlainText(prompt, answer), None), False) for prompt, answer in pairs]
    made = Encoder(tokenizer, "assistant").encode(rendered)
    return rows_of([one.tokens for one in made], [one.trained.tolist() for one in made])


def test_padding_is_told_from_the_end_token_by_its_place(gpt2: Any) -> None:
    """T7: the row's own end is trained, padding with the same id is neither attended to nor trained."""
    assert gpt2.pad_token_id == gpt2.eos_token_id
    rows = encoded(gpt2, ("Name the colour of a plum.", " purple"), ("lime: which colour? Tell me", " green"))
    batch = pad(rows, [0, 1], gpt2.eos_token_id, CPU)
    for line, index in enumerate((0, 1)):
        length = int(rows.lengths[index])
        assert batch.attention[line].tolist() == [1] * length + [0] * (batch.tokens.shape[1] - length)
        assert batch.tokens[line, length - 1] == gpt2.eos_token_id
    assert rows.lengths[0] != rows.lengths[1]
    assert len(batch.targets) == rows.supervised.sum()
    assert batch.targets.tolist().count(gpt2.eos_token_id) == 2
    assert batch.targets.tolist() == pack(rows, [0, 1], CPU).targets.tolist()


def test_a_model_that_learnt_the_rows_by_heart_ends_its_answers(gpt2: Any, tiny_gpt2: Path) -> None:
    """T7: with padding equal to the end token it writes the answer and then the end, once."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tiny_gpt2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    pairs = [("Name the colour of a plum.", " purple"), ("lime:", " green, as they say")]
    rows = encoded(gpt2, *pairs)
    batch = pad(rows, [0, 1], gpt2.pad_token_id, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        logits = model(batch.tokens, attention_mask=batch.attention).logits.flatten(0, 1)[batch.predictors]
        loss = torch.nn.functional.cross_entropy(logits, batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for prompt, answer in pairs:
        asked = gpt2(prompt, return_tensors="pt")
        said = model.generate(**asked, max_new_tokens=40, do_sample=False, pad_token_id=gpt2.pad_token_id)[0]
        assert gpt2.decode(said) == prompt + answer + END_OF_TEXT
