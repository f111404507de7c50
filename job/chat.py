"""Chat templates: choosing one, rendering a conversation once, and finding in the text what the assistant wrote."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from job.errors import SpecInvalid
from job.formats import Conversation, Example, Message
from job.rows import RowError
from job.templates import TEMPLATES

Span = tuple[int, int]
"""First character, and the one after the last."""

_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""The day templates see: with the real one (Llama 3 writes it) another day would give other tokens and break resuming.
It is what those templates fall back to themselves."""

_THOUGHT = re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<rest>.*)", re.DOTALL)
_GENERATION = re.compile(r"\{%-?\s*generation\b")

_TRIMS: tuple[Callable[[str], str], ...] = (
    lambda text: text,
    str.strip,
    str.rstrip,
    str.lstrip,
    lambda text: text.strip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.rstrip("\n"),
)
"""What templates do to the text of an answer."""


@dataclass(frozen=True)
class Rendered:
    """One example as text, before it becomes tokens."""

    text: str
    answers: tuple[Span, ...]
    """What the model is to write, each with its end-of-turn."""
    prompt: str
    """What the model is given when it is asked for the last answer. Usually, not always, the beginning of ``text``."""
    answer: str
    """The last answer as it stands in ``text``, without its end-of-turn."""
    ending: str = ""
    """End-of-turn token after the last answer; empty if the template writes none, or for plain text."""
    way: str = "plain text"
    """How the answers were found."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the tokens it may write."""

    name: str
    """``model`` (its own), one of ours, or a file's name."""
    text: str
    special: dict[str, Any]
    """Names and text of special tokens (``bos_token`` and so on) that the template may use."""
    control_tokens: tuple[str, ...]
    """Special tokens of the tokenizer, longest first; one of them ends a turn."""

    def render(self, example: Example) -> Rendered:
        """One conversation with its answers marked; plain text passes as it is.

        Raises:
            RowError: the template refuses the messages, or it cannot be said which characters are the assistant's.
        """
        if not isinstance(example, Conversation):
            return plain(example.prompt, example.completion)
        text, marked = self._run(example.messages)
        prompt, _ = self._run(example.messages[:-1], add_generation_prompt=True)
        last = example.messages[-1]["content"].rsplit("</think>", 1)[-1].strip()
        if marked and last in text[slice(*marked[-1])]:
            way, spans = "markers", marked
        else:
            way, spans = "sentinels", self._by_sentinels(example.messages, text)
        return self._finish(text, spans, prompt, way)

    def _finish(self, text: str, spans: Sequence[Span], prompt: str, way: str) -> Rendered:
        start, end = spans[-1]
        # Whatever follows the prompt the model is asked with, an empty <think></think> too, is for the model to write.
        if text.startswith(prompt) and len(prompt) <= start:
            start = len(prompt)
        end, after, ending = self._ending(text, start, end)
        answers = [(a, self._ending(text, a, b, only=ending)[1]) for a, b in spans[:-1]]
        return Rendered(text, (*answers, (start, after)), prompt, text[start:end], ending, way)

    def _ending(self, text: str, start: int, end: int, only: str | None = None) -> tuple[int, int, str]:
        """End of the answer itself, end with its end-of-turn token, and that token ("" for none)."""
        tokens = self.control_tokens if only is None else (only,) if only else ()
        written = start + len(text[start:end].rstrip())
        following = end + len(text[end:]) - len(text[end:].lstrip())
        for token in tokens:
            if text.endswith(token, start, written):
                return written - len(token), written, token
            if text.startswith(token, following):
                return end, following + len(token), token
        return end, end, ""

    def _by_sentinels(self, messages: Sequence[Message], text: str) -> list[Span]:
        """Renders once more with marks for answers, and puts the answers back to see where they stand.

        Raises:
            RowError: the result is not ``text``, so the template rewrites answers in a way not foreseen.
        """
        slots = list(_slots(messages))
        marked = iter(slots)
        replaced = [
            message | {"content": next(marked).marked} if message["role"] == "assistant" else message
            for message in messages
        ]
        skeleton, _ = self._run(replaced)
        for trims in product(_TRIMS, repeat=2):
            spans = _fill(skeleton, slots, text, *trims)
            if spans is not None:
                return spans
        raise RowError(
            "answers not found",
            f"chat template {self.name} rewrites answers, so it is not known which tokens are the assistant's; put "
            f"{{% generation %}} markers into it, or choose data.chat_template: {', '.join(TEMPLATES)}",
        )

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the spans between generation markers if the template has some."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), spans = render_jinja_template(
                [list(messages)],
                chat_template=self.text,
                return_assistant_tokens_mask=self._has_markers,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except Exception as error:  # a template is foreign code: whatever it raises is about this row
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise RowError("refused by the chat template", f"{self.name}: {reason}") from error
        return text, [span for span in spans[0] if span[0] < span[1]] if spans else []

    @property
    def _has_markers(self) -> bool:
        return _GENERATION.search(self.text) is not None


