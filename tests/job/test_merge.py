"""Merging: the merged model says what the adapter said on the base that it was trained on."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from job.errors import Conflict, InputMissing, IntegrityFailure, JobError, SpecInvalid
from job.files import read_json, write_json
from job.sizing.parts import quantizable
from job.training import merge
from job.training.adapter import add_adapter, save_adapter, trained
from job.training.model import load_base, save_generation, save_quantization
from job.training.new_tokens import Tokens
from tests.job.made import CPU, made_spec

TOKENS = ("<tool>", "<end_tool>")
LAST = {"tiny_llama": "down_proj", "tiny_gpt2": "c_proj"}


def trained_adapter(root: Path, base: Path, **sections: Any) -> Path:
    """A published adapter's folder whose every tensor was moved by a training, and its tokenizer."""
    spec = made_spec(model=str(base), **sections)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(spec.lora.new_tokens))
    ids = tuple(tokenizer.convert_tokens_to_ids(list(spec.lora.new_tokens)))
    tokens = Tokens(ids, len(tokenizer)) if ids else None
    model = add_adapter(load_base(base, spec, CPU), spec, CPU, tokens)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return published(model, tokenizer, root / "adapter", is_quantised=spec.method == "qlora")


def published(model: PeftModel, tokenizer: Any, folder: Path, is_quantised: bool) -> Path:
    """The folder of an adapter with what a run publishes for a merge to read."""
    save_adapter(model, folder, "safetensors")
    tokenizer.save_pretrained(folder)
    if is_quantised:
        save_quantization(model.get_base_model(), folder)
    return folder


def merged(root: Path, adapter: Path, onto: str | None = None, dtype: str | None = None) -> tuple[Path, dict[str, Any]]:
    wanted = merge.plan(adapter, None, onto, root / "merged", dtype)
    return wanted.output, merge.merge(wanted)


