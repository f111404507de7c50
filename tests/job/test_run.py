"""Whole runs: from a spec to a published adapter, and what happens when they are cut off."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from job.files import read_json, sha256_of
from tests.job import tiny
from tests.job.running import Run, ended, kill, make_run, processes_below, wait_for

# Long enough that there is time to interrupt it between two checkpoints, and no longer.
LONG = {"max_steps": 60, "batch_size": 4, "max_length": 64, "logging_steps": 1, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def straight(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbs; those that are cut off must end like it."""
    run = make_run(tmp_path_factory.mktemp("straight"), tiny_llama, training=LONG, checkpoints={"every_steps": 10})
    code, said = run.attempt()
    assert code == 0, said
    return run


def same_but_elsewhere(run: Run, folder: Path) -> Run:
    """The same spec and data, to another folder."""
    return Run(run.spec, folder / "out", folder / "scratch", {})


def test_the_manifest_lists_every_published_file_with_its_hash(straight: Run) -> None:  # T50
    manifest = read_json(straight.folder / "run" / "manifest.json")
    names = {entry["name"] for entry in manifest["files"]}
    expected = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "README.md",
        "training_config.yaml",
        "training_log.txt",
        "metrics.jsonl",
        "eval_results.json",
    }
    assert expected <= names
    for entry in manifest["files"]:
        path = straight.folder / entry["name"]
        assert (path.stat().st_size, sha256_of(path)) == (entry["size"], entry["sha256"]), entry["name"]


def test_the_result_compares_base_and_tuned_and_was_verified(straight: Run) -> None:
    result = straight.result()
    evaluation = result["evaluation"]
    assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"]
    assert evaluation["tuned"]["perplexity"] == pytest.approx(2.718281828459045 ** evaluation["tuned"]["loss"])
    assert result["verification"]["level"] == "logits"
    assert result["verification"]["max_abs_difference"] <= 1e-4
    phases = set(result["performance"]["phases"])
    assert {"pull", "prepare", "load", "train", "seal", "evaluate", "verify"} <= phases
    assert result["data"]["eval"]["also_in_train"] == 0