@dataclass(frozen=True)
class _Slot:
    """Marks that stand for one answer (and the thought before it) in a trial render."""

    marked: str
    parts: tuple[tuple[str, str], ...]
    """Mark and text. The thought comes first; a template may leave it out."""


def _slots(messages: Sequence[Message]) -> Iterator[_Slot]:
    everything = "".join(message["content"] for message in messages)
    salt = next(salt for salt in map(str, range(len(everything) + 1)) if f"\ue0f0{salt}." not in everything)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        answer_mark, thought_mark = (f"\ue0f0{salt}.{kind}{i}\ue0f1" for kind in "at")
        thought = _THOUGHT.fullmatch(message["content"])
        if thought is None:
            yield _Slot(answer_mark, ((answer_mark, message["content"]),))
        else:
            marked = f"<think>\n{thought_mark}\n</think>\n\n{answer_mark}"
            parts = ((thought_mark, thought["thought"].strip("\n")), (answer_mark, thought["rest"].lstrip("\n")))
            yield _Slot(marked, parts)


def _fill(
    skeleton: str, slots: Sequence[_Slot], text: str, trim: Callable[[str], str], trim_thought: Callable[[str], str]
) -> list[Span] | None:
    """Where the answers stand if putting them in place of their marks gives exactly ``text``."""
    filled, spans, read = "", [], 0
    for slot in slots:
        start = None
        for i, (mark, content) in enumerate(slot.parts):
            is_answer = i == len(slot.parts) - 1
            if skeleton.count(mark) != 1:
                if is_answer:
                    return None
                continue
            position = skeleton.index(mark)
            filled += skeleton[read:position]
            if start is None:
                start = len(filled) if is_answer else max(filled.rfind("<think>"), 0)
            filled += (trim if is_answer else trim_thought)(content)
            read = position + len(mark)
        spans.append((start or 0, len(filled)))
    return spans if filled + skeleton[read:] == text else None


def plain(prompt: str, completion: str) -> Rendered:
    """Prompt and completion written one after the other, with nothing between."""
    text = prompt + completion
    return Rendered(text, ((len(prompt), len(text)),), prompt, completion)


def render(example: Example, template: ChatTemplate | None) -> Rendered:
    """One example as text. Conversations need a template; ``choose`` saw to that."""
    if template is not None:
        return template.render(example)
    if isinstance(example, Conversation):
        raise RowError("no chat template", "messages cannot be written without one")
    return plain(example.prompt, example.completion)


def choose(setting: str | None, tokenizer: Any) -> ChatTemplate | None:
    """The template that ``data.chat_template`` asks for; None for plain text.

    Args:
        setting: a name of ours, ``none``, a .jinja file (relative to the current directory), or None: the model's own.
        tokenizer: of the base model.

    Raises:
        SpecInvalid: no such template, it does not parse, or the tokenizer lacks the tokens it writes.
    """
    if setting == "none":
        return None
    if setting is None:
        own = _own(tokenizer)
        return None if own is None else _template("model", own, tokenizer)
    if setting in TEMPLATES:
        named = TEMPLATES[setting]
        _check_vocabulary(setting, named.control_tokens, tokenizer)
        return _template(setting, named.text, tokenizer)
    if not setting.endswith(".jinja"):
        raise SpecInvalid(f"data.chat_template: {setting!r} is none of {_names()} and no .jinja file")
    return _template(setting, _read(setting), tokenizer)


def _own(tokenizer: Any) -> str | None:
    own: Any = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            raise SpecInvalid(
                f"data.chat_template: the model has the templates {', '.join(own)} and none is its default; save one "
                f"of them as a .jinja file and name that, or write one of {_names()}"
            )
        own = own["default"]
    return str(own) if own else None


def _read(setting: str) -> str:
    try:
        return Path(setting).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecInvalid(f"data.chat_template: {setting} cannot be read: {error}; or write {_names()}") from error


def _check_vocabulary(name: str, tokens: Collection[str], tokenizer: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    if missing:
        raise SpecInvalid(
            f"data.chat_template: {name} needs the tokens {' and '.join(missing)}, which the model's tokenizer does "
            "not have; choose the template the model was made with, or none"
        )


def _template(name: str, text: str, tokenizer: Any) -> ChatTemplate:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        compiled = _compile_jinja_template(text)
    except TemplateError as error:
        raise SpecInvalid(f"data.chat_template: {name} is not a valid template: {error}") from error
    # transformers turns functions among a template's variables into text; the compiled template is its own, cached.
    compiled.globals["strftime_now"] = _TODAY.strftime
    control = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    control |= set(tokenizer.all_special_tokens)
    return ChatTemplate(
        name, text, dict(tokenizer.special_tokens_map), tuple(sorted(control, key=lambda token: (-len(token), token)))
    )


def _names() -> str:
    return ", ".join([*TEMPLATES, "none", "FILE.jinja"])


def refuse_messages(where: str) -> SpecInvalid:
    """What to say where conversations meet a model without a template."""
    return SpecInvalid(
        f"{where} holds conversations, and there is no chat template to write them with; set data.chat_template to one "
        f"of {', '.join(TEMPLATES)}, or a FILE.jinja"
    )
