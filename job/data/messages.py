"""Messages as people write them (OpenAI's, ShareGPT's) to messages as chat templates read them. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from job.data.row_error import RowError, is_text, reason

Message = Mapping[str, Any]
"""``role`` and ``content``; of an assistant that calls tools ``tool_calls``; ``weight`` 0 on an answer that is not
trained; ``name`` and ``tool_call_id`` as they were given."""

Tool = Mapping[str, Any]
"""A function the model may call, as templates expect it: ``{type: function, function: {name, ...}}``."""

CALL = "function_call"
"""ShareGPT's role of an assistant that calls a tool; its text is the call, as JSON."""

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant",
    CALL: "assistant", "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_NEXT = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Which roles may follow a role; "" is the beginning."""
_KEPT = ("name", "tool_call_id")
_READ = {"role", "content", "from", "value", "tool_calls", "reasoning_content", "weight", *_KEPT}


def messages_of(items: Any, column: str, system: str = "") -> tuple[Message, ...]:
    """The messages of a row.

    Args:
        items: what stands in the column.
        system: of a column of its own; put first unless the messages begin with one.

    Raises:
        RowError: naming the message that cannot be used.
    """
    if not isinstance(items, list) or not items:
        raise RowError("not a list of messages", f"column {column!r}")
    messages = [_message(item, f"{column}[{i}]") for i, item in enumerate(items)]
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    _check_order(messages, column)
    return tuple(messages)


def unread(items: Any) -> list[str]:
    """Keys of messages that nothing is read from, such as other programs' ways to say what is trained."""
    found = items if isinstance(items, list) else []
    return list(dict.fromkeys(key for item in found if isinstance(item, Mapping) for key in item if key not in _READ))


def tools_of(value: Any, where: str) -> tuple[Tool, ...]:
    """The tools a row offers the model: a list of functions, or that list as JSON text; () for none.

    Raises:
        RowError: it is neither.
    """
    items = _from_json(value, where) if isinstance(value, str) and value.strip() else value
    if items in (None, "", [], {}) or (isinstance(items, str) and not items.strip()):
        return ()
    items = items if isinstance(items, list) else [items]
    return tuple(_tool(item, f"{where}[{i}]") for i, item in enumerate(items))


def tool_name(tool: Mapping[str, Any]) -> str:
    """Name of the function that a tool, or a call of one, is about."""
    return str(tool["function"]["name"])


def _tool(item: Any, where: str) -> Tool:
    inner = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RowError("not a tool", f"{where} is no function with a name")
    return item if "function" in item else {"type": "function", "function": item}


def _message(item: Any, where: str) -> dict[str, Any]:
    """``{role, content}`` or ``{from, value}``."""
    if not isinstance(item, Mapping):
        raise RowError("not a message", f"{where} is not an object with role and content")
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    name = text_of(item.get(role_key), f"{where}.{role_key}").lower()
    role = _ROLES.get(name)
    if role is None:
        raise RowError("unknown role", f"{where}.{role_key} is none of {', '.join(_ROLES)}")
    content = item.get(content_key)
    calls = _calls(item.get("tool_calls"), f"{where}.tool_calls")
    if name == CALL:
        content, calls = "", _calls(_from_json(content, f"{where}.{content_key}"), f"{where}.{content_key}")
    message: dict[str, Any] = {"role": role, "content": _content(content, role, calls, f"{where}.{content_key}")}
    if role == "assistant" and item.get("reasoning_content"):
        thought = text_of(item["reasoning_content"], f"{where}.reasoning_content").strip("\n")
        message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    message |= {key: text_of(item[key], f"{where}.{key}") for key in _KEPT if item.get(key) is not None}
    message |= {"tool_calls": calls} if calls else {}
    return message | _weight(item.get("weight"), role, f"{where}.weight")


def _content(content: Any, role: str, calls: list[Any], where: str) -> str:
    if calls and role != "assistant":
        raise RowError("roles out of order", f"{where.rpartition('.')[0]} is {role}; only the assistant calls tools")
    if calls and content is None:
        return ""
    text = text_of(content, where)
    return filled(text, where) if role == "assistant" and not calls else text


def _weight(value: Any, role: str, where: str) -> dict[str, int]:
    """What ``weight`` comes to: kept where it takes an answer out of the training."""
    if value is None:
        return {}
    if isinstance(value, bool) or value not in (0, 1):
        raise RowError("weight", f"{where} is neither 0 (not trained) nor 1")
    if value and role != "assistant":
        raise RowError("weight", f"{where} is 1, but only answers of the assistant are trained; leave it out")
    return {} if value else {"weight": 0}


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools, with their arguments as objects: templates write those out as JSON by themselves."""
    if value is None or value == []:
        return []
    return [_call(item, f"{where}[{i}]") for i, item in enumerate(value if isinstance(value, list) else [value])]


def _call(item: Any, where: str) -> dict[str, Any]:
    inner = item.get("function", item) if isinstance(item, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise RowError("not a tool call", f"{where} is no call with a name and arguments")
    arguments = inner.get("arguments", inner.get("parameters")) or {}
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"{where}.arguments")
    if not isinstance(arguments, Mapping):
        raise RowError("not a tool call", f"{where}.arguments is {type(arguments).__name__}; an object is needed")
    identity = {"id": item["id"]} if isinstance(item.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}


def _from_json(value: Any, where: str) -> Any:
    text = text_of(value, where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError("invalid JSON", f"{where} holds a call or tools, which are JSON: {reason(error)}") from error


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


def text_of(value: Any, where: str) -> str:
    """The value itself. Raises RowError, naming ``where``, if it is no text a tokenizer can take."""
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise RowError("not text", f"{where} is {kind}; text is needed")
    if "\0" in value or not is_text(value):
        raise RowError("not text", f"{where} holds a NUL character or half a surrogate pair")
    return value


def filled(value: str, where: str) -> str:
    """The value itself. Raises RowError, naming ``where``, if an answer is empty."""
    if not value.strip():
        raise RowError("empty answer", f"{where} is empty, so nothing could be learnt from it")
    return value
