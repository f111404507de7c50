"""The base model and its adapter: loading, checking, saving. transformers, peft and bitsandbytes do the work."""

import gc
import json
import logging
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from job.errors import IntegrityFailure, SpecInvalid
from job.layout import QUANTIZATION_CONFIG
from job.modelconfig import known_config, not_to_be_built
from job.spec import JobSpec
from job.training.device import DTYPES, Placement

log = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"

BASE_DTYPE = "base_dtype"
"""In QUANTIZATION_CONFIG: the type that the weights had when they were quantised. ``from_dict`` passes over it."""


def empty(folder: Path, name: str) -> Any:
    """The model without weights. Raises SpecInvalid where transformers can build no such model."""
    config = known_config(folder, name)
    try:
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a model's code is as little ours as its config's
        raise not_to_be_built(name, error) from error
    model.tie_weights()  # what replaced the weights took no notice of ties
    return model


def check_targets(folder: Path, spec: JobSpec) -> None:
    """Builds the model without weights and sees that every name in the spec means a layer of it.

    Raises:
        SpecInvalid: `lora.target_modules` or `lora.modules_to_save` names something the model does not have; the
            message lists what there is.
    """
    modules = dict(empty(folder, spec.model.name).named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    targets = spec.lora.target_modules
    if targets != "all-linear":
        _refuse_unmatched("lora.target_modules", targets, linear, "linear layers")
    _refuse_unmatched("lora.modules_to_save", spec.lora.modules_to_save, set(modules), "modules")


def _refuse_unmatched(key: str, names: tuple[str, ...], available: set[str], what: str) -> None:
    missing = [name for name in names if not any(one == name or one.endswith(f".{name}") for one in available)]
    if missing:
        endings = Counter(one.rsplit(".", 1)[-1] for one in available if one)
        offer = ", ".join(sorted(ending for ending in endings if not ending.isdigit()))
        raise SpecInvalid(f"{key}: {', '.join(missing)} matches nothing in this model; its {what} are: {offer}")


def quantization_config(spec: JobSpec, precision: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes holds the base; None for plain LoRA."""
    wanted = spec.quantized
    if wanted is None:
        return None
    if wanted.type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = precision if wanted.compute_dtype == "auto" else DTYPES[wanted.compute_dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=wanted.type,
        bnb_4bit_use_double_quant=wanted.double_quant,
        bnb_4bit_compute_dtype=compute,
    )


def load_base(folder: Path, spec: JobSpec, placement: Placement) -> nn.Module:
    """The frozen base on this rank's device, in its precision or in 4 bits.

    Raises:
        SpecInvalid: pickled weights that torch's restricted unpickler refuses.
        IntegrityFailure: weights that cannot be read, or do not fit the model's config.
    """
    known_config(folder, spec.model.name)
    quantization = quantization_config(spec, placement.precision)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=placement.precision,
            quantization_config=quantization,
            device_map={"": placement.device},
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except pickle.UnpicklingError as error:
        raise SpecInvalid(
            f"model {spec.model.name}: its pickled weights are refused by torch's restricted unpickler "
            f"({str(error).splitlines()[0]}); convert them to safetensors"
        ) from error
    except (ValueError, ImportError) as error:
        words = " ".join(str(error).split())[:200]
        raise SpecInvalid(
            f"model {spec.model.name}: transformers cannot load it as it is asked to ({words})"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # transformers' word for weights of another shape
            raise
        raise IntegrityFailure(
            f"model {spec.model.name}: its weights do not fit its config.json (tensors of another shape); "
            "fetch the model again"
        ) from error
    missing = sorted(found["missing_keys"]) + [str(key) for key in found["mismatched_keys"]]
    if missing:
        raise IntegrityFailure(
            f"model {spec.model.name}: {len(missing)} tensors of the model are not in its weight files or have "
            f"another shape, first {missing[0]}; fetch the model again"
        )
    keep_unpacked(model)
    if quantization is not None and placement.device.type == "cpu":
        _let_go_of_the_file(model)
    model.requires_grad_(False)
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


def keep_unpacked(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights anew at the first evaluation on a CPU with AVX512-BF16.

    The packed product has no backward pass, so a training that goes on after it would pass no gradient through; and it
    computes in bfloat16 whatever the type of its input.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _let_go_of_the_file(model: nn.Module) -> None:
    """Copies what was not quantised: one tensor that is still a view of the mapped weight file keeps all of it here."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.clone()
    gc.collect()


def recompute(core: Any, wanted: bool | str, placement: Placement) -> None:
    """Switches recomputation on where the spec, or on a GPU nothing in it, asks for it.

    Not by prepare_model_for_kbit_training: that would make embeddings and head float32, gigabytes on a large model.
    """
    if wanted is False or (wanted == "auto" and placement.device.type != "cuda"):
        return
    if core.supports_gradient_checkpointing:
        core.activation_checkpointing_enable({"use_reentrant": False})
    elif wanted == "auto":
        log.info("this model cannot recompute its activations; going on without")
    else:
        raise SpecInvalid("training.gradient_checkpointing: this model cannot recompute its activations; leave it out")


def save_quantization(model: Any, folder: Path) -> None:
    """Writes how the base was quantised, for ``BitsAndBytesConfig.from_dict``, and of which type it was before.

    Weights rounded to another type first land on other codes.
    """
    config: BitsAndBytesConfig = model.config.quantization_config
    found = config.to_dict() | {BASE_DTYPE: str(model.config.dtype).removeprefix("torch.")}
    (folder / QUANTIZATION_CONFIG).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def save_generation(model: Any, end_ids: Sequence[int], folder: Path) -> None:
    """Writes the base's generation_config.json with the tokens that end the answers trained on.

    Where to stop was learnt with the rest; the base's own word for it may be another token.
    """
    # Without the word that it was made from config.json: older transformers would then ask that for the tokens.
    own = json.loads(model.generation_config.to_json_string(ignore_metadata=True))
    found = own | {"eos_token_id": list(end_ids)}
    (folder / GENERATION_CONFIG).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def own_dropout(model: Any) -> float:
    """The base's own dropout (GPT-2 has 0.1), which is on in training: by its layers, and by its config.

    Some models drop by a function with a number out of the config; a classifier's or a summary's they do not use here.
    """
    layers = [m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" not in n]
    config = model.config.get_text_config().to_dict()
    numbers = [
        value
        for key, value in config.items()
        if "drop" in key and not key.startswith(("classif", "summary")) and isinstance(value, int | float)
    ]
    return max(map(float, [*layers, *numbers]), default=0.0)
