"""What a decoder layer keeps for its backward pass, in bytes a token: read off the operators of torch and PEFT.

Held up to what autograd keeps on tiny models by tests/job/test_estimate.py. Names of widths: d the model, q all
queries, k all keys, f the inner width of the MLP.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from job.sizing.shapes import Matrix, Shapes
from job.spec import JobSpec
from job.spec_sections import Lora


@dataclass(frozen=True)
class Setting:
    """Where a micro-batch is computed, and how large it is."""

    device: str
    """`cuda` or `cpu`."""
    width: int
    """Bytes of a number in the run's precision: 4 or 2."""
    tokens: int
    """Of the costliest micro-batch."""
    longest: int
    """Tokens of its longest row."""
    ranks: int = 1


@dataclass(frozen=True)
class Target:
    """An adapted matrix and the rank of its adapter."""

    matrix: Matrix
    rank: int


def targets_of(shapes: Shapes, lora: Lora) -> list[Target]:
    """The matrices that the adapter is put on; experts and routers are no linear layers and get none."""
    wanted = lora.target_modules
    return [
        Target(matrix, _rank(matrix, lora))
        for matrix in shapes.matrices
        if matrix.linear and (wanted == "all-linear" or any(_ends(matrix.name, name) for name in wanted))
    ]


def _ends(name: str, ending: str) -> bool:
    """Whether a module's full name, of which ``name`` is the end, may end as the spec says; layer numbers aside."""
    last = re.sub(r".*\.\d+\.", "", ending)
    return name == last or name.endswith(f".{last}") or last.endswith(f".{name}")


def _rank(matrix: Matrix, lora: Lora) -> int:
    """By the first pattern that fits the name, as PEFT looks for it; one that asks for a layer's number does not."""
    for pattern, rank in lora.rank_pattern.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", matrix.name):
            return rank
    return lora.r


def kept(shapes: Shapes, spec: JobSpec, here: Setting) -> float:
    """Bytes that one layer keeps of a token from its forward to its backward pass."""
    d, q, k, f, c = shapes.width, shapes.queries, shapes.keys, shapes.inner, here.width
    # RMSNorm keeps its input in float32: in float32 that is the stream itself, else a copy.
    norms = 4 * (shapes.norms * d + (q + k if shapes.head_norms else 0))
    attention = c * (2 * q + 2 * k) + _scores(shapes, here)
    # SwiGLU keeps the gate, its activation and the other product; GELU in torch's own operators keeps four.
    mlp = c * f * (3 if shapes.gated else 4)
    dropped = (c + (c if here.device == "cpu" else 1)) * 2 * d if shapes.dropout and shapes.family == "gpt2" else 0
    return norms + attention + mlp + dropped + adapter_inputs(shapes, spec, here)


def _scores(shapes: Shapes, here: Setting) -> float:
    """With dropout on them attention scores are kept: three matrices of a row's length squared a head."""
    if not shapes.dropout:
        return 4 * shapes.heads  # the flash kernels' sums
    return 3 * here.width * shapes.heads * here.longest


def adapter_inputs(shapes: Shapes, spec: JobSpec, here: Setting) -> float:
    """What the adapters keep of a token: their inputs and the product with A; DoRA its two results too."""
    c, casts = here.width, _casts(spec, here)
    by_input: dict[str, list[Target]] = defaultdict(list)
    for target in targets_of(shapes, spec.lora):
        by_input[target.matrix.reads or target.matrix.name].append(target)
    total = 0.0
    for group in by_input.values():
        total += group[0].matrix.inputs * _input_bytes(len(group), spec.lora.dropout > 0, casts, here)
        total += sum(c * target.rank for target in group)
        if spec.lora.use_dora:
            total += sum(2 * c * target.matrix.outputs for target in group)
    return total


def _casts(spec: JobSpec, here: Setting) -> bool:
    """PEFT turns an adapter's input to float32 before autocast turns it back; its 4-bit layers on CUDA do not."""
    return here.width == 2 and (spec.quantized is None or here.device == "cpu")


def _input_bytes(members: int, dropout: bool, casts: bool, here: Setting) -> int:
    """Bytes kept of each number that ``members`` adapters read."""
    if not dropout:
        return here.width * (members if casts else 1)
    # torch's CPU dropout multiplies by a mask of the input's type; CUDA's keeps a byte.
    mask = (4 if casts else here.width) if here.device == "cpu" else 1
    return members * (here.width + mask)


def passing(shapes: Shapes, spec: JobSpec, here: Setting) -> float:
    """Bytes of a token that the backward pass of a layer holds besides: gradients on their way through the MLP."""
    d, f, c = shapes.width, shapes.inner, here.width
    if not _casts(spec, here):
        return 2 * c * f + c * d
    # The adapter's input had been turned to float32, and so is its gradient, before dropout and after.
    return 2 * c * f + 2 * c * d + 4 * f * (2 if spec.lora.dropout else 1)


def head_kept(shapes: Shapes, here: Setting) -> float:
    """Bytes of a trained token around the head: the last norm's input and output, what is picked out, its gradient."""
    return shapes.width * (4 + 3 * here.width)


def largest(matrices: Iterable[Matrix]) -> int:
    """Elements of the largest linear matrix; 0 if there is none."""
    return max((matrix.inputs * matrix.outputs for matrix in matrices if matrix.linear), default=0)