@pytest.mark.parametrize(
    ("base", "lora"),
    [
        pytest.param("tiny_llama", {}, marks=pytest.mark.slow),
        ("tiny_llama", {"use_rslora": True, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
        pytest.param("tiny_llama", {"use_dora": True}, marks=pytest.mark.slow),
        ("tiny_llama", {"init": "pissa"}),
        ("tiny_llama", {"new_tokens": TOKENS}),
        pytest.param("tiny_qwen", {"new_tokens": TOKENS}, marks=pytest.mark.slow),
        ("tiny_qwen", {"modules_to_save": ["lm_head"]}),
        ("tiny_gpt2", {"bias": "all"}),
        ("tiny_gpt2", {"use_dora": True, "new_tokens": TOKENS}),
        ("tiny_qwen", {"target_modules": ["q_proj", "lm_head"]}),
        ("tiny_gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    ],
    ids=[
        "LoRA",
        "rsLoRA, patterns",
        "DoRA",
        "PiSSA",
        "new tokens",
        "tied",
        "head apart",
        "Conv1D, bias",
        "Conv1D, DoRA",
        "adapted head, tied",
        "adapted head, tied, Conv1D",
    ],
)
def test_the_merged_model_predicts_what_the_adapter_does(
    base: str, lora: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    adapter = trained_adapter(tmp_path, folder, lora=lora)
    output, record = merged(tmp_path, adapter)
    assert record["difference"]["max_abs_logit"] < 1e-5
    config = read_json(output / "config.json")
    assert "quantization_config" not in config
    assert not (output / "adapter_config.json").exists()
    untouched = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = torch.arange(5, 40)[None]
    with torch.no_grad():
        old = untouched(input_ids=ids).logits
        new = AutoModelForCausalLM.from_pretrained(output)(input_ids=ids).logits[..., : old.shape[-1]]
    assert float((new - old).abs().max()) > 1e-2  # the adapter says something, so agreeing with it means something
    assert len(tokenizer) == config["vocab_size"] or not lora.get("new_tokens")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(folder).chat_template


@pytest.mark.parametrize(
    ("base", "quantization", "bound"),
    [
        ("tiny_llama", {"type": "nf4"}, 2e-5),
        ("tiny_gpt2", {"type": "fp4", "double_quant": False}, 2e-5),
        ("tiny_gpt2", {"type": "int8"}, 0.05),  # evaluating, int8 rounds the activations too
    ],
    ids=["nf4", "fp4, Conv1D", "int8, Conv1D"],
)
def test_de_quantised_weights_are_those_the_training_saw(  # T32
    base: str, quantization: dict[str, Any], bound: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    adapter = trained_adapter(
        tmp_path, folder, method="qlora", quantization=quantization, lora={"target_modules": [LAST[base]]}
    )
    output, record = merged(tmp_path, adapter)
    assert record["onto"] == "dequantised"
    assert record["difference"]["max_abs_logit"] < bound
    held = load_base(folder, made_spec(method="qlora", quantization=quantization), CPU)
    result = AutoModelForCausalLM.from_pretrained(output)
    compared = 0
    for name in sorted(quantizable(AutoModelForCausalLM.from_pretrained(folder))):
        seen = dequantize_bnb_weight(held.get_submodule(name).weight, getattr(held.get_submodule(name), "state", None))
        if not name.endswith(LAST[base]):
            weight = result.get_submodule(name).weight
            weight = weight.t() if base == "tiny_gpt2" else weight
            assert torch.allclose(weight, seen.float(), atol=1e-7 if bound < 0.01 else 1e-6, rtol=0)
            compared += 1
    assert compared >= 4


def test_weights_are_quantised_from_the_type_that_training_loaded(tiny_llama: Path, tmp_path: Path) -> None:  # T32
    """Not from the one it computes in: rounded to bfloat16 first, some weights land on other codes."""
    spec = made_spec(model=str(tiny_llama), method="qlora", quantization={"compute_dtype": "float32"})
    half = replace(CPU, precision=torch.bfloat16)
    base = load_base(tiny_llama, spec, half)
    name = "model.layers.0.mlp.up_proj"
    weight: Any = base.get_submodule(name).weight
    seen = dequantize_4bit(weight.data, weight.quant_state).float()
    adapter = tmp_path / "adapter"
    model = add_adapter(base, spec, half)
    save_adapter(model, adapter, "safetensors")
    save_quantization(model.get_base_model(), adapter)
    output, _ = merged(tmp_path, adapter, dtype="float32")
    result = load_file(output / "model.safetensors")[f"{name}.weight"]
    assert torch.allclose(result, seen, atol=2e-3, rtol=0)
    other = load_base(tiny_llama, spec, CPU).get_submodule(name).weight
    codes: Any = dequantize_4bit(other.data, other.quant_state)
    assert not torch.allclose(codes, seen, atol=2e-3, rtol=0)  # else this shows nothing


def test_merging_onto_de_quantised_weights_keeps_what_quantising_again_loses(tiny_llama: Path, tmp_path: Path) -> None:
    # T32
    adapter = trained_adapter(tmp_path, tiny_llama, method="qlora")
    output, record = merged(tmp_path, adapter)
    wanted = merge.plan(adapter, None, None, tmp_path / "other")
    probes = [torch.arange(5, 60)[None], torch.arange(200, 260)[None]]
    before = merge.logits_of(merge.adapted(wanted, 300), probes)
    ours = merge.difference(before, merge.logits_of(AutoModelForCausalLM.from_pretrained(output), probes))
    theirs = merge.difference(before, merge.logits_of(merge.adapted(wanted, 300).merge_and_unload(), probes))
    assert ours["max_abs_logit"] < 0.01 * theirs["max_abs_logit"]
    assert ours["mean_kl"] < 0.01 * theirs["mean_kl"]
    onto_16 = merge.merge(merge.plan(adapter, None, "16bit", tmp_path / "sixteen"))["difference"]
    # What the 4 bits cost the base is in this difference, and is said.
    assert onto_16["mean_kl"] > 10 * record["difference"]["mean_kl"]


def test_a_result_in_16_bits_says_what_rounding_cost(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(tmp_path, tiny_llama)
    output, record = merged(tmp_path, adapter, dtype="bfloat16")
    tensors = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert read_json(output / "config.json")["dtype"] == record["dtype"] == "bfloat16"
    assert 1e-5 < record["difference"]["max_abs_logit"] < 0.1
    assert json.loads((output / merge.RECORD).read_text()) == record


def test_the_sum_is_taken_in_float32_and_rounded_once(tiny_llama: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(tmp_path, tiny_llama)
    output, _ = merged(tmp_path, adapter, dtype="bfloat16")
    weights, adapted = load_file(tiny_llama / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    result = load_file(output / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (adapted[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert torch.equal(result[f"{name}.weight"], (weights[f"{name}.weight"] + 2.0 * (b @ a)).bfloat16())


def test_a_merged_model_stops_at_the_end_of_a_turn(tiny_gemma: Path, tmp_path: Path) -> None:  # T50
    """Of itself it would go on to the end of the text, which is another token."""
    tuned = trained_adapter(tmp_path, tiny_gemma)
    tokenizer = AutoTokenizer.from_pretrained(tiny_gemma)
    prompt = tokenizer("What colour is the plum?", return_tensors="pt")["input_ids"]

    def said(folder: Path) -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(folder)
        output = model.generate(input_ids=prompt, do_sample=False, max_new_tokens=6, pad_token_id=0)
        return output[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]

    output, _ = merged(tmp_path, tuned)
    endless = said(output)
    assert len(endless) == 6
    turn_end = endless[2]  # what the model happens to say stands for the end of a turn
    save_generation(AutoModelForCausalLM.from_pretrained(tiny_gemma), [1, turn_end], tuned)
    again, _ = merged(tmp_path / "again", tuned)
    assert AutoModelForCausalLM.from_pretrained(again).generation_config.eos_token_id == [1, turn_end]
    assert said(again) == endless[: endless.index(turn_end) + 1]


def test_the_layers_foreseen_as_quantised_are_those_bitsandbytes_holds(tiny_llama: Path, tiny_gpt2: Path) -> None:
    # T48
    for folder in (tiny_llama, tiny_gpt2):
        loaded = load_base(folder, made_spec(method="qlora"), CPU)
        held = {name for name, module in loaded.named_modules() if type(module).__name__ == "Linear4bit"}
        assert quantizable(AutoModelForCausalLM.from_pretrained(folder)) == held


def _no_adapter(adapter: Path, base: Path, root: Path) -> merge.Merge:
    return merge.plan(base, base, None, root / "out")


def _no_base(adapter: Path, base: Path, root: Path) -> merge.Merge:
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": "org/model"})
    return merge.plan(adapter, None, None, root / "out")


def _base_without_config(adapter: Path, base: Path, root: Path) -> merge.Merge:
    return merge.plan(adapter, root, None, root / "out")


def _nothing_quantised(adapter: Path, base: Path, root: Path) -> merge.Merge:
    return merge.plan(adapter, base, "dequantised", root / "out")


def _quantised_base(adapter: Path, base: Path, root: Path) -> merge.Merge:
    write_json(root / "base" / "config.json", {"quantization_config": {}})
    return merge.plan(adapter, root / "base", None, root / "out")


def _full_output(adapter: Path, base: Path, root: Path) -> merge.Merge:
    return merge.plan(adapter, base, None, adapter)


@pytest.mark.parametrize(
    ("attempt", "kind", "words"),
    [
        (_no_adapter, InputMissing, "no adapter_config.json"),
        (_no_base, InputMissing, "org/model, which is no folder here; name its folder with --base"),
        (_base_without_config, InputMissing, "no config.json"),
        (_nothing_quantised, SpecInvalid, "was not quantised; use 16bit"),
        (_quantised_base, SpecInvalid, "quantised already"),
        (_full_output, Conflict, "something is there already"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_a_weight_is_read(
    attempt: Any, kind: type[JobError], words: str, tiny_llama: Path, tmp_path: Path
) -> None:
    adapter = trained_adapter(tmp_path, tiny_llama)
    with pytest.raises(kind, match=words):
        attempt(adapter, tiny_llama, tmp_path)


def test_an_adapter_of_another_base_leaves_nothing_behind(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(tmp_path, tiny_llama)
    wanted = merge.plan(adapter, tiny_gpt2, None, tmp_path / "out")
    with pytest.raises(IntegrityFailure, match="does not fit"):
        merge.merge(wanted)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_difference(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    adapter = trained_adapter(tmp_path, tiny_llama)
    assert merge.main([str(adapter), "--output", str(tmp_path / "out")]) == 0
    assert "mean KL" in capsys.readouterr().out
    assert merge.main([str(adapter), "--output", str(tmp_path / "out")]) == Conflict.exit_code
    assert "something is there already" in capsys.readouterr().err


def test_peft_reads_the_published_pissa_adapter_on_the_untouched_base(tiny_gpt2: Path, tmp_path: Path) -> None:
    # T47
    adapter = trained_adapter(tmp_path, tiny_gpt2, lora={"init": "pissa"})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_gpt2), str(adapter))
    before = {name: tensor.clone() for name, tensor in load_file(tiny_gpt2 / "model.safetensors").items()}
    after = {name.replace(".base_layer", ""): p for name, p in model.get_base_model().named_parameters()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name in after)
    assert set(before) <= set(after)
