"""What a process does not need it does not import, and works without."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.data.prepare import prepare
from job.data.prepared import load
from job.inputs import Input, Inputs, write_inputs
from job.libraries import UNUSED, unused_to_prepare, unused_to_train
from job.workdir import WorkDir
from tests.job.made import made_spec
from tests.job.tiny import toy_messages, write_rows


@pytest.mark.parametrize(
    ("sections", "prepare_without", "train_without"),
    [
        ({}, ["torch"], ["bitsandbytes"]),
        ({"output": {"serve_with": "vllm"}}, [], ["bitsandbytes"]),
        ({"lora": {"target_modules": ["q_proj"]}}, [], ["bitsandbytes"]),
        ({"lora": {"init": "pissa"}}, [], ["bitsandbytes"]),
        ({"method": "qlora"}, [], []),
        ({"training": {"optimizer": "paged_adamw_8bit"}}, ["torch"], []),
    ],
)
def test_a_library_is_left_out_where_nothing_in_the_spec_needs_it(
    sections: dict[str, Any], prepare_without: list[str], train_without: list[str]
) -> None:
    spec = made_spec(**sections)
    assert (list(unused_to_prepare(spec)), list(unused_to_train(spec))) == (prepare_without, train_without)


def test_rows_prepared_without_torch_are_those_prepared_with_it(tiny_llama: Path, tmp_path: Path) -> None:
    workdirs = []
    for name in ("with", "without"):
        root = tmp_path / name
        data = Input("train.jsonl", write_rows(root / "train.jsonl", toy_messages(40)))
        workdir = WorkDir(root)
        spec = {"name": "toy", "model": "tiny", "data": {"train": "train.jsonl"}, "training": {"max_length": 128}}
        workdir.spec.write_text(yaml.safe_dump(spec), encoding="utf-8")
        write_inputs(workdir.inputs, Inputs(Input("tiny", tiny_llama), (data,), None))
        workdirs.append(workdir)
    prepare(workdirs[0])
    code = (
        "import sys; from job.data.prepare import main; code = main(); "
        "print(code, [name for name in ('torch', 'bitsandbytes') if sys.modules.get(name)])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(workdirs[1].root)], env={UNUSED: "torch"}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout.splitlines()[-1]) == (0, "0 []"), ended.stderr
    with_torch, without = (load(workdir.prepared) for workdir in workdirs)
    assert with_torch.info == without.info
    tokenizers = [sorted((workdir.prepared / "tokenizer").iterdir()) for workdir in workdirs]
    assert [path.read_bytes() for path in tokenizers[0]] == [path.read_bytes() for path in tokenizers[1]]


def test_the_worker_comes_in_without_bitsandbytes_and_peft_works(tiny_llama: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.job.made import made_model, made_spec; "
        f"model = made_model(Path({str(tiny_llama)!r}), made_spec()); "
        "print(type(model).__name__, sys.modules.get('bitsandbytes'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", f"import job; {code}"],
        cwd=Path(__file__).parents[2],
        env={UNUSED: "bitsandbytes"},
        capture_output=True,
        text=True,
    )
    assert ended.stdout.splitlines()[-1:] == ["PeftModelForCausalLM None"], ended.stderr
