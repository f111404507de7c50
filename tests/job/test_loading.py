"""The lines that load an adapter, as a run prints them and its model card holds them, load what was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from job.loading import loading_code
from job.spec import JobSpec
from job.supervision.results import eval_results, model_card
from job.training.adapter import add_adapter, save_adapter, trained
from job.training.model import load_base, save_quantization
from job.training.new_tokens import Tokens
from launcher.results import Results
from launcher.summary import loading
from tests.job.made import CPU, made_spec

TOKENS = ("<tool>", "<end_tool>")


def padded(base: Path, folder: Path) -> Path:
    """The base with more rows than its tokenizer has tokens, as many models have them."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(512, mean_resizing=False)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def published(spec: JobSpec, base: Path, folder: Path) -> Any:
    """A model whose adapter was moved, and that adapter in a folder."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(list(spec.lora.new_tokens))
    ids = tuple(tokenizer.convert_tokens_to_ids(list(spec.lora.new_tokens)))
    tokens = Tokens(ids, len(tokenizer)) if ids else None
    model = add_adapter(load_base(base, spec, CPU), spec, CPU, tokens)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(model, folder, "safetensors")
    tokenizer.save_pretrained(folder)
    if spec.method == "qlora":
        save_quantization(model.get_base_model(), folder)
    return model


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def logits(model: Any, ids: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        result: Tensor = model(input_ids=ids.to(model.device)).logits.float().cpu()
    return result


@pytest.mark.parametrize("rows", ["as many rows", "padded"])
@pytest.mark.parametrize(
    ("base", "method"), [("tiny_llama", "lora"), ("tiny_qwen", "lora"), ("tiny_gpt2", "lora"), ("tiny_llama", "qlora")]
)
def test_the_printed_lines_load_an_adapter_with_new_tokens(
    base: str, method: str, rows: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(base)
    if rows == "padded":
        folder = padded(folder, tmp_path / "padded")
    spec = made_spec(model=str(folder), method=method, lora={"new_tokens": TOKENS})
    adapter = tmp_path / "adapter"
    model = published(spec, folder, adapter)
    record = eval_results("made", spec, {"skipped": "-"}, {}, {}, {"phases": {"train": 1.0}}, {"worker": 1.0})
    printed = loading(Results(f"file:{adapter}", record))
    card = model_card("made", spec, record).partition("```python\n")[2].partition("```")[0]
    assert card.strip() == printed.replace(repr(str(adapter)), repr("PATH/OF/THIS/FOLDER"))
    found = run(printed)
    ids = torch.tensor([[7, 20, *found["tokenizer"].convert_tokens_to_ids(list(TOKENS)), 9]])
    # Loaded by stock transformers, bitsandbytes packs 4 bits anew on some CPUs and multiplies in bfloat16.
    bound = 0.02 if method == "qlora" else 1e-5
    assert float((logits(found["model"], ids) - logits(model, ids)).abs().max()) < bound
    with model.disable_adapter():
        assert float((logits(found["model"], ids) - logits(model, ids)).abs().max()) > 20 * bound


def test_without_new_tokens_the_embeddings_are_left_alone(tiny_llama: Path, tmp_path: Path) -> None:
    spec = made_spec(model=str(tiny_llama))
    model = published(spec, tiny_llama, tmp_path / "it's here")
    code = loading_code(str(tiny_llama), str(tmp_path / "it's here"), quantized=False, new_tokens=False)
    assert "resize" not in code
    ids = torch.arange(5, 25)[None]
    assert float((logits(run(code)["model"], ids) - logits(model, ids)).abs().max()) < 1e-6
