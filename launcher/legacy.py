"""The first users' commands: options and flat keys become a spec, through one table.

What counts, later before earlier: the page's defaults, the config file, the command line's options, ``--set``.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from job.errors import SpecInvalid
from job.spec import JobSpec, from_mapping, parse
from job.strict_yaml import Document, dump_document, parse_document

FLAT: Mapping[str, str] = {
    "base_model": "model",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.target_modules",
    "bnb_4bit_use_double_quant": "quantization.double_quant",
    "bnb_4bit_quant_type": "quantization.type",
    "bnb_4bit_compute_dtype": "quantization.compute_dtype",
    "num_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "lr_scheduler": "training.schedule",
    "warmup_ratio": "training.warmup_ratio",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "batch_size": "training.micro_batch_size",
    "micro_batch_size": "training.micro_batch_size",
    "global_batch_size": "training.batch_size",
    "max_length": "training.max_length",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "seed": "training.seed",
    "logging_steps": "training.logging_steps",
    "save_steps": "checkpoints.every_steps",
    "eval_steps": "evaluation.every_steps",
}
"""Flat key of the old config file -> where the spec has it. ``load_in_4bit`` besides chooses the method."""

FOUR_BIT = "load_in_4bit"
_ASIDE = (FOUR_BIT, "bnb_4bit_use_double_quant", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype")
_ELSEWHERE = {
    "gradient_accumulation_steps": "write global_batch_size, the sequences of one optimizer step",
    "load_in_8bit": "only 4 bits are offered: load_in_4bit, with train-qlora",
    "output_dir": "the folder is named on the command line: --output-dir",
    "train_data": "the data are named on the command line: --train-data",
    "eval_data": "the data are named on the command line: --eval-data",
}

DEFAULT_MODEL = "microsoft/DialoGPT-medium"
_METHODS = {"train-lora": "lora", "train-qlora": "qlora"}
_DEFAULTS: Mapping[str, Any] = {
    "model": DEFAULT_MODEL,
    "lora.r": 16,
    "lora.alpha": 32.0,
    "lora.dropout": 0.1,
    "checkpoints.keep": "all",
    "output.adapter_format": "both",
}
_DEFAULTS_4BIT: Mapping[str, Any] = {
    "quantization.type": "nf4",
    "quantization.double_quant": True,
    "quantization.compute_dtype": "auto",
}
_EVAL_SPLIT = 0.1

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True)
class OldOptions:
    """The options of an old command that say what is trained. None: not given."""

    NAMES: ClassVar = frozenset({"train_data", "eval_data", "config", "model", "batch_size", "set"})

    train_data: str | None = None
    eval_data: str | None = None
    config: Path | None = None
    model: str | None = None
    batch_size: int | None = None
    """Rows on the device at a time; the rows of an optimizer step stay what they are."""
    set: Sequence[str] = ()


def spec_of(verb: str, options: OldOptions) -> tuple[JobSpec, list[str]]:
    """The spec an old command means, and remarks for the user.

    Args:
        verb: ``train-lora`` or ``train-qlora``.

    Raises:
        SpecInvalid: the config file or an option cannot be used; every problem on a line of its own.
    """
    method = _METHODS[verb]
    document = _read(options.config) if options.config else Document({}, verb, {})
    config, lines, remarks = _as_spec(document, method)
    value: dict[str, Any] = {}
    for layer in (_defaults(method), config, _from_options(options, method)):
        value = _merged(value, layer)
    if not value.get("data", {}).get("train"):
        raise SpecInvalid(f"{verb}: no training data; name it with --train-data FILE")
    sets_evaluation = any(change.startswith(("data.eval=", "data.eval_split=")) for change in options.set)
    if not sets_evaluation and not {"eval", "eval_split"} & value["data"].keys():
        value["data"]["eval_split"] = _EVAL_SPLIT
    return overridden(from_mapping(value, document.source, lines), options.set), remarks


def overridden(spec: JobSpec, overrides: Sequence[str]) -> JobSpec:
    """The spec with ``KEY=VALUE`` changes laid over it. Raises SpecInvalid, naming --set."""
    if not overrides:
        return spec
    # Only what was set: a default that depends on another key has to follow the change.
    return parse(dump_document(spec.model_dump(mode="json", by_alias=True, exclude_unset=True)), "spec", overrides)


def resuming(words: Sequence[str], folder: str) -> list[str]:
    """The command line that goes on with what ``words`` began in ``folder``."""
    again = [word for word in words if word != "--overwrite"]
    if not any(word == "--output-dir" or word.startswith("--output-dir=") for word in again):
        again += ["--output-dir", folder]
    return again if "--resume" in again else [*again, "--resume"]


def _read(path: Path) -> Document:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SpecInvalid(f"--config {path}: {(error.strerror or str(error)).lower()}; name a YAML file") from None
    return parse_document(text, str(path)) if text.strip() else Document({}, str(path), {})


def _as_spec(document: Document, method: str) -> tuple[dict[str, Any], dict[KeyPath, int], list[str]]:
    """A config file in the spec's shape: its values, the line of each, and remarks."""
    if document.value.keys() & JobSpec.model_fields.keys():
        return _from_spec(document, method)
    return _from_flat(document, method)


