"""Rows to examples: which column is the question, which the answer, and whether a row can be used at all. Pure."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from job.data.messages import Message, Tool, filled, messages_of, text_of, tools_of
from job.data.row_error import RowError
from job.errors import DataInvalid, SpecInvalid


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template; the last one is the assistant's."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    """What the model may call."""


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
    """Part (prompt, completion, input, system, messages, tools or text) to column. Those that may be absent are here
    whether the first row has them or not: a later one may."""
    seen: tuple[str, ...] = ()
    """Those of them that the first row has."""
    unused: tuple[str, ...] = ()
    """The other columns that it has, and keys of its messages (``messages[].train``) that nothing is read from."""

    def __str__(self) -> str:
        return f"{self.format} ({', '.join(self.seen)})"


@dataclass(frozen=True)
class _Known:
    """A format under the column names people use for it."""

    format: str
    needed: dict[str, str]
    optional: dict[str, str]


_KNOWN = (
    _Known("messages", {"messages": "messages"}, {"system": "system", "tools": "tools"}),
    _Known("sharegpt", {"messages": "conversations"}, {"system": "system", "tools": "tools"}),
    _Known("alpaca", {"prompt": "instruction", "completion": "output"}, {"input": "input", "system": "system"}),
    _Known("prompt_completion", {"prompt": "prompt", "completion": "completion"}, {"system": "system"}),
    _Known("prompt_completion", {"prompt": "question", "completion": "answer"}, {"system": "system"}),
    _Known("prompt_completion", {"prompt": "input", "completion": "output"}, {"system": "system"}),
    _Known("prompt_completion", {"prompt": "prompt", "completion": "response"}, {"system": "system"}),
    _Known("text", {"text": "text"}, {}),
)
"""Tried from the top: a row with more than one of them is the first."""

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
            columns = needed | optional
            seen = tuple(name for name in columns.values() if name in found)
            return Shape(known.format, columns, seen, tuple(name for name in found if name not in seen))
    raise DataInvalid(f"{origin}: " + _unrecognised(found, wanted, named))


def columns_of(named: Mapping[str, str]) -> frozenset[str]:
    """Every column that rows of some format may be read from; ``named`` as for ``recognise``."""
    parts = [known.needed | known.optional for known in _KNOWN]
    return frozenset(named.values()).union(*(columns.values() for columns in parts))


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
        return _conversation(values, shape)
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


def _conversation(values: Mapping[str, Any], shape: Shape) -> Conversation:
    column, tools = shape.columns["messages"], shape.columns.get("tools")
    system = _optional(values, shape.columns.get("system"))
    messages = messages_of(_present(values, column), column, system)
    return Conversation(messages, tools_of(values.get(tools), f"column {tools!r}") if tools is not None else ())


def _present(values: Mapping[str, Any], column: str) -> Any:
    if column not in values:
        # Its keys are not named: in a broken row they may be anything, and the report holds no word of the data.
        raise RowError("missing column", f"{column!r}; columns of other names: {len(values)}")
    return values[column]


def _string(values: Mapping[str, Any], column: str) -> str:
    return text_of(_present(values, column), f"column {column!r}")


def _optional(values: Mapping[str, Any], column: str | None) -> str:
    """Empty where the column is absent or null."""
    value = values.get(column) if column is not None else None
    return "" if value is None else text_of(value, f"column {column!r}")


def _answer(values: Mapping[str, Any], column: str) -> str:
    return filled(_string(values, column), f"column {column!r}")


def key_of(example: Example) -> bytes:
    """SHA-256 of the content of an example: equal for rows that train the same, whatever else their files hold."""
    parts: Any = {"p": example.prompt, "c": example.completion} if isinstance(example, PlainText) else None
    if isinstance(example, Conversation):
        # Rows without tools keep the key they always had, and so their side of the split.
        parts = [*example.messages, *([{"tools": example.tools}] if example.tools else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).digest()


def is_set_aside(key: bytes, share: float) -> bool:
    """Whether ``data.eval_split`` takes the row with this key; depends on nothing but the two."""
    return int.from_bytes(key[:8], "big") < share * 2**64
