"""Tokenizers, conversations and their masks, for tests of what is rendered and trained."""

from pathlib import Path
from typing import Any

from job.data import chat
from job.data.encode import Encoded, Encoder
from job.data.formats import Conversation, Example
from tests.job.tiny import IM_END, IM_START

BOS, EOT, HEAD, HEAD_END = "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"
TURN, TURN_END, EOS = "<start_of_turn>", "<end_of_turn>", "<|eos|>"
SPECIAL = [EOS, BOS, IM_START, IM_END, EOT, HEAD, HEAD_END, TURN, TURN_END]


def fast(backend: Any, adds_bos: bool = False, adds_eos: bool = False, **more: Any) -> Any:
    """A fast tokenizer that adds BOS or EOS by itself, or not."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_str(backend.to_str())
    single = f"{BOS + ' ' if adds_bos else ''}$A{' ' + EOS if adds_eos else ''}"
    template = processors.TemplateProcessing(
        single=single, special_tokens=[(t, own.token_to_id(t)) for t in (BOS, EOS)]
    )
    # As GPT-2 and Llama 3 have it: spaces are cut from spans.
    own.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return PreTrainedTokenizerFast(tokenizer_object=own, bos_token=BOS, eos_token=EOS, **more)


def conversation(*contents: str, system: str | None = None) -> Conversation:
    """Question, answer, question, answer."""
    roles = ("user", "assistant") * len(contents)
    head = [] if system is None else [{"role": "system", "content": system}]
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Conversation((*head, *turns))


def named(name: str, text: str, tokenizer: Any) -> chat.ChatTemplate:
    """A template as if it were the model's own."""
    tokenizer.chat_template = text
    template = chat.choose(None, tokenizer)
    assert template is not None
    return template


def published(name: str, tokenizer: Any) -> chat.ChatTemplate:
    """A template as a model published it: ``tests/job/templates``."""
    path = Path(__file__).parent / "templates" / f"{name}.jinja"
    return named("model", path.read_text(encoding="utf-8"), tokenizer)


def encode(
    example: Example, template: chat.ChatTemplate | None, tokenizer: Any, train_on: str = "assistant"
) -> tuple[chat.Rendered, Encoded]:
    rendered = chat.render(example, template)
    return rendered, Encoder(tokenizer, train_on).encode([(rendered, True)])[0]


def runs(row: Encoded, tokenizer: Any) -> list[str]:
    """The text of each stretch of trained tokens."""
    found: list[list[int]] = []
    for i, (token, trained) in enumerate(zip(row.tokens, row.trained, strict=True)):
        if trained and (i == 0 or not row.trained[i - 1]):
            found.append([])
        if trained:
            found[-1].append(int(token))
    return [tokenizer.decode(part) for part in found]
