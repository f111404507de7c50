"""What is trained, quantised and left alone is known by kind, from the config alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3TextConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from job.errors import SpecInvalid
from job.sizing import parts
from job.sizing.parts import Part
from job.training.adapter import add_adapter, foreseen, trained
from job.training.model import empty, load_base
from job.training.new_tokens import Tokens
from tests.job.made import CPU, made_spec

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mixtral() -> Any:
    return MixtralConfig(**SMALL, num_local_experts=4)


def qwen2_moe() -> Any:
    special = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
    return Qwen2MoeConfig(**SMALL, **special, decoder_sparse_step=1)


def qwen3_moe() -> Any:
    return Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, head_dim=8)


def gemma3() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = Gemma3TextConfig(**SMALL, head_dim=8)
    return Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**vision, image_size=28), mm_tokens_per_image=4
    )


def folder_of(config: Any, root: Path) -> Path:
    """A model's folder without weights: counting needs none."""
    config.save_pretrained(root)
    return root


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_qwen", "tiny_gpt2"])
@pytest.mark.parametrize(
    "lora",
    [
        {"rank_pattern": {".*1.*": 2}, "use_dora": True},
        {"new_tokens": ["<x>", "<y>"], "bias": "all"},
        {"modules_to_save": ["lm_head"], "init": "olora"},
    ],
    ids=["DoRA", "new tokens", "saved head"],
)
def test_what_is_foreseen_is_what_is_loaded(  # T48
    lora: dict[str, Any], base: str, method: str, request: pytest.FixtureRequest
) -> None:
    if method == "qlora":
        lora = {key: value for key, value in lora.items() if key not in ("init", "bias")}
    folder, spec = request.getfixturevalue(base), made_spec(method=method, lora=lora)
    tokens = Tokens((448, 449), 450) if "new_tokens" in lora else None
    found = foreseen(folder, spec, tokens)
    core: Any = load_base(folder, spec, CPU)
    held = [m for m in core.modules() if type(m).__name__ == "Linear4bit"]
    assert sum(part.quantized for part in found.values()) == sum(m.in_features * m.out_features for m in held)
    assert (len(held) > 0) == (method == "qlora")
    model = add_adapter(core, spec, CPU, tokens)
    assert sum(part.trained for part in found.values()) == sum(p.numel() for p in trained(model).values())
    plain: Any = load_base(folder, made_spec(), CPU)
    if tokens is not None:
        plain.resize_token_embeddings(tokens.vocabulary)
    assert sum(part.total for part in found.values()) == sum(p.numel() for p in plain.parameters())


def test_every_kind_of_a_decoder_is_told_apart(tiny_llama: Path) -> None:  # T48
    found = foreseen(tiny_llama, made_spec(method="qlora"))
    vocabulary = 448
    assert {kind: part.total for kind, part in found.items()} == {
        "attention": 2 * (2 * 64 * 64 + 2 * 64 * 32),
        "mlp": 2 * 3 * 64 * 128,
        "embeddings": vocabulary * 64,
        "head": vocabulary * 64,
        "norm": 5 * 64,
    }
    assert found["mlp"].quantized == found["mlp"].total
    assert found["norm"].left == found["norm"].total
    text = list(parts.lines(found))
    assert text[1].startswith("mlp: 49,152 parameters, 49,152 quantised, ")


def test_experts_that_are_no_linear_layers_stay_at_16_bits_and_are_refused(tmp_path: Path) -> None:  # T48
    folder = folder_of(mixtral(), tmp_path)
    with pytest.raises(SpecInvalid, match=r"left in 16 bits: experts 36,864.*max_unquantized above 0\.8"):
        foreseen(folder, made_spec(method="qlora"))
    allowed = foreseen(folder, made_spec(method="qlora", quantization={"max_unquantized": 0.9}))
    assert allowed["experts"] == Part(total=2 * 4 * 3 * 32 * 48)
    assert allowed["attention"].quantized == allowed["attention"].total
    assert foreseen(folder, made_spec())["experts"].trained == 0


@pytest.mark.parametrize(("config", "kind"), [(qwen2_moe, "router"), (gemma3, "vision")])
def test_routers_and_towers_are_no_targets_of_all_linear(config: Any, kind: str, tmp_path: Path) -> None:  # T48
    folder = folder_of(config(), tmp_path)
    found = foreseen(folder, made_spec())
    assert found[kind].total > 0
    assert found[kind].trained == 0
    assert found["attention"].trained > 0
    # The trap: without being told apart they would be trained.
    linear = [m for m in empty(folder, "x").modules() if isinstance(m, torch.nn.Linear)]
    assert len(parts.apart(empty(folder, "x"))) > 0
    assert len(linear) > len(parts.apart(empty(folder, "x")))


@pytest.mark.parametrize("config", [mixtral, qwen3_moe])
def test_experts_are_never_adapted_under_another_name(config: Any, tmp_path: Path) -> None:  # T48
    folder = folder_of(config(), tmp_path)
    found = foreseen(folder, made_spec())
    assert {kind for kind, part in found.items() if part.trained} == {"attention"}
    # The trap: peft's own all-linear takes experts and router along.
    theirs = get_peft_model(empty(folder, "x"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert any("experts" in name for name, p in theirs.named_parameters() if "lora_" in name)
    with pytest.raises(SpecInvalid, match="peft would adapt the experts or the router"):
        foreseen(folder, made_spec(lora={"target_modules": ["q_proj", "gate"]}))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("transformer.h.3.attn.c_attn", "attention"),
        ("transformer.h.3.mlp.c_fc", "mlp"),
        ("model.layers.0.mlp.gate_proj", "mlp"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.gate", "router"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.0.mlp.shared_expert.up_proj", "mlp"),
        ("model.layers.0.input_layernorm.weight", "norm"),
        ("transformer.ln_f.bias", "norm"),
        ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "vision"),
        ("model.layers.0.mixer.in_proj", "other"),
    ],
)
def test_names_tell_the_kind(name: str, kind: str) -> None:
    assert parts.kind_of(name) == kind
