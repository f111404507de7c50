"""Greedy answers to the prompts of rows, in batches of similar length."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from job.data.prepared import Rows
from job.evaluation.evaluate import dealt, evaluating
from job.training.attention import attention, stock_attention
from job.training.device import Placement
from job.training.sharded import is_shared

log = logging.getLogger(__name__)

BATCH_ROWS = 16


@torch.no_grad()
def answers(
    core: nn.Module,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    placement: Placement,
    count: int,
    max_new_tokens: int,
    batch_rows: int = BATCH_ROWS,
    on_batch: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """This rank's share of the greedy answers to the first ``count`` rows, by row; together the ranks answer each once.

    A prompt that leaves no room for an answer is answered with nothing.
    """
    wanted = sorted(range(min(count, len(rows))), key=lambda row: len(rows.prompt(row)))
    batches = [wanted[start : start + batch_rows] for start in range(0, len(wanted), batch_rows)]
    positions = _positions(core)
    said: dict[int, str] = {}
    with evaluating(core), attention(core, stock_attention(core)):
        for batch, counts in dealt(batches, placement):
            on_batch()
            room = positions - max(len(rows.prompt(row)) for row in batch)
            if room < 1:
                log.warning(
                    "%d prompts leave no room for an answer in %d positions: counted as wrong", len(batch), positions
                )
                texts = [""] * len(batch)
            else:
                texts = _generate(core, rows, batch, tokenizer, end_ids, placement, min(max_new_tokens, room))
            said |= dict(zip(batch, texts, strict=True)) if counts else {}
    return said


def _positions(core: Any) -> int:
    """Tokens the model can tell apart by position; embeddings of learned positions fail beyond."""
    found = getattr(core.config, "max_position_embeddings", None) or getattr(core.config, "n_positions", None)
    return int(found) if found else 1 << 30


def _generate(
    core: nn.Module,
    rows: Rows,
    batch: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    placement: Placement,
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to a batch of prompts, padded on the left."""
    prompts = [torch.from_numpy(rows.prompt(row).astype("int64")) for row in batch]
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
    texts: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return texts
