"""Peak device memory before it happens: from the model's config and the spec, with the arithmetic to check it by.

Nothing here needs torch, so that ``tunejob check`` stays quick.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from job.sizing.activations import Setting, head_kept, kept, largest, passing
from job.sizing.shapes import Matrix, Shapes
from job.sizing.trained import Target, adapter, besides, embeddings_train, head_trains, saved, targets_of
from job.spec import JobSpec

GIB = 1 << 30

CHUNK_BYTES = 1 << 26
"""Bytes of a chunk's logits in float32; ``job.training.head`` has the same number, and a test that says so."""

CHUNKED = frozenset(
    [
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "smollm3",
        "olmo2",
        "gemma",
        "gpt2",
        "gemma2",
        "gemma3_text",
        "granite",
        "cohere",
    ]
)
"""Model types whose logits are computed in chunks: the families of ``job.training.head``, as a test says."""

CUDA_CONTEXT = 0.7 * GIB
"""CUDA's context and libraries on a device. Nobody has measured it for this project."""

PROCESS = 0.42 * GIB
"""Interpreter and libraries of a worker on the CPU, measured as resident set."""

FOUR_BIT_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4-bit types; double quantisation has 8 bits a scale and a float32 for
256 of them (arXiv:2305.14314, section 3)."""


@dataclass(frozen=True)
class Item:
    """One line of the arithmetic."""

    kind: str
    count: int
    each: float
    """Bytes."""

    @property
    def bytes(self) -> float:
        """Of all of them."""
        return self.count * self.each


@dataclass(frozen=True)
class Estimate:
    """What one device holds at its peak."""

    items: tuple[Item, ...]
    """Tensors."""
    around: Item
    """What is there before the first of them."""
    setting: Setting
    missing: tuple[str, ...] = ()
    """Names in `lora.modules_to_save` of which nobody here knows how large they are: then the sum is too small."""

    @property
    def tensors(self) -> int:
        """Bytes of the tensors."""
        return math.ceil(sum(item.bytes for item in self.items))

    @property
    def bytes(self) -> int:
        """The sum."""
        return self.tensors + math.ceil(self.around.bytes)

    @property
    def gib(self) -> float:
        """The sum in GiB."""
        return self.bytes / GIB

    def record(self) -> dict[str, Any]:
        """As it stands in JSON, bytes by kind."""
        parts = {item.kind: math.ceil(item.bytes) for item in (*self.items, self.around)}
        return {"total": self.bytes, "tokens": self.setting.tokens, "parts": parts}

    def table(self) -> list[str]:
        """The arithmetic, line by line."""
        rows = [("", "count", "bytes each", "GiB")]
        rows += [(i.kind, f"{i.count:,}", f"{i.each:,.4g}", f"{i.bytes / GIB:.2f}") for i in (*self.items, self.around)]
        rows += [("sum", "", "", f"{self.gib:.2f}")]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return [
            "  ".join([row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in (1, 2, 3))]).rstrip() for row in rows
        ]


def setting_of(spec: JobSpec, tokens: int | None = None, longest: int | None = None) -> Setting:
    """Where a spec trains: on GPUs if it asks for them, else on the CPU.

    Args:
        tokens, longest: of the costliest micro-batch, where the rows are known; left out: the whole token budget.
    """
    device = "cuda" if spec.resources.gpus else "cpu"
    precision = spec.training.precision
    width = 4 if precision == "float32" or (precision == "auto" and device == "cpu") else 2
    budget = spec.training.micro_batch_size * spec.training.max_length
    ranks = max(1, spec.resources.gpus * spec.resources.nodes)
    return Setting(device, width, tokens or budget, longest or spec.training.max_length, ranks)


def estimate(shapes: Shapes, spec: JobSpec, here: Setting | None = None) -> Estimate:
    """What a device holds at the peak of training, with the kernel that the model gets (``job.training.kernels``)."""
    here = here or setting_of(spec)
    targets = targets_of(shapes, spec.lora)
    items = [
        *_weights(shapes, spec, here),
        *_trained(shapes, spec, here, targets),
        *_activations(shapes, spec, here),
    ]
    around = Item(*(("CUDA context", 1, CUDA_CONTEXT) if here.device == "cuda" else ("process", 1, PROCESS)))
    return Estimate(tuple(item for item in items if item.bytes), around, here, saved(shapes, spec.lora).unknown)


def bytes_per_weight(spec: JobSpec, width: int) -> float:
    """Bytes of a weight of a linear layer, its share of the scales included; ``width`` is that of the precision."""
    quantized = spec.quantized
    if quantized is None:
        return width
    if quantized.type == "int8":
        return 1.0
    scale = 1.0 + 4.0 / 256 if quantized.double_quant else 4.0
    return 0.5 + scale / FOUR_BIT_BLOCK


def _weights(shapes: Shapes, spec: JobSpec, here: Setting) -> Iterator[Item]:
    """The frozen base by kind; shared out where the spec says so, but for the head, and embeddings tied or trained."""
    each = bytes_per_weight(spec, here.width)
    parts = here.ranks if spec.training.parallelism == "shard" else 1
    whole = {"head"} | ({"embeddings"} if shapes.tied or embeddings_train(spec) else set())
    for kind, count in shapes.counts().items():
        loose = sum(_loose(m) * m.each * shapes.layers for m in shapes.matrices if m.kind == kind)
        shared = 1 if kind in whole else parts
        if kind not in ("attention", "mlp", "experts") or spec.quantized is None:
            yield Item(f"weights: {kind}", math.ceil(count / shared), here.width)
            continue
        name = "8 bits" if spec.quantized.type == "int8" else spec.quantized.type
        yield Item(f"weights: {kind}, {name}", math.ceil((count - loose) / shared), each)
        yield Item(f"weights: {kind}, not quantised", math.ceil(loose / shared), here.width)
    if parts > 1:
        layer = sum(m.inputs * m.outputs * m.each for m in shapes.matrices)
        # FSDP2 computes with one, and holds the next as it arrives and as it is copied apart.
        yield Item("weights: three layers gathered", 3 * layer, each)


def _loose(matrix: Matrix) -> int:
    """Parameters of a matrix that bitsandbytes leaves alone: biases, and experts that are no linear layers."""
    return (matrix.outputs if matrix.bias else 0) if matrix.linear else matrix.inputs * matrix.outputs


def _trained(shapes: Shapes, spec: JobSpec, here: Setting, targets: Sequence[Target]) -> Iterator[Item]:
    for target in targets:
        yield Item(f"adapter: {target.matrix.name}", adapter(shapes, spec.lora, [target]), 4)
    yield Item("trained besides", besides(shapes, spec), 4)
    count = adapter(shapes, spec.lora, targets) + besides(shapes, spec)
    yield Item("gradients", count, 4)
    if spec.training.optimizer == "adamw":
        yield Item("optimizer: two moments, float32", count, 8)
    else:
        yield Item("optimizer: two moments, 8 bits", count, 2 + 8 / 256)
    if here.width == 2:
        yield Item("adapter: 16-bit copies of a pass", count, 2)


def _activations(shapes: Shapes, spec: JobSpec, here: Setting) -> Iterator[Item]:
    """What is kept for the backward pass, and the larger of what only passes: the head's chunk, a layer's gradients."""
    if recomputes(spec, here):
        yield Item("kept: inputs of the layers", here.tokens * shapes.layers, shapes.width * here.width)
    else:
        yield Item("kept: activations of all layers", here.tokens * shapes.layers, kept(shapes, spec, here))
    stages = list(_at_the_head(shapes, spec, here)), list(_in_a_layer(shapes, spec, here))
    yield from max(stages, key=lambda stage: sum(item.bytes for item in stage))


def _at_the_head(shapes: Shapes, spec: JobSpec, here: Setting) -> Iterator[Item]:
    """At the end of the forward pass. Every token counts as trained: how many are is known only from the data."""
    yield Item("head: hidden states and their gradient", here.tokens, head_kept(shapes, here))
    if shapes.family not in CHUNKED or head_trains(shapes, spec) or spec.training.kernels == "reference":
        # The model's own logits, in float32, their logarithms and the gradient of these.
        yield Item("head: logits of all tokens", here.tokens * shapes.vocabulary, 12 + (2 if here.width == 2 else 0))
        return
    rows = min(here.tokens, max(1, CHUNK_BYTES // (4 * shapes.vocabulary)))
    # float32, in 16 bits before or after, and the slope of a soft-cap.
    wide = 4 + (2 if here.width == 2 else 0) + (4 if shapes.softcap else 0)
    yield Item("head: logits of a chunk", rows * shapes.vocabulary, wide)


def _in_a_layer(shapes: Shapes, spec: JobSpec, here: Setting) -> Iterator[Item]:
    """In the backward pass of the last layer, while all others keep what they kept."""
    if recomputes(spec, here):
        yield Item("passing: one layer, recomputed", here.tokens, kept(shapes, spec, here))
    gradients, matrix = passing(shapes, spec, here), largest(shapes.matrices)
    if spec.quantized is not None and matrix > here.tokens * shapes.inner:
        gradients -= shapes.inner * here.width
        yield Item("passing: the largest matrix, de-quantised", matrix, here.width)
    yield Item("passing: gradients of a layer", here.tokens, gradients)
    if spec.lora.use_dora:
        yield Item("passing: weight and update of DoRA", matrix, 8 + here.width)


def recomputes(spec: JobSpec, here: Setting) -> bool:
    """Whether activations are computed again in the backward pass."""
    wanted = spec.training.gradient_checkpointing
    return here.device == "cuda" if wanted == "auto" else wanted
