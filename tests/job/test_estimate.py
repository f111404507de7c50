"""The estimate of device memory is the sum of what training really holds, counted without torch."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from job.sizing.activations import Setting, is_padded
from job.sizing.built import built, memory_of
from job.sizing.estimate import CHUNK_BYTES, CHUNKED, GIB, estimate, setting_of
from job.sizing.fits import expected, lines_of, remedy, verdict
from job.sizing.shapes import _FAMILIES, UnknownFamily, shapes_of
from job.sizing.trained import head_trains, trained_parameters
from job.spec import JobSpec, read
from job.training import head, memory, sharded
from job.training.adapter import add_adapter
from job.training.attention import UnsupportedModel
from job.training.kernels import PaddingFree, Reference, chunked_head
from job.training.loop import Loop, make_optimizer
from job.training.new_tokens import Tokens
from job.training.order import Order
from launcher.memory import room_of
from launcher.profile import read as read_profile
from tests.job.live import Live
from tests.job.made import CPU, LLAMA_8B, made_rows, made_spec

ROOT = Path(__file__).resolve().parents[2]
WITHIN = 0.15

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "pad_token_id": 0,
}
GPT2_SIZES = {"n_embd": 256, "n_layer": 3, "n_head": 8, "vocab_size": 2000, "n_positions": 256}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def config_of(family: str) -> Any:
    sizes: dict[str, Any] = GPT2_SIZES if family == "gpt2" else SIZES | {"head_dim": 32}
    if family in ("phi", "phi3", "mistral"):
        sizes = SIZES
    if family.endswith("moe"):
        sizes = sizes | {"num_experts": 8, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
    return CONFIG_MAPPING[family](**sizes)


@pytest.mark.parametrize("family", sorted(_FAMILIES))
def test_a_config_alone_gives_the_number_of_parameters(family: str) -> None:
    config = config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = shapes_of(config.to_dict()).counts()
    assert sum(counted.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("config", "billions"), [(LLAMA_8B, 8.030), (LLAMA_70B, 70.554), (QWEN_7B, 7.616)], ids=["8b", "70b", "7b"]
)
def test_published_models_have_the_size_they_are_known_for(config: dict[str, Any], billions: float) -> None:
    assert sum(shapes_of(config).counts().values()) / 1e9 == pytest.approx(billions, abs=0.001)


@pytest.mark.parametrize(
    "lora",
    [
        {"r": 8},
        {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        {"r": 4, "use_dora": True},
        {"r": 4, "rank_pattern": {"down_proj": 16}},
        {"r": 4, "modules_to_save": ["lm_head"]},
        {"r": 4, "modules_to_save": ["mlp"]},
        {"r": 4, "modules_to_save": ["down_proj", "input_layernorm"]},
        {"r": 4, "modules_to_save": ["self_attn", "norm", "embed_tokens"]},
        {"r": 4, "modules_to_save": ["layers.1.mlp"], "target_modules": ["q_proj"]},
        {"r": 4, "bias": "all"},
        {"r": 4, "bias": "lora_only", "target_modules": ["q_proj"]},
        {"r": 4, "bias": "all", "modules_to_save": ["k_proj"]},
    ],
    ids=lambda lora: ",".join(f"{key} {value}" for key, value in lora.items()),
)
def test_what_trains_is_counted_as_peft_makes_it(lora: dict[str, Any]) -> None:  # T48
    spec, config = made_spec(lora=lora), config_of("qwen2")
    model = add_adapter(AutoModelForCausalLM.from_config(config), spec, CPU)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained_parameters(shapes_of(config.to_dict()), spec) == trained


def test_the_head_is_chunked_where_the_estimate_says_so() -> None:
    assert CHUNK_BYTES == head.CHUNK_BYTES
    assert set(head._FAMILIES) == CHUNKED


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "llama, dropout": ("llama", {"lora": {"dropout": 0.1}}, {}),
    "llama, recomputed": ("llama", {"lora": {"dropout": 0.1}}, {"gradient_checkpointing": True}),
    "llama, bf16, recomputed": ("llama", {}, {"gradient_checkpointing": True, "precision": "bfloat16"}),
    "llama, DoRA": ("llama", {"lora": {"use_dora": True}}, {}),
    "llama, 8-bit Adam": ("llama", {}, {"optimizer": "paged_adamw_8bit", "gradient_checkpointing": True}),
    "qwen3": ("qwen3", {}, {}),
    "gemma": ("gemma", {}, {"gradient_checkpointing": True}),
    "gpt2, its own dropout": ("gpt2", {}, {}),
    "phi, whole logits": ("phi", {}, {}),
    "two matrices": ("llama", {"lora": {"target_modules": ["q_proj", "v_proj"]}}, {}),
    "gemma 2, bounded scores": ("gemma2", {}, {"max_length": 256}),
    "gemma 2, recomputed": ("gemma2", {}, {"max_length": 256, "gradient_checkpointing": True}),
    "gemma 2, bf16": ("gemma2", {}, {"max_length": 256, "gradient_checkpointing": True, "precision": "bfloat16"}),
    "the reference": ("llama", {}, {"kernels": "reference", "max_length": 256}),
    "the reference, recomputed": ("llama", {}, {"kernels": "reference", "gradient_checkpointing": True}),
    "head saved": ("llama", {"lora": {"modules_to_save": ["lm_head"]}}, {}),
    "MLPs saved": ("llama", {"lora": {"modules_to_save": ["mlp"]}}, {}),
    "attention saved, recomputed": (
        "qwen3",
        {"lora": {"modules_to_save": ["self_attn", "norm"]}},
        {"gradient_checkpointing": True},
    ),
    "MLPs saved, bf16": ("llama", {"lora": {"modules_to_save": ["mlp"]}}, {"precision": "bfloat16"}),
}


def loop_of(family: str, spec: JobSpec, quantised: bool = False) -> Loop:
    """A tiny model of the family and rows that fill the token budget twice a step."""
    config = config_of(family)
    precision = torch.bfloat16 if spec.training.precision == "bfloat16" else torch.float32
    attention = "eager" if family == "gemma2" else "sdpa"
    base = AutoModelForCausalLM.from_config(config, dtype=precision, attn_implementation=attention)
    if quantised:
        quantise(base)
    base.requires_grad_(False)
    model, training = add_adapter(base, spec, replace(CPU, precision=precision)), spec.training
    shapes = shapes_of(config.to_dict())
    whole = family not in CHUNKED or training.kernels == "reference" or head_trains(shapes, spec)
    chunked = None if whole else chunked_head(model.get_base_model())
    kernel = Reference(0, CPU.device, chunked) if is_padded(shapes, spec) else PaddingFree(CPU.device, chunked)
    rows = made_rows([training.max_length] * training.batch_size, 2000)
    order = Order(rows.sources, [1.0], training, "digest")
    optimizer = make_optimizer(model, training)
    place = replace(CPU, precision=precision)
    return Loop(model, optimizer, rows, order, training, kernel, place)


def quantise(base: Any) -> None:
    """Holds every linear layer but the head in 4 bits, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(base.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            layer = Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32)
            layer.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            layer.support_avx512bf16_for_cpu = False
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, layer.to("cpu"))
    base.is_loaded_in_4bit = True


