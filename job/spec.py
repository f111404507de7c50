"""The spec: what one run trains. Frozen, closed, and every default explained where it stands.

People write sparse YAML; ``read`` checks it and reports every problem at once; ``dump`` writes it back with every
default spelled out, so that a later release cannot change what an old run meant.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from job import strict_yaml
from job.spec_draft import Draft, checked, content
from job.spec_problems import SPEC_WORDS, shown
from job.spec_reference import markdown
from job.spec_section import Section
from job.spec_sections import (
    Checkpoints,
    Data,
    Evaluation,
    Lora,
    Model,
    Output,
    Quantization,
    Resources,
    Scheduling,
    Training,
    from_text,
    sources,
)

SPEC_VERSION: Final = 1


class JobSpec(Section):
    """What one run trains."""

    version: Literal[1] = SPEC_VERSION
    """Version of this format."""
    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$", max_length=30, examples=["support-ja"])
    """Begins the run's id: lower-case letters, digits and dashes, at most 30, a letter first."""
    model: Annotated[Model, BeforeValidator(from_text, json_schema_input_type=str | Model)] = Field(
        examples=["s3://models/Llama-3.1-8B-Instruct"]
    )
    """The base model. A name alone is short for `{from: NAME}`."""
    data: Data = Field(examples=[{"train": "data/train.jsonl"}])
    """What is trained on, and what it is measured on."""
    method: Literal["lora", "qlora"] = "lora"
    """`lora`: the base as it is. `qlora`: the base held in 4 or 8 bits."""
    lora: Lora = Lora()
    """The adapter."""
    quantization: Quantization | None = None
    """How QLoRA holds the base; only with `method: qlora`."""
    training: Training = Training()
    """How it is trained."""
    checkpoints: Checkpoints = Checkpoints()
    """When the state of the training is saved."""
    evaluation: Evaluation = Evaluation()
    """How base and tuned model are compared."""
    output: Output = Output()
    """What is published."""
    resources: Resources = Resources()
    """How much of the cluster one attempt gets."""
    scheduling: Scheduling = Scheduling()
    """When and where in the queue."""
    restart: int = Field(0, ge=0)
    """Raise it to have a new Job made where a failed one stands (GitOps)."""

    @field_validator("lora")
    @classmethod
    def _fits_a_quantised_base(cls, value: Lora, info: ValidationInfo) -> Lora:
        if info.data.get("method") == "qlora" and (found := list(_not_on_a_quantised_base(value))):
            raise ValueError("; and ".join(found))
        return value

    @field_validator("quantization")
    @classmethod
    def _quantization_needs_qlora(cls, value: Quantization | None, info: ValidationInfo) -> Quantization | None:
        if value is not None and info.data.get("method") == "lora":
            raise ValueError("only with method: qlora; change the method, or remove this block")
        lora = info.data.get("lora")
        if value is not None and value.type == "int8" and lora is not None and lora.use_dora:
            raise ValueError(
                "type: int8 cannot go with lora.use_dora, whose norms PEFT cannot take of weights in int8 while they "
                "train; use nf4 or fp4, or leave lora.use_dora out"
            )
        return value

    @field_validator("training")
    @classmethod
    def _shards_only_what_can_be(cls, value: Training, info: ValidationInfo) -> Training:
        quantization = info.data.get("quantization")
        if value.parallelism == "shard" and quantization is not None and quantization.type == "int8":
            raise ValueError(
                "parallelism: shard cannot share a base in int8; set quantization.type to nf4, or replicate"
            )
        return value

    @property
    def quantized(self) -> Quantization | None:
        """How the base is quantised, defaults included; None for plain LoRA."""
        return (self.quantization or Quantization()) if self.method == "qlora" else None


IDENTITY = ("model", "data", "method", "lora", "quantization", "training", "evaluation")
"""The parts that make one run another run. What it is called, costs and leaves behind is not among them."""

WITHOUT_EFFECT = (
    "micro_batch_size",
    "gradient_checkpointing",
    "kernels",
    "on_out_of_memory",
    "parallelism",
    "logging_steps",
    "loader_workers",
)
"""Keys of ``training`` that must not change the result, so that a run may go on with other values of them."""


def read(path: Path, overrides: Sequence[str] = ()) -> JobSpec:
    """The spec in a file, with ``KEY=VALUE`` overrides such as ``training.learning_rate=1e-4`` laid over it.

    Raises:
        SpecInvalid: there is no such file, it cannot be read, or every problem in it.
    """
    hint = "name a spec that is there (configs/quickstart.yaml of the project is one)"
    return parse(content(path, "spec", hint), str(path), overrides)


