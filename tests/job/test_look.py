"""``python -m job.look``: what model and data are, and what training would make of them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from job.look import main
from tests.job import tiny

LONG = {"prompt": "count " * 200, "completion": "one two"}


def spec(folder: Path, train: Path, model: Path | str, **sections: Any) -> Path:
    data = {"train": str(train), "eval_split": 0.2} | sections.pop("data", {})
    content = {"name": "look", "model": str(model), "data": data, "training": {"max_length": 128}} | sections
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_the_report_is_that_of_the_run(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tiny.write_rows(tmp_path / "toy.jsonl", [*tiny.numbered_rows(28), tiny.numbered_rows(1)[0], LONG])
    assert main([str(spec(tmp_path, rows, tiny_llama, data={"train": {"from": str(rows), "weight": 2}}))]) == 0
    model, *report = capsys.readouterr().out.splitlines()
    assert model.startswith(f"model {tiny_llama}: ")
    text = "\n".join(report)
    for words in (
        f"{rows}: prompt_completion (prompt, completion), ",
        "weight 2: ",
        "1 dropped (longer than training.max_length)",
        "more lost in rows dropped or cut",
        "1 duplicates",
        "training rows by tokens: ",
        "evaluation rows: ",
    ):
        assert words in text, text
    assert "count to" not in text  # no word of the data


def test_samples_show_what_is_trained_and_only_where_they_are_asked_for(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.write_rows(tmp_path / "toy.jsonl", tiny.numbered_rows(40))
    samples = tmp_path / "samples.txt"
    assert main([str(spec(tmp_path, rows, tiny_llama)), "--samples", str(samples)]) == 0
    assert f"{samples}: " in capsys.readouterr().out
    text = samples.read_text(encoding="utf-8")
    blocks = text.split("\n\n# ")[1:]
    assert 12 <= len(blocks) <= 20
    for block in blocks:
        head, body = block.split("\n", 1)
        number = int(head.split("toy.jsonl:")[1].split(":")[0])
        row = tiny.numbered_rows(40)[number - 1]
        assert f"{row['prompt']}<|im_end|>\n<|im_start|>assistant\n⟦{row['completion']}<|im_end|>⟧" in body


def test_a_hub_model_that_is_not_here_leaves_the_rows_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tiny.write_rows(tmp_path / "toy.jsonl", [{"note": "made by hand"}, *tiny.numbered_rows(12)])
    assert main([str(spec(tmp_path, rows, "nobody/no-such-model", data={"max_bad_rows": 1}))]) == 0
    model, data, rest = capsys.readouterr().out.splitlines()
    assert "not in this machine's cache" in model
    assert data == f"{rows}: 12 rows, prompt_completion (prompt, completion); 1 left out"
    assert rest.startswith("not known without the model's tokenizer")


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (None, 66, ["data.train", "no such file"]),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": 1}\n', 65, ["toy.jsonl:2: ", "'prompt' is int"]),
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
