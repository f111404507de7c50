"""Inits that begin with parts of the base's weights (PiSSA, OLoRA), with the base left as it is.

What trains is W + s (B A - B0 A0): the first values stand beside the adapter as a second, fixed one. Saved, both are
one adapter of twice the rank, [B, -B0] [A; A0], and that is also how they are multiplied: in 16 bits two products that
all but cancel would each be rounded by more than is learned.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from job.errors import IntegrityFailure, SpecInvalid

NAME = "default"
FIRST = "first"
"""The fixed adapter that takes the first values away again."""

_FULL = 1024
"""Smallest side of a matrix up to which it is decomposed whole; above, its greatest singular values are looked for."""


def begin(model: PeftModel, init: str) -> None:
    """Gives every adapted layer its first values, and what takes them away again."""
    for layer in layers(model):
        _begin(layer, *_parts(layer, init))


def require_ranks(model: PeftModel, init: str) -> None:
    """Raises SpecInvalid where a layer has fewer directions than its rank; the model may be without weights."""
    for layer in layers(model):
        side, rank = min(layer.in_features, layer.out_features), layer.r[NAME]
        if rank > side:
            raise SpecInvalid(f"lora.init: {init} takes {rank} directions of a matrix of {side}; lower lora.r")


def layers(model: nn.Module) -> Iterator[Any]:
    """The adapted layers."""
    return (module for module in model.modules() if isinstance(module, LoraLayer))


@torch.no_grad()
def _parts(layer: Any, init: str) -> tuple[Tensor, Tensor]:
    """A ``[rank, in]`` and B ``[out, rank]`` such that scale * B A is a part of the layer's weight.

    PiSSA takes the greatest singular values (arXiv:2404.02948, eq. 2 and 3), OLoRA the first columns of a QR
    decomposition (arXiv:2406.01775).
    """
    base = layer.get_base_layer()
    weight = (base.weight.t() if isinstance(base, Conv1D) else base.weight).float()
    rank = layer.r[NAME]
    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if min(weight.shape) <= _FULL:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=min(rank + 16, min(weight.shape)), niter=4)
        vh = v.t()
    root = (s[:rank] / layer.scaling[NAME]).sqrt()
    return (root[:, None] * vh[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


@torch.no_grad()
def _begin(layer: Any, a: Tensor, b: Tensor) -> None:
    """Has a layer's adapter begin with B A, and a fixed one beside it take B A away."""
    layer.lora_A[NAME].weight.copy_(a)
    layer.lora_B[NAME].weight.copy_(b)
    rank, alpha = layer.r[NAME], layer.lora_alpha[NAME]
    plain = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=layer.use_rslora[NAME], init_lora_weights=False)
    layer.update_layer(FIRST, rank, alpha, config=plain)
    for part, values in ((layer.lora_A[FIRST], a), (layer.lora_B[FIRST], -b)):
        # A buffer is what peft cannot switch to trainable, and what no optimizer or shard takes for a weight.
        del part.weight
        part.register_buffer("weight", values.clone(), persistent=False)
    layer.lora_variant[NAME] = _Joined()


class _Joined(LoraVariant):  # type: ignore[misc]
    """How a layer with first values computes: [B, -B0] times what A and A0 make of its input."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The base's ``result`` with the adapter's part."""
        (a, first_a), (b, first_b) = (
            [part[name] for name in (active_adapter, FIRST)] for part in (module.lora_A, module.lora_B)
        )
        dropout = module.lora_dropout[active_adapter]
        if isinstance(dropout, nn.Identity) or not module.training:
            narrow = functional.linear(x, torch.cat([a.weight, first_a.weight]))
        else:
            narrow = torch.cat([a(dropout(x)), first_a(x)], -1)  # what is taken away is not to be trained
        wide = torch.cat([b.weight, first_b.weight], 1)
        output: Tensor = result + functional.linear(narrow, wide) * module.scaling[active_adapter]
        return output


def begun(model: PeftModel) -> bool:
    """Whether first values stand beside the adapter."""
    return any(FIRST in layer.lora_A for layer in layers(model))


def joined(model: PeftModel) -> dict[str, Tensor]:
    """The model's state with [A; A0] and [B, -B0] in the places of A and B."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, first in model.named_buffers():
        if name.endswith(f".{FIRST}.weight"):
            name = name.replace(f".{FIRST}.weight", f".{NAME}.weight")
            now = state[name]
            state[name] = torch.cat([now.float(), first.to(now.device)], dim=0 if ".lora_A." in name else 1)
    return state


@torch.no_grad()
def parted(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """A checkpoint's weights without the first values, which go to their own place in the model."""
    places: dict[str, nn.Module] = dict(model.named_modules())
    own = {}
    for name, tensor in weights.items():
        part = next((part for part in (".lora_A.", ".lora_B.") if part in name), None)
        if part is None:
            own[name] = tensor
            continue
        place: Any = places.get(name.removesuffix(".weight") + f".{FIRST}")
        dim = 0 if part == ".lora_A." else 1
        if place is None or tensor.shape[dim] != 2 * place.weight.shape[dim]:
            raise IntegrityFailure(f"checkpoint {folder.name}: {name} is not of this run's rank")
        mine, first = tensor.chunk(2, dim)
        own[name] = mine.contiguous()
        place.weight.copy_(first)
    return own
