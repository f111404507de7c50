"""``python -m job.training.merge``: adapter and base become one model, computed in float32, never quantised again.

B A is added to the weights layer by layer in float32 and only then rounded to the type of the result. Onto which
weights is the user's choice: those of the base as it is stored, or, for QLoRA, those that the training saw, which are
the quantised ones de-quantised. PEFT's own ``merge_and_unload`` on a 4-bit base quantises the sum once more and can
round away what was learned. What the result differs by from the adapter on the base it was trained on is measured.
"""

import argparse
import logging
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as functional
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from job.errors import Conflict, InputMissing, IntegrityFailure, JobError, SpecInvalid
from job.evaluation.verify import check_loaded
from job.exits import ExitCode
from job.files import read_json, sealing, write_json
from job.layout import ADAPTER_CONFIG, QUANTIZATION_CONFIG
from job.sizing.parts import quantizable
from job.training.device import DTYPES
from job.training.model import BASE_DTYPE, GENERATION_CONFIG, keep_unpacked
from job.training.new_tokens import make_room

log = logging.getLogger("job")

RECORD = "merge.json"
ONTO = ("16bit", "dequantised")

PROBES = (
    "The capital of France is Paris, and the river that runs through it is the",
    "def mean(values):\n    return sum(values) / len(values)\n\nprint(mean([1, 2, 3]))",
    "Natalia sold 48 clips in April and half as many in May. Altogether she sold",
    "昨日は雨が降っていたので、家で本を読んで過ごしました。",
)
"""Texts on which the predictions of adapter and merged model are compared."""


@dataclass(frozen=True)
class Merge:
    """What is merged, onto what, and where the result goes."""

    adapter: Path
    base: Path
    onto: str
    """`16bit`: the base as it is stored. `dequantised`: its weights as QLoRA saw them."""
    output: Path
    dtype: torch.dtype | None = None
    """Of the result; None: the base's."""


@dataclass(frozen=True)
class Quantised:
    """How the base was held while the adapter trained."""

    config: BitsAndBytesConfig
    loaded: torch.dtype | None
    """What its weights were rounded to before they were quantised; None: they were not."""


def plan(adapter: Path, base: Path | None, onto: str | None, output: Path, dtype: str | None = None) -> Merge:
    """What to do, with what the user left out filled in.

    Raises:
        InputMissing: there is no adapter, or no base.
        SpecInvalid: the adapter cannot be merged like this.
        Conflict: something stands where the result would go.
    """
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise InputMissing(
            f"{adapter}: no {ADAPTER_CONFIG} in it; name the folder of a finished run, or of an adapter (a run on the "
            "cluster is fetched with tunejob results RUN --download DIR)"
        )
    if base is None:
        name = str(read_json(adapter / ADAPTER_CONFIG)["base_model_name_or_path"])
        base = Path(name)
        if not (base / "config.json").is_file():
            raise InputMissing(f"the adapter's base is {name}, which is no folder here; name its folder with --base")
    if not (base / "config.json").is_file():
        raise InputMissing(f"--base {base}: no config.json in it; name the folder of the base model")
    if "quantization_config" in read_json(base / "config.json"):
        raise SpecInvalid(f"--base {base}: its weights are quantised already; name the model it was made from")
    is_quantised = (adapter / QUANTIZATION_CONFIG).is_file()
    if onto == "dequantised" and not is_quantised:
        raise SpecInvalid("--onto dequantised: the adapter was trained on a base that was not quantised; use 16bit")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise Conflict(f"--output {output}: something is there already; name a folder that is not")
    chosen = onto or ("dequantised" if is_quantised else "16bit")
    return Merge(adapter, base, chosen, output, DTYPES[dtype] if dtype else None)


