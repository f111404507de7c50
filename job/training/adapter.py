"""The adapter on a base: putting it there, saving it, loading it. peft does the work.

The base itself is never changed, not even by inits that begin with parts of its weights (first_values.py). So a
checkpoint and the published adapter fit the untouched base, and resuming needs no decomposition that another machine
would compute differently.
"""

import copy
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from job import serving
from job.errors import IntegrityFailure, SpecInvalid
from job.sizing import parts
from job.spec import JobSpec
from job.training.device import Placement
from job.training.first_values import NAME, begin, begun, joined, parted, require_ranks
from job.training.model import empty, recompute
from job.training.new_tokens import Tokens, make_room, rows_of


def add_adapter(base: nn.Module, spec: JobSpec, placement: Placement, tokens: Tokens | None = None) -> PeftModel:
    """Puts a fresh adapter on the base: float32, seeded, and without effect until it is trained.

    Args:
        tokens: which tokens are new; needed where ``lora.new_tokens`` names any.

    Raises:
        SpecInvalid: spec and model do not go together.
    """
    torch.manual_seed(spec.training.seed)
    model = wrapped(base, spec, tokens)
    train_in_float32(model)
    if spec.lora.begins_with_parts:
        begin(model, spec.lora.init)
    if spec.lora.use_dora:
        _measure(model)
    recompute(model.get_base_model(), spec.training.gradient_checkpointing, placement)
    return model


