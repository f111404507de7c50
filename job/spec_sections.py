"""The sections of a spec: every key with its values, its default and why."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict, field_validator
from pydantic_core.core_schema import ValidationInfo

from job.spec_section import Bytes, LabelName, Quantity, Section
from job.spec_values import require_cron, require_zone


def from_text(value: object) -> object:
    """The short form ``model: NAME`` is the long form with only ``from``."""
    return {"from": value} if isinstance(value, str) else value


def sources(value: object) -> object:
    """One input may stand without a list around it."""
    if isinstance(value, str | dict):
        value = [value]
    return [from_text(item) for item in value] if isinstance(value, list | tuple) else value


Names = Annotated[tuple[str, ...], Strict(False)]
"""A list of names; not strict, because YAML has lists where a frozen spec has tuples."""


class Model(Section):
    """The base model. ``model: NAME`` is short for ``model: {from: NAME}``."""

    source: str = Field(alias="from", min_length=1, examples=["s3://models/Llama-3.1-8B-Instruct"])
    """Where it is: a hub id (`org/name`), a directory, or an `s3://` prefix. A directory that exists wins over a hub
    id of the same name; relative directories start where the command was called."""
    id: str | None = None
    """The name under which the adapter will look for its base (`base_model_name_or_path`). Left out: `from`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model. Left out: its main branch, pinned to the commit found at the start."""

    @property
    def name(self) -> str:
        """The user's name for the base."""
        return self.id if self.id is not None else self.source


class Source(Section):
    """One input of the training data. A plain string is short for ``{from: STRING}``."""

    source: str = Field(alias="from", min_length=1, examples=["data/train.jsonl"])
    """File, or `s3://` object: .jsonl, .json, .csv, .tsv, .parquet or .txt (a row for each paragraph)."""
    weight: float = Field(1.0, gt=0, le=100)
    """Copies of each row per epoch: 1 takes every row once, 0.5 half of them, 2 each twice. An input comes to a whole
    number of rows; one that comes to none is refused."""


class Columns(Section):
    """Which columns hold what, for data whose columns have names of their own.

    For instance `{prompt: question, completion: answer}`.
    """

    prompt: str | None = None
    """Column with the question or instruction."""
    completion: str | None = None
    """Column with the answer, the part that is trained."""
    system: str | None = None
    """Column with a system message put before the prompt; needs a chat template."""
    messages: str | None = None
    """Column with the list of messages."""
    text: str | None = None
    """Column with plain text, all of which is trained."""