def merge(wanted: Merge) -> dict[str, Any]:
    """Writes the merged model with tokenizer, chat template and generation config; the record that goes with it.

    One model at a time is in memory, in the base's own precision.

    Raises:
        IntegrityFailure: the adapter's tensors do not fit the base, or the result computes no numbers.
    """
    tokenizer = _tokenizer(wanted)
    probes = [tokenizer(text, return_tensors="pt")["input_ids"][:, :64] for text in PROBES]
    reference = adapted(wanted, len(tokenizer))
    before = logits_of(reference, probes)
    _empty(reference)
    wanted.output.parent.mkdir(parents=True, exist_ok=True)
    with sealing(wanted.output) as scratch:
        model = merged(wanted, len(tokenizer))
        _write(model, tokenizer, wanted, scratch)
        _empty(model)
        result = AutoModelForCausalLM.from_pretrained(scratch, dtype="auto", local_files_only=True)
        found = difference(before, logits_of(result, probes))
        record = {
            "adapter": read_json(wanted.adapter / ADAPTER_CONFIG),
            "onto": wanted.onto,
            "dtype": str(result.dtype).removeprefix("torch."),
            "difference": found,
        }
        if not found["mean_kl"] < float("inf"):
            raise IntegrityFailure("the merged model computes no numbers; the adapter or the base is broken")
        write_json(scratch / RECORD, record)
    return record


