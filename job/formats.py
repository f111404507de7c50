"""Rows to examples: which column is the question, which the answer, and whether a row can be used at all. Pure."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.errors import DataInvalid, SpecInvalid
from job.rows import RowError, is_text

Message = dict[str, str]
"""``role`` and ``content``."""


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template; the last one is the assistant's."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class PlainText:
    """Text without a chat template; the completion is trained."""

    prompt: str
    completion: str


Example = Conversation | PlainText


@dataclass(frozen=True)
class Shape:
    """What was recognised: the format, and the columns that hold each part of it."""

    format: str
    columns: Mapping[str, str]
    """Part (prompt, completion, input, system, messages or text) to column."""

    def __str__(self) -> str:
        return f"{self.format} ({', '.join(self.columns.values())})"


@dataclass(frozen=True)
class _Known:
    """A format under the column names people use for it."""

    format: str
    needed: Mapping[str, str]
    optional: Mapping[str, str]


_KNOWN = (
    _Known("messages", {"messages": "messages"}, {}),
    _Known("sharegpt", {"messages": "conversations"}, {"system": "system"}),
    _Known("alpaca", {"prompt": "instruction", "completion": "output"}, {"input": "input", "system": "system"}),
    _Known("prompt_completion", {"prompt": "prompt", "completion": "completion"}, {"system": "system"}),
    _Known("prompt_completion", {"prompt": "question", "completion": "answer"}, {"system": "system"}),
    _Known("prompt_completion", {"prompt": "input", "completion": "output"}, {"system": "system"}),
    _Known("prompt_completion", {"prompt": "prompt", "completion": "response"}, {"system": "system"}),
    _Known("text", {"text": "text"}, {}),
)
"""Tried from the top: a row with more than one of them is the first."""

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
_NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Which roles may follow a role; "" is the beginning."""

ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)


def recognise(found: Collection[str], wanted: str | None, named: Mapping[str, str], origin: str) -> Shape:
    """The shape of rows with the columns ``found``.

    Args:
        found: columns of the first row.
        wanted: ``data.format``.
        named: part to column, what ``data.columns`` says.
        origin: of that row, for messages.

    Raises:
        DataInvalid: no format has these columns; the message lists them and says what to write.
        SpecInvalid: ``data.columns`` names parts that do not go together.
    """
    for known in _candidates(named, wanted):
        needed = {part: named.get(part, name) for part, name in known.needed.items()}
        if {*needed.values(), *named.values()} <= set(found):
            optional = {part: named.get(part, name) for part, name in known.optional.items()}
            return Shape(known.format, needed | {part: name for part, name in optional.items() if name in found})
    raise DataInvalid(f"{origin}: " + _unrecognised(found, wanted, named))


def _candidates(named: Mapping[str, str], wanted: str | None) -> list[_Known]:
    """The formats that have every part named in ``data.columns``."""
    if wanted is None and "prompt" in named:
        # Columns with names of their own say nothing about Alpaca's wording.
        wanted = "prompt_completion"
    formats = [known for known in _KNOWN if wanted in (None, known.format)]
    fitting = [known for known in formats if set(named) <= {*known.needed, *known.optional}]
    if not fitting:
        of_format = f" of data.format {wanted}" if wanted else ""
        raise SpecInvalid(
            f"data.columns: no format{of_format} has the parts {', '.join(named)} together; name prompt and completion "
            "(and system), or messages, or text"
        )
    return fitting


def _unrecognised(found: Collection[str], wanted: str | None, named: Mapping[str, str]) -> str:
    columns = ", ".join(repr(name[:60]) for name in found) or "none"
    absent = [f"data.columns.{part}: no column {name!r}" for part, name in named.items() if name not in found]
    if absent:
        return f"{'; '.join(absent)}; the row has {columns}"
    formats = dict.fromkeys(known.format for known in _KNOWN if wanted in (None, known.format))
    needed = "; ".join(f"{name}: {' or '.join(_needed(name))}" for name in formats)
    head = f"data.format {wanted} has other columns than" if wanted else "no known format has the columns"
    return (
        f"{head} {columns} ({needed}); name yours, for instance data.columns: {{prompt: COLUMN, completion: COLUMN}} "
        'or {text: COLUMN}; columns of a table without a header line are "0", "1" and so on'
    )


def _needed(name: str) -> list[str]:
    return ["+".join(known.needed.values()) for known in _KNOWN if known.format == name]


