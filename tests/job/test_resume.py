"""The resume matrix of docs/resume.md (T22, T23, T26, T41): what goes on bit for bit, what up to rounding, what not.

A kill is here what it leaves: a sealed checkpoint, and a new process that builds everything again. Real kills are in
test_run.py and, for two ranks, in test_resume_killed.py.
"""

import json
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from job.errors import Conflict
from job.spec import differences, digest
from job.training import checkpoint
from job.training.checkpoint import State
from tests.job import ranks, scenarios
from tests.job.made import made_spec
from tests.job.scenarios import largest_difference

TRAIN = "tests.job.scenarios:train"
STEPS = 5
SECTIONS: dict[str, Any] = {
    "lora": {"r": 8, "dropout": 0.2},
    "training": {"batch_size": 4, "micro_batch_size": 1, "max_length": 40, "max_steps": STEPS},
}
"""Dropout, micro-batches that add up, epochs of three steps."""


@dataclass
class Undisturbed:
    """Runs that nothing cut off; they outlive the test that asked for them first."""

    folder: Path
    said: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What they said, by what they were asked."""


@dataclass
class Bench:
    """Trains on one rank in this process, on several by the server."""

    server: ranks.Ranks
    base: str
    folder: Path
    undisturbed: Undisturbed

    def train(self, world: int, sections: dict[str, Any], **more: Any) -> dict[str, Any]:
        """What all ranks say alike."""
        found = self.server.run(TRAIN, world, base=self.base, sections=sections, **more)
        assert all(one == found[0] for one in found)
        return found[0]  # type: ignore[no-any-return]

    def straight(self, world: int, sections: dict[str, Any], kernel: str = "padding-free") -> dict[str, Any]:
        """A run that nothing cuts off, trained once for all tests; its adapter's file is under ``adapter``."""
        key = json.dumps([world, self.base, sections, kernel])
        said = self.undisturbed.said
        if key not in said:
            file = str(self.undisturbed.folder / f"{len(said)}.safetensors")
            said[key] = self.train(world, sections, kernel=kernel, adapter=file) | {"adapter": file}
        return said[key]

    def cut(self, at: int, world: int, sections: dict[str, Any], **more: Any) -> tuple[dict[str, Any], str]:
        """Trains ``at`` steps and seals a checkpoint."""
        first = self.train(world, sections, stop_after=at, save=str(self.folder), **more)
        return first, str(self.folder / f"checkpoint-{at}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def bench(several: ranks.Ranks, tiny_llama: Path, tmp_path: Path, undisturbed: Undisturbed) -> Bench:
    return Bench(several, str(tiny_llama), tmp_path, undisturbed)


def changed(sections: dict[str, Any], **training: Any) -> dict[str, Any]:
    return sections | {"training": sections["training"] | training}


def cells(table: dict[str, Any], often: set[str]) -> list[Any]:
    """The cells of a table: some with every change, the rest in the slow tier."""
    assert often <= table.keys()
    return [pytest.param(name, marks=[] if name in often else [pytest.mark.slow]) for name in table]


EQUAL: dict[str, tuple[int, dict[str, Any], dict[str, Any], str]] = {
    "accumulation, dropout, mid-epoch": (1, {}, {}, "padding-free"),
    "loader workers changed": (1, {"loader_workers": 2}, {"loader_workers": 1}, "padding-free"),
    "loader workers switched off": (1, {"loader_workers": 2}, {"loader_workers": 0}, "padding-free"),
    "states in 8 bits": (1, {"optimizer": "paged_adamw_8bit"}, {}, "padding-free"),
    "recomputation switched on": (1, {}, {"gradient_checkpointing": True}, "padding-free"),
    "warm-up and cosine": (1, {"schedule": "cosine", "warmup_ratio": 0.5}, {}, "padding-free"),
    "reference kernel": (1, {}, {}, "reference"),
    "two ranks": (2, {}, {}, "padding-free"),
    "two ranks, loader workers changed": (2, {}, {"loader_workers": 2}, "padding-free"),
    "two ranks that share the base": (2, {"parallelism": "shard"}, {}, "padding-free"),
}
"""Ranks, keys of ``training``, those that change on resume, kernel."""

EQUAL_OFTEN = {
    "accumulation, dropout, mid-epoch",
    "two ranks, loader workers changed",
    "two ranks that share the base",
}


@pytest.mark.parametrize("case", cells(EQUAL, EQUAL_OFTEN))
def test_t22_killed_at_a_random_step_it_goes_on_bit_for_bit(bench: Bench, case: str) -> None:  # T22 T23 T41
    """Losses, adapter and optimizer to the last bit (T22); nothing wrapped or initialised again (T23)."""
    world, training, later, kernel = EQUAL[case]
    sections = changed(SECTIONS, **training)
    straight = bench.straight(world, sections, kernel)
    at = random.Random(case).randint(1, STEPS - 1)
    before, folder = bench.cut(at, world, sections, kernel=kernel)
    after = bench.train(world, changed(sections, **later), kernel=kernel, resume=folder)
    assert before["losses"] + after["losses"] == straight["losses"]
    assert after["digest"] == straight["digest"]
    assert after["tokens"] == straight["tokens"]
    assert len(set(straight["losses"])) == STEPS
    assert (straight["shared"] > 0) == (training.get("parallelism") == "shard")


SHARED = {"training": {"parallelism": "shard"}}
OTHERS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "GPT-2, QLoRA": (1, "tiny_gpt2", {"method": "qlora"}),
    "GPT-2": (1, "tiny_gpt2", {}),
    "Qwen": (1, "tiny_qwen", {}),
    "Gemma": (1, "tiny_gemma", {}),
    "Qwen, QLoRA": (1, "tiny_qwen", {"method": "qlora"}),
    "two ranks, PiSSA": (2, "tiny_llama", {"lora": {"init": "pissa"}}),
    "two that share, PiSSA": (2, "tiny_llama", {"lora": {"init": "pissa"}} | SHARED),
    "two that share, DoRA": (2, "tiny_llama", {"lora": {"use_dora": True}} | SHARED),
    "two that share, QLoRA": (2, "tiny_llama", {"method": "qlora"} | SHARED),
    "two that share, Qwen": (2, "tiny_qwen", SHARED),
    "two that share, GPT-2": (2, "tiny_gpt2", SHARED),
}
"""Ranks, model, and what its spec says besides."""


