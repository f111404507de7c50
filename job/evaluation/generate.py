"""Greedy answers to the prompts of rows, in batches of similar length that cost no more tokens than a micro-batch."""

import logging
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from job.data.prepared import Ids, Rows
from job.evaluation.evaluate import dealt, evaluating
from job.training.attention import attention, stock_attention
from job.training.device import Placement
from job.training.sharded import is_shared

log = logging.getLogger(__name__)

BATCH_ROWS = 16
"""Rows that are answered together, at most."""


@torch.no_grad()
def answers(
    core: nn.Module,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    placement: Placement,
    count: int,
    max_new_tokens: int,
    budget: int,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """This rank's share of the greedy answers to the first ``count`` rows, by row; together the ranks answer each once.

    A batch costs its longest prompt and the room for the answer times its rows: at most ``budget`` tokens, which the
    training has memory for, unless a row alone costs more. Answers do not depend on it.

    A prompt that leaves no room for an answer is answered with nothing. An empty one (rows of plain text) becomes the
    tokenizer's BOS, or else its EOS: no model goes on from nothing.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    alone = np.array([eos if bos is None else bos], dtype=np.int32)
    prompts = [rows.prompt(row) if len(rows.prompt(row)) else alone for row in range(min(count, len(rows)))]
    positions = _positions(core)
    rooms = [min(max_new_tokens, positions - len(prompt)) for prompt in prompts]
    aside = [row for row, room in enumerate(rooms) if room < 1]
    if aside and placement.rank == 0:
        log.warning("%d prompts leave no room for an answer in %d positions: counted as wrong", len(aside), positions)
    said = dict.fromkeys(aside[placement.rank :: placement.world], "")
    with evaluating(core), attention(core, stock_attention(core)):
        for batch, counts in dealt(_batches(prompts, rooms, budget), placement):
            on_batch()
            asking = [prompts[row] for row in batch]
            texts = _generate(core, asking, tokenizer, end_ids, placement, rooms[batch[0]])
            said |= dict(zip(batch, texts, strict=True)) if counts else {}
    return said


def _batches(prompts: Sequence[Ids], rooms: Sequence[int], budget: int) -> list[list[int]]:
    """Rows by length of their prompts; those of a batch have equal room, so that none cuts another's answer short."""
    batches: list[list[int]] = []
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        if rooms[row] < 1:
            continue
        rows = min(BATCH_ROWS, budget // (len(prompts[row]) + rooms[row]))  # it would be the longest of its batch
        if batches and len(batches[-1]) < rows and rooms[batches[-1][0]] == rooms[row]:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _positions(core: Any) -> int:
    """Tokens the model can tell apart by position; embeddings of learned positions fail beyond."""
    found = getattr(core.config, "max_position_embeddings", None) or getattr(core.config, "n_positions", None)
    return int(found) if found else 1 << 30


def _generate(
    core: nn.Module,
    asking: Sequence[Ids],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    placement: Placement,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to a batch of prompts, padded on the left."""
    prompts = [torch.from_numpy(prompt.astype("int64")) for prompt in asking]
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), end_ids[0], dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for line, prompt in enumerate(prompts):
        tokens[line, longest - len(prompt) :] = prompt
        mask[line, longest - len(prompt) :] = 1
    # Settings of our own: the model's may sample, or limit the length of prompt and answer together.
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
        use_cache=True,
    )
    with placement.autocast():
        generator: Any = core
        output: Tensor = generator.generate(
            input_ids=tokens.to(placement.device),
            attention_mask=mask.to(placement.device),
            generation_config=settings,
            synced_gpus=is_shared(generator),
        )
    # What ends an answer may be an ordinary token, which decoding would leave in.
    written = [list(takewhile(lambda token: token not in end_ids, line)) for line in output[:, longest:].tolist()]
    texts: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts
