"""The first users' page, line by line: its commands, its folders, its loading examples, its table."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from job.files import read_json
from tests.job import tiny

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "models" / "fine_tuned_models" / "README.md"
MODEL = "microsoft/DialoGPT-medium"
ADAPTERS = {
    "lora": "models/fine_tuned_models/lora_model_20250115_143022",
    "qlora": "models/fine_tuned_models/qlora_model_20250115_143022",
}


def main_py(home: Path, words: str) -> subprocess.CompletedProcess[str]:
    """``python main.py WORDS`` as the page has it, from a folder with the page's files in it."""
    return subprocess.run(
        [sys.executable, "main.py", *words.split()],
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TUNEJOB_SCRATCH": str(home / "scratch"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def home(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the page assumes it, the model of its name being a tiny one of the same family.

    It trains one run by each command of the page; a few settings keep them short.
    """
    home = tmp_path_factory.mktemp("home")
    shutil.copy(ROOT / "main.py", home)
    shutil.copytree(ROOT / "configs", home / "configs")
    shutil.copytree(tiny_gpt2, home / MODEL)
    (home / "data").mkdir()
    rows = [
        {"instruction": f"Count to {row['completion'][-1]}.", "input": row["prompt"][:8], "output": row["completion"]}
        for row in tiny.numbered_rows(80)
    ]
    tiny.write_rows(home / "data/train.jsonl", rows)
    short = "--set training.max_steps=6 --set training.max_length=200 --set checkpoints.every_steps=2"
    for method, folder in ADAPTERS.items():
        ended = main_py(
            home,
            f"train-{method} --train-data data/train.jsonl --config configs/config.yaml --output-dir {folder} "
            f"--batch-size 1 {short} --set training.learning_rate=2e-3",
        )
        assert ended.returncode == 0, ended.stderr
    return home


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(5, 45)[None]
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens).logits
    return logits


def examples_of(text: str) -> list[str]:
    """The page's Python blocks that load an adapter."""
    return [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "PeftModel.from_pretrained" in block
    ]


def page_of(whose: str) -> Path:
    """Our page, or the page it has to keep true; skips where that is not at hand."""
    page = PAGE if whose == "ours" else ROOT.parent / "shared" / "first-users-page.md"
    if not page.exists():
        pytest.skip(f"{page.name} is not beside the checkout; only our own page is tried")
    return page


@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_both_loading_examples_run_as_they_stand(whose: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory holds a model and adapters of the very names in the example."""
    page = page_of(whose)
    monkeypatch.chdir(home)
    examples = examples_of(page.read_text(encoding="utf-8"))
    assert len(examples) == 2
    for example in examples:
        names: dict[str, object] = {}
        exec(compile(example, page.name, "exec"), names)
        model = names["model"]
        assert isinstance(model, PeftModel)
        folder = ADAPTERS["qlora" if "BitsAndBytesConfig" in example else "lora"]
        published = AutoTokenizer.from_pretrained(folder)
        assert published("Count to 3.")["input_ids"] == names["tokenizer"]("Count to 3.")["input_ids"]  # type: ignore[operator]
        assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("method", ADAPTERS)
def test_the_old_file_alone_and_the_last_checkpoint_load_to_the_published_logits(
    method: str, home: Path, tmp_path: Path
) -> None:
    folder = home / ADAPTERS[method]

    def loaded(adapter: Path) -> torch.Tensor:
        return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(home / MODEL), adapter))

    def only(adapter: Path, kept: str) -> Path:
        alone = tmp_path / f"{adapter.name}-{kept}"
        alone.mkdir()
        for name in ("adapter_config.json", kept):
            shutil.copy(adapter / name, alone)
        return alone

    published = loaded(folder)
    base = logits_of(AutoModelForCausalLM.from_pretrained(home / MODEL))
    assert not torch.equal(published, base)
    assert torch.equal(loaded(only(folder, "adapter_model.bin")), published)
    checkpoints = sorted((folder / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    assert [path.name for path in checkpoints] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert torch.equal(loaded(checkpoints[-1]), published)
    for checkpoint in checkpoints:
        expected = loaded(only(checkpoint, "adapter_model.safetensors"))
        assert torch.equal(loaded(only(checkpoint, "adapter_model.bin")), expected)


def test_the_folders_hold_what_the_page_draws(home: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    for method, adapter in ADAPTERS.items():
        folder = home / adapter
        names = {
            "adapter_config.json",
            "adapter_model.bin",
            "training_config.yaml",
            "training_log.txt",
            "eval_results.json",
        } | ({"quantization_config.json"} if method == "qlora" else set())
        assert names <= {path.name for path in folder.iterdir()}
        assert all(name in text for name in names)
        config = read_json(folder / "adapter_config.json")
        assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (16, 32, 0.1)
        assert config["base_model_name_or_path"] == MODEL
        assert "phase: train" in (folder / "training_log.txt").read_text(encoding="utf-8")


def test_the_quantisation_on_disk_is_read_by_the_library(home: Path) -> None:
    record = read_json(home / ADAPTERS["qlora"] / "quantization_config.json")
    config = BitsAndBytesConfig.from_dict(record)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    model = AutoModelForCausalLM.from_pretrained(home / MODEL, quantization_config=config)
    assert torch.isfinite(logits_of(PeftModel.from_pretrained(model, home / ADAPTERS["qlora"]))).all()


def test_compare_prints_the_page_s_table_from_both_runs(home: Path) -> None:
    for language, words in (("ja", ["手法", "メモリ使用量", "学習速度", "精度", "用途"]), ("en", [])):
        ended = main_py(home, f"compare {' '.join(ADAPTERS.values())} --lang {language}")
        assert ended.returncode == 0, ended.stderr
        header, _, lora, qlora = ended.stdout.strip().splitlines()[:4]
        assert all(word in header for word in words)
        assert lora.startswith("| LoRA")
        assert qlora.startswith("| QLoRA")
        assert re.search(r"\d", lora)


def test_a_batch_of_one_is_memory_and_leaves_the_rows_of_a_step(home: Path) -> None:
    from job.spec import read

    spec = read(home / ADAPTERS["qlora"] / "training_config.yaml")
    assert (spec.training.micro_batch_size, spec.training.batch_size) == (1, 16)
    assert spec.data.eval_split == 0.1
