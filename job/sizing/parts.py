"""What a model is made of, and what becomes of each kind: trained, quantised, or left alone. Known before it is loaded.

The counts come from a model without weights that goes through the same hands as the real one: peft puts the adapter on
it, and transformers' own rule says which layers bitsandbytes will hold.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.utils import transformers_weight_conversion as conversion
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from job.errors import SpecInvalid
from job.spec import JobSpec

KINDS = ("attention", "mlp", "experts", "router", "vision", "embeddings", "head", "norm", "other")

_OUTSIDE = ("embeddings", "head")
"""What is no hidden layer."""

_TOWERS = re.compile(
    r"(^|\.)(vision\w*|visual|audio\w*|speech\w*|image_\w+|embed_vision|embed_audio|multi_modal_projector|mm_projector"
    r"|connector|aligner)(\.|$)"
)
_ROUTERS = re.compile(r"(^|\.)(gate|router|\w+_router|shared_expert_gate|wg)(\.|$)")
_WORDS = (
    ("mlp", re.compile(r"(^|\.)shared_experts?(\.|$)")),  # every token passes through it
    ("experts", re.compile(r"(^|\.)(experts|\w*_experts?)(\.|$)")),
    ("norm", re.compile(r"(^|\.)(\w*norm\w*|ln_\w+|ln\d*)(\.|$)")),
    ("attention", re.compile(r"attn|attention|(^|\.)[qkvo]_proj(\.|$)")),
    ("mlp", re.compile(r"mlp|ffn|feed_forward|(^|\.)(fc\d?|gate_proj|up_proj|down_proj|gate_up_proj|dense\w*)(\.|$)")),
)


@dataclass(frozen=True)
class Part:
    """Parameters of one kind."""

    total: int = 0
    """Of the base."""
    quantized: int = 0
    trained: int = 0
    """Of the adapter, saved modules and biases, which train."""

    @property
    def left(self) -> int:
        """Of the base, in the precision of the run."""
        return self.total - self.quantized


def kind_of(name: str) -> str:
    """The kind of a parameter or module of a decoder, by its name; embeddings and head are told by the model."""
    if _TOWERS.search(name):
        return "vision"
    if _ROUTERS.search(name):
        return "router"
    return next((kind for kind, words in _WORDS if words.search(name)), "other")


def linear(model: nn.Module) -> list[str]:
    """Names of the linear layers, quantised ones too."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def apart(model: nn.Module) -> list[str]:
    """Linear layers that ``all-linear`` leaves alone: routers, and towers for images or sound."""
    return [name for name in linear(model) if kind_of(name) in ("router", "vision")]


def heads(model: Any) -> list[str]:
    """The name of the output head."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if head is not None and module is head]


def fused_names(model: Any) -> set[str]:
    """Names of layers under which peft adapts fused experts and their router instead, where it does so.

    Mixtures of experts used to be lists of linear layers; peft still translates the old names.
    """
    patterns = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    names = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {})
    return set(names.get(patterns.get(model.config.model_type), {}))


def quantizable(model: Any) -> set[str]:
    """Names of the layers that bitsandbytes will hold: plain linear ones, without head and tied weights."""
    spared = [*get_keys_to_not_convert(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    return {
        name
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear) and should_convert_module(name, spared)
    }


def count(model: Any, spec: JobSpec) -> dict[str, Part]:
    """The base's parameters by kind, of a model without weights that has no adapter yet."""
    held = quantizable(model) if spec.quantized is not None else set()
    found = dict.fromkeys(KINDS, Part())
    for name, kind, parameter in _parameters(model):
        size, part = parameter.numel(), found[kind]
        quantized = size if name.removesuffix(".weight") in held and name.endswith(".weight") else 0
        found[kind] = Part(part.total + size, part.quantized + quantized, part.trained)
    return {kind: part for kind, part in found.items() if part.total}


def with_trained(parts: dict[str, Part], model: Any) -> dict[str, Part]:
    """The same with what trains, out of the model in peft's wrapper."""
    found = dict(parts)
    for _, kind, parameter in _parameters(model.get_base_model()):
        if parameter.requires_grad:
            part = found.get(kind, Part())
            found[kind] = Part(part.total, part.quantized, part.trained + parameter.numel())
    return found


def _parameters(model: Any) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Every parameter once, with its kind."""
    kinds: dict[int, str] = {}
    for part, kind in ((model.get_output_embeddings(), "head"), (model.get_input_embeddings(), "embeddings")):
        kinds |= {id(parameter): kind for parameter in (part.parameters() if part is not None else ())}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        kind = kinds.get(id(parameter)) or ("embeddings" if id(parameter) in tables else kind_of(name))
        yield name, kind, parameter


def check(parts: dict[str, Part], spec: JobSpec) -> None:
    """Refuses QLoRA that would leave too much of the hidden layers as it is.

    Raises:
        SpecInvalid: names the kinds.
    """
    if spec.quantized is None:
        return
    hidden = {kind: part for kind, part in parts.items() if kind not in _OUTSIDE}
    total, left = sum(part.total for part in hidden.values()), sum(part.left for part in hidden.values())
    limit = spec.quantized.max_unquantized
    if total and left > limit * total:
        kinds = ", ".join(f"{kind} {part.left:,}" for kind, part in hidden.items() if part.left > 0.01 * total)
        raise SpecInvalid(
            f"method: qlora would quantise only {1 - left / total:.0%} of the hidden layers' parameters; left in "
            f"16 bits: {kinds}. bitsandbytes holds linear layers only. Use method: lora with the memory for it, or "
            f"raise quantization.max_unquantized above {left / total:.2f}"
        )


def record(parts: dict[str, Part]) -> dict[str, dict[str, int]]:
    """For performance.json."""
    return {
        kind: {"parameters": part.total, "quantized": part.quantized, "trained": part.trained}
        for kind, part in parts.items()
    }


def lines(parts: dict[str, Part]) -> Iterator[str]:
    """For people: a line for each kind."""
    for kind, part in parts.items():
        words = [f"{part.total:,} parameters"]
        words += [f"{part.quantized:,} quantised"] if part.quantized else []
        words += [f"{part.trained:,} trained"] if part.trained else []
        yield f"{kind}: {', '.join(words)}"
