"""Several gloo ranks train what one trains (T2, T38, T39, T40, T41, T46), with a base that each holds or all share."""

import ast
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from job.errors import SpecInvalid
from job.training import sharded
from job.training.device import Placement
from job.training.order import share
from tests.job import ranks
from tests.job.made import made_spec
from tests.job.scenarios import largest_difference
from tests.job.tiny import BASES

TRAIN = "tests.job.scenarios:train"
STEPS = {"batch_size": 8, "micro_batch_size": 1, "max_length": 40, "max_steps": 4, "max_grad_norm": 1e9}


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def trained_by(
    server: ranks.Ranks, folder: Path, base: str, world: int, sections: dict[str, Any], **more: Any
) -> tuple[dict[str, Any], Path]:
    """What rank 0 says, once it is seen that all ranks ended with the same bits; and the adapter's file."""
    adapter = folder / f"{world}-{sections['training'].get('parallelism', 'replicate')}.safetensors"
    found = server.run(TRAIN, world, base=base, sections=sections, adapter=str(adapter), **more)
    assert all(one == found[0] for one in found)
    return found[0], adapter


def assert_as_one(
    server: ranks.Ranks,
    folder: Path,
    base: str,
    world: int,
    sections: dict[str, Any],
    weights: float = 1e-5,
    **more: Any,
) -> dict[str, Any]:
    """Trains on one rank and on ``world``: gradient, losses and weights agree.

    Args:
        weights: how far a weight may be from its like in the end.

    Returns:
        What rank 0 of the latter says.
    """
    alone = sections | {"training": sections["training"] | {"parallelism": "replicate"}}
    one, first = trained_by(server, folder, base, 1, alone, **more)
    many, second = trained_by(server, folder, base, world, sections, **more)
    assert largest_difference(Path(f"{first}.gradient"), Path(f"{second}.gradient")) < 1e-6
    assert max(abs(a - b) for a, b in zip(one["losses"], many["losses"], strict=True)) < 1e-5
    assert largest_difference(first, second) < weights
    assert one["tokens"] == many["tokens"]
    assert one["shared"] == 0
    return many


def test_t2_two_ranks_have_the_gradient_of_one(several: ranks.Ranks, base: str, tmp_path: Path) -> None:  # T2 T39
    """Eight rows by one rank, four by each of two (T2): the same gradient, losses and weights."""
    # Adam makes a step of the learning rate out of any gradient, also of the few here that are little but rounding.
    weights = 1e-3 if "gemma" in base else 1e-5
    many = assert_as_one(several, tmp_path, base, 2, {"training": STEPS}, weights)
    assert many["shared"] == 0
    assert len(many["losses"]) == 4


def test_t40_ten_rows_on_four_ranks_of_which_some_have_none(  # T3 T40 T41
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path
) -> None:
    """The last step of an epoch has two rows: two of the ranks get no micro-batch, and still take part (T40)."""
    training = {"batch_size": 4, "micro_batch_size": 1, "max_length": 40, "epochs": 2.0}
    many = assert_as_one(several, tmp_path, str(tiny_llama), 4, {"training": training})
    assert len(many["losses"]) == 6


def test_memory_that_runs_out_on_one_rank_halves_the_micro_batch_of_all(  # T30
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path
) -> None:
    """Only rank 0 has too little memory; both go on with the same smaller budget, to the same losses."""
    halving = {"training": STEPS | {"micro_batch_size": 4, "on_out_of_memory": "halve"}}
    one, first = trained_by(several, tmp_path, str(tiny_llama), 1, halving)
    two, second = trained_by(several, tmp_path, str(tiny_llama), 2, halving, kernel="scarce")
    assert one["room"] is None
    assert two["room"] < 160
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 1e-5
    assert largest_difference(first, second) < 1e-5


