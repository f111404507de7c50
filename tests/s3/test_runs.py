"""Whole runs from and to S3, as pid 1 of an imitated pod, with everything that can come in between."""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from job.layout import COMMIT
from job.storage import transfer
from job.storage.s3 import S3Store
from tests.job.pod import Pod, cannot_run, ended, kill, pod_folder, terminate, wait_for
from tests.measured import FIGURES
from tests.s3.conftest import QUICK, Enter, client
from tests.s3.proxy import Proxy, drop, lose_reply, slowly, stuck
from tests.s3.weed import BUCKET, Weed

pytestmark = pytest.mark.skipif(bool(cannot_run()), reason=cannot_run() or "-")

GRACE = 14.0


@dataclass
class Bucket:
    """Where the runs of this module find what they read and leave what they make."""

    weed: Weed
    folder: Path
    prefix: str
    outputs: dict[str, str] = field(default_factory=dict)

    def pod(self, output: str, proxy: Proxy, **environment: str) -> Pod:
        """A pod that reads the spec; ``output`` is a name of the test's own."""
        credentials = self.folder / "credentials"
        owner = self.weed.identities[environment.pop("identity", "owner")]
        credentials.write_text(
            f"[default]\naws_access_key_id = {owner.key}\naws_secret_access_key = {owner.secret}\n", encoding="utf-8"
        )
        credentials.chmod(0o644)
        settings = {"AWS_ENDPOINT_URL_S3": proxy.url, "AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
        return Pod(self.folder, f"s3://{BUCKET}/{self.prefix}/{output}", settings | environment)

    def keys(self, output: str) -> dict[str, str]:
        """Key below the run's prefix -> its key in the bucket."""
        pages = client(self.weed.url, self.weed.identities["admin"]).get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=BUCKET, Prefix=f"{self.prefix}/{output}/")
        keys = [entry["Key"] for page in found for entry in page.get("Contents", ())]
        return {key.removeprefix(f"{self.prefix}/{output}/").partition("/")[2]: key for key in keys}

    def read(self, output: str, name: str) -> bytes:
        """An object of a run."""
        admin = client(self.weed.url, self.weed.identities["admin"])
        body: bytes = admin.get_object(Bucket=BUCKET, Key=self.keys(output)[name])["Body"].read()
        return body

    def losses(self, output: str) -> dict[int, float]:
        """Loss of each step; a step that was logged twice with different values fails."""
        found: dict[int, float] = {}
        for line in self.read(output, "metrics.jsonl").splitlines():
            record = json.loads(line)
            if "loss" in record:
                assert found.setdefault(record["step"], record["loss"]) == record["loss"]
        return found

    def committed(self, output: str) -> list[int]:
        """Steps of the committed checkpoints."""
        found = [re.fullmatch(rf"checkpoints/checkpoint-(\d+)[^/]*/{COMMIT}", key) for key in self.keys(output)]
        return sorted(int(match[1]) for match in found if match)


@pytest.fixture(scope="module")
def bucket(weed: Weed, tiny_llama: Path) -> Iterator[Bucket]:
    prefix = f"runs-{secrets.token_hex(4)}"
    inputs = f"s3://{BUCKET}/{prefix}/inputs"
    sections: dict[str, Any] = {"model": f"{inputs}/model", "data": {"train": f"{inputs}/train.jsonl"}}
    with pod_folder(tiny_llama, resources={"grace_seconds": int(GRACE)}, **sections) as folder:
        admin = client(weed.url, weed.identities["admin"])
        for path in tiny_llama.iterdir():
            admin.upload_file(str(path), BUCKET, f"{prefix}/inputs/model/{path.name}")
        admin.upload_file(str(folder / "train.jsonl"), BUCKET, f"{prefix}/inputs/train.jsonl")
        yield Bucket(weed, folder, prefix)


@pytest.fixture
def straight(bucket: Bucket, proxy: Proxy) -> dict[str, Any]:
    """What an undisturbed run leaves: its adapter and losses; made once for the module.

    Of three writes that are made on a condition the replies are lost, which must not matter.
    """
    if "adapter" not in bucket.outputs:
        for key in ("/training_config", "/run/inputs", "/run/manifest"):
            proxy.on("PUT", key, lose_reply)
        code, said = bucket.pod("straight", proxy).attempt()
        assert code == 0, said
        bucket.outputs["adapter"] = bucket.read("straight", "adapter_model.safetensors").hex()
        FIGURES.append(
            f"a run of 40 steps, 4 checkpoints: {len(proxy.asked)} requests to the store ({_by_kind(proxy)})"
        )
        proxy.begin_anew()
    return {"adapter": bytes.fromhex(bucket.outputs["adapter"]), "losses": bucket.losses("straight")}


