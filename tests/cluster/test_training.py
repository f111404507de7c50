"""Jobs that train on a real node: to the end, disturbed and resumed, and not at all where it is done already."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from tests.cluster.bucket import BUCKET
from tests.cluster.kubectl import wait_for
from tests.cluster.running import SMALL, Ended, KubeJob, Lab, tiny_spec
from tests.job import tiny
from tests.measured import FIGURES

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def gsm8k(lab: Lab, real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of the shortest rows of GSM8K."""
    rows = [json.loads(line) for line in (real_data / "gsm8k" / "train.jsonl").open(encoding="utf-8")]
    short = sorted(rows, key=lambda row: len(row["question"] + row["answer"]))[:64]
    lab.bucket.put(tiny.write_rows(tmp_path_factory.mktemp("gsm8k") / "rows.jsonl", short), "data/gsm8k.jsonl")
    return f"s3://{BUCKET}/data/gsm8k.jsonl"


def test_a_small_model_on_public_data_gives_an_adapter_that_loads_in_stock_peft(
    lab: Lab, small_model: str, gsm8k: str, tmp_path: Path
) -> None:
    spec = tiny_spec(
        "smollm2",
        model={"from": small_model, "id": "HuggingFaceTB/SmolLM2-135M-Instruct"},
        data={"train": gsm8k, "eval_split": 0.1, "columns": {"prompt": "question", "completion": "answer"}},
        training={"max_steps": 6, "batch_size": 2, "max_length": 96, "long_rows": "truncate", "learning_rate": 1e-3},
        checkpoints={"every_steps": 3},
        evaluation={"max_rows": 4},
    )
    kube_job = lab.job(spec, memory="4Gi", scratch_limit="2Gi")
    ended = kube_job.run().completed()
    results = kube_job.results
    folder = lab.bucket.fetch(results.prefix, tmp_path / "adapter")

    listed = {one["name"]: one for one in results.json("run/manifest.json")["files"]}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "eval_results.json"} <= set(listed)
    for name, entry in listed.items():
        data = (folder / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["size"], entry["sha256"]), name
    said = ended.only_pod().said
    assert (said["code"], said["step"], said["committed"]) == (0, 6, 6)
    assert said["manifest_sha256"] == hashlib.sha256(lab.bucket.get(f"{results.prefix}run/manifest.json")).hexdigest()
    assert_loads_and_differs(folder)

    phases = results.json("eval_results.json")["performance"]["phases"]
    before = {name: phases[name] for name in ("preflight", "own", "pull", "prepare", "start", "load")}
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in before.items())
    start = ended.only_pod().seconds_to_start
    FIGURES.append(
        f"pod to first step, SmolLM2-135M: {start + sum(before.values()):.0f} s: container {start:.0f}, {parts}"
    )
    FIGURES.append(f"its training: {phases['train']:.1f} s for 6 steps; verify {phases['verify']:.1f} s")


def assert_loads_and_differs(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SMALL), folder)
    inputs = AutoTokenizer.from_pretrained(folder)("How many clips are 48 and 24 clips?", return_tensors="pt")
    with torch.no_grad():
        after = tuned(**inputs).logits
        with tuned.disable_adapter():
            before = tuned(**inputs).logits
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-3


@pytest.mark.full
def test_qlora_trains_on_the_node(lab: Lab) -> None:
    kube_job = lab.job(tiny_spec("qlora", method="qlora"))
    kube_job.run().completed()
    assert kube_job.results.json("quantization_config.json")["load_in_4bit"] is True


def test_a_pod_tells_its_progress_and_its_end_and_never_a_secret(lab: Lab, straight: Ended) -> None:
    pod = straight.only_pod()
    logs = straight.kube_job.logs(pod)
    told = straight.kube_job.progress(pod)
    assert {"preflight", "own", "pull", "prepare", "train", "verify", "publish"} <= {line["phase"] for line in told}
    assert (told[-1]["step"], told[-1]["steps"], told[-1]["committed"]) == (600, 600, 600)
    assert (pod.said["code"], pod.said["name"], pod.said["committed"]) == (0, "OK", 600)
    everything = logs + json.dumps(pod.manifest) + json.dumps(straight.kube_job.results.json("run/status.json"))
    assert lab.bucket.trainer.secret not in everything


def test_a_pod_deleted_in_training_is_replaced_and_the_run_ends_as_if_nothing_had_been(
    lab: Lab, straight: Ended
) -> None:
    kube_job = lab.job(straight.kube_job.spec, output=f"s3://{BUCKET}/deleted")
    kube_job.apply()
    results = kube_job.results
    first = wait_for(kube_job.running, "pod at work", kube_job.story)
    wait_for(results.committed, "first checkpoint", kube_job.story)
    lab.kubectl("delete", "pod", first.name, "--wait=false")
    ended = kube_job.ended().completed()

    left, done = results.ledger()
    assert (left["exit_code"], left["pod"], done["exit_code"]) == (143, first.name, 0)
    assert 60 <= left["committed"] < 600
    second = ended.only_pod()
    assert f"resuming after step {left['committed']} of 600\n" in kube_job.logs(second)
    steps = [line["step"] for line in kube_job.progress(second) if line["phase"] == "train" and line["steps"]]
    assert min(steps) >= left["committed"]
    undisturbed = straight.kube_job.results
    assert results.losses() == undisturbed.losses()
    assert results.adapter() == undisturbed.adapter()
    assert kube_job.record()["status"].get("failed", 0) == 0


def test_a_finished_job_applied_again_and_another_of_its_run_change_nothing(lab: Lab, straight: Ended) -> None:
    kube_job = straight.kube_job
    prefix, before = kube_job.results.prefix, kube_job.record()
    published = lab.bucket.etags(prefix)
    said = kube_job.apply()
    assert said.out.count("unchanged") == 2
    assert kube_job.record() == before

    again = kube_job.named("long-again")
    ended = again.run().completed()
    assert "train" not in {line["phase"] for line in again.progress(ended.only_pod())}
    assert ended.only_pod().said["manifest_sha256"] == straight.only_pod().said["manifest_sha256"]
    assert lab.bucket.etags(prefix) == published


def test_data_changed_under_the_same_spec_is_refused_with_its_key(lab: Lab, straight: Ended, tmp_path: Path) -> None:
    key = "data/toy.jsonl"
    original, changed = tmp_path / "original.jsonl", tiny.write_rows(tmp_path / "changed.jsonl", tiny.numbered_rows(61))
    original.write_bytes(lab.bucket.get(key))
    kube_job: KubeJob = straight.kube_job.named("long-changed")
    lab.bucket.put(changed, key)
    try:
        pod = kube_job.run().failed("PodFailurePolicy")
    finally:
        lab.bucket.put(original, key)
    assert (pod.code, pod.said["name"]) == (73, "CONFLICT")
    assert f"s3://{BUCKET}/{key}" in pod.said["message"]
