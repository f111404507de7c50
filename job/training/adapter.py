"""The adapter on a base: putting it there, saving it, loading it. peft does the work.

The base itself is never changed. Inits that begin with parts of the base's weights (PiSSA, OLoRA) are trained as
W + s (B A - B0 A0), the first values standing beside the adapter as a second, fixed one; saved, both are one adapter of
twice the rank, [B, -B0] [A; A0]. So a checkpoint and the published adapter fit the untouched base, and resuming needs
no decomposition that another machine would compute differently.
"""

import copy
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from job import serving
from job.errors import IntegrityFailure, SpecInvalid
from job.sizing import parts
from job.spec import JobSpec
from job.training.device import Placement
from job.training.model import empty, recompute
from job.training.new_tokens import Tokens, make_room, rows_of

NAME = "default"
FIRST = "first"
"""The fixed adapter that takes the first values away again."""

_FULL = 1024
"""Smallest side of a matrix up to which it is decomposed whole; above, its greatest singular values are looked for."""


def add_adapter(base: nn.Module, spec: JobSpec, placement: Placement, tokens: Tokens | None = None) -> PeftModel:
    """Puts a fresh adapter on the base: float32, seeded, and without effect until it is trained.

    Args:
        tokens: which tokens are new; needed where ``lora.new_tokens`` names any.

    Raises:
        SpecInvalid: spec and model do not go together.
    """
    torch.manual_seed(spec.training.seed)
    model = wrapped(base, spec, tokens)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        # A norm whose bias trains in float32 needs a weight of the same type.
        if isinstance(module, nn.LayerNorm) and module.bias is not None and module.bias.requires_grad:
            module.weight.data = module.weight.data.float()
    if spec.lora.init in ("pissa", "olora"):
        for layer in _layers(model):
            _begin(layer, *_parts(layer, spec.lora.init))
    recompute(model.get_base_model(), spec.training.gradient_checkpointing, placement)
    return model


def wrapped(base: nn.Module, spec: JobSpec, tokens: Tokens | None = None) -> PeftModel:
    """The base, also one without weights, in peft's wrapper, with room for new tokens.

    Raises:
        SpecInvalid: spec and model do not go together.
    """
    if tokens is not None:
        make_room(base, tokens.vocabulary)
    config = _config(base, spec, tokens)
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        words = " ".join(str(error).split())[:200]
        raise SpecInvalid(
            f"lora.target_modules: PEFT cannot adapt these layers of {spec.model.name} ({words})"
        ) from error
    config.base_model_name_or_path = spec.model.name
    config.revision = spec.model.revision
    return model


def foreseen(folder: Path, spec: JobSpec, tokens: Tokens | None = None) -> dict[str, parts.Part]:
    """What will be trained, quantised and left alone, by kind, before a weight is loaded.

    Raises:
        SpecInvalid: QLoRA would leave too much as it is, or who is to serve the adapter cannot.
    """
    model = empty(folder, spec.model.name)
    if tokens is not None:
        make_room(model, tokens.vocabulary)
    found = parts.count(model, spec)
    parts.check(found, spec)
    model.requires_grad_(False)
    with init_empty_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft says the same when the real model is wrapped
        adapted = wrapped(model, spec, tokens)
    serving.check(_published(adapted).to_dict(), spec)
    return parts.with_trained(found, adapted)


def _config(base: Any, spec: JobSpec, tokens: Tokens | None) -> LoraConfig:
    wanted = spec.lora
    if wanted.init == "orthogonal" and any(rank % 2 for rank in (wanted.r, *wanted.rank_pattern.values())):
        raise SpecInvalid("lora.init: orthogonal needs even ranks; change lora.r or lora.rank_pattern")
    names = parts.linear(base)
    for key, pattern in (("rank_pattern", wanted.rank_pattern), ("alpha_pattern", wanted.alpha_pattern)):
        _refuse_idle(key, pattern, names)
    return LoraConfig(
        r=wanted.r,
        lora_alpha=_plain(wanted.alpha),
        lora_dropout=wanted.dropout,
        target_modules=_targets(base, spec),
        init_lora_weights=wanted.init if wanted.init in ("gaussian", "orthogonal") else True,
        use_rslora=wanted.use_rslora,
        use_dora=wanted.use_dora,
        rank_pattern=dict(wanted.rank_pattern),
        alpha_pattern={name: _plain(alpha) for name, alpha in wanted.alpha_pattern.items()},
        bias=wanted.bias,
        modules_to_save=list(wanted.modules_to_save) or None,
        trainable_token_indices=rows_of(base, spec, tokens),
        task_type="CAUSAL_LM",
    )