def _empty(model: nn.Module) -> None:
    """Frees a model's weights at once; modules refer to each other in circles and would stay until collected."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype)


def _tokenizer(wanted: Merge) -> Any:
    """That of the adapter, which knows new tokens and the chat template of the training; the base's without."""
    has_own = any((wanted.adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return AutoTokenizer.from_pretrained(wanted.adapter if has_own else wanted.base, local_files_only=True)


def adapted(wanted: Merge, vocabulary: int) -> PeftModel:
    """The adapter on the base that it was trained on: the reference.

    Args:
        vocabulary: tokens of the adapter's tokenizer.

    Raises:
        IntegrityFailure: the adapter's tensors do not fit the base.
    """
    quantised = _quantised(wanted)
    base = AutoModelForCausalLM.from_pretrained(
        wanted.base,
        dtype="auto" if quantised is None or quantised.loaded is None else quantised.loaded,
        quantization_config=None if quantised is None else quantised.config,
        device_map={"": "cpu"},
        local_files_only=True,
    )
    keep_unpacked(base)
    return _with_adapter(base, wanted, vocabulary)


def _with_adapter(base: Any, wanted: Merge, vocabulary: int) -> PeftModel:
    if read_json(wanted.adapter / ADAPTER_CONFIG).get("trainable_token_indices"):
        make_room(base, vocabulary)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft only warns of, check_loaded refuses
            model = PeftModel.from_pretrained(base, str(wanted.adapter))
    except (ValueError, TypeError, RuntimeError) as error:  # no layer of such a name, or one of another kind or shape
        words = " ".join(str(error).split())[:300]
        raise IntegrityFailure(f"{wanted.adapter}: the adapter does not fit {wanted.base} ({words})") from error
    check_loaded(model, load_peft_weights(str(wanted.adapter), device="cpu"))
    return model


def _quantised(wanted: Merge) -> Quantised | None:
    path = wanted.adapter / QUANTIZATION_CONFIG
    if not path.is_file():
        return None
    found = read_json(path)
    name = found.pop(BASE_DTYPE, None)
    config: BitsAndBytesConfig = BitsAndBytesConfig.from_dict(found)
    if name is None:  # others' adapters, and older ones; as a rule a base computes in the type that it is loaded in
        return Quantised(config, None if config.load_in_8bit else config.bnb_4bit_compute_dtype)
    return Quantised(config, DTYPES[name])


@torch.no_grad()
def merged(wanted: Merge, vocabulary: int) -> nn.Module:
    """The base with the adapter added to its weights, or to what quantising leaves of them.

    Raises:
        IntegrityFailure: the adapter's tensors do not fit the base.
    """
    # Rounded to the type of the result only at the end: from rounded weights, quantising would come to other codes.
    base = AutoModelForCausalLM.from_pretrained(wanted.base, dtype="auto", local_files_only=True)
    if wanted.dtype == torch.float32:
        base.float()
    quantised = _quantised(wanted) if wanted.onto == "dequantised" else None
    names = quantizable(base) if quantised is not None else set()
    held = {id(module) for name, module in base.named_modules() if name in names}
    types = {name: _type_of_result(base, name, parameter, wanted) for name, parameter in base.named_parameters()}
    model = _with_adapter(base, wanted, vocabulary)
    users = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    for module in model.modules():
        core: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if isinstance(module, LoraLayer) or id(module) in held:
            if users[id(core.weight)] > 1:  # tied: what is added here must not be added to the other layer too
                core.weight = nn.Parameter(core.weight.data.clone(), requires_grad=False)
            kept = core.weight.dtype if wanted.dtype is None else wanted.dtype
            core.weight.data = _seen(core, quantised) if id(core) in held else core.weight.data.float()
            held.discard(id(core))  # an adapted layer is met again as a module of its own
            if isinstance(module, LoraLayer):
                module.merge()
            core.weight.data = core.weight.data.to(kept)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that layers are merged already is as it should be
        result: Any = model.merge_and_unload()
    for name, parameter in result.named_parameters():
        parameter.data = parameter.data.to(types.get(name, wanted.dtype or parameter.dtype))
    head = result.get_output_embeddings()
    if head is not None and head.weight.data_ptr() != result.get_input_embeddings().weight.data_ptr():
        result.config.tie_word_embeddings = False  # one of the two was trained apart
    return result  # type: ignore[no-any-return]


def _type_of_result(base: Any, name: str, parameter: Tensor, wanted: Merge) -> torch.dtype:
    """That which was asked for, but for what the model's code wants in float32 whatever the rest is."""
    spared = {*(base._keep_in_fp32_modules or ()), *(base._keep_in_fp32_modules_strict or ())}
    if wanted.dtype is None or any(part in name for part in spared):
        return parameter.dtype
    return wanted.dtype


def _seen(layer: Any, quantised: Any) -> Tensor:
    """A layer's weight as QLoRA's forward sees it, float32, in the layer's own orientation."""
    weight = layer.weight.data.t() if isinstance(layer, Conv1D) else layer.weight.data
    weight = weight.to(quantised.loaded or weight.dtype)
    back: Tensor
    if quantised.config.load_in_8bit:
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        back = codes.float() * (scales.float()[:, None] / 127.0)
    else:
        held = bnb.nn.Params4bit(
            weight.contiguous(),
            requires_grad=False,
            quant_type=quantised.config.bnb_4bit_quant_type,
            compress_statistics=quantised.config.bnb_4bit_use_double_quant,
        ).to("cpu")
        back = bnb.functional.dequantize_4bit(held.data, held.quant_state).float()
    return back.t().contiguous() if isinstance(layer, Conv1D) else back


def _write(model: Any, tokenizer: Any, wanted: Merge, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)
    for source in (wanted.base, wanted.adapter):  # the adapter's word on where to stop is the later one
        if (source / GENERATION_CONFIG).is_file():
            shutil.copyfile(source / GENERATION_CONFIG, folder / GENERATION_CONFIG)


@torch.no_grad()
def logits_of(model: Any, probes: Sequence[Tensor]) -> list[Tensor]:
    """float32 ``[tokens, vocabulary]`` for each probe."""
    model.eval()
    return [model(input_ids=probe, use_cache=False).logits[0].float() for probe in probes]


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> dict[str, Any]:
    """How far predictions lie apart: mean KL divergence (nats), largest difference of a logit, equal first choices."""
    largest = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    pairs = [(functional.log_softmax(a, -1), functional.log_softmax(b, -1)) for a, b in zip(before, after, strict=True)]
    kl = torch.cat([functional.kl_div(q, p, log_target=True, reduction="none").sum(-1) for p, q in pairs])
    same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs])
    return {
        "mean_kl": max(float(kl.mean()), 0.0),
        "max_abs_logit": largest,
        "same_first_choice": float(same.float().mean()),
        "tokens": len(kl),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The process that ``tunejob merge`` starts."""
    parser = argparse.ArgumentParser(prog="python -m job.training.merge")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--onto", choices=ONTO)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("transformers", "peft", "bitsandbytes", "accelerate"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        wanted = plan(chosen.adapter, chosen.base, chosen.onto, chosen.output, chosen.dtype)
        log.info("merging onto the %s weights of %s", wanted.onto, wanted.base)
        record = merge(wanted)
    except JobError as error:
        print(f"tunejob: {error}", file=sys.stderr)
        return error.exit_code
    found = record["difference"]
    print(
        f"{wanted.output}: merged, {record['dtype']}. Against the adapter on the base it was trained on: mean KL "
        f"{found['mean_kl']:.2e} nats, largest logit difference {found['max_abs_logit']:.2e}, the same first choice "
        f"for {found['same_first_choice']:.1%} of {found['tokens']} tokens"
    )
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
