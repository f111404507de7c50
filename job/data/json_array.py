"""A JSON array, read element by element: memory holds a few rows, whatever its length; a bad row spoils no other."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from job.data.row_error import LENIENT, MAX_ROW_BYTES, STRICT, RowError, reason, refuse
from job.inputs import Input

_CHUNK_BYTES = 2**20
_WHITE = re.compile(r"[ \t\r\n]*")


def elements(source: Input) -> Iterator[Any]:
    """The elements in order; a RowError in place of one that has a key twice.

    Raises:
        DataInvalid: the file is no JSON array in UTF-8, naming the line.
    """
    with source.path.open("rb") as stream:
        window = _Window(source, stream)
        window.next_is("[")
        window.position += 1
        while not window.next_is("]"):
            yield window.element()
            if window.next_is(","):
                window.position += 1
            elif not window.next_is("]"):
                window.refuse("',' or ']' expected after a row")
        window.position += 1
        if not window.at_end():
            window.refuse("more text after the array's end")


class _Window:
    """The part of a file's text that is being read."""

    def __init__(self, source: Input, stream: IO[bytes]) -> None:
        self.position = 0
        """The next character, in ``_text``."""
        self._source, self._stream = source, stream
        self._text = ""
        self._line = 1
        self._bytes = 0
        self._has_ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def next_is(self, character: str) -> bool:
        """Whether this is the next character that is no white space."""
        self._skip_white()
        return self._text.startswith(character, self.position)

    def at_end(self) -> bool:
        """Whether only white space is left."""
        self._skip_white()
        return self.position == len(self._text)

    def element(self) -> Any:
        """The value at the position, which moves behind it."""
        while True:
            try:
                value, end = self._decoded()
                if end < len(self._text) or self._has_ended:  # else a number may go on
                    self.position = end
                    return value
            except (ValueError, RecursionError) as error:
                if self._has_ended or len(self._text) - self.position > MAX_ROW_BYTES:
                    at = error.pos if isinstance(error, json.JSONDecodeError) else self.position
                    self.refuse(error.msg if isinstance(error, json.JSONDecodeError) else reason(error), at)
                if isinstance(error, RecursionError):
                    self.refuse(reason(error))
            self._more()

    def refuse(self, problem: str, at: int | None = None) -> None:
        """Raises DataInvalid with the line; ``at`` is in ``_text``, the position if left out."""
        line = self._line + self._text.count("\n", 0, self.position if at is None else at)
        refuse(self._source, f"invalid JSON at line {line}: {problem}")

    def _decoded(self) -> tuple[Any, int]:
        try:
            return STRICT.raw_decode(self._text, self.position)
        except RowError as problem:
            return problem, LENIENT.raw_decode(self._text, self.position)[1]

    def _skip_white(self) -> None:
        while True:
            match = _WHITE.match(self._text, self.position)
            self.position = match.end() if match else self.position
            if self.position < len(self._text) or self._has_ended:
                return
            self._more()

    def _more(self) -> None:
        """Reads on, as much as is held already: a large row is not begun too often. What was read is let go."""
        self._line += self._text.count("\n", 0, self.position)
        kept = self._text[self.position :]
        chunk = self._stream.read(max(_CHUNK_BYTES, len(kept)))
        waiting = len(self._decoder.getstate()[0])
        try:
            self._text = kept + self._decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            refuse(self._source, f"is not UTF-8 (byte {self._bytes - waiting + error.start + 1}); save it as UTF-8")
        self.position, self._bytes, self._has_ended = 0, self._bytes + len(chunk), not chunk
