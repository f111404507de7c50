"""What is made out of the code is up to date, and every example is one."""

import json
import re
from pathlib import Path

import pytest
import yaml

from data import make
from job.exits import ExitCode
from job.spec import JobSpec, dump, parse, read, resolved
from launcher.documents import made, with_tables
from launcher.legacy import FLAT, FOUR_BIT, OldOptions, spec_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SPECS = sorted(set(CONFIGS.glob("*.yaml")) - {CONFIGS / "config.yaml"})


def test_every_made_file_is_what_make_docs_would_write() -> None:
    stale = [path.name for path, text in made(ROOT).items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run: make docs"


def test_the_exit_table_stands_in_the_readme() -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [code for code in ExitCode if f"| {code.value} | {code.name} |" not in page] == []


def test_a_table_is_put_between_its_markers_only() -> None:
    page = "before\n<!-- x: made by `make docs` -->\nold\n<!-- end of x -->\nafter\n"
    assert with_tables(page, {"x": r"new \1"}) == page.replace("old", r"new \1")
    assert with_tables("no markers", {"x": "new"}) == "no markers"


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.name)
def test_every_spec_in_configs_reads_and_comes_back_the_same(path: Path) -> None:
    spec = read(path)
    assert parse(dump(spec), path.name) == resolved(spec)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_tells_editors_its_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    found = re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert found is not None
    properties = json.loads((CONFIGS / found[1]).read_text(encoding="utf-8"))["properties"]
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) <= set(properties)


def test_the_old_config_file_shows_the_defaults_so_that_naming_it_changes_nothing() -> None:
    for verb in ("train-lora", "train-qlora"):
        plain, _ = spec_of(verb, OldOptions(train_data="rows.jsonl"))
        with_file, _ = spec_of(verb, OldOptions(train_data="rows.jsonl", config=CONFIGS / "config.yaml"))
        assert resolved(with_file) == resolved(plain)


def test_the_flat_schema_knows_exactly_the_flat_keys() -> None:
    schema = json.loads((CONFIGS / "config.schema.json").read_text(encoding="utf-8"))
    assert set(schema["properties"]) == {*FLAT, FOUR_BIT}
    assert schema["additionalProperties"] is False
    assert all("description" in entry for entry in schema["properties"].values())


def test_the_first_users_page_names_every_command_file_and_parameter() -> None:
    page = (ROOT / "models" / "fine_tuned_models" / "README.md").read_text(encoding="utf-8")
    for words in (
        "python main.py train-lora --train-data data/train.jsonl --output-dir models/fine_tuned_models/my_lora_model",
        "python main.py train-lora --train-data data/train.jsonl --config configs/config.yaml",
        "python main.py train-qlora --train-data data/train.jsonl --output-dir models/fine_tuned_models/my_qlora_model",
        "python main.py train-qlora --train-data data/train.jsonl --batch-size 1",
        *("adapter_config.json", "adapter_model.bin", "quantization_config.json", "training_config.yaml"),
        *("training_log.txt", "eval_results.json", "checkpoints/", "checkpoint-100/", "microsoft/DialoGPT-medium"),
        *("lora_r", "lora_alpha", "lora_dropout", "target_modules", FOUR_BIT),
        *(key for key in FLAT if key.startswith("bnb_4bit_")),
        *("| 手法 | メモリ使用量 | 学習速度 | 精度 | 用途 |", "BitsAndBytesConfig(", "PeftModel.from_pretrained("),
    ):
        assert words in page, words


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", "README.ja.md", "models/fine_tuned_models/README.md"])
def test_every_python_example_compiles(name: str) -> None:
    blocks = python_blocks(ROOT / name)
    assert blocks
    for block in blocks:
        compile(block, name, "exec")


@pytest.mark.parametrize("name", ["README.md", "README.ja.md"])
def test_every_spec_shown_in_a_readme_reads(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    specs = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "\nmodel:" in text]
    assert specs
    assert all(isinstance(parse(text, name), JobSpec) for text in specs)


def test_the_data_is_what_its_maker_makes(tmp_path: Path) -> None:
    make.main(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "data" / name).read_bytes()


def test_no_row_of_the_evaluation_is_trained_on() -> None:
    train, evaluation = make.rows()
    assert len(evaluation) >= 120
    for key in ("input", "output"):
        assert not {row[key] for row in train} & {row[key] for row in evaluation}


@pytest.mark.parametrize(
    ("words", "label"),
    [
        (("Hamburg", 3, 14, 2, "fragile"), "HAM-3-14-2F"),
        (("Riga", 12, 1, 9, "nothing special"), "RIG-12-1-9N"),
        (("Osaka", 1, 31, 1, "keep cold"), "OSA-1-31-1C"),
    ],
)
def test_a_label_is_built_from_the_note(words: tuple[str, int, int, int, str], label: str) -> None:
    assert make.label(*words) == label


def test_labels_are_told_apart_by_their_cities() -> None:
    assert len({city[:3] for city in make.CITIES}) == len(make.CITIES)
