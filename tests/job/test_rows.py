"""Readers: every kind of file, and every way in which one can be broken (T36)."""

import contextlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from job.data import json_array
from job.data import rows as rows_module
from job.data.rows import BadRows, Row, read_rows
from job.errors import DataInvalid, InputMissing
from job.inputs import Input
from tests.job.tiny import numbered_rows, write_rows

ROW = b'{"text": "one"}\n'


def read(path: Path, max_bad: int = 0, has_header: bool = True) -> tuple[list[Row], BadRows]:
    bad = BadRows(max_bad)
    return list(read_rows(Input(path.name, path), bad, has_header)), bad


def refusal(path: Path, max_bad: int = 0) -> str:
    with pytest.raises(DataInvalid) as caught:
        read(path, max_bad)
    return str(caught.value)


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, ending: str) -> None:
    wanted = [*numbered_rows(600), {"prompt": 'a "quote", a\ttab\nand a line', "completion": "日本語 é"}]
    found, bad = read(write_rows(tmp_path / f"data{ending}", wanted))
    assert [row.values for row in found] == wanted
    assert not bad.kinds


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(ROW + ROW)
    assert [row.origin for row in read(path)[0]] == ["data.json:1", "data.json:2"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.jsonl", b'{"text": "one"}\r\n{"text": "two"}\r\n'),
        ("bom.jsonl", b'\xef\xbb\xbf{"text": "one"}\n{"text": "two"}\n'),
        ("blank.jsonl", b'\n{"text": "one"}\n  \n\n{"text": "two"}'),
        ("bom.json", b'\xef\xbb\xbf [{"text": "one"},\r\n {"text": "two"}]\n'),
        ("crlf.csv", b"text\r\none\r\n\r\ntwo\r\n"),
        ("bom.csv", b"\xef\xbb\xbftext\none\ntwo\n"),
    ],
)
def test_line_ends_marks_and_blank_lines_do_not_matter(tmp_path: Path, name: str, content: bytes) -> None:  # T36
    path = tmp_path / name
    path.write_bytes(content)
    assert [row.values for row in read(path)[0]] == [{"text": "one"}, {"text": "two"}]