def _from_spec(document: Document, method: str) -> tuple[dict[str, Any], dict[KeyPath, int], list[str]]:
    """A spec, for instance the training_config.yaml of an earlier run. The command decides the method."""
    mixed = [key for key in document.value if key in FLAT and key not in JobSpec.model_fields]
    if mixed:
        raise SpecInvalid(
            "\n".join(f"{_where(document, key)}: a flat key in a file of sections; write {FLAT[key]}" for key in mixed)
        )
    value, remarks = dict(document.value), []
    other = value.pop("method", method)
    aside = ["quantization"] if method == "lora" and value.pop("quantization", None) is not None else []
    if other != method:
        aside.insert(0, f"method: {other}")
    if aside:
        remarks.append(f"{document.source}: {', '.join(aside)} left aside; this command trains with {method}")
    return value, dict(document.lines), remarks


def _from_flat(document: Document, method: str) -> tuple[dict[str, Any], dict[KeyPath, int], list[str]]:
    """The old flat file, one for both commands."""
    problems = [*_unknown(document), *_twice(document)]
    four_bit = document.value.get(FOUR_BIT)
    if FOUR_BIT in document.value and not isinstance(four_bit, bool):
        problems.append(f"{_where(document, FOUR_BIT)}: true or false is due, not {four_bit!r}")
    elif method == "qlora" and four_bit is False:
        problems.append(
            f"{_where(document, FOUR_BIT)}: false, but train-qlora is training in 4 bits; "
            "write true, leave it out, or use train-lora"
        )
    if problems:
        raise SpecInvalid("\n".join(problems))
    aside = [key for key in document.value if key in _ASIDE] if method == "lora" else []
    used = [key for key in document.value if key in FLAT and key not in aside]
    lines: dict[KeyPath, int] = {tuple(FLAT[key].split(".")): document.lines.get((key,), 1) for key in used}
    remarks = [f"{document.source}: {', '.join(aside)} left aside; only train-qlora uses them"] if aside else []
    return _nested([(FLAT[key], _plain(key, document.value[key])) for key in used]), lines, remarks


def _unknown(document: Document) -> list[str]:
    problems = []
    for key in document.value.keys() - FLAT.keys() - {FOUR_BIT}:
        near = difflib.get_close_matches(key, [*FLAT, FOUR_BIT], 1)
        advice = _ELSEWHERE.get(key) or (f"did you mean {near[0]}?" if near else f"known are {', '.join(FLAT)}")
        problems.append(f"{_where(document, key)}: unknown key; {advice}")
    return sorted(problems)


def _twice(document: Document) -> list[str]:
    """Two flat keys for one thing: neither is more right than the other."""
    first: dict[str, str] = {}
    known = [key for key in document.value if key in FLAT]
    second = [key for key in known if first.setdefault(FLAT[key], key) != key]
    return [f"{_where(document, key)}: says the same as {first[FLAT[key]]}; leave one of them out" for key in second]


def _plain(key: str, value: Any) -> Any:
    """A flat value as the spec writes it."""
    match key, value:
        case "target_modules", str() if value != "all-linear":
            return [name.strip() for name in value.split(",")]
        case "bnb_4bit_compute_dtype", str():
            return value.removeprefix("torch.")
    return value


def _defaults(method: str) -> dict[str, Any]:
    values = {"name": f"{method}-model", "method": method, **_DEFAULTS}
    if method == "qlora":
        values |= _DEFAULTS_4BIT
    return _nested(list(values.items()))


def _from_options(options: OldOptions, method: str) -> dict[str, Any]:
    given: dict[str, Any] = {
        "data.train": options.train_data,
        "data.eval": options.eval_data,
        "data.eval_split": 0.0 if options.eval_data else None,
        "model": options.model,
        "training.micro_batch_size": options.batch_size,
    }
    return _nested([("method", method), *((path, value) for path, value in given.items() if value is not None)])


def _nested(values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Dotted paths and values as a mapping of mappings."""
    root: dict[str, Any] = {}
    for path, value in values:
        *sections, key = path.split(".")
        place = root
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return root


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` laid over ``below``, section by section."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _where(document: Document, key: str) -> str:
    return f"{document.source}:{document.lines.get((key,), 1)}: {key}"