def parse(text: str | bytes, source: str, overrides: Sequence[str] = ()) -> JobSpec:
    """The spec in a YAML text; ``source`` is what messages call it. Raises SpecInvalid with every problem."""
    return _checked(Draft.parsed(text, source, overrides, _expanded))


def from_mapping(value: Mapping[str, Any], source: str, lines: Mapping[strict_yaml.Path, int] | None = None) -> JobSpec:
    """The spec in a mapping that was read elsewhere. Raises SpecInvalid with every problem."""
    return _checked(Draft.of(value, source, lines or {}))


def resolved(spec: JobSpec) -> JobSpec:
    """The same run with nothing left to a default that depends on another key."""
    model = spec.model.model_copy(update={"id": spec.model.name})
    return spec.model_copy(update={"model": model, "quantization": spec.quantized})


def dump(spec: JobSpec) -> str:
    """The resolved spec as YAML, every default spelled out; reading it back gives ``resolved(spec)``."""
    return strict_yaml.dump_document(_record(spec))


def identity(spec: JobSpec) -> dict[str, Any]:
    """What is trained: the part of the resolved spec that two specs of one run have in common."""
    parts = {key: value for key, value in _record(spec).items() if key in IDENTITY}
    training = {key: value for key, value in parts["training"].items() if key not in WITHOUT_EFFECT}
    return {**parts, "training": training}


def digest(spec: JobSpec) -> str:
    """SHA-256 (lower-case hex) of what is trained; the same for a sparse spec and its resolved form."""
    canonical = json.dumps(identity(spec), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def run_id(spec: JobSpec) -> str:
    """``<name>-<first 8 digits of the digest>``."""
    return f"{spec.name}-{digest(spec)[:8]}"


def differences(here: JobSpec, there: JobSpec) -> list[str]:
    """Where two specs train something else: ``training.learning_rate: 0.0002 here, 0.0001 there``."""
    ours, theirs = _leaves(identity(here)), _leaves(identity(there))
    absent = "absent"
    return [
        f"{path}: {ours.get(path, absent)} here, {theirs.get(path, absent)} there"
        for path in [*ours, *(path for path in theirs if path not in ours)]
        if ours.get(path) != theirs.get(path)
    ]


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a spec as people write it, short forms included; for editors."""
    schema = JobSpec.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def reference() -> str:
    """The manual page of the spec, in Markdown: path, type, default and meaning of every key."""
    return markdown(JobSpec)


def _record(spec: JobSpec) -> dict[str, Any]:
    record = resolved(spec).model_dump(mode="json", by_alias=True)
    return {key: value for key, value in record.items() if key != "quantization" or value is not None}


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    """Every value below, as messages show it, by its path; a list of plain values counts as one."""
    if isinstance(value, dict):
        items: list[tuple[str, Any]] = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {path: shown(value)}
    prefix = f"{path}." if path else ""
    return {leaf: text for key, item in items for leaf, text in _leaves(item, f"{prefix}{key}").items()}


def _not_on_a_quantised_base(lora: Lora) -> Iterator[str]:
    """What an adapter asks for that a base held in few bits has not."""
    if lora.begins_with_parts:
        yield (
            f"init: {lora.init} begins with parts of weights that method: qlora does not keep; "
            "use default, or method: lora"
        )
    if lora.init == "orthogonal":
        yield (
            "init: orthogonal cannot go with method: qlora (PEFT would give the adapter the integer type of the base's "
            "weights); use default or gaussian, or method: lora"
        )
    if lora.bias != "none":
        yield (
            f"bias: {lora.bias} cannot go with method: qlora (bitsandbytes turns biases into the type of its input, 16 "
            "bits on a GPU, and they would train in that); leave bias out, or use method: lora"
        )


def _expanded(path: strict_yaml.Path, value: Any) -> Any:
    """A value in its long form, so that an override can reach inside."""
    if path == ("model",):
        return from_text(value)
    return sources(value) if path == ("data", "train") else value


def _checked(draft: Draft) -> JobSpec:
    """The spec that a draft describes, or every problem at once, in the order of the file."""
    version = draft.value.get("version")
    if isinstance(version, int) and version > SPEC_VERSION:
        # Keys that this release does not know are no news then.
        what = f"{version} is of a newer tunejob, this one reads {SPEC_VERSION}; upgrade it, or take a newer image"
        raise draft.refusal([(("version",), what)])
    spec = checked(JobSpec, draft, SPEC_WORDS)
    from job import serving  # it reads specs

    if found := [(("output", "serve_with"), line) for line in serving.refusals_of(spec)]:
        raise draft.refusal(found)
    return spec


if __name__ == "__main__":
    sys.stdout.write(reference())
