"""What a decoder layer keeps for its backward pass, in bytes a token: read off the operators of torch and PEFT.

Held up to what autograd keeps on tiny models by tests/job/test_estimate.py. Names of widths: d the model, q all
queries, k all keys, f the inner width of the MLP.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from job.sizing.shapes import Matrix, Shapes
from job.sizing.trained import Target, saved, targets_of
from job.spec import JobSpec


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


def kept(shapes: Shapes, spec: JobSpec, here: Setting) -> float:
    """Bytes that one layer keeps of a token from its forward to its backward pass."""
    d, q, k, c = shapes.width, shapes.queries, shapes.keys, here.width
    # RMSNorm keeps its input in float32: in float32 that is the stream itself, else a copy.
    norms = 4 * (shapes.norms * d + (q + k if shapes.head_norms else 0))
    # Eager attention, and what a GPU has for float32, know no keys that heads share.
    shared = k if not shapes.eager and (here.device == "cpu" or c == 2) else q
    attention = c * (2 * q + 2 * shared) + _scores(shapes, spec, here)
    mlp = _mlp(shapes, here)
    dropped = (c + (c if here.device == "cpu" else 1)) * 2 * d if shapes.dropout and shapes.family == "gpt2" else 0
    return norms + attention + mlp + dropped + adapter_inputs(shapes, spec, here)


def _mlp(shapes: Shapes, here: Setting) -> int:
    """SwiGLU keeps the gate, its activation and the other product; GELU in torch's own operators keeps four."""
    return here.width * shapes.inner * (3 if shapes.gated else 4)


def is_padded(shapes: Shapes, spec: JobSpec) -> bool:
    """Whether rows lie side by side, padded to the longest: then a micro-batch has fewer tokens that count."""
    return shapes.padded or spec.training.kernels == "reference"


def _scores(shapes: Shapes, spec: JobSpec, here: Setting) -> float:
    """What attention keeps of its scores, or instead of them, a matrix being a row's length squared for each head."""
    c = here.width
    if shapes.eager:
        # The softmax in float32, in 16 bits a copy; and the tanh of scores that are bounded.
        return shapes.heads * here.longest * (4 + (c if c == 2 else 0) + (c if shapes.bounded else 0))
    # One mask for all heads.
    mask = c * here.longest if is_padded(shapes, spec) else 0
    if not shapes.dropout:
        return 4 * shapes.heads + mask  # the flash kernels' sums
    # With dropout on them three matrices are kept.
    return 3 * c * shapes.heads * here.longest + mask


def adapter_inputs(shapes: Shapes, spec: JobSpec, here: Setting) -> float:
    """What the adapters keep of a token: their inputs and the product with A; DoRA its two results too."""
    c, casts = here.width, _casts(spec, here)
    by_input: dict[str, list[Target]] = defaultdict(list)
    for target in targets_of(shapes, spec.lora):
        by_input[target.matrix.reads or target.matrix.name].append(target)
    # A matrix that trains whole keeps its input as well.
    inputs = {m.reads or m.name: m.inputs for m in saved(shapes, spec.lora).matrices}
    total = float(c * sum(inputs.values()))
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
    """Bytes of a token that the backward pass of a layer holds besides: gradients on their way.

    Through the MLP, or, once what the MLP kept is gone, through eager attention: two matrices of scores.
    """
    d, f, c = shapes.width, shapes.inner, here.width
    scores = (4 + c) * shapes.heads * here.longest if shapes.eager else 0
    if not _casts(spec, here):
        through = 2 * c * f + c * d
    else:
        # The adapter's input had been turned to float32, and so is its gradient, before dropout and after.
        through = 2 * c * f + 2 * c * d + 4 * f * (2 if spec.lora.dropout else 1)
    return max(through, scores - _mlp(shapes, here))


def head_kept(shapes: Shapes, here: Setting) -> float:
    """Bytes of a trained token around the head: the last norm's input and output, what is picked out, its gradient."""
    return shapes.width * (4 + 3 * here.width)


def largest(matrices: Iterable[Matrix]) -> int:
    """Elements of the largest linear matrix; 0 if there is none."""
    return max((matrix.inputs * matrix.outputs for matrix in matrices if matrix.linear), default=0)