class Data(Section):
    """What is trained on, and what it is measured on."""

    train: Annotated[
        tuple[Source, ...],
        BeforeValidator(sources, json_schema_input_type=str | Source | list[str | Source]),
    ] = Field(strict=False, min_length=1, examples=["data/train.jsonl"])
    """The training data: one file or URI, or a list of `{from, weight}`."""
    eval: str | None = None
    """Evaluation data of its own. Rows of it that stand in the training data are counted and reported."""
    eval_split: float = Field(0.0, ge=0, le=0.5)
    """Share of the training rows set aside for evaluation, by a hash of each row's content: adding rows moves no other
    row, and equal rows stay on one side. Not together with `eval`."""
    format: Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"] | None = None
    """Shape of the rows. Left out: recognised by the columns of the first row that fits one."""
    columns: Columns = Columns()
    """Names of the columns, where they differ from the format's own."""
    chat_template: str | None = None
    """Left out: the model's own template where it has one; without it, alpaca and prompt/completion rows are plain text
    and `messages` are refused. `none`: plain text in any case. `chatml`, `llama3`, `gemma`, `qwen`: that template. A
    file name ending in .jinja: its content. What was used is published with the adapter."""
    train_on: Literal["completion", "assistant", "last", "all"] = "assistant"
    """Which tokens are trained: `assistant` (the same as `completion`): every answer and its end-of-turn; `last`: only
    the last answer of a conversation; `all`: every token."""
    max_bad_rows: int = Field(0, ge=0)
    """Broken rows (bad JSON, missing column, wrong type) that are skipped and counted before the run is refused."""
    max_dropped: float = Field(0.1, ge=0, le=1)
    """Share of rows that `training.long_rows` may drop before the run is refused."""

    @field_validator("eval_split")
    @classmethod
    def _one_way_to_evaluate(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("eval") is not None:
            raise ValueError("not together with data.eval; name the evaluation data, or set a share aside")
        return value


_PARTS = ("pissa", "olora")


class Lora(Section):
    """The adapter (LoRA, arXiv:2106.09685)."""

    r: int = Field(16, ge=1, le=1024)
    """Rank of the update. An adapted matrix gains r * (d_in + d_out) parameters."""
    alpha: float = Field(32.0, gt=0)
    """Scale of the update: the layer adds (alpha / r) * B @ A."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of the adapter's inputs set to zero while training."""
    target_modules: Literal["all-linear"] | Names = "all-linear"
    """Names (or endings of names) of the layers to adapt; `all-linear` is every linear layer but the output head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (rsLoRA, arXiv:2312.03732)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which bias vectors are trained besides. With other than `none` the base without the adapter is no longer the
    untouched base; some servers refuse such adapters. Not on a quantised base."""
    modules_to_save: Names = ()
    """Whole modules trained and saved besides the adapter (for instance a classification head)."""
    use_dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv:2402.09353): often better at small ranks, and slower. Not with
    `quantization.type: int8`."""
    init: Literal["default", "gaussian", "orthogonal", "olora", "pissa"] = "default"
    """First values of the adapter. `default`, `gaussian` and `orthogonal` begin with no effect. `pissa`
    (arXiv:2404.02948) and `olora` (arXiv:2406.01775) begin with parts of the base weights; the published adapter is
    converted to fit the untouched base, at twice the rank. A quantised base takes `default` and `gaussian` only."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field({})
    """Ranks of single layers, by the ending of their name or a regular expression, for instance `{down_proj: 32}`."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({})
    """Alphas of single layers, by the ending of their name or a regular expression."""
    new_tokens: Names = ()
    """Tokens added to the tokenizer; their embeddings are trained and saved with the adapter."""

    @property
    def begins_with_parts(self) -> bool:
        """Whether the adapter begins with parts of the base's weights."""
        return self.init in _PARTS

    @property
    def times_published(self) -> int:
        """How many times the rank that trains is published: parts of the base that it began with go along."""
        return 2 if self.begins_with_parts else 1

    @field_validator("target_modules", "modules_to_save", "new_tokens")
    @classmethod
    def _no_empty_name(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if "" in tuple(value):  # the end of every name
            raise ValueError("an empty name stands in the list; remove it")
        return value

    @field_validator("target_modules")
    @classmethod
    def _some_layers(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("the list is empty, and an adapter needs layers; name some, or write all-linear")
        return value

    @field_validator("new_tokens")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        twice = next((token for token in value if value.count(token) > 1), None)
        if twice is not None:
            raise ValueError(f'"{twice}" stands in the list twice; remove one of both')
        return value

    @field_validator("init")
    @classmethod
    def _goes_with_the_rest(cls, value: str, info: ValidationInfo) -> str:
        if value in _PARTS and info.data.get("use_dora"):
            raise ValueError(f"{value} cannot be converted to fit the untouched base with use_dora; choose one of both")
        if value == "orthogonal" and info.data.get("r", 0) % 2:
            raise ValueError(f"orthogonal needs an even rank, and r is {info.data['r']}; change r, or use gaussian")
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _even_for_orthogonal(cls, value: dict[str, int], info: ValidationInfo) -> dict[str, int]:
        odd = next((f"{name} has {rank}" for name, rank in value.items() if rank % 2), None)
        if odd and info.data.get("init") == "orthogonal":
            raise ValueError(f"init: orthogonal needs even ranks, and {odd}; change it, or use init: gaussian")
        return value


class Quantization(Section):
    """How QLoRA (arXiv:2305.14314) holds the frozen base: 4 or 8 bits a weight, by bitsandbytes."""

    type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Data type of a weight: 4 bits (nf4 suits normally distributed weights), or 8 (LLM.int8, arXiv:2208.07339)."""
    double_quant: bool = True
    """Quantise the quantisation constants too: about 0.4 bits a weight less."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type in which de-quantised weights are multiplied. `auto`: the run's precision on the device at hand."""
    max_unquantized: float = Field(0.2, ge=0, le=1)
    """Share of the parameters of hidden layers that may stay at 16 bits (experts that are no linear layers do) before
    the run is refused."""


class Training(Section):
    """How it is trained."""

    epochs: float = Field(3.0, gt=0, le=1000)
    """Passes over the training data; fractions are fine. Without effect where `max_steps` is given."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps in all. Left out: what `epochs` comes to."""
    batch_size: int = Field(16, ge=1, le=65536)
    """Sequences per optimizer step, all devices together."""
    micro_batch_size: int = Field(4, ge=1, le=65536)
    """Times `max_length` this is the token budget of a micro-batch. Lower it when memory runs out: the loss stays the
    same, and so does the run."""
    learning_rate: float = Field(2e-4, gt=0, le=1)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up: down to `min_lr` along a half cosine or a line, or level."""
    warmup_ratio: float = Field(0.03, ge=0, le=1)
    """Share of all steps in which the learning rate rises from 0 to its peak."""
    min_lr: float = Field(0.0, ge=0)
    """Where the course ends, a step after the last; below `learning_rate`. Without effect on `constant`."""
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"
    """`adamw`: torch's, states in fp32. `paged_adamw_8bit`: bitsandbytes', states in 8 bits that may leave the GPU; it
    makes the host wait for the device once a step."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Decoupled weight decay (arXiv:1711.05101) on the adapter's matrices."""
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False)
    """Adam's decay rates of the first and second moment, both in [0, 1)."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Bound on the global L2 norm of the gradient, applied once per optimizer step."""
    max_length: int = Field(1024, ge=8, le=10_000_000)
    """Tokens a row may have, end-of-turn included. Above the model's own limit it is refused."""
    long_rows: Literal["drop", "error", "truncate", "truncate_prompt"] = "drop"
    """What happens to longer rows. `drop`: left out, counted, bounded by `data.max_dropped`. `error`: the run is
    refused. `truncate`: the end is cut (no end-of-turn is put in its place). `truncate_prompt`: the beginning of the
    prompt is cut and the answer stays whole; where the answer alone is too long the row is dropped."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 on GPUs that have it (Ampere and later), float16 with loss scaling on older ones, float32 on the
    CPU. The adapter itself is always float32."""
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass: less memory, about a third more work. `auto`: on a GPU."""
    seed: int = Field(42, ge=0, lt=2**31)
    """Seeds the adapter's first values, the order of rows and dropout."""
    kernels: Literal["auto", "reference"] = "auto"
    """`reference`: the model's own forward on padded rows. `auto`: padding-free batches with attention per document and
    logits for trained tokens only, compared with the reference at the start; a difference falls back to it."""
    on_out_of_memory: Literal["fail", "halve"] = "fail"
    """What happens when the device's memory runs out: exit 83, or go on with half the token budget of a micro-batch, on
    all ranks from the same step on, and when the run is resumed. The loss stays the same."""
    parallelism: Literal["replicate", "shard"] = "replicate"
    """`replicate`: every rank holds the whole base. `shard`: the ranks share it (FSDP2), for a base that is too big for
    one device."""
    logging_steps: int = Field(10, ge=1)
    """Optimizer steps between two lines of metrics.jsonl."""
    loader_workers: int = Field(0, ge=0, le=64)
    """Threads that prepare batches ahead of the step. 0: none. Never changes the result."""

    @field_validator("min_lr")
    @classmethod
    def _below_the_peak(cls, value: float, info: ValidationInfo) -> float:
        if value > info.data.get("learning_rate", value):
            raise ValueError(f"{value:g} lies above training.learning_rate ({info.data['learning_rate']:g}); lower it")
        return value

    @field_validator("parallelism")
    @classmethod
    def _not_halved(cls, value: str, info: ValidationInfo) -> str:
        if value == "shard" and info.data.get("on_out_of_memory") == "halve":
            raise ValueError(
                "shard cannot go with training.on_out_of_memory: halve; a rank without memory leaves the others "
                "waiting for its share of the base, so lower training.micro_batch_size instead"
            )
        return value

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"both numbers lie in [0, 1), not {list(value)}; 0.9 and 0.999 are usual")
        return value


