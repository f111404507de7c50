"""YAML as people mean it: the core schema of YAML 1.2, and nothing that could surprise or bomb.

The only file that knows PyYAML. It reads the parser's events, so that aliases are never followed and depth is bounded,
and it reports every problem of a text at once, each with its line.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from job.errors import SpecInvalid

Path = tuple[str | int, ...]
"""Keys and list indices from the root down to a value."""

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DIGITS = 400  # Python itself refuses to print or read whole numbers of more than 4300 digits
MAX_PROBLEMS = 50

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_UNPRINTABLE = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What YAML forbids, and the three line breaks (U+0085, U+2028, U+2029) that only some of its readers take for one."""
_UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""What an escape may write but no path and no UTF-8 text can hold."""

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_NOT_PLAIN = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf", "infinity"}
"""Words (in any case) that some reader of YAML takes for something else."""


@dataclass(frozen=True)
class Document:
    """One text as read: its value, and where each part of it stands."""

    value: Any
    """A mapping with text keys; below it mappings, lists, text, numbers, booleans and None."""
    source: str
    """What messages call the text: the file's name."""
    lines: Mapping[Path, int]
    """Line (from 1) of every key and every list item."""
    problems: tuple[str, ...] = ()
    """What is wrong with the text itself, where the caller wants to report it together with more."""
    reported: frozenset[Path] = frozenset()
    """Where those problems are: the values there are not what the user meant."""

    def is_reported(self, path: Path) -> bool:
        """Whether a value was refused as text already, so that a complaint about it would be the second."""
        return path in self.reported or any(part == "<<" or str(part).startswith(_NO_KEY) for part in path)


_NO_KEY = "(key on line "


def refusal(problems: Sequence[str], untold: int = 0) -> SpecInvalid:
    """One error for all problems, a line each; a flood of them is cut.

    Args:
        problems: as they will stand in the message.
        untold: further problems that nobody put into words.
    """
    shown = list(problems[:MAX_PROBLEMS])
    more = len(problems) - len(shown) + untold
    return SpecInvalid("\n".join([*shown, f"and {more} more problems"] if more else shown))


def path_text(path: Path) -> str:
    """A path as people write it: ``data.train.0.weight``."""
    return ".".join(str(part) if re.fullmatch(r"[\w-]+", str(part)) else repr(part) for part in path)


def parse_document(text: str | bytes, source: str, tolerant: bool = False) -> Document:
    """Reads one YAML document whose root is a mapping.

    Args:
        text: at most 1 MiB; bytes are UTF-8, with or without a byte order mark.
        source: the file's name, for messages.
        tolerant: problems that leave the rest of the text readable are handed over instead of raised.

    Raises:
        SpecInvalid: every problem, one per line as ``source:LINE: path: what; what to try``.
    """
    reader = _Reader(_decoded(text, source), source)
    value = reader.document()
    if not reader.problems and not isinstance(value, dict):
        found = "nothing in it" if value is None else "no key at its top"
        reader.report(1, (), f"the document has {found}; write lines like name: support-ja")
    if reader.problems and not (tolerant and isinstance(value, dict)):
        raise refusal(reader.problems)
    return Document(value, source, reader.lines, tuple(reader.problems), frozenset(reader.reported))


def parse_scalar(text: str, source: str = "--set") -> Any:
    """Reads one value given on a command line: ``[a, b]``, ``{a: 1}``, ``"quoted"``, a number, a word or plain text.

    Raises:
        SpecInvalid: the same as for a document.
    """
    text = _decoded(text, source).strip()
    if not text.startswith(("[", "{", '"', "'")):
        try:
            return _plain(text)
        except ValueError as error:
            raise refusal([f"{source}: {error}"]) from None
    reader = _Reader(text, source)
    value = reader.document()
    if reader.problems:
        raise refusal(reader.problems)
    return value


def dump_document(value: Mapping[str, Any]) -> str:
    """YAML that this reader and any reader of YAML 1.1 understand alike: whatever could be misread is quoted.

    Keys keep their order; text of several lines stands as a block.

    Raises:
        SpecInvalid: a value is of a type that YAML has no word for.
    """
    try:
        return yaml.dump(
            dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1 << 20
        )
    except yaml.representer.RepresenterError as error:
        found = repr(error.args[-1])[:80]
        raise refusal(
            [f"{found}: no value for a spec; write text, numbers, true or false, lists or mappings"]
        ) from None


def _decoded(text: str | bytes, source: str) -> str:
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    if len(content) > MAX_BYTES:
        raise refusal([f"{source}: larger than 1 MiB, which no spec is; is it the right file?"])
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise refusal([f"{source}:{line}: not UTF-8 (byte {error.start + 1}); save the file as UTF-8"]) from None
    strange = _UNPRINTABLE.search(text)
    if strange:
        line = text.count("\n", 0, strange.start()) + 1
        name = f"U+{ord(strange[0]):04X}"
        raise refusal([f"{source}:{line}: character {name} is not allowed as such; remove it, or escape it in quotes"])
    return text