def test_only_the_newest_checkpoints_are_kept_and_each_loads_in_peft(straight: Run, tiny_llama: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    names = sorted(path.name for path in (straight.folder / "checkpoints").iterdir())
    assert names == ["checkpoint-50", "checkpoint-60"]
    for name in names:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        PeftModel.from_pretrained(base, straight.folder / "checkpoints" / name)


def test_nothing_published_is_a_pickle_unless_asked_for(straight: Run) -> None:
    for path in straight.folder.rglob("*"):
        if path.is_file():
            head = path.read_bytes()[:4]
            assert not head.startswith((b"\x80", b"PK")), path


def test_a_finished_run_is_a_no_op_and_changed_data_is_not(straight: Run, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.folder.rglob("*") if path.is_file()}
    code, said = straight.attempt()
    assert code == 0
    assert "already complete" in said
    assert not list(straight.scratch.iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in straight.folder.rglob("*") if path.is_file()}

    damaged = Run(straight.spec, tmp_path / "damaged", tmp_path / "scratch", {})
    shutil.copytree(straight.folder, damaged.folder)
    (damaged.folder / "adapter_model.safetensors").write_bytes(straight.adapter()[:-1] + b"?")
    code, said = damaged.attempt()
    assert code == 76
    assert "adapter_model.safetensors" in said

    changed = Run(straight.spec, tmp_path / "out", tmp_path / "scratch", {})
    shutil.copytree(straight.folder, changed.folder)
    data = straight.spec.parent / "train.jsonl"
    original = data.read_bytes()
    try:
        tiny.write_rows(data, tiny.numbered_rows(61))
        code, said = changed.attempt()
    finally:
        data.write_bytes(original)
    assert code == 73
    assert "the inputs changed" in said
    assert str(data) in said


def test_a_folder_that_belongs_to_another_spec_is_refused_with_the_difference(straight: Run, tmp_path: Path) -> None:
    spec = tmp_path / "other.yaml"
    spec.write_text(straight.spec.read_text().replace("learning_rate: 0.005", "learning_rate: 0.004"))
    code, said = Run(spec, straight.folder, tmp_path / "scratch", {}).attempt()
    assert code == 73
    assert "training.learning_rate: 0.004 here, 0.005 there" in said
    assert "Traceback" not in said


def test_killed_anywhere_the_next_attempt_resumes_bit_for_bit(  # T22, T24
    straight: Run, tmp_path: Path
) -> None:
    run = same_but_elsewhere(straight, tmp_path)
    process = run.start()
    wait_for((run.folder / "checkpoints/checkpoint-20/COMMIT.json").exists, process, "checkpoint of step 20")
    process.send_signal(signal.SIGKILL)  # and not reaped: a dead supervisor must not pass for a living one
    assert not (run.folder / "run/manifest.json").exists()

    code, said = run.attempt()  # at once, while the orphaned worker may still be writing
    assert code == 0, said
    kill(process)
    assert not processes_below(run.scratch)
    assert not list(run.scratch.iterdir())
    assert "attempt 2" in said
    ledger = [read_json(run.folder / f"run/attempts/{number:06d}.json") for number in (1, 2)]
    assert [(one["exit_code"], one["message"]) for one in ledger] == [(None, "vanished"), (0, "")]
    assert ledger[0]["seconds"] > 0
    assert "going on from the checkpoint of step" in said
    assert "an earlier attempt prepared, kept by this machine" in said
    assert run.adapter() == straight.adapter()
    assert run.losses() == straight.losses()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_asked_to_leave_in_training_it_checkpoints_and_resumes_bit_for_bit(  # T22, T27
    straight: Run, tmp_path: Path, number: signal.Signals
) -> None:
    run = same_but_elsewhere(straight, tmp_path)
    process = run.start()
    wait_for(lambda: run.progress().get("step", 0) >= 3, process, "step 3")
    process.send_signal(number)
    code, said = ended(process)
    assert code == 143, said
    assert not processes_below(run.scratch)
    step = read_json(run.folder / "run/status.json")["committed"]
    assert step >= 3
    assert f"checkpoint is of step {step}" in said
    assert read_json(run.folder / "run/attempts/000001.json")["exit_code"] == 143
    assert not (run.folder / "run/manifest.json").exists()

    shutil.rmtree(run.scratch)  # as for a pod that replaces this one elsewhere
    code, said = run.attempt()
    assert code == 0, said
    assert f"going on from the checkpoint of step {step}" in said
    assert f"an earlier attempt prepared, kept by {run.folder}" in said
    assert not list(run.folder.glob("run/prepared/**/*.*"))
    assert run.adapter() == straight.adapter()


@pytest.mark.full
def test_asked_to_leave_after_training_the_next_attempt_trains_nothing(  # T27
    straight: Run, tmp_path: Path
) -> None:
    """Every other phase is met in test_pid1.py."""
    run = same_but_elsewhere(straight, tmp_path)
    shutil.copytree(straight.folder, run.folder)
    (run.folder / "run/manifest.json").unlink()
    process = run.start()
    status = run.folder / "run/status.json"
    wait_for(lambda: status.exists() and read_json(status)["phase"] == "verify", process, "verify")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, said = ended(process)
    assert code == 143, said
    assert not processes_below(run.scratch)
    code, said = run.attempt()
    assert code == 0, said
    assert "resuming after step 60 of 60" in said
    assert run.adapter() == straight.adapter()


def test_nothing_is_begun_that_the_budget_does_not_allow(straight: Run, tmp_path: Path) -> None:
    run = same_but_elsewhere(straight, tmp_path)
    shutil.copytree(straight.folder, run.folder)
    (run.folder / "run/manifest.json").unlink()
    spent = read_json(run.folder / "run/attempts/000001.json")["seconds"]
    run.spec = tmp_path / "run.yaml"
    run.spec.write_text(f"{straight.spec.read_text()}resources: {{budget: {spent / 7200:.6f}}}\n")
    code, said = run.attempt()
    assert code == 94, said
    assert "resources.budget" in said
    assert "checkpoint is of step 60" in said
    assert "going on from" not in said


@pytest.mark.full
def test_a_budget_ends_the_run_with_a_checkpoint_and_is_kept_over_attempts(straight: Run, tmp_path: Path) -> None:
    run = same_but_elsewhere(straight, tmp_path)
    run.spec = tmp_path / "run.yaml"
    endless = straight.spec.read_text().replace("max_steps: 60", "max_steps: 100000")
    status, ledger = run.folder / "run/status.json", run.folder / "run/attempts"

    def attempt_with(seconds: float) -> tuple[int, str]:
        run.spec.write_text(f"{endless}resources: {{budget: {seconds / 3600:.6f}}}\n")  # no part of what is trained
        return run.attempt()

    run.spec.write_text(endless)
    process = run.start()
    wait_for((run.folder / "checkpoints/checkpoint-10/COMMIT.json").exists, process, "checkpoint of step 10")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    spent, committed = read_json(ledger / "000001.json")["seconds"], read_json(status)["committed"]

    code, said = attempt_with(spent / 2)
    assert code == 94, said
    assert "resources.budget" in said
    assert read_json(status)["committed"] == committed
    assert "going on from" not in said  # nothing is begun that the budget does not allow

    # What took `spent` seconds until ten steps were committed has time for that twice, however busy the machine is.
    code, said = attempt_with(spent + read_json(ledger / "000002.json")["seconds"] + 2 * spent)
    assert code == 94, said
    assert f"going on from the checkpoint of step {committed}" in said
    assert read_json(status)["committed"] > committed
    assert f"checkpoint is of step {read_json(status)['committed']}" in said


def test_a_damaged_checkpoint_is_not_resumed_from(straight: Run, tmp_path: Path) -> None:  # T24
    run = same_but_elsewhere(straight, tmp_path)
    shutil.copytree(straight.folder, run.folder)
    (run.folder / "run/manifest.json").unlink()
    damaged = run.folder / "checkpoints/checkpoint-60/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    code, said = run.attempt()
    assert code == 0, said
    assert "going on from the checkpoint of step 50" in said
    assert run.adapter() == straight.adapter()

    for name in ("checkpoint-50", "checkpoint-60"):
        for path in (run.folder / "checkpoints").glob(f"{name}*/optimizer.safetensors"):
            path.write_bytes(b"?")
    (run.folder / "run/manifest.json").unlink()
    code, said = run.attempt()
    assert code == 76
    assert "none of the" in said


def test_an_output_in_use_is_refused(straight: Run, tmp_path: Path) -> None:
    run = same_but_elsewhere(straight, tmp_path)
    process = run.start()
    wait_for((run.folder / "run/owner.json").exists, process, "owner")
    code, said = Run(run.spec, run.folder, tmp_path / "other", {}).attempt()
    assert code == 80
    assert "output in use by" in said
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143


@pytest.mark.full
def test_a_worker_killed_from_outside_is_a_lost_rank_and_never_an_interruption(  # T44
    straight: Run, tmp_path: Path
) -> None:
    """As pid 1 it is tried on every change, in test_pid1.py."""
    run = same_but_elsewhere(straight, tmp_path)
    run.environment["TUNEJOB_CPU_RANKS"] = "2"
    process = run.start()
    wait_for((run.folder / "checkpoints/checkpoint-10/COMMIT.json").exists, process, "checkpoint of step 10")
    assert _kill_rank(run.scratch, 1)
    code, said = ended(process)
    assert code == 75, said
    assert "vanished without a word" in said
    assert not processes_below(run.scratch)


def _kill_rank(scratch: Path, rank: int) -> bool:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes()
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(scratch).encode() in line and f"RANK={rank}".encode() in environment:
            os.kill(int(path.name), signal.SIGKILL)
            return True
    return False


@pytest.mark.full
def test_two_ranks_train_what_one_trains(straight: Run, tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load

    results = []
    for ranks in ("1", "2"):
        folder = tmp_path / ranks
        run = make_run(folder, tiny_llama, environment={"TUNEJOB_CPU_RANKS": ranks}, lora={"dropout": 0.0})
        code, said = run.attempt()
        assert code == 0, said
        results.append((load(run.adapter()), run.result()))
    (one, first), (two, second) = results
    assert second["performance"]["ranks"] == 2
    assert second["evaluation"]["tuned"]["loss"] == pytest.approx(first["evaluation"]["tuned"]["loss"], abs=1e-5)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [pytest.param("tiny_gpt2", marks=pytest.mark.full), "tiny_qwen"])
def test_qlora_trains_on_the_cpu_evaluates_and_goes_on(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """T37: an evaluation between two steps must not leave a base that passes no gradient on."""
    training = {"max_steps": 20, "logging_steps": 1, "learning_rate": 5e-3, "max_length": 64, "batch_size": 8}
    run = make_run(
        tmp_path,
        request.getfixturevalue(kind),
        method="qlora",
        lora={"dropout": 0.0},
        training=training,
        evaluation={"every_steps": 5},
        checkpoints={"every_steps": 100},
    )
    code, said = run.attempt()
    assert code == 0, said
    evaluation = run.result()["evaluation"]
    assert evaluation["tuned"]["loss"] < evaluation["base"]["loss"] - 0.1
    assert run.result()["verification"]["level"] == "logits"
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    on_the_way = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(on_the_way) == 3
    assert on_the_way == sorted(on_the_way, reverse=True)


@pytest.mark.full
def test_bias_and_modules_to_save_are_trained_and_the_base_figures_stay_the_base(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    plain = make_run(tmp_path / "plain", tiny_gpt2)
    more = make_run(tmp_path / "more", tiny_gpt2, lora={"bias": "all", "modules_to_save": ["ln_f"]})
    results: list[dict[str, Any]] = []
    for run in (plain, more):
        code, said = run.attempt()
        assert code == 0, said
        results.append(run.result())
    assert results[1]["evaluation"]["base"] == results[0]["evaluation"]["base"]
    assert results[1]["performance"]["trained_parameters"] > results[0]["performance"]["trained_parameters"]
