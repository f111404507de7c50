"""Every trap of training has a test, and the page that says which is true."""

from pathlib import Path

import pytest

from tests import traps


def test_every_trap_is_held_by_a_test() -> None:
    held = traps.holders()
    assert [number for number in traps.TRAPS if number not in held] == []
    assert set(held) <= set(traps.TRAPS)


def test_the_page_says_what_is() -> None:
    assert traps.PAGE.read_text(encoding="utf-8") == traps.page(), "run python -m tests.traps"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("def test_a() -> None:  # T7 T8\n    assert True\n", {7, 8}),
        ('def test_a() -> None:\n    """Holds T9."""\n    assert True\n', {9}),
        ("def test_t10_a() -> None:\n    assert True\n", {10}),
        ("def test_a() -> None:\n    assert 'T11'\n", set()),
        ("def helper() -> None:  # T12\n    assert True\n", set()),
    ],
)
def test_a_test_names_its_traps_where_it_begins(text: str, numbers: set[int], tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_one.py").write_text(text, encoding="utf-8")
    assert set(traps.holders(tmp_path)) == numbers
