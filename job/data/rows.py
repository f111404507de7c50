"""Files to rows: one reader for each kind of file, streamed, and every broken row named by file and line."""

import codecs
import csv
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from job.data.json_array import elements
from job.data.parquet import read_parquet
from job.data.row_error import MAX_ROW_BYTES, STRICT, RowError, is_text, reason, refuse
from job.errors import DataInvalid, InputMissing
from job.inputs import Input


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


@dataclass(frozen=True)
class BadRow:
    """One row that cannot be used."""

    source: str
    number: int
    kind: str
    """What it is counted under."""
    problem: str
    """The kind and the details."""


class BadRows:
    """Counts rows that are skipped, and refuses the run when there are more than ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kinds: Counter[str] = Counter()
        self.examples: list[str] = []

    def skip(self, row: BadRow) -> None:
        """Counts one row.

        Raises:
            DataInvalid: it was one too many.
        """
        self.kinds[row.kind] += 1
        what = f"{row.source}:{row.number}: {row.problem}"
        if len(self.examples) < 10:
            self.examples.append(what)
        if self.kinds.total() > self.limit:
            count = f"bad row {self.kinds.total()}, data.max_bad_rows is {self.limit}"
            raise DataInvalid(f"{what} ({count}: correct it, or raise that to skip such rows)")


def begins_with_header(named: Mapping[str, str]) -> bool:
    """Whether tables begin with the names of their columns: unless ``data.columns`` names them by number."""
    return not named or not all(name.isdigit() for name in named.values())


def read_rows(
    source: Input, bad: BadRows, has_header: bool = True, columns: Collection[str] | None = None
) -> Iterator[Row]:
    """The usable rows of one file, in order, read as they are asked for.

    Args:
        bad: where broken rows are counted.
        columns: as ``items``.

    Raises:
        DataInvalid: as ``items``, or there are too many broken rows.
        InputMissing: as ``items``.
    """
    for item in items(source, has_header, columns):
        if isinstance(item, Row):
            yield item
        else:
            bad.skip(item)


def items(source: Input, has_header: bool = True, columns: Collection[str] | None = None) -> Iterator[Row | BadRow]:
    """The rows of one file and its broken ones, in order, read as they are asked for.

    Args:
        source: the file; the ending of its name says what it is.
        has_header: whether the first line of .csv and .tsv names the columns; without it they are "0", "1", and so on.
        columns: those that are wanted; others of a .parquet file are not read, and null. None: all.

    Raises:
        DataInvalid: the file cannot be read as what it is called, or is empty.
        InputMissing: there is no such file.
    """
    reader = _reader(source)
    _check_file(source)
    is_empty = True
    for number, value in reader(source, has_header, columns):
        is_empty = False
        if isinstance(value, dict):
            yield Row(source.uri, number, value)
            continue
        if not isinstance(value, RowError):
            value = RowError("not an object", f"a {_json_name(value)} stands where a row should")
        yield BadRow(source.uri, number, value.kind, str(value))
    if is_empty:
        refuse(source, "holds no rows; the file is empty or has only blank lines or a header")


_Numbered = Iterator[tuple[int, Any]]
_Wanted = Collection[str] | None
_Reader = Callable[[Input, bool, _Wanted], _Numbered]


def _read_jsonl(source: Input, has_header: bool, columns: _Wanted) -> _Numbered:
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
        return STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise RowError("invalid JSON", f"{error.msg} at column {error.pos + 1}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError("invalid JSON", reason(error)) from error


def _read_json(source: Input, has_header: bool, columns: _Wanted) -> _Numbered:
    """A JSON array, or lines of JSON under the name .json."""
    with source.path.open("rb") as stream:
        head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if head.startswith(b"["):
        yield from enumerate(elements(source), start=1)
    else:
        yield from _read_jsonl(source, has_header, columns)


def _read_text(source: Input, has_header: bool, columns: _Wanted) -> _Numbered:
    """Paragraphs: lines with an empty one, or nothing but white space, before and after."""
    lines: list[bytes] = []
    start = size = 0
    for number, line in _lines(source):
        if isinstance(line, RowError):
            yield number, line
        elif line.strip():
            start, size = (start, size + len(line)) if lines else (number, len(line))
            lines.append(line if size <= MAX_ROW_BYTES else b"\n")
        elif lines:
            yield start, _paragraph(lines, size)
            lines = []
    if lines:
        yield start, _paragraph(lines, size)


def _paragraph(lines: list[bytes], size: int) -> dict[str, Any] | RowError:
    if size > MAX_ROW_BYTES:
        return RowError("row too large", f"more than {MAX_ROW_BYTES} bytes in one paragraph")
    try:
        return {"text": "\n".join(_text(line.rstrip(b"\r\n")) for line in lines)}
    except RowError as problem:
        return problem


def _read_table(source: Input, has_header: bool, columns: _Wanted) -> _Numbered:
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
            # An open quote takes in the lines after it: they may have been rows, and are lost with it.
            for lost in range(number + 1, reader.line_num + 1):
                yield lost, RowError("malformed field", f"lost to the quote that line {number} leaves open")
            continue
        if fields:
            yield number, _table_row(fields, header)


def _table_line(source: Input, number: int, line: bytes | RowError) -> str:
    if isinstance(line, RowError):
        refuse(source, f"line {number}: {line}")
    return line.decode("utf-8", errors="surrogateescape")


def _header(source: Input, reader: Any) -> list[str]:
    header: list[str]
    try:
        header = next((fields for fields in reader if fields), [])
    except csv.Error as error:
        refuse(source, f"line {reader.line_num}: the header cannot be read: {error}")
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        refuse(source, f"line {reader.line_num}: the header names column {twice[0]!r} twice")
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


_READERS: dict[str, _Reader] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": read_parquet,
    ".txt": _read_text,
}


def _ending(source: Input) -> str:
    """By the user's name for it; what was pulled may be called otherwise."""
    return PurePosixPath(source.uri).suffix.lower() or Path(source.path).suffix.lower()


def _reader(source: Input) -> _Reader:
    reader = _READERS.get(_ending(source))
    if reader is None:
        refuse(source, f"the name ends in {_ending(source) or 'nothing'}; known are {', '.join(_READERS)}")
    return reader


def _check_file(source: Input) -> None:
    if not source.path.exists():
        raise InputMissing(f"{source.uri}: no such file; check the name under data")
    if not source.path.is_file():
        refuse(source, "is not a file; name a single .jsonl, .json, .csv, .tsv, .parquet or .txt file")
    if source.path.stat().st_size == 0:
        refuse(source, "is empty (0 bytes)")
    with source.path.open("rb") as stream:
        if stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            refuse(source, "is UTF-16; save it as UTF-8")


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


def _json_name(value: object) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names.get(type(value), type(value).__name__)