def tensors_of(loop: Loop) -> list[torch.Tensor]:
    """Everything that lies there between two steps."""
    states = [value for state in loop.optimizer.state.values() for value in state.values()]
    found = [*loop.model.parameters(), *loop.model.buffers(), *(s for s in states if isinstance(s, torch.Tensor))]
    for module in loop.model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        found += [] if state is None else [state.absmax, state.state2.absmax]
    return found


def measured(loop: Loop) -> int:
    """Bytes of tensors at the peak of the second step."""
    loop.model.train()
    with loop.kernel.installed(loop.model.get_base_model()):
        loop._step(0, False)
        with Live("cpu", tensors_of(loop)) as live:
            loop._step(1, False)
    return live.peak


TRAINING = {"batch_size": 4, "micro_batch_size": 2, "max_length": 128, "max_steps": 2}


@pytest.mark.parametrize("name", CASES)
def test_the_estimate_is_what_a_step_holds(name: str) -> None:
    family, sections, training = CASES[name]
    spec = made_spec(training=TRAINING | training, **sections)
    found = estimate(shapes_of(config_of(family).to_dict()), spec)
    assert found.tensors == pytest.approx(measured(loop_of(family, spec)), rel=WITHIN)


def test_the_estimate_of_a_base_in_four_bits_is_what_a_step_holds() -> None:
    spec = made_spec(method="qlora", training=TRAINING | {"gradient_checkpointing": True})
    found = estimate(shapes_of(config_of("llama").to_dict()), spec)
    assert found.tensors == pytest.approx(measured(loop_of("llama", spec, quantised=True)), rel=WITHIN)
    weights = sum(item.bytes for item in found.items if "nf4" in item.kind)
    elements = sum(item.count for item in found.items if "nf4" in item.kind)
    assert weights / elements == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256))