def test_t38_the_gradient_is_clipped_after_it_was_summed_over_ranks(  # T38
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path
) -> None:
    """A bound that cuts every step: clipped rank by rank the weights would be others (T38)."""
    bound = {"training": STEPS | {"max_grad_norm": 1e-2}}
    one, first = trained_by(several, tmp_path, str(tiny_llama), 1, bound)
    two, second = trained_by(several, tmp_path, str(tiny_llama), 2, bound)
    assert largest_difference(first, second) < 1e-5
    assert max(abs(a - b) for a, b in zip(one["losses"], two["losses"], strict=True)) < 1e-5
    free, _ = trained_by(several, tmp_path, str(tiny_llama), 1, {"training": STEPS})
    assert free["losses"] != one["losses"]


def test_t2_the_mean_of_the_ranks_means_is_another_gradient(  # T2
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path
) -> None:
    """The tempting formula, DDP's: if it gave the same, the tests above could not fail."""
    sections = {"training": STEPS}
    _, exact = trained_by(several, tmp_path, str(tiny_llama), 1, sections)
    tempting = tmp_path / "mean-of-means.safetensors"
    several.run("tests.job.scenarios:mean_of_means", 2, base=str(tiny_llama), sections=sections, gradient=str(tempting))
    assert largest_difference(Path(f"{exact}.gradient"), tempting) > 1e-4


@pytest.mark.parametrize(
    ("trouble", "name", "words"),
    [
        ("rounds", "reference", ["another rank refuses padding-free", "differs from the reference by"]),
        ("lacks", "padding-free", ["another rank has no padding-free, oneDNN", "no oneDNN"]),
    ],
)
def test_t2_ranks_that_find_different_things_take_the_same_kernel(  # T2
    several: ranks.Ranks, tiny_llama: Path, trouble: str, name: str, words: list[str]
) -> None:
    """Each deals out rows by its kernel's micro-batches: unlike ones would train some rows twice, others never."""
    found = several.run("tests.job.choosing:chosen", 2, base=str(tiny_llama), trouble=trouble)
    assert [one[0] for one in found] == [name, name]
    assert all(word in one[1] for word, one in zip(words, found, strict=True))
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize(
    ("model", "recompute"),
    [
        ("tiny_llama", True),
        pytest.param("tiny_qwen", False, marks=pytest.mark.slow),
        ("tiny_gpt2", True),
        pytest.param("tiny_llama", False, marks=pytest.mark.slow),
        pytest.param("tiny_qwen", True, marks=pytest.mark.slow),
        pytest.param("tiny_gpt2", False, marks=pytest.mark.slow),
    ],
)
def test_a_shared_base_trains_what_one_rank_trains(  # T2
    several: ranks.Ranks, model: str, tmp_path: Path, recompute: bool, request: pytest.FixtureRequest
) -> None:
    """FSDP2 on two ranks, tied embeddings and GPT-2's Conv1D among the bases."""
    base = str(request.getfixturevalue(model))
    training = STEPS | {"parallelism": "shard", "gradient_checkpointing": recompute}
    many = assert_as_one(several, tmp_path, base, 2, {"training": training})
    assert many["shared"] > 0


@pytest.mark.parametrize(
    ("more", "kernel"),
    [
        ({"method": "qlora"}, "padding-free"),
        ({"lora": {"use_dora": True}}, "own head"),
        pytest.param({"lora": {"init": "pissa"}}, "padding-free", marks=pytest.mark.slow),
        ({"lora": {"bias": "all", "modules_to_save": ["lm_head", "input_layernorm"]}}, "own head"),
        pytest.param({}, "reference", marks=pytest.mark.slow),
    ],
    ids=["QLoRA", "DoRA", "PiSSA", "biases and whole modules", "reference"],
)
def test_a_shared_base_under_other_adapters_and_kernels(  # T2
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path, more: dict[str, Any], kernel: str
) -> None:
    sections = {"training": STEPS | {"parallelism": "shard"}} | more
    many = assert_as_one(several, tmp_path, str(tiny_llama), 2, sections, kernel=kernel)
    assert many["shared"] > 0


def test_t40_ranks_that_share_a_base_wait_for_nobody_in_vain(  # T40
    several: ranks.Ranks, tiny_llama: Path, tmp_path: Path
) -> None:
    """Ten rows on four ranks of a shared base: those without a micro-batch still gather as the others do."""
    training = {"batch_size": 4, "micro_batch_size": 1, "max_length": 40, "epochs": 1.0, "parallelism": "shard"}
    many = assert_as_one(several, tmp_path, str(tiny_llama), 4, {"training": training})
    assert many["shared"] > 0