def _plain(text: str) -> Any:
    """The value of unquoted text, by the core schema. Raises ValueError for a number nobody can mean."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if not (text[0] in "+-." or text[0].isdigit()):
        return text
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", "").lower())
    whole = _DECIMAL.fullmatch(text) or _OCTAL.fullmatch(text) or _HEX.fullmatch(text)
    if not whole and not _FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; put it in quotes if it is text")
    if not whole:
        return float(text)
    return int(text, 10 if _DECIMAL.fullmatch(text) else 0)


@dataclass
class _Reader:
    """Builds values out of the parser's events, and gathers what is wrong with them."""

    text: str
    source: str
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    reported: set[Path] = field(default_factory=set)

    def report(self, line: int, path: Path, what: str) -> None:
        where = f"{path_text(path)}: " if path else ""
        self.problems.append(f"{self.source}:{line}: {where}{what}")
        self.reported.add(path)

    def document(self) -> Any:
        """The value of the one document in the text; None where there is none."""
        try:
            return self._only_document(yaml.parse(self.text, Loader=_LOADER))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
            last = max(len(self.text.splitlines()), 1)
            where = f"column {column}" if line <= last else "its end"
            what = " ".join(part for part in (error.context, error.problem) if part)
            self.report(min(line, last), (), f"not YAML at {where}: {what}; check indentation, quotes and brackets")
        except yaml.YAMLError as error:
            self.report(1, (), f"not YAML: {' '.join(str(error).split())}; save the file as plain UTF-8 text")
        return None

    def _only_document(self, events: Iterator[Any]) -> Any:
        next(events)  # the stream's start
        start = next(events)
        if isinstance(start, yaml.StreamEndEvent):
            return None
        if start.tags or start.version not in (None, (1, 2)):
            self.report(1, (), "only the directive %YAML 1.2 is known; remove the lines that begin with %")
        value = self._value(events, next(events), ())
        next(events)  # the document's end
        after = next(events)
        if isinstance(after, yaml.DocumentStartEvent):
            self.report(_line(after), (), "a second document begins; keep one document to a file")
        return value

    def _value(self, events: Iterator[Any], event: Any, path: Path) -> Any:
        if isinstance(event, yaml.AliasEvent):
            self.report(_line(event), path, f"alias *{event.anchor}: values are not shared; write the value out here")
            return None
        if event.anchor is not None:
            self.report(_line(event), path, f"anchor &{event.anchor}: values are not shared; remove it")
        if event.tag is not None:
            self.report(_line(event), path, f"tag {event.tag}: types are not chosen by tags; remove it")
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if len(path) >= MAX_DEPTH:
            self.report(_line(event), path[:3], f"nested deeper than {MAX_DEPTH} levels; no spec is that deep")
            raise refusal(self.problems)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(events, path)
        return self._mapping(events, path)

    def _scalar(self, event: Any, path: Path) -> Any:
        if _UNUSABLE.search(event.value):
            self.report(_line(event), path, "an escaped NUL or half a character; remove it")
        if event.style:  # quoted, or a block
            return event.value
        try:
            return _plain(event.value)
        except ValueError as error:
            self.report(_line(event), path, str(error))
            return None

    def _sequence(self, events: Iterator[Any], path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.lines[here] = _line(event)
            items.append(self._value(events, event, here))
        return items

    def _mapping(self, events: Iterator[Any], path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = self._key(events, event, path)
            here = (*path, key)
            if key in values:
                first = self.lines[here]
                self.report(_line(event), here, f"given twice, first on line {first}; keep one of them")
            else:
                self.lines[here] = _line(event)
            values[key] = self._value(events, next(events), here)
        return values

    def _key(self, events: Iterator[Any], event: Any, path: Path) -> str:
        if isinstance(event, yaml.CollectionStartEvent):
            # Keys inside keys nest without a path that could be counted, so reading ends here.
            self.report(_line(event), path, "a list or block as a key; keys are text")
            raise refusal(self.problems)
        key = self._value(events, event, path)
        if isinstance(key, str):
            if key == "<<" and not event.style:
                self.report(_line(event), path, "merge key <<: blocks are not merged; write the keys out here")
            return key
        if isinstance(event, yaml.ScalarEvent):
            self.report(_line(event), path, f"key {event.value[:40] or 'null'}: keys are text; put it in quotes")
        return f"{_NO_KEY}{_line(event)}, column {event.start_mark.column + 1})"


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with text quoted wherever another reader might see a number, a date or a switch."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=_text_style(text))


def _text_style(text: str) -> str | None:
    """PyYAML's letter for the plainest style in which nobody misreads the text; None leaves the choice to PyYAML."""
    if _UNPRINTABLE.search(text):
        return '"'
    if "\n" in text:
        return "|"
    return None if text[:1].isalpha() and text.lower() not in _NOT_PLAIN else "'"


_Dumper.add_representer(str, _text_node)
