"""Rows that lie one behind the other know nothing of each other: models are told by their parts, then tried (T14)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from job.training import kernels
from job.training.apart import Pieces, leaks, probe_of, refusal
from job.training.head import Scores
from job.training.kernels import PaddingFree, Reference
from tests.job.live import Live
from tests.job.made import CPU, made_model, made_rows, made_spec, rows_of
from tests.job.tiny import BASES

DEVICE = torch.device("cpu")
SIXTEEN = replace(CPU, precision=torch.bfloat16)

SMALL: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
MIXED: dict[str, tuple[dict[str, Any], str]] = {
    "granitemoehybrid": (
        MAMBA | {"layer_types": ["mamba", "mamba", "attention", "mamba"], "num_local_experts": 0},
        "its layers are linear_attention, which would go on from the row before",
    ),
    "qwen3_next": (DELTA | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, "its layers are linear_att"),
    "lfm2": ({"layer_types": ["conv", "conv", "full_attention", "conv"]}, "its layers are conv, which"),
    "falcon_h1": (MAMBA | {"mamba_d_ssm": 64}, "its layers are hybrid, which"),
    "mamba": ({"state_size": 8}, "its layers are linear_attention, which"),
    "rwkv": ({"attention_hidden_size": 32}, "a RwkvBlock has no attention that could be told"),
}


def core_of(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL | more)).eval()


@pytest.mark.parametrize("family", MIXED)
def test_a_model_that_goes_on_from_the_row_before_is_refused_by_its_parts(family: str) -> None:  # T14
    sizes, reason = MIXED[family]
    assert reason in str(refusal(core_of(family, **sizes)))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (torch.nn.Conv1d(32, 32, 4, padding=3), "model.layers.2.mlp.mixer is a Conv1d along time"),
        (torch.nn.GRU(32, 32), "model.layers.2.mlp.mixer is a GRU along time"),
        (torch.nn.Linear(32, 32), "None"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_part_that_looks_back_is_seen_where_the_config_says_nothing_of_it(part: torch.nn.Module, reason: str) -> None:
    core = core_of("llama")
    core.model.layers[2].mlp.mixer = part
    assert reason in str(refusal(core))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mixtral", "qwen2", "phi3", "cohere"])
def test_a_model_of_attention_is_not_refused(family: str) -> None:
    assert refusal(core_of(family)) is None


@pytest.mark.parametrize("base", BASES)
def test_an_adapter_on_the_model_changes_nothing_of_that(base: str, request: pytest.FixtureRequest) -> None:
    assert refusal(made_model(request.getfixturevalue(base), made_spec()).get_base_model()) is None


def test_in_16_bits_too_it_trains_on_padded_rows_and_says_why(tmp_path: Path) -> None:  # T14 T43
    """Mamba in bfloat16: what leaks is less than rounding, so that no comparison of sums would see it."""
    core = core_of("granitemoehybrid", **MIXED["granitemoehybrid"][0]).to(torch.bfloat16)
    core.requires_grad_(False)
    core.get_input_embeddings().weight.requires_grad_(True)
    rows = made_rows([100, 60, 80], 300)
    choice = kernels.choose(core, rows, [0, 1, 2], Reference(0, DEVICE), SIXTEEN)
    assert choice.kernel.padded
    assert "rows one behind the other: its layers are linear_attention" in choice.reason
    assert kernels.named(core, "padding-free, own head", Reference(0, DEVICE), SIXTEEN, "-") is None


class Whispering(PaddingFree):
    """Lets one token of a later row know of an earlier row, by the least that float32 can tell."""

    name = "whispering"

    def score(self, model: Any, batch: Any) -> Scores:
        scores = super().score(model, batch)
        losses = scores.losses.clone()
        losses[-1] *= 1 + 1e-6 * (batch.tokens[0, 0] % 97)
        return scores._replace(losses=losses)


LENGTHS = {
    "one row": [40],
    "two rows": [30, 9],
    "all short": [300, 9, 5],
    "one of them short": [600, 5, 700],
    "none short": [600, 700, 800],
}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_least_leak_is_seen_whatever_the_rows_are(  # T14
    tiny_llama: Path, lengths: str, precision: torch.dtype
) -> None:
    core = made_model(tiny_llama, made_spec()).get_base_model().eval()
    place = replace(CPU, precision=precision)
    rows = made_rows(LENGTHS[lengths], 300)
    pieces = Pieces(rows, probe_of(rows.lengths))
    with place.autocast():
        assert leaks(core, pieces, Whispering(DEVICE), precision)
        assert not leaks(core, pieces, PaddingFree(DEVICE), precision)
    with kernels.registered(lambda *_: Whispering(DEVICE)):
        choice = kernels.choose(core, rows, probe_of(rows.lengths), Reference(0, DEVICE), CPU)
    assert "with whispering a row's loss depends on the row before it" in choice.reason
    assert not choice.kernel.padded


def test_experts_that_tokens_share_out_may_round_otherwise() -> None:
    core = core_of("mixtral", num_local_experts=4)
    rows = made_rows([100, 60, 80], 300)
    assert not leaks(core, Pieces(rows, [0, 1, 2]), PaddingFree(DEVICE), torch.float32)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([40, 7, 9], [0, 1, 2]), ([900, 7, 300, 9], [0, 1, 3]), ([900, 800], [0, 1, 0]), ([5], [0, 0, 0])],
)
def test_kernels_are_compared_on_three_rows_where_there_are_three(lengths: list[int], expected: list[int]) -> None:
    assert probe_of(np.array(lengths, dtype=np.int32)) == expected  # T43


def test_a_piece_ends_with_the_last_trained_token_of_its_row() -> None:
    """An answer early in a long row, one across the whole row, a row that is short enough."""
    tokens = [np.arange(1000, 1900), np.arange(2000, 2700), np.arange(3000, 3010)]
    masks = [[50 <= i < 60 for i in range(900)], [True] * 700, [i > 4 for i in range(10)]]
    pieces = Pieces(rows_of(tokens, masks), [0, 1, 2])
    assert [(int(pieces.tokens(i)[0]), int(pieces.tokens(i)[-1])) for i in range(3)] == [
        (1000, 1059),
        (2684, 2699),
        (3000, 3009),
    ]
    assert pieces.lengths.tolist() == [60, 16, 10]
    assert pieces.supervised.tolist() == [10, 15, 5]
    for piece in range(3):
        labels = pieces.labels(piece)
        assert int((labels != -100).sum()) == pieces.supervised[piece]
        assert labels[0] == -100
        assert all(label in (-100, token) for label, token in zip(labels, pieces.tokens(piece), strict=True))


def test_the_comparison_holds_no_more_where_rows_are_long(tiny_llama: Path) -> None:
    """It keeps all it computes, where the steps may recompute: whole rows would not fit beside a large model."""
    core = made_model(tiny_llama, made_spec()).get_base_model()
    peaks = []
    for length in (64, 1500):
        rows = made_rows([length] * 3, 300)
        with Live("cpu") as live:
            kernels.choose(core, rows, probe_of(rows.lengths), Reference(0, DEVICE), CPU)
        peaks.append(live.peak)
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
