"""Base and tuned model on the same held-out rows: token-weighted loss, perplexity, accuracy, exact match."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from job.attention import attention, stock_attention
from job.device import Placement
from job.kernels import Kernel
from job.order import micro_batches
from job.prepared import Rows

log = logging.getLogger(__name__)


class StopAsked(Exception):
    """The request to leave came in the middle of an evaluation."""


@dataclass(frozen=True)
class Figures:
    """What one model scores on the evaluation rows."""

    loss: float
    """Sum of the cross entropies (nats) of all trained tokens by their number, whatever the batches were."""
    perplexity: float
    """exp(loss)."""
    token_accuracy: float
    """Share of trained tokens that the model, given the right beginning, ranks first."""
    tokens: int
    """Trained tokens measured."""
    exact_match: float | None = None
    """Share of generated answers equal to the row's, white space at the ends aside; None if none were generated."""
    generated_rows: int = 0

    def record(self) -> dict[str, Any]:
        """As it stands in JSON."""
        return asdict(self)


@torch.no_grad()
def measure(
    core: nn.Module,
    rows: Rows,
    kernel: Kernel,
    placement: Placement,
    budget: int,
    limit: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[], None] = lambda: None,
) -> Figures:
    """Loss and accuracy on the first ``limit`` rows, in batches of up to ``budget`` tokens of similar length.

    Leaves the training untouched: no random number is drawn, and the mode is put back.

    Raises:
        StopAsked: ``should_stop`` said so between two batches.
    """
    count = len(rows) if limit is None else min(limit, len(rows))
    groups = micro_batches([int(length) for length in rows.lengths[:count]], budget, kernel.padded)
    sums = torch.zeros(3, dtype=torch.float64, device=placement.device)
    with _evaluating(core), kernel.installed(core):
        for group in groups[placement.rank :: placement.world]:
            on_batch()
            if should_stop():
                raise StopAsked
            with placement.autocast():
                scores = kernel.score(core, kernel.collate(rows, group))
            loss, right = scores.losses.double().sum(), scores.right.double().sum()
            sums += torch.stack([loss, right, torch.full_like(loss, len(scores.right))])
    if placement.world > 1:
        dist.all_reduce(sums)
    total, right_total, tokens = sums.tolist()
    mean = total / tokens if tokens else math.nan
    return Figures(mean, math.exp(mean) if mean < 700 else math.inf, right_total / max(1.0, tokens), int(tokens))


@torch.no_grad()
def exact_match(
    core: nn.Module,
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    placement: Placement,
    count: int,
    max_new_tokens: int,
    batch_rows: int = 16,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Share of the first ``count`` rows answered word for word by greedy generation."""
    wanted = sorted(range(min(count, len(rows))), key=lambda row: len(rows.prompt(row)))
    batches = [wanted[start : start + batch_rows] for start in range(0, len(wanted), batch_rows)]
    right = 0
    positions = _positions(core)
    with _evaluating(core), attention(core, stock_attention(core)):
        for batch in batches[placement.rank :: placement.world]:
            on_batch()
            room = positions - max(len(rows.prompt(row)) for row in batch)
            if room < 1:
                log.warning(
                    "%d prompts leave no room for an answer in %d positions: counted as wrong", len(batch), positions
                )
                continue
            limit = min(max_new_tokens, room)
            answers = _generate(core, rows, batch, tokenizer, end_ids, placement, limit)
            right += sum(answer.strip() == rows.answer(row).strip() for answer, row in zip(answers, batch, strict=True))
    total = torch.tensor(float(right), device=placement.device)
    if placement.world > 1:
        dist.all_reduce(total)
    return float(total) / max(1, len(wanted))


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
        )
    answers: list[str] = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
    return answers


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def as_base(model: PeftModel, biases: dict[str, Tensor]) -> Iterator[None]:
    """The model as it was before training: adapter off, and trained biases (``lora.bias``) put back for the while."""
    parameters = dict(model.named_parameters())
    tuned = {name: parameters[name].detach().clone() for name in biases}
    _assign(parameters, biases)
    try:
        with model.disable_adapter():
            yield
    finally:
        _assign(parameters, tuned)


@torch.no_grad()
def _assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        parameters[name].copy_(value)


def trained_biases(model: PeftModel) -> dict[str, Tensor]:
    """Copies of the base's own bias vectors that will train; empty unless ``lora.bias`` asks for it."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name.endswith(".bias") and "lora_" not in name and "modules_to_save" not in name
    }