@pytest.mark.parametrize("case", cells(OTHERS, {"GPT-2, QLoRA"}))
def test_t22_other_models_and_adapters_go_on_bit_for_bit(  # T22 T37 T47
    bench: Bench, case: str, request: pytest.FixtureRequest
) -> None:
    world, model, more = OTHERS[case]
    bench.base = str(request.getfixturevalue(model))
    sections = SECTIONS | more
    for key in ("lora", "training"):
        sections[key] = SECTIONS[key] | more.get(key, {})
    straight = bench.straight(world, sections)
    before, folder = bench.cut(3, world, sections)
    after = bench.train(world, sections, resume=folder)
    assert before["losses"] + after["losses"] == straight["losses"]
    assert after["digest"] == straight["digest"]
    assert (straight["shared"] > 0) == ("share" in case)


def test_t22_a_checkpoint_without_its_optimizer_would_be_seen(bench: Bench) -> None:  # T22
    """The tempting shortcut, adapter alone: if it ended alike, the tests above could not fail."""
    straight = bench.straight(1, SECTIONS)
    _, folder = bench.cut(3, 1, SECTIONS)
    forgetful = bench.train(1, SECTIONS, resume=folder, forget_optimizer=True)
    assert forgetful["losses"][1:] != straight["losses"][4:]


ROUNDED: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "one rank, then two": (1, 2, {}, {}),
    "two ranks, then one": (2, 1, {}, {}),
    "two ranks, then four": (2, 4, {}, {}),
    "one rank, then two that share": (1, 2, {}, {"parallelism": "shard"}),
    "two that share, then three that do": (2, 3, {"parallelism": "shard"}, {}),
    "two that share, then one": (2, 1, {"parallelism": "shard"}, {"parallelism": "replicate"}),
    "larger micro-batches": (1, 1, {}, {"micro_batch_size": 4}),
}
"""Ranks before and after, keys of ``training``, those that change on resume."""


ROUNDED_OFTEN = {"two ranks, then one", "one rank, then two that share", "larger micro-batches"}


@pytest.mark.parametrize("case", cells(ROUNDED, ROUNDED_OFTEN))
def test_t41_on_another_number_of_ranks_it_goes_on_up_to_rounding(bench: Bench, case: str) -> None:  # T22 T41
    """Without dropout, to 1e-5 (T41): a checkpoint knows nothing of the ranks that made it."""
    before_world, after_world, training, later = ROUNDED[case]
    sections = changed(SECTIONS | {"lora": {"r": 8}}, **training)
    resumed = bench.folder / "resumed.safetensors"
    straight = bench.straight(before_world, sections)
    before, folder = bench.cut(3, before_world, sections)
    after = bench.train(after_world, changed(sections, **later), resume=folder, adapter=str(resumed))
    losses = before["losses"] + after["losses"]
    assert max(abs(a - b) for a, b in zip(losses, straight["losses"], strict=True)) < 1e-5
    assert largest_difference(Path(straight["adapter"]), resumed) < 1e-5
    assert after["tokens"] == straight["tokens"]


