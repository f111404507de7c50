"""Text to token ids and labels: tokenised once, as a whole, and labelled by the characters each token covers."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from job.data.chat import Rendered
from job.errors import SpecInvalid

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Encoded:
    """One row as it is trained."""

    tokens: Ids
    trained: Mask
    """Which tokens the loss counts. Never the first: nothing stands before it that could predict it."""
    prompt: Ids
    """What the model is given when it is asked for the last answer; empty where nobody will ask."""
    answer: str
    """The last answer, without the token that ends it."""

    @property
    def supervised(self) -> int:
        """Tokens the loss counts."""
        return int(self.trained.sum())


class Encoder:
    """Turns rendered rows into tokens; knows what the tokenizer adds by itself, and adds it exactly once."""

    def __init__(self, tokenizer: Any, train_on: str) -> None:
        """
        Raises:
            SpecInvalid: the tokenizer is not a fast one, or has no end-of-sequence token.
        """
        if not tokenizer.is_fast:
            raise SpecInvalid(
                f"model.from: {type(tokenizer).__name__} is a slow tokenizer, which does not say which characters a "
                "token covers; save the model with a tokenizer.json (AutoTokenizer.from_pretrained(..., use_fast=True))"
            )
        if tokenizer.eos_token_id is None:
            raise SpecInvalid("model.from: the tokenizer has no eos token, so the model could not learn where to stop")
        self._train_on = train_on
        self._eos, self._end = tokenizer.eos_token_id, str(tokenizer.eos_token)
        self._prefix = _prefix(tokenizer)
        self._backend = _bare(tokenizer)

    def encode(self, rows: Sequence[tuple[Rendered, bool]]) -> list[Encoded]:
        """The rows as tokens, in order; each with its prompt if it is asked for, else with an empty one."""
        texts = self._tokens([row.text for row, _ in rows])
        prompts = iter(self._tokens([row.prompt for row, needs_prompt in rows if needs_prompt]))
        pairs = zip(rows, texts, strict=True)
        return [self._row(row, text, next(prompts) if needs_prompt else None) for (row, needs_prompt), text in pairs]

    def _tokens(self, texts: list[str]) -> Any:
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _row(self, row: Rendered, text: Any, prompt: Any) -> Encoded:
        tokens = np.array(text.ids, dtype=np.int32)
        trained = self._mask(row, np.array(text.offsets, dtype=np.int64).reshape(-1, 2))
        answer = row.answer
        if row.way == "plain text":
            if len(tokens) == 0 or tokens[-1] != self._eos:
                tokens, trained = np.append(tokens, np.int32(self._eos)), np.append(trained, True)
            answer = self._without_end(answer)
        tokens, trained = self._prefixed(tokens), self._prefixed(tokens, trained)
        trained[:1] = False
        asked = self._prefixed(np.array(prompt.ids, dtype=np.int32)) if prompt is not None else tokens[:0]
        return Encoded(tokens, trained, asked, answer)

    def _without_end(self, answer: str) -> str:
        """An answer without the end of text that its file wrote out: what a model generates ends before it."""
        bare = answer.rstrip()
        return bare.removesuffix(self._end) if bare.endswith(self._end) else answer

    def _mask(self, row: Rendered, offsets: npt.NDArray[np.int64]) -> Mask:
        # A token that covers no character of its own (SentencePiece's added space) belongs to the character it is at.
        starts, ends = offsets[:, 0], np.maximum(offsets[:, 1], offsets[:, 0] + 1)
        trained = np.full(len(offsets), self._train_on == "all")
        counts = row.trained or (True,) * len(row.answers)
        chosen = list(zip(row.answers, counts, strict=True))
        for (start, end), is_trained in chosen[-1:] if self._train_on == "last" else chosen:
            touched = (starts < end) & (ends > start)
            trained = trained | touched if is_trained else trained & ~touched
        return trained

    def _prefixed(self, tokens: Ids, values: Any = None) -> Any:
        """``tokens`` (or ``values``, False for what is added) with the tokenizer's own beginning, once."""
        count = len(self._prefix)
        has_it = np.array_equal(tokens[:count], self._prefix)
        if values is None:
            return tokens if has_it else np.concatenate([self._prefix, tokens])
        return values if has_it else np.concatenate([np.zeros(count, dtype=np.bool_), values])

    def cut_end(self, row: Encoded, limit: int) -> Encoded:
        """The first ``limit`` tokens; no end-of-turn is put in place of the one lost."""
        return replace(row, tokens=row.tokens[:limit], trained=row.trained[:limit])

    def cut_prompt(self, row: Encoded, limit: int) -> Encoded | None:
        """The row without the beginning of its prompt; None if what is trained does not fit by itself."""
        excess = len(row.tokens) - limit
        count = len(self._prefix) if np.array_equal(row.tokens[: len(self._prefix)], self._prefix) else 0
        # One token stays before the first trained one: something has to predict it.
        room = int(np.argmax(row.trained)) - max(count, 1) if row.trained.any() else 0
        if excess > room:
            return None
        cut = slice(count, count + excess)
        prompt = np.delete(row.prompt, cut) if len(row.prompt) else row.prompt
        return replace(row, tokens=np.delete(row.tokens, cut), trained=np.delete(row.trained, cut), prompt=prompt)


def _prefix(tokenizer: Any) -> Ids:
    """What the tokenizer puts before every text: usually nothing or its BOS."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return np.array(full[:start], dtype=np.int32)
    return np.array([], dtype=np.int32)


def _bare(tokenizer: Any) -> Any:
    """A copy of the tokenizer's engine without truncation, padding and post-processor.

    The post-processor adds special tokens, which is done here, and in byte-level tokenizers it takes the leading space
    out of a token's span, so that a token of spaces alone would cover nothing.
    """
    from tokenizers import Tokenizer

    engine: Any = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    engine.no_truncation()
    engine.no_padding()
    engine.post_processor = None
    return engine
