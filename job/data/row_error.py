"""What may be wrong with a row or its file, and JSON read strictly. Pure."""

import json
from typing import Any, NoReturn

from job.errors import DataInvalid
from job.inputs import Input

MAX_ROW_BYTES = 16 * 2**20
"""A longer row is broken data (a missing line end), not a row."""


class RowError(ValueError):
    """One row cannot be used. ``kind`` is what it is counted under, without the details."""

    def __init__(self, kind: str, details: str = "") -> None:
        super().__init__(f"{kind}: {details}" if details else kind)
        self.kind = kind


def refuse(source: Input, problem: str) -> NoReturn:
    """Raises DataInvalid: the file as a whole cannot be read."""
    raise DataInvalid(f"{source.uri}: {problem}")


def reason(error: BaseException) -> str:
    """First line of a library's message, without the class name."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def is_text(value: str) -> bool:
    """False if half a surrogate pair is in it, which no UTF-8 file and no tokenizer can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ; json would silently keep the last of equal ones."""
    values = dict(pairs)
    if len(values) != len(pairs):
        firsts = {name: i for i, (name, _) in reversed(list(enumerate(pairs, start=1)))}
        place = next(i for i, (name, _) in enumerate(pairs, start=1) if firsts[name] < i)
        raise RowError("duplicate key", f"key {place} of {len(pairs)} in an object is one of those before it")
    return values


STRICT = json.JSONDecoder(object_pairs_hook=_once)
"""Raises RowError for an object that has a key twice."""
LENIENT = json.JSONDecoder()
