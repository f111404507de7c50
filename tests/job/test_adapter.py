"""The adapter: that it trains, leaves the base alone, and is the same after saving and loading."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from job.errors import IntegrityFailure, SpecInvalid
from job.evaluation.evaluate import as_base, trained_biases
from job.evaluation.verify import check_structure, loaded
from job.files import read_json
from job.spec import JobSpec
from job.training.adapter import add_adapter, foreseen, load_adapter, save_adapter, trained
from job.training.device import Placement
from job.training.first_values import FIRST
from job.training.loop import make_optimizer
from job.training.model import load_base
from job.training.new_tokens import Tokens, make_room
from tests.job.made import CPU, made_spec

IDS = torch.arange(10, 40).view(2, 15)
VOCABULARY = {"tiny_llama": 448, "tiny_qwen": 448, "tiny_gemma": 450, "tiny_gpt2": 446}
METHODS: dict[str, dict[str, Any]] = {
    "float32": {},
    "nf4": {"method": "qlora"},
    "fp4": {"method": "qlora", "quantization": {"type": "fp4", "double_quant": False}},
    "int8": {"method": "qlora", "quantization": {"type": "int8"}},
}
LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA, patterns": {"use_rslora": True, "rank_pattern": {".*1.*": 2}, "alpha_pattern": {".*0.*": 3}},
    "DoRA": {"use_dora": True},
    "PiSSA": {"init": "pissa"},
    "OLoRA": {"init": "olora"},
    "head saved": {"modules_to_save": ["lm_head"]},
    "new tokens": {"new_tokens": ["<a>", "<b>"]},
    "biases": {"bias": "all"},
    "norm saved, biases": {"modules_to_save": ["ln_f"], "bias": "all"},
}
HALF = replace(CPU, precision=torch.bfloat16)


def tokens_of(spec: JobSpec, base: str) -> Tokens | None:
    """New tokens behind those of a tiny model."""
    first = VOCABULARY[base]
    ids = tuple(range(first, first + len(spec.lora.new_tokens)))
    return Tokens(ids, first + len(ids)) if ids else None


def adapted(folder: Path, spec: JobSpec, base: str) -> PeftModel:
    return add_adapter(load_base(folder, spec, CPU), spec, CPU, tokens_of(spec, base))


def logits(model: Any, placement: Placement = CPU) -> Tensor:
    model.eval()
    with torch.no_grad(), placement.autocast():
        result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def train(model: PeftModel, spec: JobSpec, steps: int = 1, placement: Placement = CPU) -> None:
    """Steps of the run's own optimizer."""
    torch.manual_seed(0)
    optimizer = make_optimizer(model, spec.training)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        with placement.autocast():
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()


def frozen(model: PeftModel) -> dict[str, Tensor]:
    """Copies of what does not train, 4-bit codes included."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def lora_b(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter) for name, parameter in trained(model).items() if ".lora_B." in name)


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gemma", "tiny_gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputing"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_every_adapter_and_nothing_of_the_base(  # T18, T20
    base: str, checkpointing: bool, method: str, request: pytest.FixtureRequest
) -> None:
    spec = made_spec(training={"gradient_checkpointing": checkpointing}, **METHODS[method])
    model = adapted(request.getfixturevalue(base), spec, base)
    assert model.get_base_model().is_gradient_checkpointing == checkpointing
    before = frozen(model)
    train(model, spec)
    assert all(float(b.abs().max()) > 0 for _, b in lora_b(model))
    assert sum(1 for _ in lora_b(model)) == (8 if base == "tiny_gpt2" else 14)
    after = frozen(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_recomputing_the_old_way_trains_the_same(tiny_llama: Path) -> None:  # T18
    """Reentrant recomputation drops gradients where the embeddings need none; peft's hook gives them one."""
    found = []
    for reentrant in (False, True):
        spec = made_spec(training={"gradient_checkpointing": True})
        model = adapted(tiny_llama, spec, "tiny_llama")
        if reentrant:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        train(model, spec)
        found.append({name: b.detach().clone() for name, b in lora_b(model)})
    assert all(float(b.abs().max()) > 0 for b in found[1].values())
    assert all(torch.allclose(b, found[1][name], atol=1e-7) for name, b in found[0].items())


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gemma", "tiny_gpt2"])
@pytest.mark.parametrize("lora", [lora for lora in LORA if lora != "norm saved, biases"])
def test_an_untrained_adapter_changes_nothing_and_a_trained_one_can_be_taken_off(  # T19, T47
    base: str, lora: str, request: pytest.FixtureRequest
) -> None:
    spec = made_spec(lora=LORA[lora])
    folder = request.getfixturevalue(base)
    core: Any = load_base(folder, spec, CPU)
    if (tokens := tokens_of(spec, base)) is not None:
        make_room(core, tokens.vocabulary)
    untouched = logits(core)
    model = add_adapter(core, spec, CPU, tokens)
    difference = float((logits(model) - untouched).abs().max())
    # DoRA divides by norms, and PiSSA and OLoRA take away what they add: equal up to rounding.
    assert difference <= 2e-6 if lora in ("DoRA", "PiSSA", "OLoRA") else difference == 0.0
    biases = trained_biases(model)
    train(model, spec, 2)
    assert float((logits(model) - untouched).abs().max()) > 1e-3
    count = len(trained(model))
    with as_base(model, biases):
        assert torch.equal(logits(model), untouched)
    assert len(trained(model)) == count


