"""What is wrong with a spec, said in the user's words: paths as in their file, values as they wrote them.

pydantic finds the problems; here each becomes one sentence. Nothing of pydantic's own vocabulary gets out.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from job.strict_yaml import Path, path_text

Kind = Any
"""A type as it stands in an annotation: a class, a union, a literal, a tuple's generic alias."""

REFUSED_METHODS = {
    "full": "full fine-tuning is not offered, only adapters are trained; use lora or qlora",
    **dict.fromkeys(
        ("dpo", "ipo", "orpo", "kto", "cpo", "simpo", "grpo", "ppo", "rlhf", "rloo", "reward"),
        "preference optimisation and reinforcement learning are not offered; use lora or qlora on examples to imitate",
    ),
    **dict.fromkeys(("adalora", "ia3", "prefix", "prompt_tuning", "p_tuning"), "not offered; use lora or qlora"),
    "dora": "DoRA is a kind of LoRA; use lora and set lora.use_dora: true",
}
"""Values of ``method`` that people try, and why they are not there."""

_PROFILE = "this says what the cluster is like; it belongs in the profile"
_SECRET = "secrets do not belong in a spec; put it in the Secret that the profile names"
REFUSED = {
    "neftune*": "NEFTune is not offered: noise on the embeddings changes the loss that is reported; remove it",
    "ema": "an average of weights (EMA) is not offered; remove it",
    "use_ema": "an average of weights (EMA) is not offered; remove it",
    "ema_*": "an average of weights (EMA) is not offered; remove it",
    "deepspeed*": "DeepSpeed is not offered; for a base too big for one device set training.parallelism: shard",
    "fsdp*": "FSDP2 needs no settings here; for a base too big for one device set training.parallelism: shard",
    "sequence_parallel*": "sequence parallelism is not offered; lower training.max_length or take larger GPUs",
    "context_parallel*": "sequence parallelism is not offered; lower training.max_length or take larger GPUs",
    "tensor_parallel*": "tensor parallelism is not offered; remove it",
    "pipeline_parallel*": "pipeline parallelism is not offered; remove it",
    "vision*": "training on images is not offered; use rows of text",
    "image": "training on images is not offered, and the container's image belongs in the profile; remove it",
    "image_pull_secrets": _PROFILE,
    "image_*": "training on images is not offered; use rows of text",
    "images": "training on images is not offered; use rows of text",
    "pixel_*": "training on images is not offered; use rows of text",
    "trust_remote_code": "code out of a model repository is never run; use a model that transformers knows by itself",
    "reward_model": REFUSED_METHODS["dpo"],
    "dpo*": REFUSED_METHODS["dpo"],
    "packing": "rows are always batched without padding and never see each other; remove it",
    "gradient_accumulation_steps": "it follows from training.batch_size and training.micro_batch_size; set those",
    "output_dir": "where results go is no part of a spec; use --output or store.output in the profile",
    "apiVersion": "this looks like a Kubernetes object; a spec begins with name, model and data",
    **dict.fromkeys(("namespace", "context", "service_account", "pull_secrets", "store", "hub", "env"), _PROFILE),
    **dict.fromkeys(("node_selector", "tolerations", "gpu_types", "scratch"), _PROFILE),
    **dict.fromkeys(("token", "hf_token", "api_token", "password", "*secret*", "*access_key*", "*api_key"), _SECRET),
}
"""Keys (or shell patterns of keys) that people try, and why they are not there."""

RENAMED = {
    "dora": "lora.use_dora",
    "init_lora_weights": "lora.init",
    "early_stopping_patience": "evaluation.early_stopping",
    "load_best_model_at_end": "evaluation.publish",
    "auto_find_batch_size": "training.on_out_of_memory",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "per_device_train_batch_size": "training.micro_batch_size",
    "max_seq_length": "training.max_length",
    "sequence_len": "training.max_length",
    "warmup_steps": "training.warmup_ratio",
    "optim": "training.optimizer",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "load_in_4bit": "method: qlora",
    "load_in_8bit": "method: qlora",
    "lora_r": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.target_modules",
    "base_model": "model",
    "model_name_or_path": "model",
    "train_data": "data.train",
    "dataset": "data.train",
    "datasets": "data.train",
    "eval_data": "data.eval",
    "save_steps": "checkpoints.every_steps",
    "save_total_limit": "checkpoints.keep",
    "eval_steps": "evaluation.every_steps",
}
"""Other programs' names for keys of ours."""

_SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|\b(AKIA|ASIA)[A-Z0-9]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{16,}|\bsk-[\w-]{20,}|xox[abp]-[\w-]{10,}|://[^/\s:@]+:[^/\s@]+@"
    r"|[?&]X-Amz-(Signature|Credential)="
)
_VARIABLE = re.compile(r"\$\{[^}]*\}?|\$\([A-Za-z_]\w*\)|\$[A-Z_][A-Z0-9_]+")
_WORDS = {r"^[a-z][a-z0-9-]*$": "lower-case letters, digits and dashes, a letter first"}

