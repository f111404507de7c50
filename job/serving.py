"""What servers make of an adapter: refused where vLLM or TGI refuse it, or serve it wrongly. No torch.

From the sources of vLLM (``lora/peft_helper.py``, ``lora/utils.py``, ``config/lora.py``; 0.8 to 0.26) and of TGI 3
(``adapters/lora.py``, ``utils/adapter.py``). TGI reads lora_A and lora_B and one scale; of everything else it says
nothing and goes on without, which is worse than a refusal.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from job.errors import SpecInvalid
from job.spec import JobSpec

VLLM_LARGEST_RANK = 512
"""Largest `--max-lora-rank` of vLLM, which takes 1, 8, 16, 32, 64, 128, 256, 320 and 512; its default is 16."""
TGI_TARGETS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"})
"""The only layers into which TGI puts an adapter."""
NAMES = {"vllm": "vLLM", "tgi": "TGI"}


@dataclass(frozen=True)
class Adapter:
    """What a server reads of an adapter."""

    rank: int
    """The largest of its layers."""
    scales: frozenset[float] = frozenset()
    """alpha by rank of its layers; more than one where patterns ask for it."""
    ranks: frozenset[int] = frozenset()
    use_dora: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    new_tokens: bool = False
    fan_in_fan_out: bool = False
    """GPT-2's layers, which hold their weights transposed."""
    targets: tuple[str, ...] = ()
    """Endings of the layers' names; empty while they are not known (all-linear before the model is)."""
    safetensors: bool = True


@dataclass(frozen=True)
class Rule:
    """Something a server does not take."""

    server: str
    key: str
    """The key of the spec that asks for it."""
    breaks: Callable[[Adapter], bool]
    what: str
    """What the server does about it."""
    instead: str


def _beyond(targets: Sequence[str]) -> bool:
    return any(name.rsplit(".", 1)[-1] not in TGI_TARGETS for name in targets)


RULES: tuple[Rule, ...] = (
    Rule(
        "vllm",
        "lora.use_dora",
        lambda a: a.use_dora,
        "refuses DoRA when it loads the adapter",
        "leave it out, or merge the adapter after training (tunejob merge) and serve the merged model",
    ),
    Rule(
        "vllm",
        "lora.modules_to_save",
        lambda a: bool(a.modules_to_save),
        "refuses whole modules in an adapter",
        "leave it out, or serve the merged model",
    ),
    Rule(
        "vllm",
        "lora.new_tokens",
        lambda a: a.new_tokens,
        "refuses embeddings of new tokens in an adapter",
        "serve the merged model",
    ),
    Rule(
        "vllm",
        "lora.bias",
        lambda a: a.bias != "none",
        "refuses trained biases in an adapter",
        "set it to none, or serve the merged model",
    ),
    Rule(
        "vllm",
        "lora.r",
        lambda a: a.rank > VLLM_LARGEST_RANK,
        f"takes ranks up to {VLLM_LARGEST_RANK} (pissa and olora are published at twice their rank)",
        "lower the rank, or serve the merged model",
    ),
    Rule(
        "vllm",
        "lora.rank_pattern or lora.alpha_pattern",
        lambda a: len(a.scales) > 1,
        "applies one scale, alpha by r, to every layer and so would answer wrongly",
        "give each pattern's rank an alpha of the same ratio, or serve the merged model",
    ),
    Rule(
        "vllm",
        "model",
        lambda a: a.fan_in_fan_out,
        "has no LoRA for GPT-2's layers",
        "serve the merged model",
    ),
    Rule(
        "tgi",
        "lora.use_dora",
        lambda a: a.use_dora,
        "drops DoRA's magnitudes without a word and so would answer wrongly",
        "leave it out, or serve the merged model",
    ),
    Rule(
        "tgi",
        "lora.modules_to_save",
        lambda a: bool(a.modules_to_save),
        "drops whole modules without a word",
        "leave it out, or serve the merged model",
    ),
    Rule(
        "tgi",
        "lora.new_tokens",
        lambda a: a.new_tokens,
        "drops the embeddings of new tokens without a word",
        "serve the merged model",
    ),
    Rule(
        "tgi",
        "lora.bias",
        lambda a: a.bias != "none",
        "drops trained biases without a word",
        "set it to none, or serve the merged model",
    ),
    Rule(
        "tgi",
        "lora.rank_pattern or lora.alpha_pattern",
        lambda a: len(a.scales) > 1 or len(a.ranks) > 1,
        "stacks the layers' matrices and applies one scale to all, so that ranks must not differ",
        "leave the patterns out, or serve the merged model",
    ),
    Rule(
        "tgi",
        "lora.target_modules",
        lambda a: a.fan_in_fan_out or _beyond(a.targets),
        f"puts adapters into {', '.join(sorted(TGI_TARGETS))} only and drops all others",
        "name those, or serve the merged model",
    ),
    Rule(
        "tgi",
        "output.adapter_format",
        lambda a: not a.safetensors,
        "reads .safetensors only",
        "set it to safetensors or both",
    ),
)


