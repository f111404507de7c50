"""What vLLM and TGI make of an adapter: for each row of the table an adapter that fails it."""

from pathlib import Path
from typing import Any

import pytest

from job import serving
from job.errors import SpecInvalid
from job.files import read_json
from job.spec import parse
from job.training.adapter import add_adapter, foreseen, save_adapter
from job.training.model import load_base
from job.training.new_tokens import Tokens
from tests.job.made import CPU, made_spec

SPEC = """
name: served
model: some/model
data: {train: rows.jsonl}
"""


def spec_text(server: str, **sections: Any) -> str:
    """A spec that will be served, as people write it."""
    output = {"serve_with": server} | sections.pop("output", {})
    return SPEC + "".join(f"{key}: {value}\n" for key, value in {"output": output, **sections}.items())


ROWS: list[tuple[str, str, dict[str, Any], str]] = [
    ("vllm", "lora.use_dora", {"lora": {"use_dora": True}}, "DoRA"),
    ("vllm", "lora.modules_to_save", {"lora": {"modules_to_save": ["lm_head"]}}, "whole modules"),
    ("vllm", "lora.new_tokens", {"lora": {"new_tokens": ["<x>"]}}, "new tokens"),
    ("vllm", "lora.bias", {"lora": {"bias": "all"}}, "biases"),
    ("vllm", "lora.r", {"lora": {"r": 513}}, "up to 512"),
    ("vllm", "lora.r", {"lora": {"r": 300, "init": "pissa"}}, "twice their rank"),
    ("vllm", "lora.rank_pattern or lora.alpha_pattern", {"lora": {"rank_pattern": {"q_proj": 8}}}, "one scale"),
    ("vllm", "lora.rank_pattern or lora.alpha_pattern", {"lora": {"alpha_pattern": {"q_proj": 8}}}, "one scale"),
    ("tgi", "lora.use_dora", {"lora": {"use_dora": True}}, "magnitudes"),
    ("tgi", "lora.modules_to_save", {"lora": {"modules_to_save": ["lm_head"]}}, "whole modules"),
    ("tgi", "lora.new_tokens", {"lora": {"new_tokens": ["<x>"]}}, "new tokens"),
    ("tgi", "lora.bias", {"lora": {"bias": "lora_only"}}, "biases"),
    (
        "tgi",
        "lora.rank_pattern or lora.alpha_pattern",
        {"lora": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}}},
        "ranks must not differ",
    ),
    ("tgi", "lora.target_modules", {"lora": {"target_modules": ["q_proj", "qkv_proj"]}}, "drops all others"),
    ("tgi", "output.adapter_format", {"output": {"adapter_format": "bin"}}, "safetensors only"),
]


@pytest.mark.parametrize(("server", "key", "sections", "words"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS])
def test_a_spec_whose_adapter_the_server_refuses_is_refused_before_training(  # T33
    server: str, key: str, sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecInvalid) as refused:
        parse(spec_text(server, **sections), "run.yaml")
    (line,) = [line for line in str(refused.value).splitlines() if key in line]
    assert words in line
    assert "run.yaml:5: output.serve_with" in line
    parse(spec_text("peft", **sections), "run.yaml")  # PEFT loads all of them


@pytest.mark.parametrize(
    "sections",
    [
        {"lora": {"use_rslora": True}},
        {"lora": {"init": "pissa"}},
        {"lora": {"target_modules": ["q_proj", "down_proj"]}},
        {"output": {"adapter_format": "both"}},
    ],
)
@pytest.mark.parametrize("server", ["vllm", "tgi"])
def test_what_the_servers_load_passes(server: str, sections: dict[str, Any]) -> None:
    parse(spec_text(server, **sections), "run.yaml")


def test_patterns_of_one_ratio_pass_where_ranks_may_differ() -> None:
    lora = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}}  # alpha / r is 2, as without a pattern
    parse(spec_text("vllm", lora=lora), "run.yaml")
    with pytest.raises(SpecInvalid, match="one scale"):
        parse(spec_text("vllm", lora=lora | {"use_rslora": True}), "run.yaml")


def test_every_rule_has_an_adapter_that_fails_it() -> None:
    covered = {(server, key) for server, key, _, _ in ROWS} | {("vllm", "model")}  # GPT-2, below
    assert {(rule.server, rule.key) for rule in serving.RULES} == covered


