"""YAML is read as version 1.2 says, refused where it could surprise, and written so that every reader agrees."""

import contextlib
import io
import math
import re

import pytest
import ruamel.yaml
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from job.errors import SpecInvalid
from job.strict_yaml import MAX_PROBLEMS, dump_document, parse_document, parse_scalar


def value_of(text):
    return parse_document(text, "run.yaml").value


def refused(text):
    with pytest.raises(SpecInvalid) as caught:
        parse_document(text, "run.yaml")
    return str(caught.value).splitlines()


def same(one, other):
    """Equal, of equal type, and NaN is itself."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is type(other) and one == other


SCALARS = {
    "2e-4": 2e-4,
    "1e5": 1e5,
    "1E+5": 1e5,
    ".5": 0.5,
    ".5e3": 500.0,
    "5.": 5.0,
    "-.5e-3": -0.0005,
    "+1": 1,
    "012": 12,
    "08": 8,
    "0x1F": 31,
    "0o17": 15,
    "0b11": "0b11",
    "-0x1F": "-0x1F",
    "0X1F": "0X1F",
    "1_000": "1_000",
    "1e": "1e",
    "1.5.2": "1.5.2",
    ".": ".",
    "+": "+",
    "12:30": "12:30",
    "2001-12-14": "2001-12-14",
    "on": "on",
    "off": "off",
    "yes": "yes",
    "No": "No",
    "y": "y",
    "true": True,
    "True": True,
    "FALSE": False,
    "tRUE": "tRUE",
    "null": None,
    "~": None,
    "": None,
    "NULL": None,
    "nULL": "nULL",
    ".inf": math.inf,
    "-.INF": -math.inf,
    ".nan": math.nan,
    ".Nan": ".Nan",
    "+.nan": "+.nan",
    "=": "=",
    "²": "²",
    "٣": "٣",
    "s3://a/b": "s3://a/b",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items())
def test_a_plain_scalar_means_what_the_core_schema_says(text, value):  # T31
    assert same(value_of(f"a: {text}")["a"], value)
    assert same(parse_scalar(text), value)


@pytest.mark.parametrize("text", SCALARS)
def test_quotes_make_text_of_anything(text):
    assert value_of(f"a: '{text}'\nb: \"{text}\"") == {"a": text, "b": text}


def by_ruamel(text):
    return ruamel.yaml.YAML(typ="safe", pure=True).load(text)


# Left to the table: underscores, dates, `=`, the binary and signed hexadecimal numbers that ruamel adds, and `.5e3`,
# where it wants a sign in the exponent.
NUMBERISH = st.from_regex(r"[-+]?(0o[0-9]{1,3}|0x[0-9a-g]{1,3}|[0-9.]{1,6}([eE][-+]?[0-9]{0,2})?)", fullmatch=True)
RUAMELS_OWN = re.compile(r"[-+]0[xo].*|[-+]?\.[0-9.]*[eE][0-9]*|[-+]?\.+([eE].*)?")
WORDS = st.sampled_from(["true", "null", "yes", "on", "Off", "~", "inf", ".inf", "-.inf", ".nan", "NaN", "y", "12:30"])


@given(NUMBERISH.filter(lambda text: not RUAMELS_OWN.fullmatch(text)) | WORDS)
def test_plain_scalars_are_read_as_by_another_reader_of_yaml_1_2(text):
    assert same(value_of(f"a: {text}")["a"], by_ruamel(f"a: {text}")["a"])


def test_lines_are_those_of_keys_and_items():
    document = parse_document("# top\na:\n  b: 1\n  c:\n    - x\n    - {d: 2}\ne: |\n  long\nf: 3\n", "run.yaml")
    assert document.lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 4,
        ("a", "c", 0): 5,
        ("a", "c", 1): 6,
        ("a", "c", 1, "d"): 6,
        ("e",): 7,
        ("f",): 9,
    }
    assert document.source == "run.yaml"


@pytest.mark.parametrize(
    "text", [b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", "\ufeffa: 1\nb: 2", "%YAML 1.2\n---\na: 1\nb: 2\n...\n"]
)
def test_byte_order_mark_crlf_and_the_right_directive_are_fine(text):
    assert value_of(text) == {"a": 1, "b": 2}


REFUSALS = {
    "duplicate key": ("a: 1\nb: {c: 1,\n c: 2}", ["run.yaml:3: b.c: given twice, first on line 2"]),
    "python tag": ("a: !!python/object/apply:os.system [x]", ["run.yaml:1: a: tag tag:yaml.org,2002:python/object"]),
    "own tag": ("a: 1\nb: !foo 1", ["run.yaml:2: b: tag !foo"]),
    "harmless tag": ("a: !!str 1", ["run.yaml:1: a: tag tag:yaml.org,2002:str"]),
    "non-specific tag": ("a: ! 1", ["run.yaml:1: a: tag !"]),
    "anchor and alias": ("a: &x 1\nb: *x", ["run.yaml:1: a: anchor &x", "run.yaml:2: b: alias *x"]),
    "alias as a key": ("a: &x k\n*x : 1", ["run.yaml:1: a: anchor &x", "run.yaml:2: alias *x"]),
    "merge key": ("a: 1\n<<: {b: 2}", ["run.yaml:2: merge key <<"]),
    "two documents": ("a: 1\n---\nb: 2", ["run.yaml:2: a second document"]),
    "nothing": ("", ["run.yaml:1: the document has nothing in it"]),
    "only a comment": ("# a\n", ["run.yaml:1: the document has nothing in it"]),
    "empty document": ("---\n", ["run.yaml:1: the document has nothing in it"]),
    "list": ("- a", ["run.yaml:1: the document has no key at its top"]),
    "scalar": ("just words", ["run.yaml:1: the document has no key at its top"]),
    "number as a key": ("a: 1\n1: x", ["run.yaml:2: key 1: keys are text"]),
    "switch as a key": ("true: x", ["run.yaml:1: key true: keys are text"]),
    "list as a key": ("? [a]\n: 1", ["run.yaml:1: a list or block as a key"]),
    "keys within keys": ("? " * 100_000, ["run.yaml:1: a list or block as a key"]),
    "not UTF-8": (b"a: 1\nb: \xff", ["run.yaml:2: not UTF-8 (byte 9)"]),
    "UTF-16": ("a: 1".encode("utf-16"), ["run.yaml:1: not UTF-8 (byte 1)"]),
    "NUL": ("a: 1\nb: \0", ["run.yaml:2: character U+0000"]),
    "escaped NUL": ('a: "\\0"', ["run.yaml:1: a: an escaped NUL"]),
    "line separator": ("a: x\u2028y", ["run.yaml:1: character U+2028"]),
    "lone surrogate": ("a: \ud800", ["run.yaml:1: not UTF-8"]),
    "too large": ("a: " + "x" * (1 << 20), ["run.yaml: larger than 1 MiB"]),
    "too deep": ("a: " + "[" * 1_000_000, ["run.yaml:1: a.0.0: nested deeper than 32"]),
    "number without end": ("a: " + "9" * 5000, ["run.yaml:1: a: a number of 5000 digits"]),
    "hexadecimal without end": ("a: 0x" + "f" * 5000, ["run.yaml:1: a: a number of 5002 digits"]),
    "open bracket": ("a: 1\nb: [1,\n", ["run.yaml:2: not YAML at its end"]),
    "two colons": ("a: b: c", ["run.yaml:1: not YAML at column 5"]),
    "tab": ("a:\n\tb: 1", ["run.yaml:2: not YAML at column 1"]),
    "old directive": ("%YAML 1.1\n---\na: 1", ["run.yaml:1: only the directive %YAML 1.2"]),
    "tag directive": ("%TAG ! x:\n---\na: 1", ["run.yaml:1: only the directive %YAML 1.2"]),
}


@pytest.mark.parametrize(("text", "starts"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_could_surprise_is_refused_with_its_line(text, starts):
    lines = refused(text)
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


def test_every_problem_is_reported_and_a_syntax_error_ends_the_list():
    lines = refused("a: &x 1\na: 2\nb: !t 3\nc: [")
    assert [line.split(": ")[0] for line in lines] == ["run.yaml:1", "run.yaml:2", "run.yaml:3", "run.yaml:4"]


def test_a_flood_of_problems_is_cut():
    lines = refused("\n".join(f"k{index}: *a" for index in range(10_000)))
    assert len(lines) == MAX_PROBLEMS + 1
    assert lines[-1] == f"and {10_000 - MAX_PROBLEMS} more problems"


def test_an_alias_bomb_is_never_expanded():
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 30)]
    assert "anchor &l0" in refused("\n".join(["l0: &l0 x", *levels]))[0]


def test_thirty_two_levels_are_fine():
    deepest = value_of("a: " + "[" * 31 + "]" * 31)["a"]
    for _ in range(30):
        (deepest,) = deepest
    assert deepest == []


@given(
    st.text(alphabet="ab:-?[]{}&*!|>'\"%#,\n \t<1.~\r\u00e9", max_size=40)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
def test_any_input_is_read_or_refused(text):
    with contextlib.suppress(SpecInvalid):
        assert isinstance(value_of(text), dict)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[a, 1, 2e-4]", ["a", 1, 2e-4]),
        ("{r: 8, target_modules: [q, v]}", {"r": 8, "target_modules": ["q", "v"]}),
        ('"1"', "1"),
        ("'on'", "on"),
        (" 8 ", 8),
        ("a: b #c", "a: b #c"),
        ("*x", "*x"),
        ("- a", "- a"),
        ("", None),
    ],
)
def test_a_value_of_the_command_line_is_flow_or_plain_text(text, value):
    assert parse_scalar(text) == value


@pytest.mark.parametrize(
    "text", ["[a", "{a: 1", '"a', "[a] b", "{a: 1, a: 2}", "[!!python/name:x y]", "9" * 5000, "\0"]
)
def test_a_bad_value_of_the_command_line_is_refused(text):
    with pytest.raises(SpecInvalid, match=r"^--set"):
        parse_scalar(text)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
TRICKY = st.sampled_from(
    [
        *SCALARS,
        "<<",
        "a: b",
        "a #b",
        "- a",
        "|",
        "two\nlines\n",
        "\n lead\n",
        "trail \n\n",
        "日本語",
        "\x85",
        "\ufeff",
        "a\r\nb",
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | TRICKY
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | TRICKY, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(TEXTS | TRICKY, VALUES, min_size=1, max_size=3))
@example({"a": 2e-5, "b": 1e22, "c": -math.inf, "d": 0.0002})
def test_what_is_dumped_is_read_back_by_readers_of_both_versions(value):
    text = dump_document(value)
    assert repr(value_of(text)) == repr(value)
    assert repr(yaml.safe_load(text)) == repr(value)


@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), LEAVES, min_size=1, max_size=3))
def test_what_is_dumped_is_read_back_by_ruamel_too(value):
    assert repr(dict(by_ruamel(dump_document(value)))) == repr(value)


@pytest.mark.parametrize(
    ("text", "line"), [("on", "'on'"), ("1e5", "'1e5'"), ("12:30", "'12:30'"), ("n", "'n'"), ("cosine", "cosine")]
)
def test_only_what_could_be_misread_is_quoted(text, line):
    assert dump_document({"a": text}) == f"a: {line}\n"


def test_keys_keep_their_order_and_lines_stay_readable():
    text = dump_document({"b": "one\ntwo\n", "a": 2e-5, "c": "x " * 100})
    assert text == "b: |\n  one\n  two\na: 2.0e-05\nc: '" + "x " * 100 + "'\n"


def test_shared_parts_are_written_out():
    part = {"x": 1}
    assert "&" not in dump_document({"a": part, "b": part})


def test_both_parsers_tell_quoted_text_from_plain():
    for loader in {yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)}:
        events = [
            event for event in yaml.parse(io.StringIO("a: 'b'\n"), Loader=loader) if isinstance(event, yaml.ScalarEvent)
        ]
        assert [bool(event.style) for event in events] == [False, True]


def test_a_value_that_yaml_has_no_word_for_is_refused() -> None:
    with pytest.raises(SpecInvalid, match="no value for a spec"):
        dump_document({"name": object()})