def train_in_float32(model: nn.Module) -> None:
    """What trains is held in float32, whatever the base is: steps of Adam are too small for 16 bits."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        # A norm whose bias trains in float32 needs a weight of the same type.
        if isinstance(module, nn.LayerNorm) and module.bias is not None and module.bias.requires_grad:
            module.weight.data = module.weight.data.float()


@torch.no_grad()
def _measure(model: PeftModel) -> None:
    """DoRA's magnitudes (arXiv:2402.09353, eq. 5) in float32; those that peft takes are rounded to the base's type.

    Raises:
        SpecInvalid: a row of zeros has no direction.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or NAME not in layer.lora_magnitude_vector:
            continue
        dora: Any = layer.lora_magnitude_vector[NAME]
        a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        weight = dequantize_module_weight(layer.get_base_layer()).to(b.device).float()
        norms = dora.get_weight_norm(weight, b @ a, layer.scaling[NAME])
        if not bool((norms > 0).all()):
            raise SpecInvalid(
                f"lora.use_dora: {name.removeprefix('base_model.model.')} has a row of zeros, and DoRA divides by each "
                "row's length; leave the layer out of lora.target_modules, or leave use_dora out"
            )
        dora.weight.data = norms.to(dora.weight.device)


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
    except (TypeError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise SpecInvalid(
            f"lora.target_modules: PEFT cannot adapt these layers of {spec.model.name} ({words})"
        ) from error
    if spec.lora.begins_with_parts:
        require_ranks(model, spec.lora.init)
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
    layers = [(part.r[NAME], part.scaling[NAME]) for part in adapted.modules() if isinstance(part, LoraLayer)]
    serving.check(adapted.peft_config[NAME].to_dict(), spec, layers)
    return parts.with_trained(found, adapted)


def _config(base: Any, spec: JobSpec, tokens: Tokens | None) -> LoraConfig:
    wanted = spec.lora
    targets, saved = _targets(base, spec), _saved(base, spec)
    names = _adapted(base, targets, saved)
    if not names and saved:
        raise SpecInvalid(
            f"lora.modules_to_save: {', '.join(wanted.modules_to_save)}: whole, they leave no layer of "
            "lora.target_modules to adapt; name smaller modules"
        )
    for key, pattern in (("rank_pattern", wanted.rank_pattern), ("alpha_pattern", wanted.alpha_pattern)):
        _refuse_idle(key, pattern, names)
    return LoraConfig(
        r=wanted.r,
        lora_alpha=_plain(wanted.alpha),
        lora_dropout=wanted.dropout,
        target_modules=targets,
        init_lora_weights=wanted.init if wanted.init in ("gaussian", "orthogonal") else True,
        use_rslora=wanted.use_rslora,
        use_dora=wanted.use_dora,
        rank_pattern=dict(wanted.rank_pattern),
        alpha_pattern={name: _plain(alpha) for name, alpha in wanted.alpha_pattern.items()},
        bias=wanted.bias,
        modules_to_save=saved or None,
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


def _saved(base: nn.Module, spec: JobSpec) -> list[str]:
    """Names of the modules that train whole.

    peft takes every module whose name ends in one of these letters, `norm` for `input_layernorm` as well: there the
    modules that are meant are named in full.
    """
    held: set[str] = parts.quantizable(base) if spec.quantized is not None else set()
    found: list[str] = []
    for wanted in spec.lora.modules_to_save:
        meant = [name for name, _ in base.named_modules() if _means([wanted], name)]
        if any(isinstance(base.get_submodule(name), nn.ModuleList | nn.ModuleDict) for name in meant):
            raise SpecInvalid(f"lora.modules_to_save: {wanted} is a list of modules; name modules in it")
        inside = next((one for one in held for name in meant if one == name or one.startswith(f"{name}.")), None)
        if inside is not None:
            raise SpecInvalid(
                f"lora.modules_to_save: {wanted}: qlora holds {inside} in few bits, in which it cannot train; leave "
                "it out, or use method: lora"
            )
        taken = [name for name, _ in base.named_modules() if name.endswith(wanted)]
        found += [wanted] if taken == meant else meant
    return found


def _adapted(base: nn.Module, targets: list[str], saved: list[str]) -> list[str]:
    """Names of the layers that peft will adapt: those that are meant, outside modules that train whole."""
    whole = [name for name, _ in base.named_modules() if _means(saved, name)]
    return [
        name
        for name in parts.linear(base)
        if _means(targets, name) and not any(name == one or name.startswith(f"{one}.") for one in whole)
    ]


def _means(wanted: list[str], name: str) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in wanted)


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
            raise SpecInvalid(f"lora.{key}: {one!r} matches no layer that is adapted; they end in {endings}")


# Saving and loading


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PeftModel, folder: Path, formats: str) -> None:
    """Writes adapter_config.json and the weights as `safetensors`, `bin` or `both`; they fit the untouched base."""
    state, config = joined(model) if begun(model) else None, model.peft_config[NAME]
    model.peft_config[NAME] = _published(model)
    try:
        for safe in {"safetensors": (True,), "bin": (False,), "both": (True, False)}[formats]:
            model.save_pretrained(folder, safe_serialization=safe, save_embedding_layers=False, state_dict=state)
    finally:
        model.peft_config[NAME] = config
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; the run's own card comes with the result


def _published(model: PeftModel) -> Any:
    """The config of the saved adapter; joined with its first values it has twice the rank at the same scale."""
    config: Any = copy.deepcopy(model.peft_config[NAME])
    # peft holds these as a set, which every process would write down in another order.
    config.target_modules = sorted(config.target_modules)
    if not begun(model):
        return config
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r = 2 * config.r
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    config.lora_alpha = _plain(factor * config.lora_alpha)
    config.alpha_pattern = {name: _plain(factor * alpha) for name, alpha in config.alpha_pattern.items()}
    return config


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Gives an adapter in place the weights in a checkpoint: nothing is wrapped twice, nothing initialised again.

    Raises:
        IntegrityFailure: the checkpoint has other tensors than this adapter.
    """
    weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    if begun(model):
        weights = parted(model, weights, folder)
    found = set_peft_model_state_dict(model, weights)
    own = trained(model)  # each tensor once: of tied embeddings and head one name of the two is missing
    lost = [key for key in found.missing_keys if key in own]
    # The bias of a saved module is in the file twice where biases train too, once by a name that nobody loads.
    unknown = [key for key in found.unexpected_keys if ".modules_to_save." not in key]
    if lost or unknown:
        raise IntegrityFailure(
            f"checkpoint {folder.name}: its adapter is not this run's ({len(lost)} tensors missing, "
            f"{len(unknown)} unknown)"
        )
