"""Chat templates: choosing one, rendering a conversation once, and finding in the text what the assistant wrote."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from job.data import answers
from job.data.answers import Span
from job.data.formats import Conversation, Example
from job.data.messages import Message, Tool, tool_name
from job.data.row_error import RowError
from job.data.templates import PATCHED, TEMPLATES
from job.errors import SpecInvalid

_TODAY = datetime(2024, 7, 26, tzinfo=UTC)
"""The day templates see: with the real one (Llama 3 writes it) another day would give other tokens and break resuming.
It is what those templates fall back to themselves."""

_GENERATION = re.compile(r"\{%-?\s*generation\b")

_PROBE: tuple[Message, ...] = (
    {"role": "user", "content": " q1\n"},
    {"role": "assistant", "content": "<think>\nt\n</think>\n\n a1 "},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "\na2\n"},
)
"""What a patched template has to write like the original before it is tried on rows."""


@dataclass(frozen=True)
class Rendered:
    """One example as text, before it becomes tokens."""

    text: str
    answers: tuple[Span, ...]
    """What the assistant says, each with its end-of-turn."""
    prompt: str
    """What the model is given when it is asked for the last answer. Usually, not always, the beginning of ``text``."""
    answer: str
    """The last answer as it stands in ``text``, without its end-of-turn."""
    ending: str = ""
    """End-of-turn token after the last answer; empty if the template writes none, or for plain text."""
    way: str = "plain text"
    """How the answers were found."""
    trained: tuple[bool, ...] = ()
    """Which answers are trained at all (``weight``); () for every one."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template, and the tokens it may write."""

    name: str
    """``model`` (its own), one of ours, or a file's name."""
    text: str
    special: dict[str, Any]
    """Names and text of special tokens (``bos_token`` and so on) that the template may use."""
    control_tokens: tuple[str, ...]
    """Tokens that may end a turn, longest first: the special ones, and an ordinary one that this template ends with."""
    patched: tuple[str, ...] = ()
    """Templates with markers that write what this one, which has none, writes."""

    def render(self, example: Example) -> Rendered:
        """One conversation with its answers marked; plain text passes as it is.

        Raises:
            RowError: the template refuses the messages or leaves out the tools, or it cannot be said which characters
                are the assistant's.
        """
        if not isinstance(example, Conversation):
            return plain(example.prompt, example.completion)
        messages, tools = [_written(message) for message in example.messages], example.tools
        text, marked = self._run(self.text, messages, tools)
        self._check_tools(tools, text)
        prompt, _ = self._run(self.text, messages[:-1], tools, add_generation_prompt=True)
        way, spans = self._answers(messages, tools, text, marked)
        weights = [message.get("weight", 1) for message in example.messages if message["role"] == "assistant"]
        return self._finish(text, spans, prompt, way, tuple(map(bool, weights)))

    def _answers(
        self, messages: Sequence[Message], tools: Sequence[Tool], text: str, marked: Sequence[Span]
    ) -> tuple[str, Sequence[Span]]:
        """How the answers were found, and where they stand."""
        said = [message for message in messages if message["role"] == "assistant"]
        if _fits(marked, said, text):
            return "markers", marked
        for patched in self.patched:
            written, spans = self._run(patched, messages, tools)
            if written == text and _fits(spans, said, text):
                return "patched template", spans
        found = answers.find(messages, text, lambda trial: self._run(self.text, trial, tools)[0])
        if found is None or not _fits(found, said, text):
            raise RowError(
                "answers not found",
                f"chat template {self.name} rewrites answers or leaves out calls, so it is not known which tokens are "
                f"the assistant's; put {{% generation %}} markers into it, or choose data.chat_template: "
                f"{', '.join(TEMPLATES)}",
            )
        return "sentinels", found

    def _check_tools(self, tools: Sequence[Tool], text: str) -> None:
        absent = [i for i, tool in enumerate(tools) if tool_name(tool) not in text]
        if absent:
            raise RowError("tools left out", f"chat template {self.name} does not write tools[{absent[0]}] of the row")

    def _finish(self, text: str, spans: Sequence[Span], prompt: str, way: str, trained: tuple[bool, ...]) -> Rendered:
        start, end = spans[-1]
        # Whatever follows the prompt the model is asked with, an empty <think></think> too, is for the model to write.
        if text.startswith(prompt) and len(prompt) <= start:
            start = len(prompt)
        end, after, ending = self._ending(text, start, end)
        earlier = [(a, self._ending(text, a, b, only=ending)[1]) for a, b in spans[:-1]]
        return Rendered(text, (*earlier, (start, after)), prompt, text[start:end], ending, way, trained)

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

    def _run(
        self,
        template: str,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        add_generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text, and the spans between generation markers if the template has some."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), spans = render_jinja_template(
                [list(messages)],
                tools=list(tools) or None,
                chat_template=template,
                return_assistant_tokens_mask=_has_markers(template),
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except Exception as error:  # a template is foreign code: whatever it raises is about this row
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise RowError("refused by the chat template", f"{self.name}: {reason}") from error
        return text, [span for span in spans[0] if span[0] < span[1]] if spans else []

    def with_turn_end(self, added: Sequence[str]) -> "ChatTemplate":
        """The same, knowing which of the tokenizer's added tokens it writes after an answer.

        Some fine-tunes add theirs as an ordinary token. An answer may end with one, too (``</tool_call>``), so that it
        is no sign by itself.
        """
        answer = _PROBE[-1]["content"].strip()
        try:
            text = self._run(self.text, _PROBE)[0]
        except RowError:
            return self
        _, found, after = text.rpartition(answer)
        ends = [token for token in added if found and after.lstrip().startswith(token)]
        return replace(self, control_tokens=_longest_first({*self.control_tokens, *ends}))

    def with_patches(self) -> "ChatTemplate":
        """The same, knowing which of ``PATCHED`` write what it writes; those with markers of their own need none."""
        if _has_markers(self.text):
            return self
        fitting = (template for template in PATCHED if self._writes_the_same(template))
        return replace(self, patched=tuple(fitting))

    def _writes_the_same(self, template: str) -> bool:
        try:
            return self._run(self.text, _PROBE)[0] == self._run(template, _PROBE)[0]
        except RowError:
            return False


def _has_markers(template: str) -> bool:
    return _GENERATION.search(template) is not None


def _written(message: Message) -> dict[str, Any]:
    """A message as templates see it: what says how it is trained is not for them."""
    return {key: value for key, value in message.items() if key != "weight"}


def _fits(spans: Sequence[Span], said: Sequence[Mapping[str, Any]], text: str) -> bool:
    """Whether there is a stretch for every message of the assistant, and it holds what that one says."""
    pairs = zip(spans, said, strict=False)
    return len(spans) == len(said) and all(answers.holds(span, message, text) for span, message in pairs)


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
    added = tokenizer.added_tokens_decoder.values()
    control = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    template = ChatTemplate(name, text, dict(tokenizer.special_tokens_map), _longest_first(control))
    return template.with_turn_end([token.content for token in added]).with_patches()


def _longest_first(tokens: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(tokens, key=lambda token: (-len(token), token)))


def _names() -> str:
    return ", ".join([*TEMPLATES, "none", "FILE.jinja"])


def refuse_messages(where: str) -> SpecInvalid:
    """What to say where conversations meet a model without a template."""
    return SpecInvalid(
        f"{where} holds conversations, and there is no chat template to write them with; set data.chat_template to one "
        f"of {', '.join(TEMPLATES)}, or a FILE.jinja"
    )
