"""Runs of the real worker with adapters that are more than two matrices a layer: trained, resumed, verified."""

from pathlib import Path
from typing import Any

import pytest

from job.evaluation import verify
from job.exits import ExitCode
from job.files import read_json
from job.workdir import WorkDir
from tests.job.worked import adapter, evaluation, made_workdir, resume, work

TRAINING = {"max_steps": 4}


@pytest.mark.parametrize(
    ("base", "sections"),
    [
        ("tiny_llama", {"lora": {"init": "pissa", "rank_pattern": {"up_proj": 8}, "use_rslora": True}}),
        ("tiny_llama", {"lora": {"new_tokens": ["<tool>", "<end_tool>"]}, "method": "qlora"}),
        ("tiny_gpt2", {"lora": {"use_dora": True, "new_tokens": ["<tool>"]}}),
        ("tiny_qwen", {"quantization": {"type": "int8"}, "method": "qlora"}),
        ("tiny_gemma", {"lora": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}}}),
    ],
    ids=["PiSSA", "new tokens, nf4", "DoRA, Conv1D", "int8", "a pattern from the beginning"],
)
def test_a_run_trains_and_its_adapter_is_verified_in_stock_peft(  # T21, T33, T43, T47, T50
    base: str, sections: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    workdir = made_workdir(tmp_path, request.getfixturevalue(base), training=TRAINING, **sections)
    assert work(workdir) == ExitCode.OK
    assert verify.run(workdir) == ExitCode.OK
    assert read_json(workdir.verification)["level"] == "logits"
    sides = evaluation(workdir)
    assert sides["tuned"]["loss"] < sides["base"]["loss"]
    record = read_json(workdir.performance)
    assert sum(part["trained"] for part in record["parameters"].values()) == record["trained_parameters"]
    assert record["base_dropout"] == (0.1 if base == "tiny_gpt2" else 0.0)
    # Where to stop: the base's own token, and what ends a turn where that is another.
    stops = read_json(workdir.adapter / "generation_config.json")
    assert stops["eos_token_id"] == {"tiny_gpt2": [0], "tiny_gemma": [1, 4]}.get(base, [2])
    assert stops.get("bos_token_id") == {"tiny_gpt2": 0, "tiny_gemma": 2}.get(base)
    assert "_from_model_config" not in stops
    tokenizer = read_json(workdir.adapter / "tokenizer.json")
    added = {token["content"] for token in tokenizer["added_tokens"]}
    assert added >= set(sections["lora"].get("new_tokens", ()) if "lora" in sections else ())


@pytest.mark.parametrize(
    ("base", "sections"),
    [
        ("tiny_llama", {"lora": {"init": "pissa"}}),
        ("tiny_llama", {"lora": {"new_tokens": ["<tool>"], "use_dora": True}, "method": "qlora"}),
        ("tiny_qwen", {"lora": {"new_tokens": ["<tool>"]}, "evaluation": {"every_steps": 2, "publish": "best"}}),
    ],
    ids=["PiSSA", "DoRA, new tokens, nf4", "new tokens, tied"],
)
def test_a_resumed_run_publishes_the_same_bytes(  # T22, T33, T47
    base: str, sections: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)

    def lived(name: str) -> WorkDir:
        root = tmp_path / name
        root.mkdir()
        workdir = made_workdir(root, folder, training=TRAINING, **sections)
        assert work(workdir) == ExitCode.OK
        return workdir

    straight = lived("straight")
    whole = adapter(straight.adapter)
    figures = evaluation(straight)
    resume(straight, 2)
    assert work(straight) == ExitCode.OK
    assert adapter(straight.adapter) == whole
    assert evaluation(straight) == figures  # the base's figures too: they come from an unmodified model