def _by_kind(proxy: Proxy) -> str:
    methods = sorted({asked.split()[0] for asked in proxy.asked})
    return ", ".join(f"{method} {proxy.count(f'^{method} ')}" for method in methods)


def test_a_run_from_and_to_s3_is_published_whole(
    straight: dict[str, Any], bucket: Bucket, enter: Enter, proxy: Proxy
) -> None:
    enter("owner", proxy.url)
    run = bucket.keys("straight")["run/manifest.json"].removesuffix("/run/manifest.json")
    store = S3Store(f"s3://{BUCKET}/{run}", patience=QUICK)
    manifest = transfer.read_manifest(store)
    assert manifest is not None
    transfer.verify_manifest(store, manifest)
    assert {"adapter_model.safetensors", "eval_results.json", "training_log.txt"} <= {e.name for e in manifest.files}
    assert bucket.committed("straight") == [30, 40]
    inputs = json.loads(bucket.read("straight", "run/inputs.json"))["inputs"]
    assert {record["name"].rsplit("/", 1)[-1] for record in inputs} >= {"train.jsonl", "model.safetensors"}
    assert all(len(record["sha256"]) == 64 for record in inputs)


def test_a_published_run_is_a_no_op_that_reads_no_input_and_nowhere_is_a_secret(
    straight: dict[str, Any], bucket: Bucket, proxy: Proxy
) -> None:
    pod = bucket.pod("straight", proxy)
    code, said = pod.attempt()
    assert code == 0, said
    assert "already complete" in said
    assert pod.word["manifest_sha256"]
    assert proxy.count(r"^GET .*/inputs/(model|train)") == 0
    assert proxy.count("^PUT .*/run/probe-") == proxy.count("^PUT ")
    secret = bucket.weed.identities["owner"].secret
    assert secret not in said
    for name in bucket.keys("straight"):
        assert secret.encode() not in bucket.read("straight", name), name


def test_inputs_that_changed_are_73_and_are_named(straight: dict[str, Any], bucket: Bucket, proxy: Proxy) -> None:
    admin = client(bucket.weed.url, bucket.weed.identities["admin"])
    key = f"{bucket.prefix}/inputs/train.jsonl"
    original = admin.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    try:
        admin.put_object(Bucket=BUCKET, Key=key, Body=original.replace(b"\n", b"\n\n", 1))
        code, said = bucket.pod("straight", proxy).attempt()
    finally:
        admin.put_object(Bucket=BUCKET, Key=key, Body=original)
    assert code == 73, said
    assert f"the inputs changed since this run began: s3://{BUCKET}/{key};" in said