Problem = tuple[Path, str]
"""Where, as in the user's file, and what."""


@dataclass(frozen=True)
class Words:
    """What is said of keys that people try in one kind of file."""

    refused: Mapping[str, str]
    """Keys, or shell patterns of keys, and why they are not there."""
    renamed: Mapping[str, str]
    """Other names of keys that are there."""
    secret: str
    """Where a secret belongs instead."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Required keys, and how to come by a value."""


SPEC_WORDS = Words(REFUSED, RENAMED, _SECRET)


def explain(
    errors: Sequence[ErrorDetails], root: type[BaseModel], value: Mapping[str, Any], words: Words = SPEC_WORDS
) -> list[Problem]:
    """One problem for every place that pydantic complained about.

    Args:
        errors: as from ``ValidationError.errors()``.
        root: the model that was to be made.
        value: what it was to be made of, as the user wrote it.
        words: of the kind of file at hand.
    """
    found: dict[Path, str] = {}
    for error in errors:
        path, what = _explained(error, root, value, words)
        found.setdefault(path, what)
    # A list whose items are wrong also counts as too short; the items say it better.
    return [(path, what) for path, what in found.items() if not any(other[:-1] == path for other in found if other)]


def text_problems(value: Any, path: Path = (), words: Words = SPEC_WORDS) -> Iterator[Problem]:
    """Text anywhere in a file that holds a secret, or a variable that nobody would expand."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from text_problems(item, (*path, key), words)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from text_problems(item, (*path, index), words)
    elif isinstance(value, str) and _SECRETS.search(value):
        yield path, f"looks like a secret; {words.secret}"
    elif isinstance(value, str) and (variable := _VARIABLE.search(value)):
        yield path, f"{variable[0]} is not expanded; write the value itself, or give it by --set"


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Its fields under the names that a spec uses."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def origin_of(kind: Kind) -> Any:
    """``tuple`` for any tuple, ``Literal`` for any literal; None for a plain class."""
    return get_origin(kind)


def section_of(kind: Kind) -> type[BaseModel] | None:
    """The block of keys that a field of this kind is, or may be."""
    options = [option for option in _options(kind) if isinstance(option, type) and issubclass(option, BaseModel)]
    return options[0] if options else None


def held_by(kind: Kind) -> tuple[str, type[BaseModel]] | None:
    """What a list or a mapping holds, where that is a block: the word for its place, and the block."""
    word, index = {tuple: ("N", 0), dict: ("NAME", 1)}.get(origin_of(kind), ("", 0))
    section = section_of(get_args(kind)[index]) if word else None
    return (word, section) if section else None


def describe(kind: Kind, metadata: Sequence[Any] = ()) -> str:
    """What a value of this kind looks like, in plain words: ``a whole number from 1 to 1024``."""
    words = [_describe(option, metadata) for option in _options(kind) if option is not NoneType]
    if any(isinstance(rule, BeforeValidator) for rule in metadata):
        words.insert(0, "a name, path or URI")
    if NoneType in _options(kind):
        words.append("null")
    return ", or ".join(words)


def shown(value: Any) -> str:
    """A value in a message: as YAML spells it, and short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a block of keys" if value else "an empty block"
    if isinstance(value, list | tuple):
        text = f"[{', '.join(shown(item) for item in value[:8])}{', …' if len(value) > 8 else ''}]"
    else:
        text = f'"{value}"' if isinstance(value, str) else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 60 else f"{text[:57]}…"


def _explained(error: ErrorDetails, root: type[BaseModel], value: Mapping[str, Any], words: Words) -> Problem:
    path, holder, info, kind = _target(root, error["loc"])
    if error["type"] == "extra_forbidden" and holder is not None:
        written, _ = _as_written(path, value)
        return written, _unknown(str(path[-1]), holder, root, words)
    if error["type"] == "missing" and isinstance(path[-1], str):
        written, _ = _as_written(path, value)
        example = words.missing.get(path_text(path)) or _example(str(path[-1]), info)
        return written, f"missing; add a line like {example}"
    if error["type"] == "missing":  # of a list with a fixed number of items
        path, kind = path[:-1], info.annotation if info else kind
    written, found = _as_written(path, value)
    if error["type"] == "value_error":
        return written, str(error["ctx"]["error"])
    if written == ("method",) and str(found).lower() in REFUSED_METHODS:
        return written, f"{found}: {REFUSED_METHODS[str(found).lower()]}"
    expected = describe(kind, info.metadata if info and kind == info.annotation else ())
    return written, f"expected {expected}, not {shown(found)}{_hint(found, kind)}"


def _target(root: Kind, loc: Sequence[str | int]) -> tuple[Path, type[BaseModel] | None, FieldInfo | None, Kind]:
    """Follows a location through the models, and stops where pydantic starts to name members of unions.

    Returns:
        The path, the block that holds its last key, that key's field, and the kind of value due there.
    """
    path: Path = ()
    holder, info, kind = None, None, root
    for part in loc:
        if isinstance(part, str) and (section := section_of(kind)):
            holder, info = section, fields_of(section).get(part)
            kind = info.annotation if info else None
        elif isinstance(part, int) and origin_of(kind) is tuple:
            kind = get_args(kind)[0]
        elif isinstance(part, str) and origin_of(kind) is dict:
            holder, info, kind = None, None, get_args(kind)[1]
        else:
            break
        path = (*path, part)
    return path, holder, info, kind


