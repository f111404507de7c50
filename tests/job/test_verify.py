"""Verification refuses an adapter that is not what was trained (T21)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from job.errors import IntegrityFailure
from job.evaluation import verify
from job.files import read_json, write_json
from job.training.adapter import save_adapter, trained
from job.training.model import load_base
from tests.job.made import CPU, made_model, made_spec

SPEC = made_spec()


@pytest.fixture
def sealed(tiny_llama: Path, tmp_path: Path) -> Path:
    """An adapter that does something."""
    model = made_model(tiny_llama, SPEC)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    save_adapter(model, tmp_path / "adapter", "both")
    return tmp_path / "adapter"


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def first(tensors: dict[str, torch.Tensor], part: str = "lora_A") -> str:
    return next(name for name in sorted(tensors) if part in name)


def test_a_sound_adapter_passes_and_its_files_agree(sealed: Path) -> None:  # T21
    weights = verify.check_structure(sealed, SPEC)
    assert len(weights) == 28
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({first(t): torch.full_like(t[first(t)], float("nan"))}), "not finite"),
        (lambda t: t.update({first(t): torch.zeros(0, 64)}), "empty"),
        (lambda t: t.update({first(t): torch.zeros(3, 64)}), "rank 4"),
        (lambda t: t.pop(first(t, "lora_B")), "no partner"),
        (lambda t: t.update({first(t): t[first(t)] + 1}), "different tensors"),
        (lambda t: [t.pop(name) for name in list(t)] and t.update({"x": torch.ones(1)}), "no LoRA tensors"),
    ],
    ids=["NaN", "empty tensor", "other rank", "half a pair", "other file disagrees", "no adapter"],
)
def test_a_damaged_adapter_is_refused(sealed: Path, change: Any, words: str) -> None:
    rewrite(sealed, change)
    with pytest.raises(IntegrityFailure, match=words):
        verify.check_structure(sealed, SPEC)


def test_a_rank_by_a_pattern_from_the_beginning_of_a_name_is_the_specs(tiny_llama: Path, tmp_path: Path) -> None:  # T21
    spec = made_spec(lora={"rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}})
    save_adapter(made_model(tiny_llama, spec), tmp_path, "safetensors")
    assert len(verify.check_structure(tmp_path, spec)) == 28


def test_another_base_in_its_config_is_refused(sealed: Path) -> None:
    config = read_json(sealed / "adapter_config.json")
    write_json(sealed / "adapter_config.json", config | {"base_model_name_or_path": "/scratch/model"})
    with pytest.raises(IntegrityFailure, match="base model"):
        verify.check_structure(sealed, SPEC)


def test_tensors_that_stock_peft_would_skip_with_a_warning_are_refused(  # T21
    sealed: Path, tiny_llama: Path
) -> None:
    (sealed / "adapter_model.bin").unlink()
    rewrite(sealed, lambda t: t.update({first(t).replace("layers.0", "layers.7"): t[first(t)].clone(), **_partner(t)}))
    weights = verify.check_structure(sealed, SPEC)
    model = PeftModel.from_pretrained(load_base(tiny_llama, SPEC, CPU), str(sealed))
    with pytest.raises(IntegrityFailure, match="stock PEFT loads other tensors"):
        verify.check_loaded(model, weights)


def _partner(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    name = first(tensors).replace("lora_A", "lora_B")
    return {name.replace("layers.0", "layers.7"): tensors[name].clone()}


def test_other_logits_than_the_trained_models_are_refused(sealed: Path, tiny_llama: Path) -> None:
    model = PeftModel.from_pretrained(load_base(tiny_llama, SPEC, CPU), str(sealed)).eval()
    tokens = torch.randint(5, 300, (12,))
    with torch.no_grad():
        logits = model(input_ids=tokens[None]).logits[0]
    probe = {"tokens.0": tokens, "logits.0": logits}
    assert verify.compare_logits(model, probe, CPU, is_exact=True)["max_abs_difference"] <= 1e-6
    probe["logits.0"] = logits + torch.randn_like(logits) * 1e-3
    with pytest.raises(IntegrityFailure, match="other logits"):
        verify.compare_logits(model, probe, CPU, is_exact=True)
    # What 16 bit may differ by passes there, and a real difference does not.
    assert verify.compare_logits(model, probe, CPU, is_exact=False)["mean_kl"] < 1e-3
    probe["logits.0"] = logits.flip(-1)
    with pytest.raises(IntegrityFailure, match="mean KL"):
        verify.compare_logits(model, probe, CPU, is_exact=False)
