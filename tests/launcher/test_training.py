"""The commands as users call them, with a tiny model: from the words on the command line to the adapter in PEFT."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tunejob
from job.exits import ExitCode
from job.files import read_json
from job.spec import read, run_id
from tests.job import tiny

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240
QUICK = ("training.max_steps=4", "training.max_length=64", "checkpoints.every_steps=2", "training.batch_size=4")

PAGE_FILES = (
    "adapter_config.json",
    "adapter_model.bin",
    "training_config.yaml",
    "training_log.txt",
    "eval_results.json",
    "checkpoints/checkpoint-2/adapter_model.bin",
    "checkpoints/checkpoint-4/adapter_config.json",
)


@dataclass
class Ended:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """``python main.py WORDS`` in ``folder``, in a process group of its own as a terminal would make it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TUNEJOB_SCRATCH": str(folder / "scratch")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: "subprocess.Popen[str]") -> Ended:
    """Waits for a command; one that hangs is killed with everything it started."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    return Ended(process.returncode, out, err)


def command(folder: Path, *words: str) -> Ended:
    """A command to its end."""
    return ended(start(folder, *words))


def changes(*more: str) -> list[str]:
    return [word for change in (*QUICK, *more) for word in ("--set", change)]


def settings(folder: Path) -> list[str]:
    """Rows in ``folder``, and the words that train a tiny model on them with an old command."""
    tiny.write_rows(folder / "rows.jsonl", tiny.numbered_rows(60))
    return ["--train-data", "rows.jsonl", *changes()]


def loaded_by(summary: str, folder: Path) -> list[str]:
    """What the Python lines of a summary load, run in ``folder`` by a new interpreter: class and adapters."""
    code = textwrap.dedent(summary.partition("To load it:\n")[2])
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(type(model).__name__, model.active_adapters)"],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return ran.stdout.split()


@dataclass
class Old:
    """What ``train-lora`` without a folder left."""

    home: Path
    folder: Path
    said: Ended


@pytest.fixture(scope="module")
def old(tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Old:
    home = tmp_path_factory.mktemp("old")
    said = command(home, "train-lora", *settings(home), "--model", str(tiny_gpt2), "--batch-size", "2")
    assert said.code == 0, said.err
    (folder,) = (home / "models" / "fine_tuned_models").iterdir()
    return Old(home, folder, said)


def test_train_lora_leaves_every_file_of_the_page_in_a_dated_folder(old: Old) -> None:  # T28
    assert re.fullmatch(r"lora_model_\d{8}_\d{6}", old.folder.name)
    assert [name for name in PAGE_FILES if not (old.folder / name).is_file()] == []
    assert not (old.folder / "quantization_config.json").exists()


def test_the_summary_goes_to_stdout_and_the_talk_to_stderr(old: Old) -> None:
    assert old.said.out.startswith(f"{old.folder.name}: finished\n")
    for words in ("base", "tuned", "loss", "perplexity", "held out", "memory", "PeftModel.from_pretrained"):
        assert words in old.said.out
    assert "none of them in the training data" in old.said.out
    assert "output: models/fine_tuned_models/lora_model_" in old.said.err
    assert "Traceback" not in old.said.err


def test_the_printed_lines_load_the_adapter(old: Old) -> None:
    assert loaded_by(old.said.out, old.home) == ["PeftModelForCausalLM", "['default']"]


def test_the_page_s_loading_example_works_on_run_and_checkpoint(old: Old, tiny_gpt2: Path) -> None:
    for folder in (old.folder, old.folder / "checkpoints" / "checkpoint-2"):
        base = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
        assert PeftModel.from_pretrained(base, folder).peft_config["default"].r == 16


def test_a_finished_folder_is_kept_unless_it_may_be_set_aside(old: Old, tmp_path: Path) -> None:
    words = ["train-lora", *settings(old.home), "--output-dir", str(old.folder)]
    refused = command(old.home, *words)
    assert (refused.code, "--overwrite" in refused.err) == (ExitCode.CONFLICT, True)
    assert "Traceback" not in refused.err


def test_training_config_fed_back_repeats_the_run_to_the_byte(old: Old) -> None:
    config = old.folder / "training_config.yaml"
    again = command(old.home, "train-lora", "--config", str(config), "--output-dir", "again")
    assert again.code == 0, again.err
    assert run_id(read(old.home / "again" / "training_config.yaml")) == run_id(read(config))
    name = "adapter_model.safetensors"
    assert (old.home / "again" / name).read_bytes() == (old.folder / name).read_bytes()


@pytest.mark.full
def test_train_qlora_reads_the_flat_file_and_its_printed_lines_load_the_adapter(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("lora_r: 4\nload_in_4bit: true\nbnb_4bit_quant_type: fp4\n", encoding="utf-8")
    words = [*settings(tmp_path), "--model", str(tiny_llama), "--config", "config.yaml", "--output-dir", "out"]
    trained = command(tmp_path, "train-qlora", *words)
    assert trained.code == 0, trained.err
    assert read_json(tmp_path / "out" / "quantization_config.json")["bnb_4bit_quant_type"] == "fp4"
    assert loaded_by(trained.out, tmp_path) == ["PeftModelForCausalLM", "['default']"]


@pytest.fixture
def spec(tiny_llama: Path, tmp_path: Path) -> Path:
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.numbered_rows(60))
    sections = {
        "name": "toy",
        "model": str(tiny_llama),
        "data": {"train": str(data), "eval_split": 0.2},
        "training": {"max_steps": 400, "batch_size": 4, "max_length": 64, "logging_steps": 1},
        "checkpoints": {"every_steps": 2},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections), encoding="utf-8")
    return path


def signalled(process: "subprocess.Popen[str]", words: str, number: int) -> Ended:
    """How a command ended that got a signal, with all it started, once it had said ``words``."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            os.killpg(process.pid, number)
            break
    last = ended(process)
    return Ended(last.code, last.out, "".join(said) + last.err)