@pytest.mark.parametrize("server", ["vllm", "tgi"])
def test_layers_of_gpt2_are_refused_once_the_model_is_known_and_before_it_is_loaded(
    server: str, tiny_gpt2: Path
) -> None:
    spec = made_spec(output={"serve_with": server})
    with pytest.raises(SpecInvalid, match="cannot serve this adapter"):
        foreseen(tiny_gpt2, spec)
    foreseen(tiny_gpt2, made_spec())


def test_all_linear_passes_where_its_layers_are_those_the_server_knows(tiny_llama: Path) -> None:
    for server in ("vllm", "tgi"):
        foreseen(tiny_llama, made_spec(output={"serve_with": server}))


FIRST_THAT_FITS = {"r": 16, "alpha": 32, "rank_pattern": {"q_proj": 8, "layers.0.self_attn.q_proj": 4}}


@pytest.mark.parametrize(
    ("server", "lora", "words"),
    [
        # Every name has alpha / r = 2 by itself; layer 0 takes rank 8 of the one and alpha 8 of the other.
        (
            "vllm",
            FIRST_THAT_FITS | {"alpha_pattern": {"layers.0.self_attn.q_proj": 8, "q_proj": 16}},
            "one scale",
        ),
        ("vllm", FIRST_THAT_FITS | {"alpha_pattern": {"q_proj": 16, "layers.0.self_attn.q_proj": 8}}, None),
        ("tgi", FIRST_THAT_FITS | {"alpha_pattern": {"q_proj": 16, "layers.0.self_attn.q_proj": 8}}, "ranks must not"),
        # No layer is left with the alpha and the rank that the server reads.
        ("vllm", {"r": 8, "alpha": 8, "target_modules": ["q_proj"], "alpha_pattern": {".*": 32}}, "one scale"),
        ("vllm", {"r": 8, "alpha": 8, "use_rslora": True, "init": "pissa"}, None),
        ("vllm", {"r": 8, "rank_pattern": {"down_proj": 32}, "alpha_pattern": {"down_proj": 32}, "alpha": 8}, None),
        ("vllm", {"r": 8, "alpha": 8, "use_rslora": True, "alpha_pattern": {".*": 16}}, "one scale"),
    ],
    ids=["other order", "one order", "ranks", "r and alpha of no layer", "PiSSA", "one ratio", "rsLoRA"],
)
def test_patterns_are_taken_as_peft_takes_them_once_the_layers_are_known(
    server: str, lora: dict[str, Any], words: str | None, tiny_llama: Path
) -> None:
    spec = made_spec(lora=lora, output={"serve_with": server})
    if words is None:
        foreseen(tiny_llama, spec)
    else:
        with pytest.raises(SpecInvalid, match=words):
            foreseen(tiny_llama, spec)


def test_the_published_rank_is_what_the_server_must_hold() -> None:
    config = {"r": 200, "lora_alpha": 200}
    output = {"serve_with": "vllm"}
    serving.check(config, made_spec(lora={"init": "pissa", "r": 200}, output=output), [(256, 1.0)])
    with pytest.raises(SpecInvalid, match="twice their rank"):
        serving.check(config, made_spec(lora={"init": "pissa", "r": 200}, output=output), [(257, 1.0)])
    serving.check(config, made_spec(lora={"r": 200}, output=output), [(257, 1.0)])


@pytest.mark.parametrize(
    ("lora", "broken"),
    [
        ({}, set()),
        ({"use_dora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 2}}, {"vllm": 3, "tgi": 3}),
        ({"new_tokens": ["<x>"]}, {"vllm": 1, "tgi": 1}),
        ({"init": "olora", "use_rslora": True}, set()),
    ],
    ids=["plain", "three reasons", "new tokens", "converted"],
)
def test_a_published_config_is_judged_as_its_spec_was(
    lora: dict[str, Any], broken: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    spec = made_spec(lora=lora)
    tokens = Tokens((448,), 449) if spec.lora.new_tokens else None
    save_adapter(add_adapter(load_base(tiny_llama, spec, CPU), spec, CPU, tokens), tmp_path, "safetensors")
    adapter = serving.of_config(read_json(tmp_path / "adapter_config.json"))
    for server in ("vllm", "tgi"):
        found = [line.split(":")[0] for line in serving.refusals(adapter, server)]
        assert found == [line.split(":")[0] for line in serving.refusals(serving.published(spec), server)]
        assert len(found) == (broken or {server: 0})[server]