def _targets(base: Any, spec: JobSpec) -> list[str]:
    """Names of the layers to adapt.

    ``all-linear`` is resolved here: peft's own would take routers and towers for images too, and of some mixtures of
    experts the fused experts along with their router.
    """
    fused, wanted = parts.fused_names(base), spec.lora.target_modules
    if wanted != "all-linear":
        if taken := [name for name in wanted if name.rsplit(".", 1)[-1] in fused]:
            raise SpecInvalid(
                f"lora.target_modules: {', '.join(taken)}: of a {base.config.model_type} peft would adapt the experts "
                "or the router, which are no linear layers, under this name; leave it out"
            )
        return list(wanted)
    spared = {*parts.apart(base), *parts.heads(base)}
    names = [name for name in parts.linear(base) if name not in spared and name.rsplit(".", 1)[-1] not in fused]
    if not names:
        raise SpecInvalid("lora.target_modules: all-linear finds no linear layer in this model; name layers of it")
    return names


def _plain(alpha: float) -> Any:
    """A whole number as such: some servers read nothing else."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _refuse_idle(key: str, pattern: dict[str, Any], names: list[str]) -> None:
    for one in pattern:
        try:
            found = any(re.match(rf"(.*\.)?({one})$", name) for name in names)
        except re.error as error:
            raise SpecInvalid(f"lora.{key}: {one!r} is no regular expression ({error})") from None
        if not found:
            endings = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names} - {""}))
            raise SpecInvalid(f"lora.{key}: {one!r} matches no linear layer of this model; they end in {endings}")


# First values that are parts of the base


def _layers(model: PeftModel) -> Iterator[Any]:
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
    if rank > min(weight.shape):
        raise SpecInvalid(f"lora.init: {init} takes {rank} directions of a matrix of {min(weight.shape)}; lower lora.r")
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
    layer.set_adapter([NAME, FIRST])


def _begun(model: PeftModel) -> bool:
    return any(FIRST in layer.lora_A for layer in _layers(model))


# Saving and loading


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PeftModel, folder: Path, formats: str) -> None:
    """Writes adapter_config.json and the weights as `safetensors`, `bin` or `both`; they fit the untouched base."""
    state, config = _joined(model) if _begun(model) else None, model.peft_config[NAME]
    model.peft_config[NAME] = _published(model)
    try:
        for safe in {"safetensors": (True,), "bin": (False,), "both": (True, False)}[formats]:
            model.save_pretrained(folder, safe_serialization=safe, save_embedding_layers=False, state_dict=state)
    finally:
        model.peft_config[NAME] = config
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; the run's own card comes with the result


def _joined(model: PeftModel) -> dict[str, Tensor]:
    """The model's state with [A; A0] and [B, -B0] in the places of A and B."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, first in model.named_buffers():
        if name.endswith(f".{FIRST}.weight"):
            name = name.replace(f".{FIRST}.weight", f".{NAME}.weight")
            now = state[name]
            state[name] = torch.cat([now.float(), first.to(now.device)], dim=0 if ".lora_A." in name else 1)
    return state


def _published(model: PeftModel) -> Any:
    """The config of the saved adapter; joined with its first values it has twice the rank at the same scale."""
    config: Any = model.peft_config[NAME]
    if not _begun(model):
        return config
    double = copy.deepcopy(config)
    factor = math.sqrt(2) if config.use_rslora else 2
    double.r = 2 * config.r
    double.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    double.lora_alpha = _plain(factor * config.lora_alpha)
    double.alpha_pattern = {name: _plain(factor * alpha) for name, alpha in config.alpha_pattern.items()}
    return double


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Gives an adapter in place the weights in a checkpoint: nothing is wrapped twice, nothing initialised again.

    Raises:
        IntegrityFailure: the checkpoint has other tensors than this adapter.
    """
    weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    if _begun(model):
        weights = _parted(model, weights, folder)
    found = set_peft_model_state_dict(model, weights)
    lost = [
        key
        for key in found.missing_keys
        if f".{FIRST}." not in key and ("lora_" in key or "modules_to_save" in key or "trainable_tokens_delta" in key)
    ]
    if lost or found.unexpected_keys:
        raise IntegrityFailure(
            f"checkpoint {folder.name}: its adapter is not this run's ({len(lost)} tensors missing, "
            f"{len(found.unexpected_keys)} unknown)"
        )


@torch.no_grad()
def _parted(model: PeftModel, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
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
