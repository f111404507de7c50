"""Bad input ends a whole attempt with its code and one sentence that names file, line or key; never a traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.job import tiny
from tests.job.running import Run, make_run

Change = Callable[[Run, Path], None]


def edit(old: str, new: str) -> Change:
    def change(run: Run, model: Path) -> None:
        text = run.spec.read_text()
        assert old in text
        run.spec.write_text(text.replace(old, new))

    return change


def rows(text: str) -> Change:
    return lambda run, model: (run.spec.parent / "train.jsonl").write_text(text) and None


def drop(name: str) -> Change:
    return lambda run, model: (model / name).unlink()


def truncated(run: Run, model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(run: Run, model: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, (f"touch {model}/harmed",)

    torch.save({"weight": Harmful()}, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def remote_code(run: Run, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (model / "config.json").write_text(json.dumps(config))


def config(key: str, value: object) -> Change:
    def change(run: Run, model: Path) -> None:
        record = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(record | {key: value}))

    return change


CASES: dict[str, tuple[Change, int, str]] = {
    "unknown key": (
        edit("learning_rate:", "learnig_rate:"),
        78,
        r"run\.yaml:\d+: training\.learnig_rate: .*learning_rate",
    ),
    "not offered": (edit("learning_rate:", "neftune_noise_alpha:"), 78, r"neftune_noise_alpha.*not offered"),
    "data missing": (edit("train.jsonl", "gone.jsonl"), 66, r"data\.train .*gone\.jsonl: no such file"),
    "broken row": (rows('{"prompt": "a", "completion": "b"}\n{"prompt"\n'), 65, r"train\.jsonl:2"),
    "empty data": (rows("\n\n"), 65, r"train\.jsonl"),
    "missing column": (rows('{"question": "a", "reply": "b"}\n'), 65, r"question.*reply"),
    "nothing trained": (rows('{"prompt": "' + "long " * 200 + '", "completion": "b"}\n'), 65, r"long|dropped"),
    "model missing": (edit("model: ", "model: /nowhere"), 66, r"model /nowhere.*: no such folder"),
    "no config": (drop("config.json"), 66, r"config\.json"),
    "unknown architecture": (config("model_type", "frobnicate"), 78, r"frobnicate"),
    "weights of another shape": (config("intermediate_size", 96), 76, r"weights do not fit its config|another shape"),
    "no weights": (drop("model.safetensors"), 66, r"weights"),
    "no tokenizer": (drop("tokenizer.json"), 66, r"tokenizer"),
    "truncated weights": (truncated, 76, r"model\.safetensors"),
    "pickle with code": (pickled, 78, r"pytorch_model\.bin.*system"),
    "remote code": (remote_code, 78, r"auto_map|remote code"),
    "targets match nothing": (
        edit("r: 4", "r: 4\n  target_modules: [c_attn]"),
        78,
        r"lora\.target_modules: c_attn matches nothing.*q_proj",
    ),
    "longer than the model": (edit("max_length: 64", "max_length: 4096"), 78, r"4096.*2048"),
    "no GPU": (edit("lora:", "resources: {gpus: 1}\nlora:"), 82, r"resources\.gpus: 1 asked for"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_its_code_and_a_sentence(  # T20, T36
    case: str, tiny_llama: Path, tmp_path: Path
) -> None:
    change, expected, words = CASES[case]
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU; the case needs one that is asked for and missing")
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    run = make_run(tmp_path, model)
    change(run, model)
    code, said = run.attempt()
    assert code == expected, said
    assert "Traceback" not in said
    import re

    assert re.search(words, said.replace("\n", " ")), said
    assert not (model / "harmed").exists()
    assert not (run.folder / "run/manifest.json").exists()


@pytest.mark.full
def test_a_refused_run_does_not_block_its_folder(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_llama)
    data = tmp_path / "train.jsonl"
    good = data.read_text()
    data.write_text(good + '{"prompt": 3}\n')
    assert run.attempt()[0] == 65
    data.write_text(good)
    run.spec.write_text(run.spec.read_text().replace("r: 4", "r: 5"))  # another spec, and other data
    code, said = run.attempt()
    assert code == 0, said
    assert "attempt 2" in said
    run.spec.write_text(run.spec.read_text().replace("r: 5", "r: 6"))
    assert run.attempt()[0] == 73  # what is there now belongs to its spec


def test_a_full_disk_is_named_and_nothing_half_is_left(tiny_llama: Path, tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", full], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        run = make_run(tmp_path, tiny_llama)
        run.folder = full / "out"
        code, said = run.attempt()
        assert code == 74, said
        assert "Traceback" not in said
        assert str(full) in said
        assert not (run.folder / "run/manifest.json").exists()
    finally:
        subprocess.run(["umount", full], check=True)


def test_a_spec_that_is_not_mounted_is_a_usage_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "job", "--spec", str(tmp_path / "gone.yaml"), "--output", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 64
    assert "gone.yaml" in ended.stderr


@pytest.mark.full
def test_rows_too_few_to_split_train_and_say_so(tiny_llama: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, tiny_llama, rows=tiny.numbered_rows(2), data={"eval_split": 0.02})
    code, said = run.attempt()
    assert code == 0, said
    assert "no evaluation" in said
    assert "skipped" in run.result()["evaluation"]