def test_an_estimate_that_forgot_the_activations_would_be_seen() -> None:
    spec = made_spec(training=TRAINING)
    found = estimate(shapes_of(config_of("llama").to_dict()), spec)
    without = sum(item.bytes for item in found.items if not item.kind.startswith("kept"))
    assert without < (1 - WITHIN) * measured(loop_of("llama", spec))


@pytest.mark.parametrize(
    ("file", "config", "gib"),
    [
        ("lora-8b.yaml", LLAMA_8B, 80),
        ("gitops.yaml", LLAMA_8B, 80),
        ("multi-gpu.yaml", LLAMA_8B, 80),
        ("cron.yaml", LLAMA_8B, 80),
        ("japanese-chat.yaml", QWEN_7B, 24),
        ("qlora-70b.yaml", LLAMA_70B, 80),
    ],
)
def test_the_specs_that_name_a_gpu_fit_it(file: str, config: dict[str, Any], gib: int) -> None:
    spec = read(ROOT / "configs" / file)
    room = room_of(spec, read_profile(ROOT / "configs" / "profiles" / "gpus.yaml"))
    assert room == gib * GIB
    shapes = shapes_of(config)
    assert verdict(shapes, spec, estimate(shapes, spec), room).startswith("fits ")


def test_every_spec_that_names_a_gpu_is_among_those() -> None:
    mark = next(m for m in test_the_specs_that_name_a_gpu_fit_it.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    named = {case[0] for case in mark.args[1]}
    with_gpu = {p.name for p in (ROOT / "configs").glob("*.yaml") if "gpus:" in p.read_text(encoding="utf-8")}
    assert with_gpu == named


def gpu_spec(method: str = "lora", gpus: int = 1, **training: Any) -> JobSpec:
    return made_spec(method=method, resources={"gpus": gpus, "gpu_type": "l4"}, training=training)


def test_what_does_not_fit_says_what_to_lower_and_that_fits() -> None:
    shapes = shapes_of(LLAMA_8B)
    spec = gpu_spec(micro_batch_size=16, max_length=2048)
    assert estimate(shapes, spec).bytes > 24 * GIB
    cure = remedy(shapes, spec, 22 * GIB)
    assert cure is not None
    changes, lower = cure
    assert changes[0].startswith("training.micro_batch_size: ")
    assert len(changes) == 1
    assert lower.bytes <= 22 * GIB
    said = verdict(shapes, spec, estimate(shapes, spec), 24 * GIB)
    assert said.startswith("does not fit l4 (24 GiB); with training.micro_batch_size: ")


def test_what_fits_nowhere_says_so() -> None:
    shapes, spec = shapes_of(LLAMA_70B), gpu_spec()
    said = verdict(shapes, spec, estimate(shapes, spec), 8 * GIB)
    assert "whatever is lowered" in said
    assert remedy(shapes, spec, 8 * GIB) is None


def test_ranks_that_share_the_base_hold_a_part_of_it() -> None:
    shapes = shapes_of(LLAMA_70B)
    whole = estimate(shapes, gpu_spec(gpus=8))
    part = estimate(shapes, gpu_spec(gpus=8, parallelism="shard"))
    saved = whole.bytes - part.bytes
    layers = shapes.counts()["attention"] + shapes.counts()["mlp"]
    assert 0.8 * layers * 2 * 7 / 8 < saved < layers * 2


@pytest.mark.parametrize(
    ("lora", "whole"),
    [
        ({}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"new_tokens": ["<tool>"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, True),
    ],
    ids=["", "head saved", "new tokens", "embeddings saved"],
)
def test_ranks_share_the_embeddings_only_where_they_are_left_alone(
    tiny_llama: Path, lora: dict[str, Any], whole: bool
) -> None:
    """As the sharing itself has it: `job.training.sharded` keeps on every rank what trains."""
    config = json.loads((tiny_llama / "config.json").read_text(encoding="utf-8"))
    shapes = shapes_of(config)
    assert not shapes.tied
    spec = gpu_spec(gpus=8, parallelism="shard").model_copy(update={"lora": made_spec(lora=lora).lora})
    held = {item.kind: item.count for item in estimate(shapes, spec).items}["weights: embeddings"]
    assert held == shapes.vocabulary * shapes.width / (1 if whole else 8)
    tokens = Tokens((shapes.vocabulary - 1,), shapes.vocabulary) if "new_tokens" in lora else None
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).requires_grad_(False)
    model = add_adapter(base, spec, CPU, tokens)
    assert (not sharded._loose_embedding(model.get_base_model())) is whole
    assert trained_parameters(shapes, spec) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    chunked = True
    try:
        chunked_head(model.get_base_model())
    except UnsupportedModel:
        chunked = False
    assert head_trains(shapes, spec) is not chunked


def test_a_part_whose_size_nobody_knows_is_named_and_nothing_is_promised(tiny_llama: Path) -> None:
    spec = made_spec(resources={"gpus": 1, "gpu_type": "l4"}, lora={"modules_to_save": ["rotary_emb", "mlp"]})
    lines = list(lines_of(tiny_llama, spec, room=24 * GIB))
    assert lines[-1].startswith("not estimated: lora.modules_to_save: rotary_emb: nobody here knows")
    assert not any(line.startswith("fits") for line in lines)
    assert any("trained besides" in line for line in lines)
    assert expected(tiny_llama, spec, lambda padded: setting_of(spec)) is None
    known = made_spec(resources={"gpus": 1, "gpu_type": "l4"}, lora={"modules_to_save": ["mlp"]})
    assert list(lines_of(tiny_llama, known, room=24 * GIB))[-1].startswith("fits l4")


@pytest.mark.parametrize(
    ("family", "sizes", "padded", "eager"),
    [
        ("olmo2", {}, False, False),
        ("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}, True, False),
        ("bloom", {"n_layer": 3, "n_head": 8}, True, True),
    ],
)
def test_a_family_that_is_built_is_padded_where_the_training_would_pad_it(
    family: str, sizes: dict[str, Any], padded: bool, eager: bool, tmp_path: Path
) -> None:
    CONFIG_MAPPING[family](**SIZES | sizes).save_pretrained(tmp_path)
    shapes = built(tmp_path)
    assert (shapes.padded, shapes.eager) == (padded, eager)


def test_a_run_that_pads_knows_its_costliest_micro_batch_as_padded(tiny_llama: Path) -> None:
    seen: list[bool] = []

    def here(padded: bool) -> Setting:
        seen.append(padded)
        return setting_of(made_spec())

    for kernels in ("auto", "reference"):
        expected(tiny_llama, made_spec(training={"kernels": kernels}), here)
    assert seen == [False, True]


def test_the_table_adds_up_and_the_record_too(tiny_llama: Path) -> None:
    spec = made_spec(training=TRAINING)
    first, *lines = lines_of(tiny_llama, spec)
    assert first.startswith("memory at the peak of training: ")
    found = estimate(shapes_of(config_of("llama").to_dict()), spec)
    assert sum(found.record()["parts"].values()) == pytest.approx(found.bytes, abs=len(found.items) + 1)
    assert lines[-1].split()[0] == "sum"
    assert math.ceil(found.around.bytes) + found.tensors == found.bytes


def test_a_family_that_is_not_known_is_built_without_weights(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["olmo2"](**SIZES)
    with pytest.raises(UnknownFamily, match="olmo2"):
        shapes_of(config.to_dict())
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(built(tmp_path).counts().values())
    assert counted == pytest.approx(sum(parameter.numel() for parameter in model.parameters()), rel=0.001)
    assert memory_of(tmp_path, made_spec())[-1].startswith("  sum")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_process_that_trains_the_small_model_holds_what_was_estimated(method: str) -> None:
    """Peak resident set over that of the process before it loaded anything."""
    folder = ROOT / "models" / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip(f"{folder.name} is absent: make {folder.relative_to(ROOT)}")
    command = [sys.executable, "-W", "ignore", "-m", "tests.job.rss", str(folder), method]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{method}: {found['held'] / GIB:.2f} GiB held, {found['estimated'] / GIB:.2f} estimated")
    assert found["estimated"] == pytest.approx(found["held"], rel=WITHIN)
    assert found["total"] == pytest.approx(found["peak"], rel=WITHIN)


@pytest.mark.parametrize(("expected", "available", "frugal"), [(100, 249, True), (100, 250, False), (100, None, False)])
def test_a_process_gives_back_at_once_only_where_memory_is_scarce(
    expected: int, available: int | None, frugal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "give_back_at_once", lambda: True)  # it would hold for the tests after this one
    assert memory.be_frugal(expected, available) == frugal


def test_the_rows_at_hand_take_the_place_of_the_budget() -> None:
    spec = made_spec(training=TRAINING)
    shapes = shapes_of(config_of("llama").to_dict())
    short = estimate(shapes, spec, setting_of(spec, tokens=100, longest=50))
    assert short.bytes < estimate(shapes, spec).bytes
    assert short.record()["tokens"] == 100
