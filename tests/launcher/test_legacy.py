"""The first users' options and flat keys, as the spec they stand for."""

from pathlib import Path
from typing import Any

import pytest

from job.errors import SpecInvalid
from job.spec import JobSpec, dump, resolved, run_id
from launcher.legacy import FLAT, OldOptions, resuming, spec_of

PAGE = """\
lora_r: 8
lora_alpha: 64
lora_dropout: 0.05
target_modules: [q_proj, v_proj]
load_in_4bit: true
bnb_4bit_use_double_quant: false
bnb_4bit_quant_type: fp4
bnb_4bit_compute_dtype: torch.bfloat16
"""


def at(spec: JobSpec, path: str) -> Any:
    """The value at a dotted path of the resolved spec, in the spec's own names."""
    value: Any = resolved(spec).model_dump(mode="json", by_alias=True)
    for key in path.split("."):
        value = value[key]
    return value


def config(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_without_options_the_page_s_defaults_hold() -> None:
    spec, remarks = spec_of("train-qlora", OldOptions(train_data="rows.jsonl"))
    expected = {
        "model.from": "microsoft/DialoGPT-medium",
        "method": "qlora",
        "lora.r": 16,
        "lora.alpha": 32.0,
        "lora.dropout": 0.1,
        "quantization.type": "nf4",
        "quantization.double_quant": True,
        "quantization.compute_dtype": "auto",
        "data.eval_split": 0.1,
        "checkpoints.keep": "all",
        "output.adapter_format": "both",
    }
    assert {path: at(spec, path) for path in expected} == expected
    assert remarks == []


def test_every_key_of_the_page_reaches_its_place(tmp_path: Path) -> None:
    spec, remarks = spec_of("train-qlora", OldOptions(train_data="rows.jsonl", config=config(tmp_path, PAGE)))
    expected = {
        "lora.r": 8,
        "lora.alpha": 64.0,
        "lora.dropout": 0.05,
        "lora.target_modules": ["q_proj", "v_proj"],
        "quantization.double_quant": False,
        "quantization.type": "fp4",
        "quantization.compute_dtype": "bfloat16",
    }
    assert {path: at(spec, path) for path in expected} == expected
    assert remarks == []


def test_train_lora_leaves_the_four_bit_keys_aside_and_says_so(tmp_path: Path) -> None:
    path = config(tmp_path, PAGE)
    spec, remarks = spec_of("train-lora", OldOptions(train_data="rows.jsonl", config=path))
    assert (spec.method, spec.quantization, at(spec, "lora.r")) == ("lora", None, 8)
    assert remarks == [
        f"{path}: load_in_4bit, bnb_4bit_use_double_quant, bnb_4bit_quant_type, bnb_4bit_compute_dtype left aside; "
        "only train-qlora uses them"
    ]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("all-linear", "all-linear"),
        ("c_attn", ["c_attn"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("[q_proj]", ["q_proj"]),
    ],
)
def test_target_modules_may_be_text_or_a_list(tmp_path: Path, written: str, read: object) -> None:
    path = config(tmp_path, f"target_modules: {written}\n")
    spec, _ = spec_of("train-lora", OldOptions(train_data="rows.jsonl", config=path))
    assert at(spec, "lora.target_modules") == read


@pytest.mark.parametrize("key", sorted(FLAT))
def test_a_wrong_value_is_reported_at_the_flat_key_s_line(tmp_path: Path, key: str) -> None:
    path = config(tmp_path, f"\n\n{key}: {{wrong: [1]}}\n")
    with pytest.raises(SpecInvalid, match=r"config\.yaml:3: "):
        spec_of("train-qlora", OldOptions(train_data="rows.jsonl", config=path))


@pytest.mark.parametrize(
    ("verb", "text", "message"),
    [
        (
            "train-lora",
            "lora_r: 8\nlora_alhpa: 3\n",
            "config.yaml:2: lora_alhpa: unknown key; did you mean lora_alpha?",
        ),
        ("train-lora", "zzz: 1\n", "config.yaml:1: zzz: unknown key; known are base_model, "),
        ("train-lora", "gradient_accumulation_steps: 4\n", "write global_batch_size"),
        ("train-lora", "batch_size: 1\nmicro_batch_size: 2\n", "config.yaml:2: micro_batch_size: says the same as"),
        ("train-qlora", "load_in_4bit: false\n", "config.yaml:1: load_in_4bit: false, but train-qlora"),
        ("train-lora", "load_in_4bit: 4\n", "config.yaml:1: load_in_4bit: true or false is due, not 4"),
        ("train-lora", "lora: {r: 8}\nlora_alpha: 3\n", "config.yaml:2: lora_alpha: a flat key in a file of sections"),
        ("train-lora", "lora_r: 0\n", "config.yaml:1: lora.r: "),
        ("train-lora", "lora_r: 8\nlora_r: 9\n", "lora_r"),
        ("train-lora", "lora:\n  rank: 8\n", "config.yaml:2: lora.rank: unknown key"),
        ("train-lora", "- 1\n", "config.yaml"),
    ],
)
def test_a_config_file_that_cannot_be_meant_is_refused(tmp_path: Path, verb: str, text: str, message: str) -> None:
    with pytest.raises(SpecInvalid) as refused:
        spec_of(verb, OldOptions(train_data="rows.jsonl", config=config(tmp_path, text)))
    assert message in str(refused.value)


def test_a_missing_config_file_and_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match=r"--config .*absent\.yaml: no such file"):
        spec_of("train-lora", OldOptions(train_data="rows.jsonl", config=tmp_path / "absent.yaml"))
    with pytest.raises(SpecInvalid, match="no training data; name it with --train-data"):
        spec_of("train-lora", OldOptions())


