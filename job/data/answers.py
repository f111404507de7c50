"""Where a template put the assistant's answers, found by rendering again with marks in their place. Pure.

A mark is a text that stands nowhere in the conversation. Whatever is found counts only if putting the answer back gives
the very text that is trained on; else nothing is said (and the row is refused).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from job.data.messages import Message

Span = tuple[int, int]
"""First character, and the one after the last."""

Render = Callable[[Sequence[Message]], str]

_THOUGHT = re.compile(r"(\s*<think>\n*)(.*?)(\n*</think>\n*)(.*)", re.DOTALL)
"""What stands before a thought, the thought, what stands behind it, and the answer."""

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
class _Slot:
    """Marks that stand for one answer (and the thought before it) in a trial render."""

    marked: str
    parts: tuple[tuple[str, str], ...]
    """Mark and text. The thought comes first; a template may leave it out."""


def find(messages: Sequence[Message], text: str, render: Render) -> list[Span] | None:
    """Where each answer stands in ``text``, the render of ``messages``; None if it cannot be proven.

    Args:
        render: the template, for other messages in their place.
    """
    slots = _slots(messages)
    spans = _plain(messages, slots, text, render)
    if spans is None:
        return None
    for i, message in enumerate(messages):
        if message.get("tool_calls"):
            span = _around(messages, i, slots[i], text, render)
            if span is None:
                return None
            spans[i] = span
    return [spans[i] for i in sorted(spans)]


def last_part(content: str) -> str:
    """An answer without the thought before it, which templates may write in another way."""
    return content.rsplit("</think>", 1)[-1].strip()


def _slots(messages: Sequence[Message]) -> dict[int, _Slot]:
    """A slot for each answer, by its place among the messages."""
    everything = "".join(message["content"] for message in messages)
    salt = next(salt for salt in map(str, range(len(everything) + 1)) if f"\ue0f0{salt}." not in everything)
    answers = ((i, message["content"]) for i, message in enumerate(messages) if message["role"] == "assistant")
    return {i: _slot(content, *(f"\ue0f0{salt}.{kind}{i}\ue0f1" for kind in "at")) for i, content in answers}


def _slot(content: str, answer_mark: str, thought_mark: str) -> _Slot:
    thought = _THOUGHT.fullmatch(content)
    if thought is None:
        return _Slot(answer_mark, ((answer_mark, content),))
    head, said, middle, answer = thought.groups()
    return _Slot(f"{head}{thought_mark}{middle}{answer_mark}", ((thought_mark, said), (answer_mark, answer)))


def _plain(
    messages: Sequence[Message], slots: Mapping[int, _Slot], text: str, render: Render
) -> dict[int, Span] | None:
    """The answers without calls of tools, all in one render."""
    chosen = {i: slot for i, slot in slots.items() if not messages[i].get("tool_calls")}
    if not chosen:
        return {}
    skeleton = render([_marked(message, chosen.get(i)) for i, message in enumerate(messages)])
    for trims in product(_TRIMS, repeat=2):
        spans = _fill(skeleton, list(chosen.values()), text, *trims)
        if spans is not None:
            return dict(zip(chosen, spans, strict=True))
    return None


def _marked(message: Message, slot: _Slot | None) -> Message:
    return message if slot is None else {**message, "content": slot.marked}


def _fill(
    skeleton: str, slots: Sequence[_Slot], text: str, trim: Callable[[str], str], trim_thought: Callable[[str], str]
) -> list[Span] | None:
    """Where the answers stand if putting them in place of their marks gives exactly ``text``."""
    filled, spans, read = "", [], 0
    for slot in slots:
        start = None
        for mark, content, is_answer in _parts(slot):
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


def _parts(slot: _Slot) -> Iterator[tuple[str, str, bool]]:
    """Mark, text, and whether it is the answer."""
    for i, (mark, content) in enumerate(slot.parts):
        yield mark, content, i == len(slot.parts) - 1


def _around(messages: Sequence[Message], i: int, slot: _Slot, text: str, render: Render) -> Span | None:
    """Where a message with calls of tools stands: between what comes before and after a mark in its place."""
    bare = {key: value for key, value in messages[i].items() if key != "tool_calls"}
    trial = render([*messages[:i], _marked(bare, slot), *messages[i + 1 :]])
    answer_mark = slot.parts[-1][0]
    if trial.count(answer_mark) != 1:
        return None
    start = end = trial.index(answer_mark)
    thought_mark = slot.parts[0][0]
    if len(slot.parts) > 1 and thought_mark in trial:
        start = max(trial.rfind("<think>", 0, trial.index(thought_mark)), 0)
    after = trial[end + len(answer_mark) :]
    fits = text.startswith(trial[:start]) and text.endswith(after) and start + len(after) < len(text)
    return (start, len(text) - len(after)) if fits else None


def holds(span: Span, message: Mapping[str, Any], text: str) -> bool:
    """Whether a stretch of ``text`` has all that a message of the assistant says, calls of tools included."""
    said = text[slice(*span)]
    calls = message.get("tool_calls") or ()
    return last_part(message["content"]) in said and all(call["function"]["name"] in said for call in calls)
