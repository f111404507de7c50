"""What a model is made of, by its config.json alone: matrices and vectors by kind, without torch and without weights.

Families that are not listed here are read off a model without weights (``job.sizing.built``, a process of its own).
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from job.errors import SpecInvalid


class UnknownFamily(Exception):
    """This page does not know the model's family; a model without weights has to be built."""


@dataclass(frozen=True)
class Matrix:
    """A kind of linear layer, or of experts, that every decoder layer has."""

    name: str
    """How its name ends, as `lora.target_modules` has it."""
    kind: str
    """`attention`, `mlp` or `experts`."""
    inputs: int
    outputs: int
    each: int = 1
    """How many of them a decoder layer has."""
    bias: bool = False
    reads: str = ""
    """The activation it multiplies; layers that read the same one share a copy of it. Left out: one of its own."""
    linear: bool = True
    """Whether it is a linear layer; experts held as one 3-D parameter are none: neither adapted nor quantised."""


@dataclass(frozen=True)
class Shapes:
    """A decoder: so many equal layers between an embedding and a head."""

    family: str
    layers: int
    width: int
    vocabulary: int
    heads: int
    head_width: int
    key_value_heads: int
    inner: int
    """Width between the two halves of an MLP."""
    matrices: tuple[Matrix, ...]
    vectors: int
    """Elements of norms and other vectors in one decoder layer, biases of matrices left out."""
    tied: bool
    gated: bool = True
    """The MLP multiplies two products (SwiGLU); otherwise it has one."""
    norms: int = 2
    """Norms as wide as the model in one decoder layer."""
    layer_norm: bool = False
    """LayerNorm with a bias instead of RMSNorm."""
    head_norms: bool = False
    """Queries and keys are normed."""
    positions: int = 0
    """Learned positions."""
    head_bias: bool = False
    dropout: float = 0.0
    """The base's own, on in training."""
    softcap: bool = False
    """Logits pass through a soft-cap."""
    bounded: bool = False
    """So do attention scores."""
    eager: bool = False
    """Attention is made of torch's plain operators, with all scores of a row: where they are bounded, or in models that
    transformers gives nothing better."""
    padded: bool = False
    """Rows cannot lie one behind the other (``job.training.apart``)."""

    @property
    def queries(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of all keys of a token."""
        return self.key_value_heads * self.head_width

    def counts(self) -> dict[str, int]:
        """Parameters by kind: embeddings, head, attention, mlp, experts, norms. A tied head has none of its own."""
        counts = Counter(embeddings=(self.vocabulary + self.positions) * self.width)
        counts["head"] = 0 if self.tied else self.vocabulary * self.width
        counts["head"] += self.vocabulary if self.head_bias else 0
        for matrix in self.matrices:
            size = matrix.inputs * matrix.outputs + (matrix.outputs if matrix.bias else 0)
            counts[matrix.kind] += size * matrix.each * self.layers
        counts["norms"] = self.vectors * self.layers + self.width * (2 if self.layer_norm else 1)
        return {kind: count for kind, count in counts.items() if count}


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """The shapes that a config describes.

    Args:
        config: the content of config.json.

    Raises:
        UnknownFamily: `model_type` is not among those of this module.
        SpecInvalid: a size is missing or is no number.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise UnknownFamily(family)
    try:
        return _FAMILIES[family](config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise SpecInvalid(
            f"the model's config.json: {type(error).__name__} {error} while counting the parameters of a {family}; "
            "it lacks a size or has one that is no number; fetch the model again"
        ) from error


def read_config(folder: Path) -> dict[str, Any] | None:
    """The config.json of a folder; None where there is none. Raises SpecInvalid where it cannot be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SpecInvalid(f"{path} cannot be read: {error}; fetch the model again") from error
    if not isinstance(config, dict):
        raise SpecInvalid(f"{path}: a mapping is needed; fetch the model again")
    return config


def _llama(config: Mapping[str, Any], **special: Any) -> Shapes:
    """Llama and those built like it: grouped queries, RMSNorm, a gated MLP."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    shape = Shapes(
        family=config["model_type"],
        layers=config["num_hidden_layers"],
        width=width,
        vocabulary=config["vocab_size"],
        heads=heads,
        head_width=config.get("head_dim") or width // heads,
        key_value_heads=config.get("num_key_value_heads") or heads,
        inner=inner,
        matrices=(),
        vectors=2 * width,
        tied=bool(config.get("tie_word_embeddings", False)),
        dropout=float(config.get("attention_dropout") or 0.0),
    )
    bias = bool(special.pop("bias", config.get("attention_bias", False)))
    matrices = _separate(shape, bias, bool(special.pop("output_bias", bias)), bool(config.get("mlp_bias", False)))
    return replace(shape, matrices=matrices, **special)


def _separate(shape: Shapes, bias: bool, output_bias: bool, mlp_bias: bool) -> tuple[Matrix, ...]:
    """The seven matrices of a layer that hold queries, keys and values apart."""
    width, inner = shape.width, shape.inner
    return (
        Matrix("q_proj", "attention", width, shape.queries, bias=bias, reads="attention"),
        Matrix("k_proj", "attention", width, shape.keys, bias=bias, reads="attention"),
        Matrix("v_proj", "attention", width, shape.keys, bias=bias, reads="attention"),
        Matrix("o_proj", "attention", shape.queries, width, bias=output_bias),
        Matrix("gate_proj", "mlp", width, inner, bias=mlp_bias, reads="mlp"),
        Matrix("up_proj", "mlp", width, inner, bias=mlp_bias, reads="mlp"),
        Matrix("down_proj", "mlp", inner, width, bias=mlp_bias),
    )


def _qwen2(config: Mapping[str, Any]) -> Shapes:
    return _llama(config, bias=True, output_bias=False)


def _qwen3(config: Mapping[str, Any]) -> Shapes:
    shape = _llama({**config, "head_dim": config.get("head_dim", 128)})
    return replace(shape, vectors=shape.vectors + 2 * shape.head_width, head_norms=True)


def _gemma(config: Mapping[str, Any]) -> Shapes:
    return _llama({"tie_word_embeddings": True, "head_dim": 256, **config})


def _gemma2(config: Mapping[str, Any]) -> Shapes:
    shape = _gemma(config)
    bounded = config.get("attn_logit_softcapping", 50.0) is not None
    softcap = config.get("final_logit_softcapping", 30.0) is not None
    shape = replace(shape, vectors=4 * shape.width, norms=4, softcap=softcap)
    return replace(shape, bounded=bounded, eager=bounded, padded=bounded)


def _gemma3(config: Mapping[str, Any]) -> Shapes:
    shape = _gemma(config)
    capped = config.get("final_logit_softcapping") is not None
    vectors = 4 * shape.width + 2 * shape.head_width
    return replace(shape, vectors=vectors, norms=4, head_norms=True, softcap=capped)


def _phi3(config: Mapping[str, Any]) -> Shapes:
    shape = _llama(config)
    fused = (
        Matrix("qkv_proj", "attention", shape.width, shape.queries + 2 * shape.keys),
        Matrix("o_proj", "attention", shape.queries, shape.width),
        Matrix("gate_up_proj", "mlp", shape.width, 2 * shape.inner),
        Matrix("down_proj", "mlp", shape.inner, shape.width),
    )
    return replace(shape, matrices=fused)


def _mixtral(config: Mapping[str, Any]) -> Shapes:
    """Experts are two 3-D parameters a layer, and the router a parameter of its own."""
    inner = config.get("moe_intermediate_size") or config["intermediate_size"]
    shape = _llama({"intermediate_size": inner, **config})
    experts = config.get("num_local_experts") or config["num_experts"]
    matrices = (
        *(matrix for matrix in shape.matrices if matrix.kind == "attention"),
        Matrix("experts.gate_up_proj", "experts", shape.width, 2 * inner, experts, linear=False),
        Matrix("experts.down_proj", "experts", inner, shape.width, experts, linear=False),
        Matrix("gate", "experts", shape.width, experts, linear=False),
    )
    # A token passes through several experts, each as wide as `inner`.
    return replace(shape, matrices=matrices, inner=inner * config["num_experts_per_tok"])


def _qwen3_moe(config: Mapping[str, Any]) -> Shapes:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UnknownFamily("qwen3_moe with layers that have no experts")
    shape = _mixtral(config)
    return replace(shape, vectors=shape.vectors + 2 * shape.head_width, head_norms=True)


def _gpt2(config: Mapping[str, Any]) -> Shapes:
    width = config["n_embd"]
    inner = config.get("n_inner") or 4 * width
    return Shapes(
        family="gpt2",
        layers=config["n_layer"],
        width=width,
        vocabulary=config["vocab_size"],
        heads=config["n_head"],
        head_width=width // config["n_head"],
        key_value_heads=config["n_head"],
        inner=inner,
        matrices=(
            Matrix("attn.c_attn", "attention", width, 3 * width, bias=True),
            Matrix("attn.c_proj", "attention", width, width, bias=True),
            Matrix("mlp.c_fc", "mlp", width, inner, bias=True),
            Matrix("mlp.c_proj", "mlp", inner, width, bias=True),
        ),
        vectors=4 * width,
        tied=bool(config.get("tie_word_embeddings", True)),
        gated=False,
        layer_norm=True,
        positions=config["n_positions"],
        dropout=max(float(config.get(key, 0.1) or 0.0) for key in ("resid_pdrop", "attn_pdrop")),
    )


def _phi(config: Mapping[str, Any]) -> Shapes:
    """Attention and MLP side by side behind one LayerNorm; biases everywhere, in the head too."""
    shape = _llama(config)
    matrices = (
        *(replace(matrix, bias=True, reads="attention") for matrix in shape.matrices[:3]),
        Matrix("dense", "attention", shape.queries, shape.width, bias=True),
        Matrix("fc1", "mlp", shape.width, shape.inner, bias=True, reads="attention"),
        Matrix("fc2", "mlp", shape.inner, shape.width, bias=True),
    )
    return replace(
        shape,
        matrices=matrices,
        vectors=2 * shape.width,
        gated=False,
        norms=1,
        layer_norm=True,
        head_bias=True,
    )


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], Shapes]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "phi": _phi,
    "phi3": _phi3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}