def _as_written(path: Path, value: Any) -> tuple[Path, Any]:
    """The path in the user's file, where short forms leave parts of it out; and what stands there."""
    written: Path = ()
    for part in path:
        if isinstance(value, str):
            break
        if isinstance(value, Mapping) and isinstance(part, int):
            continue
        written = (*written, part)
        try:
            value = value[part]
        except (LookupError, TypeError):
            value = None
    return written, value


def _unknown(key: str, holder: type[BaseModel], root: type[BaseModel], words: Words) -> str:
    """Why a key is not there, and which one may be meant."""
    for pattern, reason in words.refused.items():
        if fnmatchcase(key, pattern):
            return reason
    elsewhere = list(_places(root))
    meant = [path for path in elsewhere if path.rpartition(".")[2] == key]
    if not meant and key in words.renamed:
        meant = [words.renamed[key]]
    here = list(fields_of(holder))
    meant = meant or difflib.get_close_matches(key, here, n=1)
    if not meant:
        near = difflib.get_close_matches(key, [path.rpartition(".")[2] for path in elsewhere], n=1, cutoff=0.8)
        meant = [path for path in elsewhere if path.rpartition(".")[2] in near]
    if meant:
        return f"unknown key; did you mean {' or '.join(meant[:3])}?"
    return f"unknown key; the keys here are {', '.join(here)}"


def _places(root: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the spec with the path to it; keys of list items stand below ``N``."""
    for key, info in fields_of(root).items():
        yield f"{prefix}{key}"
        kind = info.annotation
        if section := section_of(kind):
            yield from _places(section, f"{prefix}{key}.")
        elif held := held_by(kind):
            yield from _places(held[1], f"{prefix}{key}.{held[0]}.")


def _options(kind: Kind) -> tuple[Kind, ...]:
    """The members of a union, else the kind alone; wrappers taken off."""
    if origin_of(kind) is Annotated:
        return _options(get_args(kind)[0])
    if origin_of(kind) in (Union, UnionType):
        return tuple(option for member in get_args(kind) for option in _options(member))
    return (kind,)


def _describe(kind: Kind, metadata: Sequence[Any]) -> str:
    if origin_of(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin_of(kind) is tuple:
        return _describe_list(get_args(kind))
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        bounds = _bounds(metadata)
        noun = "a whole number" if kind is int else "a number"
        return f"{noun} {bounds}" if bounds else noun
    return _describe_text(metadata) if kind is str else "a block of keys"


def _describe_list(items: tuple[Kind, ...]) -> str:
    if items[-1] is not Ellipsis:
        return f"a list of {len(items)} numbers"
    return "a list of text" if items[0] is str else "a list of them"


def _describe_text(metadata: Sequence[Any]) -> str:
    patterns = [rule.pattern for rule in metadata if getattr(rule, "pattern", None)]
    words = [_WORDS.get(pattern, f"text like {pattern}") for pattern in patterns] or ["text"]
    words += ["not empty" for rule in metadata if isinstance(rule, annotated_types.MinLen)]
    words += [f"at most {rule.max_length} characters" for rule in metadata if isinstance(rule, annotated_types.MaxLen)]
    return ", ".join(words)


def _bounds(metadata: Sequence[Any]) -> str:
    rules = {type(rule): rule for rule in metadata}
    low, high = rules.get(annotated_types.Ge), rules.get(annotated_types.Le)
    if low and high:
        return f"from {low.ge} to {high.le}"
    words = [
        (annotated_types.Ge, "ge", "of at least"),
        (annotated_types.Gt, "gt", "above"),
        (annotated_types.Le, "le", "at most"),
        (annotated_types.Lt, "lt", "below"),
    ]
    return " and ".join(f"{word} {getattr(rules[rule], name)}" for rule, name, word in words if rule in rules)


def _example(key: str, info: FieldInfo | None) -> str:
    examples = info.examples if info else None
    text = str(examples[0]).replace("'", "") if examples else "…"  # a block as YAML writes it in one line
    return f"{key}: {text}"


def _hint(found: Any, kind: Kind) -> str:
    """What to try, where the value itself gives it away."""
    options = _options(kind)
    if isinstance(found, str):
        choices = [str(choice) for option in options if origin_of(option) is Literal for choice in get_args(option)]
        near = difflib.get_close_matches(found.lower(), choices, n=1)
        if near:
            return f"; did you mean {near[0]}?"
        if (int in options or float in options) and re.fullmatch(r"[-+0-9._eE]+", found):
            return "; write it without quotes and underscores"
    if str in options and isinstance(found, int | float):
        return "; put it in quotes"
    if found is None and section_of(kind):
        return "; write its keys below it, or remove it"
    return ""