def refusals(adapter: Adapter, server: str) -> Iterator[str]:
    """A sentence for everything that stands against an adapter on `vllm` or `tgi`; none for `peft`."""
    for rule in RULES:
        if rule.server == server and rule.breaks(adapter):
            yield f"{rule.key}: {NAMES[server]} {rule.what}; {rule.instead}"


def refusals_of(spec: JobSpec) -> Iterator[str]:
    """What stands against serving what a spec will publish with ``output.serve_with``, as far as the spec says."""
    return refusals(published(spec), spec.output.serve_with)


def check(config: Mapping[str, Any], spec: JobSpec, layers: Iterable[tuple[int, float]]) -> None:
    """Refuses an adapter that ``output.serve_with`` cannot serve, once the model's layers are known.

    Args:
        config: of the adapter that trains.
        layers: rank and scale of each layer that is adapted. Only peft knows them: of rank_pattern and of alpha_pattern
            it takes the first that fits a layer's name, each for itself.

    Raises:
        SpecInvalid: every reason, a line each.
    """
    server, pairs = spec.output.serve_with, list(layers)
    adapter = of_config(config, spec.output.adapter_format != "bin")
    factor = spec.lora.times_published
    # Servers take rank and scale from r and lora_alpha, also where patterns leave no layer with them.
    ranks = {factor * rank for rank in (config["r"], *(rank for rank, _ in pairs))}
    scales = {
        _scale(config["r"], config["lora_alpha"], bool(config.get("use_rslora"))),
        *(round(scale, 12) for _, scale in pairs),
    }
    known = replace(adapter, rank=max(ranks), ranks=frozenset(ranks), scales=frozenset(scales))
    found = refusals(known, server)
    if lines := [f"output.serve_with: {server} cannot serve this adapter: {line}" for line in found]:
        raise SpecInvalid("\n".join(lines))


def published(spec: JobSpec) -> Adapter:
    """The adapter that a spec will publish, as far as the spec alone says."""
    lora = spec.lora
    factor = spec.lora.times_published
    ranks = [lora.r, *lora.rank_pattern.values()]
    return Adapter(
        rank=factor * max(ranks),
        scales=_scales(lora.r, lora.alpha, lora.rank_pattern, lora.alpha_pattern, lora.use_rslora),
        ranks=frozenset(factor * rank for rank in ranks),
        use_dora=lora.use_dora,
        bias=lora.bias,
        modules_to_save=lora.modules_to_save,
        new_tokens=bool(lora.new_tokens),
        targets=() if lora.target_modules == "all-linear" else tuple(lora.target_modules),
        safetensors=spec.output.adapter_format != "bin",
    )


def of_config(config: Mapping[str, Any], safetensors: bool = True) -> Adapter:
    """The adapter of an adapter_config.json, or of a ``LoraConfig.to_dict()``."""
    patterns = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    ranks = [config["r"], *patterns[0].values()]
    targets = config.get("target_modules") or ()
    return Adapter(
        rank=max(ranks),
        scales=_scales(config["r"], config["lora_alpha"], *patterns, bool(config.get("use_rslora"))),
        ranks=frozenset(ranks),
        use_dora=bool(config.get("use_dora")),
        bias=str(config.get("bias", "none")),
        modules_to_save=tuple(config.get("modules_to_save") or ()),
        new_tokens=bool(config.get("trainable_token_indices")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        targets=() if isinstance(targets, str) else tuple(sorted(targets)),
        safetensors=safetensors,
    )


def _scales(
    rank: int, alpha: float, ranks: Mapping[str, int], alphas: Mapping[str, float], use_rslora: bool
) -> frozenset[float]:
    """The scales that layers may have, as far as patterns say: one of ranks meets the one of alphas written alike."""
    names = ranks.keys() | alphas.keys()
    pairs = [(rank, alpha), *((ranks.get(name, rank), alphas.get(name, alpha)) for name in names)]
    return frozenset(_scale(size, one, use_rslora) for size, one in pairs)


def _scale(rank: int, alpha: float, use_rslora: bool) -> float:
    return round(alpha / (math.sqrt(rank) if use_rslora else rank), 12)