def example_of(values: Mapping[str, Any], shape: Shape, has_template: bool) -> Example:
    """One row as what will be rendered: messages if there is a chat template, else plain text.

    Raises:
        RowError: the row lacks a column, holds something else than text, or its roles are out of order.
    """
    if "messages" in shape.columns:
        return Conversation(_conversation(values, shape))
    if "text" in shape.columns:
        return PlainText("", _answer(values, shape.columns["text"]))
    prompt = _string(values, shape.columns["prompt"])
    completion = _answer(values, shape.columns["completion"])
    extra = _optional(values, shape.columns.get("input"))
    system = _optional(values, shape.columns.get("system"))
    if has_template:
        return Conversation(_turn(system, f"{prompt}\n\n{extra}" if extra else prompt, completion))
    if system:
        raise RowError("system message without a chat template", f"column {shape.columns['system']!r}")
    if shape.format == "alpaca":
        text = ALPACA_WITH_INPUT if extra else ALPACA_WITHOUT_INPUT
        return PlainText(text.format(prompt=prompt, input=extra), completion)
    return PlainText(prompt, completion)


def _turn(system: str, prompt: str, completion: str) -> tuple[Message, ...]:
    pairs = [("system", system)] if system else []
    pairs += [("user", prompt), ("assistant", completion)]
    return tuple({"role": role, "content": content} for role, content in pairs)


def _conversation(values: Mapping[str, Any], shape: Shape) -> tuple[Message, ...]:
    column = shape.columns["messages"]
    items = _present(values, column)
    if not isinstance(items, list) or not items:
        raise RowError("not a list of messages", f"column {column!r}")
    messages = [_message(item, f"{column}[{i}]") for i, item in enumerate(items)]
    system = _optional(values, shape.columns.get("system"))
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    _check_order(messages, column)
    return tuple(messages)


def _message(item: Any, where: str) -> Message:
    """``{role, content}`` or ``{from, value}``."""
    if not isinstance(item, Mapping):
        raise RowError("not a message", f"{where} is not an object with role and content")
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    name = _text(item.get(role_key), f"{where}.{role_key}")
    role = _ROLES.get(name.lower())
    if role is None:
        raise RowError("unknown role", f"{where}.{role_key} is {name!r}; known are {', '.join(_ROLES)}")
    content = _text(item.get(content_key), f"{where}.{content_key}")
    if role == "assistant":
        _not_empty(content, f"{where}.{content_key}")
    return {"role": role, "content": content}


def _check_order(messages: Sequence[Message], column: str) -> None:
    before = ""
    for i, message in enumerate(messages):
        allowed = _NEXT[before]
        if message["role"] not in allowed:
            place = f"after {before}" if before else "first"
            problem = f"{column}[{i}] is {message['role']}; {place} comes {' or '.join(allowed)}"
            raise RowError("roles out of order", problem)
        before = message["role"]
    if before != "assistant":
        raise RowError("no answer at the end", f"{column} ends with {before}; the last message is the assistant's")


def _present(values: Mapping[str, Any], column: str) -> Any:
    if column not in values:
        raise RowError("missing column", f"{column!r}; the row has {', '.join(map(repr, values)) or 'none'}")
    return values[column]


def _string(values: Mapping[str, Any], column: str) -> str:
    return _text(_present(values, column), f"column {column!r}")


def _optional(values: Mapping[str, Any], column: str | None) -> str:
    """Empty where the column is absent or null."""
    value = values.get(column) if column is not None else None
    return "" if value is None else _text(value, f"column {column!r}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise RowError("not text", f"{where} is {kind}; text is needed")
    if "\0" in value or not is_text(value):
        raise RowError("not text", f"{where} holds a NUL character or half a surrogate pair")
    return value


def _answer(values: Mapping[str, Any], column: str) -> str:
    return _not_empty(_string(values, column), f"column {column!r}")


def _not_empty(value: str, where: str) -> str:
    if not value.strip():
        raise RowError("empty answer", f"{where} is empty, so nothing could be learnt from it")
    return value


def key_of(example: Example) -> bytes:
    """SHA-256 of the content of an example: equal for rows that train the same, whatever else their files hold."""
    parts = (
        list(example.messages) if isinstance(example, Conversation) else {"p": example.prompt, "c": example.completion}
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).digest()


def is_set_aside(key: bytes, share: float) -> bool:
    """Whether ``data.eval_split`` takes the row with this key; depends on nothing but the two."""
    return int.from_bytes(key[:8], "big") < share * 2**64
