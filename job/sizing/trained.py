"""What trains, on which matrices and besides them: counted by names and shapes, for PEFT goes by names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from job.sizing.shapes import Matrix, Shapes
from job.spec import JobSpec
from job.spec_sections import Lora

_TABLES = ("lm_head", "embed_tokens", "wte", "embed_out", "embed_in")
"""Embeddings and heads: a vector for each word of the vocabulary."""

_FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f")

_WHOLE = {"attention": ("self_attn", "attn"), "mlp": ("mlp",), "experts": ("mlp", "block_sparse_moe", "experts")}
"""Modules that hold the matrices of a kind."""


@dataclass(frozen=True)
class Target:
    """An adapted matrix and the rank of its adapter."""

    matrix: Matrix
    rank: int


@dataclass(frozen=True)
class Saved:
    """What `lora.modules_to_save` comes to: modules of which a second copy trains whole."""

    parameters: int = 0
    matrices: tuple[Matrix, ...] = ()
    """Those among them, which then carry no adapter."""
    unknown: tuple[str, ...] = ()
    """Names of which nobody here knows how large they are."""


def targets_of(shapes: Shapes, lora: Lora) -> list[Target]:
    """The matrices that the adapter is put on; experts and routers are no linear layers and get none."""
    wanted, whole = lora.target_modules, saved(shapes, lora).matrices
    return [
        Target(matrix, _rank(matrix, lora))
        for matrix in shapes.matrices
        if matrix.linear
        and matrix not in whole
        and (wanted == "all-linear" or any(_ends(matrix.name, name) for name in wanted))
    ]


def _ends(name: str, ending: str) -> bool:
    """Whether a module's full name, of which ``name`` is the end, may end as the spec says; layer numbers aside."""
    last = _inside(ending)
    return name == last or name.endswith(f".{last}") or last.endswith(f".{name}")


def _inside(name: str) -> str:
    """A module's name from its layer on."""
    return re.sub(r".*\.\d+\.", "", name)


def _rank(matrix: Matrix, lora: Lora) -> int:
    """By the first pattern that fits the name, as PEFT looks for it; one that asks for a layer's number does not."""
    for pattern, rank in lora.rank_pattern.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", matrix.name):
            return rank
    return lora.r


def saved(shapes: Shapes, lora: Lora) -> Saved:
    """What trains whole, of embeddings and head to parts of the layers."""
    parameters, matrices, unknown = 0, dict[str, Matrix](), []
    for name in lora.modules_to_save:
        found = [matrix for matrix in shapes.matrices if _holds(name, matrix)]
        size = _size(shapes, name, found)
        parameters += size or 0
        matrices |= {matrix.name: matrix for matrix in found}
        unknown += [name] if size is None else []
    return Saved(parameters, tuple(matrices.values()), tuple(unknown))


def _holds(name: str, matrix: Matrix) -> bool:
    """Whether a module is a matrix, or holds it."""
    inside = _inside(name)
    return _ends(matrix.name, name) or f".{inside}." in f".{matrix.name}." or inside in _WHOLE.get(matrix.kind, ())


def _size(shapes: Shapes, name: str, matrices: Sequence[Matrix]) -> int | None:
    """Parameters of a module in all layers, or in the one that its name counts; None if nobody here knows."""
    last, layers = name.rsplit(".", 1)[-1], 1 if re.search(r"(^|\.)\d+\.", name) else shapes.layers
    if matrices:
        norms = 2 * shapes.head_width if shapes.head_norms and last in _WHOLE["attention"] else 0
        sizes = ((m.inputs * m.outputs + (m.outputs if m.bias else 0)) * m.each for m in matrices)
        return (sum(sizes) + norms) * layers
    if last in _TABLES:
        return shapes.vocabulary * shapes.width
    if last == "wpe":
        return shapes.positions * shapes.width
    if last in ("q_norm", "k_norm"):
        return shapes.head_width * layers
    if re.fullmatch(r"\w*norm\w*|ln_\w+", last):
        width = shapes.width * (2 if shapes.layer_norm else 1)
        return width if last in _FINAL_NORMS and not re.search(r"\.\d+\.", name) else width * layers
    return None


def adapter(shapes: Shapes, lora: Lora, targets: Sequence[Target]) -> int:
    """Parameters of the adapter on some matrices: A and B, and with DoRA a magnitude for each output."""
    each = sum(
        t.rank * (t.matrix.inputs + t.matrix.outputs) + (t.matrix.outputs if lora.use_dora else 0) for t in targets
    )
    return each * shapes.layers


def besides(shapes: Shapes, spec: JobSpec) -> int:
    """Parameters of what trains whole, of the rows of new tokens, and of biases."""
    lora = spec.lora
    whole = saved(shapes, lora)
    rows = len(lora.new_tokens) * (1 if shapes.tied else 2)  # of the embeddings, and of a head that is another tensor
    return whole.parameters + rows * shapes.width + _biases(shapes, lora, whole)


def _biases(shapes: Shapes, lora: Lora, whole: Saved) -> int:
    if lora.bias == "none":
        return 0
    adapted = [target.matrix for target in targets_of(shapes, lora)]
    of = adapted if lora.bias == "lora_only" else [m for m in shapes.matrices if m not in whole.matrices]
    return sum(m.outputs for m in of if m.bias) * shapes.layers


def trained_parameters(shapes: Shapes, spec: JobSpec) -> int:
    """Parameters that train: adapter, magnitudes (DoRA), saved modules, new tokens, biases."""
    return adapter(shapes, spec.lora, targets_of(shapes, spec.lora)) + besides(shapes, spec)


def head_trains(shapes: Shapes, spec: JobSpec) -> bool:
    """Whether the output head is trained: by itself, in the rows of new tokens, or as the embeddings it is tied to."""
    names = {name.rsplit(".", 1)[-1] for name in spec.lora.modules_to_save}
    alone = names & {"lm_head", "embed_out"} or spec.lora.new_tokens
    return bool(alone or (shapes.tied and embeddings_train(spec)))


def embeddings_train(spec: JobSpec) -> bool:
    """Whether the input embeddings are trained, whole or in the rows of new tokens."""
    names = {name.rsplit(".", 1)[-1] for name in spec.lora.modules_to_save}
    return bool(names & {"embed_tokens", "wte", "embed_in"} or spec.lora.new_tokens)
