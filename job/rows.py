"""Files to rows: one reader for each kind of file, streamed, and every broken row named by file and line."""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

from job.errors import DataInvalid, InputMissing
from job.inputs import Input

MAX_ROW_BYTES = 16 * 2**20
"""A longer line is broken data (a missing line end), not a row."""
MAX_ARRAY_BYTES = 512 * 2**20
"""A JSON array is held whole as text; a larger one has to become .jsonl."""
_PARQUET_BATCH_ROWS = 256
_WHITE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One row as it stands in its file."""

    source: str
    """The user's name for the file."""
    number: int
    """Line of the file on which the row starts, or the row's number (.parquet, JSON array); from 1."""
    values: dict[str, Any]

    @property
    def origin(self) -> str:
        """For messages: ``train.jsonl:17``."""
        return f"{self.source}:{self.number}"


class RowError(ValueError):
    """One row cannot be used. ``kind`` is what it is counted under, without the details."""

    def __init__(self, kind: str, details: str = "") -> None:
        super().__init__(f"{kind}: {details}" if details else kind)
        self.kind = kind


class BadRows:
    """Counts rows that are skipped, and refuses the run when there are more than ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kinds: Counter[str] = Counter()
        self.examples: list[str] = []

    def skip(self, source: str, number: int, problem: RowError) -> None:
        """Counts one row.

        Raises:
            DataInvalid: it was one too many.
        """
        self.kinds[problem.kind] += 1
        if len(self.examples) < 10:
            self.examples.append(f"{source}:{number}: {problem}")
        if self.kinds.total() > self.limit:
            count = f"bad row {self.kinds.total()}, data.max_bad_rows is {self.limit}"
            raise DataInvalid(f"{source}:{number}: {problem} ({count}: correct it, or raise that to skip such rows)")


def read_rows(source: Input, bad: BadRows, has_header: bool = True) -> Iterator[Row]:
    """The rows of one file, in order, read as they are asked for.

    Args:
        source: the file; the ending of its name says what it is.
        bad: where broken rows are counted.
        has_header: whether the first line of .csv and .tsv names the columns; without it they are "0", "1", and so on.

    Raises:
        DataInvalid: the file cannot be read as what it is called, is empty, or has too many broken rows.
        InputMissing: there is no such file.
    """
    reader = _reader(source)
    _check_file(source)
    is_empty = True
    for number, value in reader(source, bad, has_header):
        is_empty = False
        if isinstance(value, dict):
            yield Row(source.uri, number, value)
        elif isinstance(value, RowError):
            bad.skip(source.uri, number, value)
        else:
            bad.skip(source.uri, number, RowError("not an object", f"a {_json_name(value)} stands where a row should"))
    if is_empty:
        _refuse(source, "holds no rows; the file is empty or has only blank lines or a header")


_Numbered = Iterator[tuple[int, Any]]
_Reader = Callable[[Input, BadRows, bool], _Numbered]


def _read_jsonl(source: Input, bad: BadRows, has_header: bool) -> _Numbered:
    for number, line in _lines(source):
        if isinstance(line, RowError):
            yield number, line
        elif not line.isspace() and line:
            yield number, _outcome(line)


def _outcome(line: bytes) -> Any:
    """The parsed row, or what is wrong with it."""
    try:
        return _parse(_text(line))
    except RowError as problem:
        return problem


def _text(line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError("invalid UTF-8", f"byte {error.start + 1} of the line; save the file as UTF-8") from error
    if "\0" in text:
        raise RowError("NUL character", f"at column {text.index(chr(0)) + 1}")
    return text


def _parse(text: str) -> Any:
    try:
        return _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise RowError("invalid JSON", f"{error.msg} at column {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError("invalid JSON", _reason(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys all differ; json would silently keep the last of equal ones."""
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise RowError("duplicate key", repr(twice))
    return values


_STRICT = json.JSONDecoder(object_pairs_hook=_once)
_LENIENT = json.JSONDecoder()


def _read_json(source: Input, bad: BadRows, has_header: bool) -> _Numbered:
    """A JSON array, or lines of JSON under the name .json."""
    with source.path.open("rb") as stream:
        head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head.startswith(b"["):
        yield from _read_jsonl(source, bad, has_header)
        return
    size = source.path.stat().st_size
    if size > MAX_ARRAY_BYTES:
        _refuse(source, f"is a JSON array of {size} bytes, over {MAX_ARRAY_BYTES}; write it as .jsonl, a row a line")
    try:
        text = source.path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(source, f"is not UTF-8 (byte {error.start + 1}); save it as UTF-8")
    yield from enumerate(_elements(source, text), start=1)