class Checkpoints(Section):
    """When the state of the training is saved, and how much of it is kept. The last step is always saved."""

    every_steps: int | None = Field(100, ge=1)
    """Optimizer steps between two checkpoints; null for none by steps."""
    every_minutes: float | None = Field(None, gt=0)
    """Minutes between two checkpoints, whichever comes first."""
    keep: Literal["all"] | int = 2
    """Newest committed checkpoints kept besides the best; `all` keeps every one."""

    @field_validator("keep")
    @classmethod
    def _at_least_one(cls, value: str | int) -> str | int:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"expected all, or a whole number of at least 1, not {value}")
        return value


class Evaluation(Section):
    """How base and tuned model are compared when training is over, and what is measured on the way."""

    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two evaluations during training; left out: only at the end."""
    max_rows: int | None = Field(None, ge=1)
    """At most this many evaluation rows, the first ones; left out: all."""
    early_stopping: int | None = Field(None, ge=1)
    """Evaluations in a row without a lower loss after which the training ends; needs `every_steps`."""
    min_improvement: float = Field(0.0, ge=0)
    """How much lower (nats) the evaluation loss has to be to count as lower for `early_stopping`."""
    publish: Literal["last", "best"] = "last"
    """Which state is published: that of the last step, or that of the lowest evaluation loss on the way, which needs
    `every_steps`."""
    generate_rows: int = Field(0, ge=0)
    """Evaluation rows answered by greedy generation, by base and tuned: exact match, chrF and ROUGE-L."""
    extract: str | None = None
    """What part of a generated answer is compared besides: `number`, the last number in it (GSM8K), or a regular
    expression with one group, whose last match counts."""
    max_new_tokens: int = Field(128, ge=1)
    """Tokens a generated answer may have."""

    @field_validator("early_stopping", "publish")
    @classmethod
    def _only_with_every_steps(cls, value: int | str | None, info: ValidationInfo) -> int | str | None:
        if value not in (None, "last") and info.data.get("every_steps", 1) is None:
            raise ValueError(f"{value} needs evaluations on the way; set evaluation.every_steps")
        return value

    @field_validator("extract")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value in (None, "number"):
            return value
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"neither `number` nor a regular expression ({error})") from None
        if groups != 1:
            raise ValueError(f"a regular expression with one group is needed, this one has {groups}")
        return value


class Output(Section):
    """What is published."""

    adapter_format: Literal["safetensors", "bin", "both"] = "safetensors"
    """File format of the adapter. `bin` is a pickle that PEFT reads with weights_only; some old loaders need it."""
    serve_with: Literal["peft", "vllm", "tgi"] = "peft"
    """Who will load the adapter. An adapter that this server refuses is refused before training."""


class Resources(Section):
    """How much of the cluster one attempt gets. May change between attempts of one run."""

    gpus: int = Field(0, ge=0, le=1024)
    """GPUs. 0 asks for none: the run takes one that is visible, else the CPU. More than 0 and none visible: exit 82."""
    gpu_type: str | None = None
    """A name from the profile's `gpu_types`."""
    nodes: int = Field(1, ge=1, le=1024)
    """Pods that train together."""
    cpu: Quantity | None = None
    """Kubernetes quantity as text, for instance `"8"` or `500m`. Left out: 4 for each GPU, 1 without."""
    memory: Bytes | None = None
    """Kubernetes quantity, for instance `64Gi`. Left out: 32Gi for each GPU, 4Gi without."""
    ephemeral_storage: Bytes | None = None
    """Kubernetes quantity of scratch space: base model, data and checkpoints. Left out: the profile's `scratch.size`,
    else 100Gi with a GPU, 20Gi without."""
    grace_seconds: int = Field(120, ge=10, le=86400)
    """Seconds between the request to leave and the kill."""
    deadline_seconds: int = Field(86400, ge=60)
    """Seconds one admission of the Job may be active."""
    budget_hours: float | None = Field(None, gt=0, alias="budget")
    """Hours over all attempts."""


class Scheduling(Section):
    """When and where in the queue. Wins over the profile."""

    queue: LabelName | None = None
    """Kueue LocalQueue."""
    priority: LabelName | None = None
    """Priority class; with a queue Kueue's WorkloadPriorityClass."""
    cron: Annotated[str, AfterValidator(require_cron)] | None = None
    """Cron line, for instance `0 3 * * 1`; each fire is a run of its own."""
    time_zone: Annotated[str, AfterValidator(require_zone)] | None = None
    """Time zone of `cron`, for instance `Asia/Tokyo`. Left out: UTC."""

    @field_validator("time_zone")
    @classmethod
    def _only_with_cron(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("cron", "") is None:
            raise ValueError("only with scheduling.cron; add the cron line, or remove this key")
        return value