MOMENTS: dict[str, tuple[Callable[[Proxy], None], Callable[[Proxy], bool]]] = {
    "pull": (
        lambda proxy: proxy.on("GET", r"/inputs/model/model\.safetensors", slowly(5.0), times=None),
        lambda proxy: proxy.count(r"GET .*/inputs/model/model\.safetensors") > 0,
    ),
    "upload": (
        lambda proxy: proxy.on("PUT", r"/checkpoint-20/optimizer", stuck(60), times=None),
        lambda proxy: proxy.count("PUT .*/checkpoint-20/optimizer") > 0,
    ),
    "publish": (
        lambda proxy: proxy.on("PUT", r"/toy-[0-9a-f]+/adapter_model\.safetensors", stuck(60), times=None),
        lambda proxy: proxy.count(r"PUT .*/toy-[0-9a-f]+/adapter_model\.safetensors") > 0,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("moment", MOMENTS)
def test_asked_to_leave_while_bytes_move_it_leaves_in_time_and_loses_nothing(  # T27
    moment: str, ranks: int, straight: dict[str, Any], bucket: Bucket, proxy: Proxy
) -> None:
    begin, reached = MOMENTS[moment]
    output = f"{moment}-{ranks}"
    pod = bucket.pod(output, proxy, TUNEJOB_CPU_RANKS=str(ranks))
    begin(proxy)
    process = pod.start()
    wait_for(lambda: reached(proxy), process, moment)
    terminate(process)
    code, said = ended(process, GRACE)
    assert code == 143, said
    assert "Traceback" not in said
    assert pod.word["name"] == "INTERRUPTED"
    assert "run/manifest.json" not in bucket.keys(output)
    before = bucket.committed(output)
    assert pod.word["committed"] == (before[-1] if before else 0)

    proxy.heal()
    code, said = pod.attempt()
    assert code == 0, said
    if before:
        assert f"going on from the checkpoint of step {before[-1]}" in said
    if moment == "publish":
        assert '"phase": "train"' not in said or f'"step": {before[-1]}' in said
    if ranks == 1:
        assert bucket.read(output, "adapter_model.safetensors") == straight["adapter"]
        assert bucket.losses(output) == straight["losses"]


def test_asked_to_leave_while_the_store_is_away_it_leaves_with_143(bucket: Bucket, proxy: Proxy) -> None:
    pod = bucket.pod("gone", proxy)
    proxy.on(".*", ".*", drop, times=None)
    process = pod.start()
    wait_for(lambda: bool(proxy.asked), process, "a request")
    terminate(process)
    code, said = ended(process, GRACE)
    assert code == 143, said
    assert pod.word["name"] == "INTERRUPTED"


def test_a_store_that_is_away_for_a_while_stops_no_step(straight: dict[str, Any], bucket: Bucket, proxy: Proxy) -> None:
    pod = bucket.pod("away", proxy)
    process = pod.start()
    wait_for(lambda: pod.progress().get("step", 0) >= 3, process, "step 3")
    proxy.on(".*", ".*", drop, times=None)
    wait_for(lambda: pod.progress().get("phase") == "evaluate", process, "the end of the training")
    proxy.heal()
    code, said = ended(process)
    assert code == 0, said
    assert bucket.read("away", "adapter_model.safetensors") == straight["adapter"]
    assert bucket.committed("away")[-1] == 40


def test_of_two_pods_of_one_run_one_publishes_and_the_other_leaves_with_80(
    straight: dict[str, Any], bucket: Bucket, proxy: Proxy, tiny_llama: Path
) -> None:
    first = bucket.pod("twice", proxy)
    process = first.start()
    wait_for(lambda: "run/owner.json" in bucket.keys("twice"), process, "an owner")
    with pod_folder(tiny_llama) as other:
        (other / "spec.yaml").write_bytes((bucket.folder / "spec.yaml").read_bytes())
        second = Pod(other, first.output, first.environment)
        code, said = second.attempt()
        assert code == 80, said
        assert second.word["name"] == "FENCED"
    assert "another attempt" in said or "output in use" in said
    code, said = ended(process)
    assert code == 0, said
    assert bucket.read("twice", "adapter_model.safetensors") == straight["adapter"]
    ledger = [key for key in bucket.keys("twice") if key.startswith("run/attempts/")]
    assert ledger == ["run/attempts/000001.json"]


def test_a_pod_that_vanishes_is_succeeded_after_its_lease_and_nothing_committed_is_trained_again(
    straight: dict[str, Any], bucket: Bucket, proxy: Proxy
) -> None:
    pod = bucket.pod("vanished", proxy)
    proxy.on("PUT", "/checkpoint-30/", stuck(60), times=None)  # so that it cannot finish
    process = pod.start()
    wait_for(lambda: 20 in bucket.committed("vanished"), process, "checkpoint of step 20")
    kill(process)
    process.communicate()
    proxy.heal()
    newest = bucket.committed("vanished")[-1]
    code, said = pod.attempt()
    assert code == 0, said
    assert "taking over from" in said
    assert f"going on from the checkpoint of step {newest}" in said
    assert bucket.read("vanished", "adapter_model.safetensors") == straight["adapter"]
    assert bucket.losses("vanished") == straight["losses"]
    ledger = json.loads(bucket.read("vanished", "run/attempts/000001.json"))
    assert (ledger["exit_code"], ledger["job"]) == (None, "toy")


def test_three_attempts_that_fail_alike_are_the_last_of_their_job(bucket: Bucket, proxy: Proxy) -> None:
    proxy.on("GET", r"/inputs/model/model\.safetensors", slowly(1.0), times=None)
    codes = []
    for _ in range(4):  # each is cut off by its scratch volume before anything is committed
        pod = bucket.pod("fruitless", proxy, TUNEJOB_SCRATCH_LIMIT="64Ki")
        code, said = pod.attempt()
        codes.append(code)
    assert codes == [74, 74, 74, 93], said
    assert "Job toy" in pod.word["message"]


@pytest.mark.full
def test_credentials_that_may_not_write_are_refused_before_anything_is_pulled(bucket: Bucket, proxy: Proxy) -> None:
    pod = bucket.pod("refused", proxy, identity="reader")
    code, said = pod.attempt()
    assert code == 77, said
    assert "PutObject" in pod.word["message"]
    assert proxy.count(r"/inputs/") == 0