def _elements(source: Input, text: str) -> Iterator[Any]:
    """The elements of a JSON array, parsed one by one so that one bad row does not spoil the rest."""
    position = _skip_white(text, text.index("[") + 1)
    while not text.startswith("]", position):
        value, position = _element(source, text, position)
        yield value
        position = _skip_white(text, position)
        if text.startswith(",", position):
            position = _skip_white(text, position + 1)
        elif not text.startswith("]", position):
            _refuse(source, f"invalid JSON at line {_line(text, position)}: ',' or ']' expected after a row")
    if text[position + 1 :].strip():
        _refuse(source, f"invalid JSON at line {_line(text, position)}: more text after the array's end")


def _element(source: Input, text: str, position: int) -> tuple[Any, int]:
    try:
        try:
            return _STRICT.raw_decode(text, position)
        except RowError as problem:
            return problem, _LENIENT.raw_decode(text, position)[1]
    except (ValueError, RecursionError) as error:
        where = error.pos if isinstance(error, json.JSONDecodeError) else position
        _refuse(source, f"invalid JSON at line {_line(text, where)}: {_reason(error)}")


def _skip_white(text: str, position: int) -> int:
    match = _WHITE.match(text, position)
    return match.end() if match else position


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _read_table(source: Input, bad: BadRows, has_header: bool) -> _Numbered:
    """Rows of a .csv or .tsv file; a quoted field may hold line ends."""
    csv.field_size_limit(MAX_ROW_BYTES)
    # Bytes that are not UTF-8 become surrogates, so that the row they are in can be named.
    lines = (_table_line(source, number, line) for number, line in _lines(source))
    reader = csv.reader(lines, delimiter="\t" if _ending(source) == ".tsv" else ",", strict=True)
    header = _header(source, reader) if has_header else None
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, RowError("malformed field", f"{error}; a quote inside a quoted field is written twice")
            continue
        if fields:
            yield number, _table_row(fields, header)


def _table_line(source: Input, number: int, line: bytes | RowError) -> str:
    if isinstance(line, RowError):
        _refuse(source, f"line {number}: {line}")
    return line.decode("utf-8", errors="surrogateescape")


def _header(source: Input, reader: Any) -> list[str]:
    header: list[str]
    try:
        header = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        _refuse(source, f"line {reader.line_num}: the header cannot be read: {error}")
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        _refuse(source, f"line {reader.line_num}: the header names column {twice[0]!r} twice")
    return header


def _table_row(fields: list[str], header: list[str] | None) -> dict[str, Any] | RowError:
    names = header if header is not None else [str(i) for i in range(len(fields))]
    if len(fields) != len(names):
        return RowError("wrong number of fields", f"{len(fields)} where the header has {len(names)}")
    for name, field in zip(names, fields, strict=True):
        if "\0" in field:
            return RowError("NUL character", f"in column {name!r}")
        if not is_text(field):
            return RowError("invalid UTF-8", f"in column {name!r}; save the file as UTF-8")
    return dict(zip(names, fields, strict=True))


def _read_parquet(source: Input, bad: BadRows, has_header: bool) -> _Numbered:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        _refuse(source, f"cannot be read as parquet after row {number}: {_reason(error)}; write the file again")


_READERS: dict[str, _Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}


def _ending(source: Input) -> str:
    """By the user's name for it; what was pulled may be called otherwise."""
    return PurePosixPath(source.uri).suffix.lower() or Path(source.path).suffix.lower()


def _reader(source: Input) -> _Reader:
    reader = _READERS.get(_ending(source))
    if reader is None:
        _refuse(source, f"the name ends in {_ending(source) or 'nothing'}; known are {', '.join(_READERS)}")
    return reader


def _check_file(source: Input) -> None:
    if not source.path.exists():
        raise InputMissing(f"{source.uri}: no such file; check the name under data")
    if not source.path.is_file():
        _refuse(source, "is not a file; name a single .jsonl, .json, .csv, .tsv or .parquet file")
    if source.path.stat().st_size == 0:
        _refuse(source, "is empty (0 bytes)")
    with source.path.open("rb") as stream:
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            _refuse(source, "is UTF-16; save it as UTF-8")


def _lines(source: Input) -> Iterator[tuple[int, bytes | RowError]]:
    """Numbered lines without their end; memory stays bounded whatever the file holds."""
    with source.path.open("rb") as stream:
        if stream.read(3) != codecs.BOM_UTF8:
            stream.seek(0)
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            if len(line) > MAX_ROW_BYTES:
                _skip_line(stream, line)
                yield number, RowError("row too large", f"more than {MAX_ROW_BYTES} bytes in one line")
            else:
                yield number, line


def _skip_line(stream: IO[bytes], line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = stream.readline(MAX_ROW_BYTES)


def is_text(value: str) -> bool:
    """False if half a surrogate pair is in it, which no UTF-8 file and no tokenizer can hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _json_name(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _reason(error: BaseException) -> str:
    """First line of a library's message, without the class name."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _refuse(source: Input, problem: str) -> NoReturn:
    raise DataInvalid(f"{source.uri}: {problem}")