def test_ctrl_c_prints_the_line_that_goes_on(spec: Path, tmp_path: Path) -> None:
    stopped = signalled(start(tmp_path, "train", str(spec), "--output", "an out"), "committed", signal.SIGINT)
    assert (stopped.code, stopped.out) == (ExitCode.INTERRUPTED, ""), stopped.err
    python, program, *words = shlex.split(stopped.err.splitlines()[-1])
    assert (python, Path(program)) == ("python", ROOT / "main.py")
    again = signalled(start(tmp_path, *words), "going on from the checkpoint", signal.SIGINT)
    assert again.code == ExitCode.INTERRUPTED, again.err


def test_from_python_results_are_data_and_a_second_call_trains_nothing(
    spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEJOB_SCRATCH", str(tmp_path / "scratch"))
    given = yaml.safe_load(spec.read_text(encoding="utf-8"))
    results = tunejob.train(given, output=f"file:{tmp_path / 'out'}", overrides=["training.max_steps=2"])
    assert results["evaluation.tuned.loss"] < results["evaluation.base.loss"] * 1.5
    folder = Path(results.uri.removeprefix("file:"))
    ledger = sorted(path.name for path in (folder / "run" / "attempts").iterdir())
    again = tunejob.train(given, output=f"file:{tmp_path / 'out'}", overrides=["training.max_steps=2"])
    assert again == results
    assert sorted(path.name for path in (folder / "run" / "attempts").iterdir()) == ledger
    assert read_json(folder / "eval_results.json") == results.record
    assert "| LoRA (toy-" in tunejob.compare([results.uri])


def test_a_failed_run_raises_the_class_that_says_whose_problem_it_is(spec: Path, tmp_path: Path) -> None:
    with pytest.raises(tunejob.JobError) as failed:
        tunejob.train(spec, output=str(tmp_path / "out"), overrides=["data.train=absent.jsonl"])
    assert failed.value.exit_code == ExitCode.NOINPUT
    assert "absent.jsonl: no such file" in str(failed.value)
