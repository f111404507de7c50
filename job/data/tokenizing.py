"""The base model's tokenizer, and what its config says of the rows a model can take. No weights are read."""

from collections.abc import Mapping, Sequence
from typing import Any

from job.data.row_writer import Limits
from job.errors import InputMissing, SpecInvalid
from job.files import read_json
from job.inputs import Input
from job.modelconfig import known_config
from job.spec import JobSpec

_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "n_ctx")
"""What model configs call the number of positions."""


def open_tokenizer(model: Input, spec: JobSpec) -> tuple[Any, Limits]:
    """The tokenizer, with the spec's new tokens, and the limits of a row.

    Raises:
        InputMissing: there is no config.json.
        SpecInvalid: config or tokenizer cannot be used, transformers does not know the model, rows are to be longer
            than the model's positions, or a token is not new.
    """
    config = _model_config(model)
    known_config(model.path, spec.model.name)
    _check_length(spec.training.max_length, config)
    tokenizer = _tokenizer(model)
    vocabulary = _vocabulary(config)
    if spec.lora.new_tokens:
        _add_tokens(tokenizer, spec.lora.new_tokens)
        vocabulary = max(vocabulary or 0, len(tokenizer))  # the worker makes room for them
    return tokenizer, Limits(spec.training.max_length, spec.training.long_rows, vocabulary)


def _add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    known = tokenizer.get_vocab()
    for token in tokens:
        # Of a token that is there already the base's own row would train.
        if token in known or not tokenizer.add_tokens([token]):
            raise SpecInvalid(f"lora.new_tokens: the model's tokenizer knows {token!r} already; leave it out")


def _model_config(model: Input) -> Mapping[str, Any]:
    try:
        config = read_json(model.path / "config.json")
    except FileNotFoundError:
        raise InputMissing(f"model.from: {model.uri} has no config.json; name a folder or hub id of a model") from None
    except ValueError as error:
        raise SpecInvalid(f"model.from: config.json of {model.uri} is not JSON ({error})") from error
    # Models that also see or hear keep the figures of their language part one level down.
    return {**config, **(config.get("text_config") or {})}


def _vocabulary(config: Mapping[str, Any]) -> int | None:
    size = config.get("vocab_size")
    return size if isinstance(size, int) else None


def _check_length(max_length: int, config: Mapping[str, Any]) -> None:
    key = next((key for key in _POSITIONS if isinstance(config.get(key), int)), None)
    if key is not None and max_length > config[key] > 0:
        raise SpecInvalid(
            f"training.max_length: {max_length} tokens, and the model has {config[key]} positions ({key} in its "
            f"config.json); write {config[key]} or less"
        )
    short = _short_positions(config)
    if short is not None and max_length > short:
        raise SpecInvalid(
            f"training.max_length: {max_length} tokens, and this model (longrope) tells positions otherwise in a batch "
            f"with a row of more than {short}: the loss of a row would depend on the others; write {short} or less"
        )


def _short_positions(config: Mapping[str, Any]) -> int | None:
    """Tokens up to which LongRoPE (arXiv:2402.13753) has its short factors; None for models without."""
    rope = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}  # new name and old
    if "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    found = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return found if isinstance(found, int) else None


def _tokenizer(model: Input) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its loaders raise whatever their formats do
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(str(model.path), model.uri)
        raise SpecInvalid(
            f"model.from: the tokenizer of {model.uri} cannot be loaded ({reason}); the model needs a tokenizer.json, "
            "and code of its own is not run"
        ) from error