def test_t39_the_worker_leaves_the_mathematics_to_no_helper_of_accelerate() -> None:  # T39
    """No Accelerator, no prepared loader, model or scheduler, no DDP (T39, T40): what is imported says so."""
    home = Path(__file__).parents[2] / "job"
    taken: dict[str, set[str]] = {}
    for path in sorted(home.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "accelerate":
                taken.setdefault(path.name, set()).update(alias.name for alias in node.names)
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "accelerate" for alias in node.names), path.name
        assert "DistributedDataParallel" not in path.read_text(encoding="utf-8"), path.name
    assert taken
    assert set().union(*taken.values()) <= {"PartialState", "init_empty_weights"}, taken


REFUSED: dict[str, dict[str, Any]] = {
    "training.on_out_of_memory: halve": {"training": {"parallelism": "shard", "on_out_of_memory": "halve"}},
    "parallelism: shard cannot share a base in int8": {
        "method": "qlora",
        "quantization": {"type": "int8"},
        "training": {"parallelism": "shard"},
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_two_ranks_have_trained_is_refused_by_name(words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        made_spec(**REFUSED[words])


@pytest.mark.parametrize(
    ("method", "device", "world", "expected", "words"),
    [
        ("lora", "cpu", 2, True, ""),
        ("lora", "cpu", 1, False, "nothing to share with on one rank"),
        ("qlora", "cpu", 2, True, ""),
        ("qlora", "cuda", 2, True, "untested on a GPU"),
    ],
)
def test_a_base_is_shared_where_there_is_somebody_to_share_with(
    caplog: pytest.LogCaptureFixture, method: str, device: str, world: int, expected: bool, words: str
) -> None:
    spec = made_spec(method=method, training={"parallelism": "shard"})
    placement = Placement(torch.device(device), torch.float32, 0, world)
    with caplog.at_level(logging.INFO):
        assert sharded.shards(spec, placement) is expected
    assert words in caplog.text
    assert bool(caplog.text) == bool(words)
    assert sharded.loading_place(spec, placement).device.type == ("cpu" if expected else device)
    assert sharded.verifying_place(spec, placement).device.type == "cpu"
    replicated = made_spec(method=method)
    assert sharded.verifying_place(replicated, placement) == placement
    assert sharded.shards(replicated, placement) is False
    assert sharded.loading_place(replicated, placement) == placement


def test_a_model_that_is_no_list_of_layers_is_refused_by_name() -> None:
    class Recurrent(torch.nn.Module):
        base_model = torch.nn.LSTM(4, 4)

    with pytest.raises(SpecInvalid, match=r"training.parallelism: shard needs .* LSTM is none; use replicate"):
        sharded.shard(Recurrent(), Placement(torch.device("cpu"), torch.float32, 0, 2))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_t40_idle_passes_make_up_for_missing_micro_batches(world: int) -> None:  # T40
    lengths = [33, 5, 17, 9, 21, 12]
    for count in range(1, len(lengths) + 1):
        groups = [[position] for position in range(count)]
        passes = {
            len(share(groups, lengths, rank, world)) + sharded.idle_passes(groups, lengths, rank, world)
            for rank in range(world)
        }
        assert len(passes) == 1


def test_t35_ranks_begin_alike_and_drop_differently(several: ranks.Ranks, tiny_llama: Path) -> None:
    """One seed for the adapter's first values; of dropout each rank has another in every step."""
    sections = {"training": STEPS, "lora": {"dropout": 0.1}}
    one, other = several.run("tests.job.scenarios:randomness", 2, base=str(tiny_llama), sections=sections)
    assert one["first values"] == other["first values"]
    assert len({*one["dropout"], *other["dropout"]}) == len(one["dropout"]) + len(other["dropout"]) >= 6
    again, _ = several.run("tests.job.scenarios:randomness", 2, base=str(tiny_llama), sections=sections)
    assert again == one