def test_unicode_line_separators_do_not_end_a_row(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two\x85"}\n', encoding="utf-8")
    assert [row.values for row in read(path)[0]] == [{"text": "one\u2028two\x85"}]


def test_rows_are_numbered_by_the_line_they_start_on(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('text\n\n"one\nmore"\ntwo\n', encoding="utf-8")
    assert [row.number for row in read(path)[0]] == [3, 5]


def test_a_table_without_header_has_numbered_columns(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text("What?\t18\nWho?\t3\n", encoding="utf-8")
    found, _ = read(path, has_header=False)
    assert [row.values for row in found] == [{"0": "What?", "1": "18"}, {"0": "Who?", "1": "3"}]


BAD_ROWS = {
    "invalid JSON": (b'{"text": "one"\n', "data.jsonl:2", "invalid JSON"),
    "not an object": (b"[1]\n", "data.jsonl:2", "a list stands where a row should"),
    "null": (b"null\n", "data.jsonl:2", "a null stands"),
    "invalid UTF-8": (b'{"text": "\xff"}\n', "data.jsonl:2", "byte 11"),
    "NUL": (b'{"text": "a\0"}\n', "data.jsonl:2", "NUL character"),
    "duplicate key": (b'{"text": "a", "text": "b"}\n', "data.jsonl:2", "duplicate key: key 2 of 2"),
    "nested duplicate key": (b'{"m": [{"a": 1, "a": 2}]}\n', "data.jsonl:2", "duplicate key: key 2 of 2"),
    "deep nesting": (b"[" * 100_000 + b"\n", "data.jsonl:2", "nested too deeply"),
    "endless number": (b'{"text": ' + b"1" * 10_000 + b"}\n", "data.jsonl:2", "invalid JSON"),
}


@pytest.mark.parametrize(("content", "where", "what"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_line_and_reason(tmp_path: Path, content: bytes, where: str, what: str) -> None:  # T36
    path = tmp_path / "data.jsonl"
    path.write_bytes(ROW + content + ROW)
    message = refusal(path)
    assert message.startswith(where)
    assert what in message


@pytest.mark.parametrize("content", [content for content, _, _ in BAD_ROWS.values()], ids=BAD_ROWS)
def test_bad_rows_up_to_the_limit_are_skipped_and_counted(tmp_path: Path, content: bytes) -> None:  # T36
    path = tmp_path / "data.jsonl"
    path.write_bytes(ROW + content + ROW)
    found, bad = read(path, max_bad=1)
    assert [row.number for row in found] == [1, 3]
    assert bad.kinds.total() == 1


def test_one_bad_row_more_than_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x\n" + ROW + b"y\n")
    assert refusal(path, max_bad=1).startswith("data.jsonl:3: invalid JSON")


def test_a_huge_line_is_one_bad_row_and_reading_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # T36
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 100)
    path = tmp_path / "data.jsonl"
    path.write_bytes(ROW + b'{"text": "' + b"a" * 1000 + b'"}\n' + ROW)
    found, bad = read(path, max_bad=1)
    assert [row.number for row in found] == [1, 3]
    assert dict(bad.kinds) == {"row too large": 1}


def test_a_duplicate_key_in_an_array_spoils_only_its_row(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b'[{"a": "1", "a": "2"}, {"a": "3"}, 7]')
    found, bad = read(path, max_bad=2)
    assert [(row.number, row.values) for row in found] == [(2, {"a": "3"})]
    assert dict(bad.kinds) == {"duplicate key": 1, "not an object": 1}


BROKEN_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("data.jsonl", b"", "is empty"),
    "blank lines only": ("data.jsonl", b"\n\n", "holds no rows"),
    "empty array": ("data.json", b"[ ]", "holds no rows"),
    "header only": ("data.csv", b"text\n", "holds no rows"),
    "unknown ending": ("data.md", b"text", "the name ends in .md; known are .jsonl"),
    "no ending": ("data", b"text", "ends in nothing"),
    "UTF-16": ("data.jsonl", '{"a": "b"}'.encode("utf-16"), "is UTF-16"),
    "not parquet": ("data.parquet", b"PAR1 no", "cannot be read as parquet"),
    "array cut off": ("data.json", b'[{"a": "b"},\n{"a": ', "invalid JSON at line 2"),
    "array without comma": ("data.json", b'[{"a": "b"}\n{"a": "c"}]', "invalid JSON at line 2"),
    "text after array": ("data.json", b'[{"a": "b"}]\nmore', "more text after"),
    "array not UTF-8": ("data.json", b'[{"a": "\xff"}]', "is not UTF-8"),
    "column twice": ("data.csv", b"a,a\n1,2\n", "names column 'a' twice"),
    "too many fields": ("data.csv", b"a,b\n1,2,3\n", "data.csv:2: wrong number of fields: 3 where the header has 2"),
    "too few fields": ("data.tsv", b"a\tb\n1\n", "data.tsv:2: wrong number of fields"),
    "open quote": ("data.csv", b'a,b\n1,"2\n3,4\n', "data.csv:2: malformed field"),
    "table not UTF-8": ("data.csv", b"a\nb\n\xff\n", "data.csv:3: invalid UTF-8"),
    "NUL in table": ("data.csv", b"a\nb\0\n", "data.csv:2: NUL character"),
}


@pytest.mark.parametrize(("name", "content", "what"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_broken_file_is_refused_with_the_reason(tmp_path: Path, name: str, content: bytes, what: str) -> None:  # T36
    path = tmp_path / name
    path.write_bytes(content)
    assert what in refusal(path)


def test_a_cut_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.parquet", numbered_rows(3000))
    content = path.read_bytes()
    path.write_bytes(content[:200] + b"\0" * 400 + content[600:])
    assert "cannot be read as parquet" in refusal(path)


def test_a_value_that_python_has_no_object_for_spoils_only_its_row(tmp_path: Path) -> None:  # T36
    path = tmp_path / "data.parquet"
    late = pa.array([0, 2**63 - 1, 1], pa.timestamp("us"))
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b", "c"], "when": late}), path)
    found, bad = read(path, max_bad=1)
    assert [(row.number, row.values["text"]) for row in found] == [(1, "a"), (3, "c")]
    assert bad.examples[0].startswith("data.parquet:2: value out of range: in column 'when': ")
    assert "data.parquet:2: value out of range" in refusal(path)
    assert [row.values for row in read_rows(Input(path.name, path), BadRows(0), columns={"text"})] == [
        {"text": text, "when": None} for text in "abc"
    ]


ODD = {
    "timestamp": ([2**63 - 1], pa.timestamp("us")),
    "duration": ([2**62], pa.duration("ms")),
    "zone": ([0], pa.timestamp("s", tz="Nowhere/City")),
}


@pytest.mark.parametrize("kind", ODD)
def test_no_value_of_a_parquet_file_ends_in_a_traceback(tmp_path: Path, kind: str) -> None:  # T36
    path = tmp_path / "data.parquet"
    values, type_ = ODD[kind]
    pyarrow.parquet.write_table(pa.table({"text": pa.array(values, type_)}), path)
    assert "data.parquet:1: value out of range: in column 'text'" in refusal(path)


def test_two_parquet_columns_of_a_name_are_refused(tmp_path: Path) -> None:  # T36
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    assert "data.parquet: has two columns with the name 'text'" in refusal(path)


def test_a_parquet_row_has_no_nulls_but_those_of_its_columns(tmp_path: Path) -> None:
    """Arrow gives all objects of a column the same keys; a model would learn to write them."""
    tool = {"name": "get", "parameters": {"properties": {"town": {"type": "string"}}}}
    wanted: list[dict[str, Any]] = [
        {"m": [{"content": "a", "calls": [{"name": "get", "arguments": {"town": "Kyoto"}}]}], "tools": [tool]},
        {"m": [{"content": "b", "calls": [{"name": "put", "arguments": {"land": "Japan", "n": 0}}]}], "tools": None},
        {"m": [{"content": "", "calls": []}], "tools": [{"name": "put", "parameters": {"properties": {}}}]},
    ]
    assert [row.values for row in read(write_rows(tmp_path / "data.parquet", wanted))[0]] == wanted


OPEN_QUOTES: dict[str, tuple[str, list[int], list[int]]] = {
    "closed by a later quote": ('b,"\nc,1\nd,2\n"e",3\nf,4\n', [2, 7], [3, 4, 5, 6]),
    "never closed": ('b,"\nc,1\nd,2\n', [2], [3, 4, 5]),
    "a stray one in its own line": ('b,"x"y\nc,1\n', [2, 4], [3]),
}


@pytest.mark.parametrize(("content", "good", "lost"), OPEN_QUOTES.values(), ids=OPEN_QUOTES)
def test_every_line_that_an_open_quote_takes_in_counts(
    tmp_path: Path, content: str, good: list[int], lost: list[int]
) -> None:
    path = tmp_path / "data.csv"
    path.write_text("k,v\na,0\n" + content, encoding="utf-8")
    found, bad = read(path, max_bad=len(lost))
    assert [row.number for row in found] == good
    assert [int(example.split(":")[1]) for example in bad.examples] == lost
    assert dict(bad.kinds) == {"malformed field": len(lost)}
    assert len(lost) == 1 or "data.csv:4: malformed field" in refusal(path, max_bad=1)


def test_a_text_file_has_a_row_for_each_paragraph(tmp_path: Path) -> None:
    path = tmp_path / "data.txt"
    path.write_bytes("\ufeff\nOne\r\n  two.\r\n\r\n \t\nThree é\n\n".encode())
    assert [(row.number, row.values) for row in read(path)[0]] == [
        (2, {"text": "One\n  two."}),
        (6, {"text": "Three é"}),
    ]


def test_a_paragraph_that_cannot_be_used_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_ROW_BYTES", 100)
    path = tmp_path / "data.txt"
    path.write_bytes(b"one\n\na\0b\n\n" + b"long line\n" * 20 + b"\ntwo\xff\n\nlast")
    found, bad = read(path, max_bad=3)
    assert [row.values["text"] for row in found] == ["one", "last"]
    assert dict(bad.kinds) == {"NUL character": 1, "row too large": 1, "invalid UTF-8": 1}
    assert [example.split(":")[1] for example in bad.examples] == ["3", "5", "26"]


def test_an_array_is_read_on_wherever_the_window_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.json"
    values = [{"text": "é" * n, "n": [n, {"a": "😀"}]} for n in range(30)]
    path.write_text(json.dumps([*values, 1234567], ensure_ascii=False, indent=1), encoding="utf-8")
    for size in (1, 7, 64):
        monkeypatch.setattr(json_array, "_CHUNK_BYTES", size)
        found, bad = read(path, max_bad=1)
        assert [row.values for row in found] == values
        assert bad.examples == ["data.json:31: not an object: a number stands where a row should"]


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_many_large_rows_take_little_memory(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"data{ending}", [{"text": f"{i}😀" + "a" * 100_000} for i in range(200)])
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_rows(Input(path.name, path), BadRows(0)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 200
    assert peak < 200 * 100_000 * 4 / 2  # a text with one emoji takes four bytes a character


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"absent\.jsonl: no such file"):
        read(tmp_path / "absent.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "is not a file" in refusal(tmp_path / "folder.jsonl")


def test_messages_use_the_name_of_the_user_and_its_ending(tmp_path: Path) -> None:
    path = tmp_path / "train-0"
    path.write_bytes(b"x\n")
    with pytest.raises(DataInvalid, match=r"^s3://corpus/wiki\.jsonl:1: invalid JSON"):
        list(read_rows(Input("s3://corpus/wiki.jsonl", path), BadRows(0)))


@settings(max_examples=150, deadline=None)
@given(content=st.binary(max_size=200), ending=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt"]))
def test_no_bytes_whatsoever_end_in_a_traceback(  # T36
    tmp_path_factory: pytest.TempPathFactory, content: bytes, ending: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / f"data{ending}"
    path.write_bytes(content)
    with contextlib.suppress(DataInvalid):
        found, bad = read(path, max_bad=3)
        assert found or bad.kinds


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow])
@given(
    values=st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), min_size=1, max_size=5),
    indent=st.sampled_from([None, 1]),
)
def test_an_array_read_piece_by_piece_is_what_json_reads(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]], indent: int | None
) -> None:
    path = tmp_path_factory.mktemp("array") / "data.json"
    path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    assert [row.values for row in read(path)[0]] == values