@pytest.mark.parametrize(
    ("base", "lora", "method"),
    [
        ("tiny_llama", "rsLoRA, patterns", "float32"),
        ("tiny_llama", "PiSSA", "float32"),
        ("tiny_llama", "head saved", "float32"),
        ("tiny_llama", "new tokens", "nf4"),
        ("tiny_qwen", "new tokens", "float32"),
        ("tiny_qwen", "DoRA", "nf4"),
        ("tiny_gemma", "rsLoRA, patterns", "nf4"),
        ("tiny_gemma", "new tokens", "float32"),
        ("tiny_gpt2", "OLoRA", "float32"),
        ("tiny_gpt2", "new tokens", "float32"),
        ("tiny_gpt2", "biases", "float32"),
    ],
)
def test_stock_peft_loads_what_was_trained(  # T21, T33, T47
    base: str, lora: str, method: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model_key = {"from": "org/tiny", "revision": "0123abc"}
    spec = made_spec(lora=LORA[lora], model=model_key, **METHODS[method])
    folder = request.getfixturevalue(base)
    model = adapted(folder, spec, base)
    train(model, spec, 3)
    save_adapter(model, tmp_path, "safetensors")
    core: Any = load_base(folder, spec, CPU)
    if (tokens := tokens_of(spec, base)) is not None:
        core.resize_token_embeddings(tokens.vocabulary)  # with rows of its own making, as a user would
    again = PeftModel.from_pretrained(core, str(tmp_path))
    difference = float((logits(again) - logits(model)).abs().max())
    assert difference <= 2e-6
    config = read_json(tmp_path / "adapter_config.json")
    assert config["init_lora_weights"] is True  # another word would change the base where it is loaded
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", "0123abc")
    assert (config["r"], config["lora_alpha"]) == ((8, 16) if lora in ("PiSSA", "OLoRA") else (4, 8))
    adapted_ = {name.rsplit(".", 1)[-1] for name, part in again.named_modules() if isinstance(part, LoraLayer)}
    assert {name.rsplit(".", 1)[-1] for name in config["target_modules"]} == adapted_


@pytest.mark.parametrize(
    ("base", "lora"),
    [
        *(("tiny_llama", lora) for lora in ("plain", "PiSSA", "OLoRA", "DoRA", "new tokens", "head saved")),
        ("tiny_qwen", "new tokens"),  # tied: one tensor by two names
        ("tiny_gpt2", "new tokens"),
        ("tiny_qwen", "head saved"),
        ("tiny_gemma", "plain"),
        ("tiny_gpt2", "norm saved, biases"),
    ],
)
def test_a_resumed_adapter_goes_on_bit_for_bit(  # T22, T23, T33, T47
    base: str, lora: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    spec, folder = made_spec(lora=LORA[lora]), request.getfixturevalue(base)
    model = adapted(folder, spec, base)
    train(model, spec, 2)
    save_adapter(model, tmp_path, "safetensors")
    again = adapted(folder, made_spec(lora=LORA[lora], training={"seed": 7}), base)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert trained(again).keys() == trained(model).keys()
    train(model, spec)
    train(again, spec)
    assert all(torch.equal(p, trained(again)[name]) for name, p in trained(model).items())


def test_resuming_needs_no_decomposition_another_machine_would_do_differently(tmp_path: Path, tiny_llama: Path) -> None:
    # T47
    spec = made_spec(lora={"init": "pissa"})
    model = adapted(tiny_llama, spec, "tiny_llama")
    train(model, spec, 2)
    save_adapter(model, tmp_path, "safetensors")
    again = adapted(tiny_llama, spec, "tiny_llama")
    for name, buffer in again.named_buffers():
        if f".{FIRST}." in name:
            buffer.mul_(-1.0)  # as if the decomposition had come out with other signs here
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_pissa_begins_with_the_greatest_directions_of_the_weight(tiny_gpt2: Path) -> None:
    spec = made_spec(lora={"init": "pissa", "alpha": 12})
    model = adapted(tiny_gpt2, spec, "tiny_gpt2")
    layer: Any = model.get_base_model().get_submodule("transformer.h.0.attn.c_attn")
    weight = layer.get_base_layer().weight.t()  # Conv1D holds [in, out]
    u, s, vh = torch.linalg.svd(weight)
    best = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
    part = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(part, best, atol=1e-6)
    assert not any(name for name, p in model.named_parameters() if f".{FIRST}." in name)


def test_ranks_and_scales_follow_the_patterns(tiny_llama: Path) -> None:
    lora = {"alpha": 6, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 16}}
    model = adapted(tiny_llama, made_spec(lora=lora), "tiny_llama").get_base_model()
    found = {}
    for name in ("layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"):
        layer: Any = model.get_submodule(f"model.{name}")
        found[name] = (layer.lora_A["default"].weight.shape[0], layer.scaling["default"])
    assert list(found.values()) == [(2, 3.0), (2, 8.0), (4, 1.5)]
    whole = {"rank_pattern": {"^model.layers.0.mlp.up_proj": 2}, "alpha_pattern": {"^model.layers.0.mlp.up_proj": 6}}
    one: Any = (
        adapted(tiny_llama, made_spec(lora=whole), "tiny_llama")
        .get_base_model()
        .get_submodule("model.layers.0.mlp.up_proj")
    )
    assert (one.lora_A["default"].weight.shape[0], one.scaling["default"]) == (2, 3.0)
    stable = made_spec(lora=lora | {"use_rslora": True})
    layer = adapted(tiny_llama, stable, "tiny_llama").get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    assert layer.scaling["default"] == 6 / 4**0.5


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank_pattern": {"q_porj": 2}}, "'q_porj' matches no layer that is adapted; they end in .*q_proj"),
        ({"alpha_pattern": {"(": 2}}, "no regular expression"),
        ({"init": "pissa", "r": 100}, "100 directions of a matrix of 64"),
        ({"new_tokens": ["<x>"], "modules_to_save": ["embed_tokens"]}, "embed_tokens is among lora.modules_to_save"),
        ({"new_tokens": ["<x>"], "target_modules": ["lm_head"]}, "lm_head is among lora.target_modules"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"down_proj": 2}}, "no layer that is adapted; .* q_proj"),
        ({"rank_pattern": {"lm_head": 2}}, "no layer that is adapted"),
        (
            {"rank_pattern": {"q_proj": 2}, "modules_to_save": ["self_attn"]},
            "'q_proj' matches no layer that is adapted",
        ),
        ({"modules_to_save": ["model"]}, r"lora\.modules_to_save: model: whole, they leave no layer"),
        ({"modules_to_save": ["layers"]}, r"lora\.modules_to_save: layers is a list of modules"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(lora: dict[str, Any], words: str, tiny_llama: Path) -> None:
    spec = made_spec(lora=lora)
    with pytest.raises(SpecInvalid, match=words):
        adapted(tiny_llama, spec, "tiny_llama")


def test_what_a_tied_or_quantised_model_cannot_train_is_refused_before_it_is_loaded(
    tiny_qwen: Path, tiny_llama: Path
) -> None:
    tied = made_spec(lora={"new_tokens": ["<x>"], "modules_to_save": ["lm_head"]})
    with pytest.raises(SpecInvalid, match=r"lm_head is among lora\.modules_to_save"):
        foreseen(tiny_qwen, tied, tokens_of(tied, "tiny_qwen"))
    for name in ("down_proj", "mlp"):
        with pytest.raises(SpecInvalid, match=f"{name}: qlora holds .*down_proj in few bits|{name}: qlora holds .*mlp"):
            foreseen(tiny_llama, made_spec(method="qlora", lora={"modules_to_save": [name]}))


def test_a_saved_module_is_the_one_that_is_named(tiny_llama: Path) -> None:
    model = adapted(tiny_llama, made_spec(lora={"modules_to_save": ["norm"]}), "tiny_llama")
    saved = [name for name in trained(model) if "lora_" not in name]
    assert saved == ["base_model.model.model.norm.modules_to_save.default.weight"]


def test_dora_refuses_a_row_without_a_direction(tiny_llama: Path) -> None:
    spec = made_spec(lora={"use_dora": True})
    core: Any = load_base(tiny_llama, spec, CPU)
    core.model.layers[1].mlp.up_proj.weight.data[3] = 0.0
    with pytest.raises(SpecInvalid, match=r"use_dora: model.layers.1.mlp.up_proj has a row of zeros"):
        add_adapter(core, spec, CPU)


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("method", ["float32", "nf4"])
def test_dora_begins_as_the_base_in_16_bits_too(base: str, method: str, request: pytest.FixtureRequest) -> None:  # T19
    spec = made_spec(lora={"use_dora": True}, **METHODS[method])
    core: Any = load_base(request.getfixturevalue(base), spec, HALF)
    untouched = logits(core, HALF)
    assert torch.equal(logits(add_adapter(core, spec, HALF), HALF), untouched)


@pytest.mark.parametrize("lora", [LORA["PiSSA"] | {"dropout": 0.5}, {"modules_to_save": ["norm", "embed_tokens"]}])
def test_a_16_bit_base_is_no_reason_for_other_logits_when_loaded(  # T21, T47
    lora: dict[str, Any], tmp_path: Path, tiny_llama: Path
) -> None:
    spec = made_spec(lora=lora)
    model = add_adapter(load_base(tiny_llama, spec, HALF), spec, HALF)
    train(model, spec, 3, HALF)
    save_adapter(model, tmp_path, "safetensors")
    again = loaded(load_base(tiny_llama, spec, HALF), tmp_path, check_structure(tmp_path, spec))
    assert torch.equal(logits(again, HALF), logits(model, HALF))


@pytest.mark.parametrize(
    "sections",
    [
        {"method": "qlora", "lora": {"init": "pissa"}},
        {"method": "qlora", "lora": {"init": "olora"}},
        {"lora": {"init": "pissa", "use_dora": True}},
    ],
)
def test_parts_of_weights_that_are_not_there_are_refused_in_the_spec(sections: dict[str, Any]) -> None:  # T47
    with pytest.raises(ValueError, match="init"):
        made_spec(**sections)


def test_a_checkpoint_of_another_rank_is_no_checkpoint_of_this_run(tmp_path: Path, tiny_llama: Path) -> None:
    wide = adapted(tiny_llama, made_spec(lora={"init": "pissa", "r": 8}), "tiny_llama")
    save_adapter(wide, tmp_path, "safetensors")
    with pytest.raises(IntegrityFailure, match="rank"):
        load_adapter(adapted(tiny_llama, made_spec(lora={"init": "pissa"}), "tiny_llama"), tmp_path)


@pytest.mark.parametrize("base", ["tiny_llama", "tiny_qwen", "tiny_gpt2"])
def test_only_the_rows_of_new_tokens_train(base: str, request: pytest.FixtureRequest) -> None:  # T33
    spec = made_spec(lora=LORA["new tokens"])
    model = adapted(request.getfixturevalue(base), spec, base)
    rows = {name: p for name, p in trained(model).items() if "trainable_tokens" in name}
    tied = base != "tiny_llama"
    assert [tuple(p.shape) for p in rows.values()] == [(2, 64)] * (1 if tied else 2)
    core: Any = model.get_base_model()
    assert core.get_input_embeddings().token_adapter.base_layer.weight.shape[0] == VOCABULARY[base] + 2
    before = frozen(model)
    values = {name: p.detach().clone() for name, p in rows.items()}
    model.train()
    ids = torch.cat([IDS, torch.tensor([[VOCABULARY[base], VOCABULARY[base] + 1, 9]] * 2)], 1)
    optimizer = make_optimizer(model, spec.training)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    assert all(bool((p != values[name]).any(1).all()) for name, p in rows.items())
    assert all(torch.equal(tensor, frozen(model)[name]) for name, tensor in before.items())


def test_new_rows_begin_as_the_mean_of_the_old_ones(tiny_llama: Path) -> None:  # T33
    core: Any = load_base(tiny_llama, made_spec(), CPU)
    mean = core.get_input_embeddings().weight.mean(0)
    make_room(core, VOCABULARY["tiny_llama"] + 3)
    assert torch.allclose(core.get_input_embeddings().weight[-3:], mean.expand(3, -1), atol=1e-7)
    assert not any(parameter.requires_grad for parameter in core.parameters())
    make_room(core, 100)  # a vocabulary that fits already
    assert core.get_input_embeddings().weight.shape[0] == VOCABULARY["tiny_llama"] + 3


def test_a_16_bit_base_keeps_its_embeddings_and_its_adapter_is_float32(tiny_llama: Path) -> None:  # T34, T49
    placement = replace(CPU, precision=torch.bfloat16)
    spec = made_spec(method="qlora", training={"learning_rate": 1e-6, "gradient_checkpointing": True})
    model = add_adapter(load_base(tiny_llama, spec, placement), spec, placement)
    core: Any = model.get_base_model()
    assert core.get_input_embeddings().weight.dtype == core.lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert not any(isinstance(m, nn.LayerNorm) and m.weight.dtype != torch.bfloat16 for m in core.modules())
    assert core.model.layers[0].gradient_checkpointing
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    optimizer = make_optimizer(model, spec.training)
    for _ in range(3):
        optimizer.zero_grad()
        with placement.autocast():
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        optimizer.step()
    moved = {name: (p - before[name]).abs() for name, p in trained(model).items()}
    # Adam's first steps are as long as the learning rate; bfloat16 weights of this size would not move at all.
    a = [float(change.median()) for name, change in moved.items() if "lora_A" in name]
    assert all(1e-7 < change < 1e-5 for change in a)
    lost = [bool((b.bfloat16() == (b + 3e-6).bfloat16()).float().mean() > 0.9) for n, b in before.items() if "_A" in n]
    assert all(lost)


def test_the_file_is_as_large_as_its_tensors(tmp_path: Path, tiny_llama: Path) -> None:  # T21
    spec = made_spec(lora={"r": 64})
    model = adapted(tiny_llama, spec, "tiny_llama")
    save_adapter(model, tmp_path, "safetensors")
    bytes_ = 4 * sum(p.numel() for p in trained(model).values())
    assert abs((tmp_path / "adapter_model.safetensors").stat().st_size - bytes_) <= 0.01 * bytes_


def test_the_config_is_written_alike_by_every_process(tmp_path: Path, tiny_llama: Path) -> None:  # T35
    """peft keeps target modules in a set, whose order hangs on the process's hash seed: the file has it sorted."""
    spec = made_spec()
    model = adapted(tiny_llama, spec, "tiny_llama")
    save_adapter(model, tmp_path, "safetensors")
    targets = read_json(tmp_path / "adapter_config.json")["target_modules"]
    assert targets == sorted(targets)
    assert len(targets) > 1