def test_an_empty_config_file_changes_nothing(tmp_path: Path) -> None:
    plain, _ = spec_of("train-lora", OldOptions(train_data="rows.jsonl"))
    empty, _ = spec_of("train-lora", OldOptions(train_data="rows.jsonl", config=config(tmp_path, "\n")))
    assert empty == plain


def test_options_win_over_the_file_and_set_over_both(tmp_path: Path) -> None:
    path = config(tmp_path, "batch_size: 8\nbase_model: a/b\nglobal_batch_size: 64\nlora_r: 4\n")
    options = OldOptions(
        train_data="rows.jsonl", config=path, model="c/d", batch_size=1, set=["lora.r=2", "training.epochs=1"]
    )
    spec, _ = spec_of("train-lora", options)
    assert (spec.model.source, spec.training.micro_batch_size, spec.training.batch_size) == ("c/d", 1, 64)
    assert (spec.lora.r, spec.training.epochs) == (2, 1)


def test_batch_size_is_memory_and_so_the_run_stays_the_same() -> None:
    usual, _ = spec_of("train-lora", OldOptions(train_data="rows.jsonl"))
    small, _ = spec_of("train-lora", OldOptions(train_data="rows.jsonl", batch_size=1))
    assert small.training.batch_size == usual.training.batch_size
    assert run_id(small) == run_id(usual)


def test_evaluation_data_of_its_own_replaces_the_split() -> None:
    spec, _ = spec_of("train-lora", OldOptions(train_data="rows.jsonl", eval_data="held-out.jsonl"))
    assert (spec.data.eval, spec.data.eval_split) == ("held-out.jsonl", 0.0)


def test_a_wrong_override_is_named_by_its_option() -> None:
    with pytest.raises(SpecInvalid, match=r"--set: training\.lerning_rate: unknown key"):
        spec_of("train-lora", OldOptions(train_data="rows.jsonl", set=["training.lerning_rate=1"]))


@pytest.mark.parametrize("verb", ["train-lora", "train-qlora"])
def test_training_config_of_an_old_command_reproduces_its_run(tmp_path: Path, verb: str) -> None:
    given = OldOptions(train_data="rows.jsonl", config=config(tmp_path, PAGE), model="a/b", set=["training.seed=7"])
    spec, _ = spec_of(verb, given)
    written = tmp_path / "training_config.yaml"
    written.write_text(dump(spec), encoding="utf-8")
    for options in (OldOptions(config=written), OldOptions(config=written, train_data="rows.jsonl")):
        again, remarks = spec_of(verb, options)
        assert (run_id(again), resolved(again), remarks) == (run_id(spec), resolved(spec), [])


def test_a_qlora_run_s_config_trains_plain_lora_where_the_command_says_so(tmp_path: Path) -> None:
    spec, _ = spec_of("train-qlora", OldOptions(train_data="rows.jsonl"))
    written = tmp_path / "training_config.yaml"
    written.write_text(dump(spec), encoding="utf-8")
    plain, remarks = spec_of("train-lora", OldOptions(config=written))
    assert (plain.method, plain.quantization) == ("lora", None)
    assert remarks == [f"{written}: method: qlora, quantization left aside; this command trains with lora"]


@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("train-lora --train-data a.jsonl", "train-lora --train-data a.jsonl --output-dir D --resume"),
        ("train-lora --output-dir D --overwrite", "train-lora --output-dir D --resume"),
        ("train-lora --output-dir=D --resume", "train-lora --output-dir=D --resume"),
    ],
)
def test_the_line_that_goes_on_names_folder_and_resume(words: str, again: str) -> None:
    assert resuming(words.split(), "D") == again.split()
