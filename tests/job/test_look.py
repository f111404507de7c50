"""``python -m job.look``: what model and data are, before anything trains."""

from pathlib import Path

import pytest
import yaml

from job.look import main
from tests.job import tiny


def spec(folder: Path, train: Path, model: Path) -> Path:
    content = {"name": "look", "model": str(model), "data": {"train": str(train), "eval_split": 0.1}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_every_input_is_named_with_what_it_holds(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.write_rows(tmp_path / "toy.jsonl", tiny.numbered_rows(12))
    assert main([str(spec(tmp_path, rows, tiny_llama))]) == 0
    model, data = capsys.readouterr().out.splitlines()
    assert model.startswith(f"model {tiny_llama}: ")
    assert data.startswith(f"{rows}: 12 rows, ")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 66, ["data.train", "no such file"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n', 65, ["toy.jsonl", "2"]),
        ("\n", 65, ["toy.jsonl"]),
    ],
)
def test_what_is_missing_or_broken_is_named(
    tmp_path: Path, tiny_llama: Path, caplog: pytest.LogCaptureFixture, text: str | None, code: int, words: list[str]
) -> None:
    rows = tmp_path / "toy.jsonl"
    if text is not None:
        rows.write_text(text, encoding="utf-8")
    assert main([str(spec(tmp_path, rows, tiny_llama))]) == code
    assert all(word in caplog.text for word in words), caplog.text