def test_t41_a_checkpoint_of_two_ranks_has_the_files_of_one(bench: Bench) -> None:  # T41
    """One set, free of the number of ranks (T41), also where they share the base."""
    listed = []
    for world, more in ((1, {}), (2, {}), (2, {"parallelism": "shard"})):
        bench.folder = bench.folder / f"next-{world}"
        _, folder = bench.cut(1, world, changed(SECTIONS, **more))
        listed.append(sorted((path.name, path.stat().st_size) for path in Path(folder).glob("*.safetensors")))
    assert [name for name, _ in listed[0]] == ["adapter_model.safetensors", "optimizer.safetensors"]
    assert listed[0] == listed[1] == listed[2]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"model": "another"}, 'model.from: "another" here, "tiny" there'),
    "global batch": ({"training": {"batch_size": 32}}, "training.batch_size: 32 here, 16 there"),
    "learning rate": ({"training": {"learning_rate": 0.02}}, "training.learning_rate: 0.02 here, 0.01 there"),
    "epochs": ({"training": {"epochs": 9.0}}, "training.epochs: 9.0 here, 3.0 there"),
    "seed": ({"training": {"seed": 1}}, "training.seed: 1 here, 42 there"),
    "rank of the adapter": ({"lora": {"r": 32}}, "lora.r: 32 here, 4 there"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_t26_another_model_or_batch_is_another_run_and_is_refused(case: str) -> None:  # T26
    """Never silently with the old batch, nor silently with the new one (T26)."""
    sections, difference = REFUSED[case]
    here, there = made_spec(**sections), made_spec()
    assert difference in differences(here, there)
    state = State(7, 100, digest(there), "data", {}, {}, {})
    with pytest.raises(Conflict) as refusal:
        checkpoint.accept(state, digest(here), "data", {})
    assert str(refusal.value) == "checkpoint-7 was trained from another spec; name another output"


def test_t26_other_data_is_refused() -> None:  # T26
    state = State(7, 100, "spec", "data", {}, {}, {})
    with pytest.raises(Conflict) as refusal:
        checkpoint.accept(state, "spec", "other data", {})
    assert str(refusal.value) == (
        "checkpoint-7 was trained on other data, tokenizer or chat template than is here now; "
        "name another output to begin anew"
    )


HARMLESS: dict[str, Any] = {
    "micro_batch_size": 1,
    "gradient_checkpointing": True,
    "kernels": "reference",
    "parallelism": "shard",
    "logging_steps": 1,
    "loader_workers": 3,
}


@pytest.mark.parametrize("key", HARMLESS)
def test_t26_what_does_not_change_the_result_may_change_on_resume(key: str) -> None:  # T26
    here, there = made_spec(training={key: HARMLESS[key]}), made_spec()
    assert differences(here, there) == []
    checkpoint.accept(State(7, 100, digest(there), "data", {}, {}, {}), digest(here), "data", {})


ELSEWHERE: dict[str, tuple[Any, Any]] = {
    "device": ("Xeon", "EPYC"),
    "threads": (8, 2),
    "ranks": (1, 2),
    "cpu_capability": ("AVX512", "AVX2"),
    "versions": ({"torch": "2.13.0"}, {"torch": "2.14.0"}),
}


@pytest.mark.parametrize("key", ELSEWHERE)
def test_t22_another_machine_or_version_lowers_the_promise_and_says_so(  # T22
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    then, now = ELSEWHERE[key]
    state = State(7, 100, "spec", "data", {}, {key: then}, {})
    with caplog.at_level(logging.WARNING):
        checkpoint.accept(state, "spec", "data", {key: then})
        assert not caplog.records
        checkpoint.accept(state, "spec", "data", {key: now})
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("resuming from step 7 under other conditions (")
    assert f"{key}: {then} then, {now} now" in said
    assert said.endswith("equal up to rounding, not bit for bit")


def test_t22_the_environment_names_all_that_the_last_bits_depend_on() -> None:  # T22
    import torch

    found = checkpoint.environment(torch.device("cpu"), world=2)
    assert ELSEWHERE.keys() <= found.keys()
    assert found["ranks"] == 2
    assert {"torch", "transformers", "peft", "accelerate", "bitsandbytes"} <= found["versions"].keys()


def test_what_is_trained_in_this_process_is_what_the_server_trains(bench: Bench) -> None:
    """The server's forks are no world of their own: the bits are those of a plain call."""
    here = scenarios.train(0, 1, bench.base, SECTIONS)
    assert here == bench.train(1, SECTIONS)
