"""What a spec and a profile come to on a cluster: a pure function, so the manifests are compared as data."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.errors import SpecInvalid
from job.exits import CONTAINER, pod_failure_policy
from job.spec import JobSpec, digest, from_mapping, parse, resolved, run_id
from launcher.labels import OUTPUT, PER_FIRE, QUEUE, RUN, SPEC_DIGEST, run_of
from launcher.profile import Profile, read
from launcher.quantity import amount, canonical
from launcher.render import KEPT, PRIORITY, Rendered, render, to_yaml
from tests.cluster.test_manifests import job as handwritten

SPEC = {"name": "support", "model": "s3://models/llama", "data": {"train": "s3://corpus/train.jsonl"}}
PROFILE = {"namespace": "ml", "image": "registry.example/tunejob:1", "store": {"output": "s3://runs", "secret": "keys"}}
GPUS = {
    "gpu_types": {
        "h100": {"node_selector": {"gpu": "h100", "arch": "x"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]},
        "mig": {"resource": "nvidia.com/mig-3g.40gb"},
    }
}
NODE_LOSS = [
    {
        "key": f"node.kubernetes.io/{what}",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": 60,
    }
    for what in ("not-ready", "unreachable")
]


def spec(**changes: Any) -> JobSpec:
    return from_mapping(SPEC | changes, "run.yaml")


def profile(folder: Path, **changes: Any) -> Profile:
    path = folder / "profile.yaml"
    path.write_text(json.dumps(PROFILE | changes), encoding="utf-8")
    return read(path)


def pod(rendered: Rendered) -> dict[str, Any]:
    """The pod's spec."""
    found: dict[str, Any] = rendered.workload["spec"]["template"]["spec"]
    return found


def container(rendered: Rendered) -> dict[str, Any]:
    (found,) = pod(rendered)["containers"]
    return dict(found)


def variables(rendered: Rendered) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container(rendered)["env"] if "value" in one}


def test_the_same_spec_and_profile_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (to_yaml(render(spec(), profile(tmp_path)).objects) for _ in range(2))
    assert first == second
    assert [one["kind"] for one in yaml.safe_load_all(first)] == ["ConfigMap", "Job"]


def test_the_config_map_carries_the_resolved_spec_and_cannot_change(tmp_path: Path) -> None:
    rendered = render(spec(), profile(tmp_path))
    assert rendered.config_map["immutable"] is True
    assert parse(rendered.config_map["data"]["spec.yaml"], "spec.yaml") == resolved(spec())
    (volume,) = (one for one in pod(rendered)["volumes"] if one["name"] == "spec")
    assert volume["configMap"]["name"] == rendered.config_map["metadata"]["name"]


def shape(value: Any) -> Any:
    """Keys only: what is said, not its values. Lists of named things by their names."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items() if key not in ("sizeLimit", "medium")}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {one.get("name", index): shape(one) for index, one in enumerate(value)}
    return None


def test_the_pod_is_hardened_as_the_one_written_by_hand(tmp_path: Path) -> None:
    store = {"output": "s3://runs", "secret": "keys", "endpoint": "http://store:8333"}
    rendered = render(spec(), profile(tmp_path, store=store, env={"TUNEJOB_HEARTBEAT_SECONDS": "2"}))
    ours, theirs = copy.deepcopy(rendered.workload["spec"]), handwritten()["spec"]
    assert ours["podFailurePolicy"] == pod_failure_policy()
    (our_container,) = ours["template"]["spec"]["containers"]
    (their_container,) = theirs["template"]["spec"]["containers"]
    assert our_container["securityContext"] == their_container["securityContext"]
    assert our_container["name"] == CONTAINER
    our_pod, their_pod = shape(ours["template"]["spec"]), shape(theirs["template"]["spec"])
    del our_pod["tolerations"], our_pod["securityContext"], their_pod["securityContext"]
    del our_pod["containers"][CONTAINER]["env"]["OMP_NUM_THREADS"]
    del our_pod["volumes"]["scratch"], their_pod["volumes"]["scratch"]
    assert our_pod == their_pod
    assert pod(rendered)["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 10001,
        "runAsGroup": 10001,
        "fsGroup": 10001,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


@pytest.mark.parametrize("word", ["suspend", "ttlSecondsAfterFinished", "livenessProbe"])
def test_a_job_never_has_what_would_end_or_repeat_it_by_itself(tmp_path: Path, word: str) -> None:
    assert word not in to_yaml(render(spec(), profile(tmp_path)).objects)


def test_everything_is_marked_with_its_run_and_kept_when_its_file_goes(tmp_path: Path) -> None:
    rendered = render(spec(), profile(tmp_path, labels={"team": "nlp"}))
    run = run_id(spec())
    for one in rendered.objects:
        assert one["metadata"]["namespace"] == "ml"
        assert one["metadata"]["labels"].items() >= {RUN: run, "team": "nlp", "app.kubernetes.io/instance": run}.items()
        assert one["metadata"]["annotations"].items() >= KEPT.items()
    assert rendered.workload["spec"]["template"]["metadata"]["labels"][RUN] == run
    notes = rendered.workload["metadata"]["annotations"]
    assert (notes[OUTPUT], notes[SPEC_DIGEST]) == ("s3://runs", digest(spec()))
    assert rendered.run == run_of(rendered.workload) == run


def test_names_are_names_even_of_the_longest_spec(tmp_path: Path) -> None:
    rendered = render(spec(name="a" * 30), profile(tmp_path))
    run = run_id(spec(name="a" * 30))
    assert re.fullmatch(rf"{run}-[0-9a-f]{{8}}", rendered.name)
    assert re.fullmatch(rf"{run}-spec-[0-9a-f]{{8}}", rendered.config_map["metadata"]["name"])
    assert max(len(one["metadata"]["name"]) for one in rendered.objects) <= 63


ANOTHER_JOB = {
    "memory": ({"resources": {"memory": "8Gi"}}, {}),
    "restart": ({"restart": 1}, {}),
    "grace": ({"resources": {"grace_seconds": 60}}, {}),
    "image": ({}, {"image": "registry.example/tunejob:2"}),
    "endpoint": ({}, {"store": {"output": "s3://runs", "endpoint": "http://minio:9000"}}),
    "output": ({}, {"store": {"output": "s3://elsewhere"}}),
    "label of the pod": ({}, {"labels": {"team": "nlp"}}),
    "queue": ({}, {"queue": "ml"}),
    "priority in a queue": ({"scheduling": {"queue": "ml", "priority": "low"}}, {}),
}


@pytest.mark.parametrize(("changes", "of_profile"), ANOTHER_JOB.values(), ids=ANOTHER_JOB.keys())
def test_what_cannot_change_on_a_job_makes_another_job_of_the_same_run(
    tmp_path: Path, changes: dict[str, Any], of_profile: dict[str, Any]
) -> None:
    before, after = render(spec(), profile(tmp_path)), render(spec(**changes), profile(tmp_path, **of_profile))
    assert before.run == after.run
    assert before.name != after.name


@pytest.mark.parametrize("change", [{"context": "other"}, {"namespace": "other"}])
def test_where_the_cluster_is_does_not_change_the_jobs_name(tmp_path: Path, change: dict[str, Any]) -> None:
    assert render(spec(), profile(tmp_path)).name == render(spec(), profile(tmp_path, **change)).name


def test_another_queue_is_another_job_because_kueue_lets_no_running_one_move(tmp_path: Path) -> None:
    first, second = (render(spec(), profile(tmp_path, queue=queue)).name for queue in ("one", "two"))
    assert first != second


def test_gpus_are_asked_for_by_the_profiles_resource_on_the_profiles_nodes(tmp_path: Path) -> None:
    rendered = render(spec(resources={"gpus": 2, "gpu_type": "h100"}), profile(tmp_path, **GPUS))
    asked = container(rendered)["resources"]
    assert asked["requests"]["nvidia.com/gpu"] == asked["limits"]["nvidia.com/gpu"] == "2"
    assert pod(rendered)["nodeSelector"] == {"arch": "x", "gpu": "h100"}
    assert pod(rendered)["tolerations"] == [{"key": "gpu", "operator": "Exists"}, *NODE_LOSS]


GPU_RESOURCES = [
    ({"gpus": 1, "gpu_type": "mig"}, GPUS, "nvidia.com/mig-3g.40gb"),
    ({"gpus": 1}, {}, "nvidia.com/gpu"),
    ({"gpus": 1}, {"gpu_types": {"only": {"resource": "amd.com/gpu"}}}, "amd.com/gpu"),
    ({"gpus": 1}, GPUS, "nvidia.com/gpu"),
]


@pytest.mark.parametrize(("resources", "of_profile", "name"), GPU_RESOURCES)
def test_without_a_type_the_only_one_is_taken_else_any_nvidia(
    tmp_path: Path, resources: dict[str, Any], of_profile: dict[str, Any], name: str
) -> None:
    rendered = render(spec(resources=resources), profile(tmp_path, **of_profile))
    found = container(rendered)["resources"]["limits"]
    assert [key for key in found if "/" in key] == [name]


def test_without_gpus_nothing_of_a_gpu_type_is_rendered(tmp_path: Path) -> None:
    only = {"gpu_types": {"h100": GPUS["gpu_types"]["h100"]}}
    rendered = render(spec(), profile(tmp_path, **only))
    assert "nodeSelector" not in pod(rendered)
    assert pod(rendered)["tolerations"] == NODE_LOSS
    assert not [key for key in container(rendered)["resources"]["limits"] if "/" in key]


def test_with_a_queue_placement_is_an_affinity_and_tolerations_are_the_flavors(tmp_path: Path) -> None:
    asked = spec(resources={"gpus": 1, "gpu_type": "h100"}, scheduling={"priority": "high"})
    rendered = render(asked, profile(tmp_path, queue="ml", **GPUS))
    assert not pod(rendered).keys() & {"nodeSelector", "tolerations", "priorityClassName"}
    (term,) = pod(rendered)["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term["matchExpressions"] == [
        {"key": "arch", "operator": "In", "values": ["x"]},
        {"key": "gpu", "operator": "In", "values": ["h100"]},
    ]
    labels = rendered.workload["metadata"]["labels"]
    assert (labels[QUEUE], labels[PRIORITY]) == ("ml", "high")


def test_the_specs_queue_wins_over_the_profiles(tmp_path: Path) -> None:
    rendered = render(spec(scheduling={"queue": "urgent"}), profile(tmp_path, queue="ml"))
    assert rendered.workload["metadata"]["labels"][QUEUE] == "urgent"


def test_without_a_queue_a_priority_is_a_priority_class(tmp_path: Path) -> None:
    rendered = render(spec(scheduling={"priority": "high"}), profile(tmp_path))
    assert pod(rendered)["priorityClassName"] == "high"
    assert not rendered.workload["metadata"]["labels"].keys() & {QUEUE, PRIORITY}


def test_the_store_is_described_to_the_container(tmp_path: Path) -> None:
    store = {
        "output": "s3://runs/team/",
        "endpoint": "https://minio:9000",
        "client_endpoint": "https://minio.example",
        "secret": "keys",
        "ca_config_map": "corp-ca",
        "region": "eu",
        "addressing": "virtual",
        "checksums": "when_supported",
    }
    rendered = render(spec(), profile(tmp_path, store=store, hub={"secret": "hf"}, env={"NCCL_DEBUG": "WARN"}))
    assert variables(rendered) == {
        "TUNEJOB_OUTPUT": "s3://runs/team",
        "AWS_ENDPOINT_URL_S3": "https://minio:9000",
        "AWS_REGION": "eu",
        "AWS_SHARED_CREDENTIALS_FILE": "/var/run/secrets/tunejob/s3/credentials",
        "AWS_CA_BUNDLE": "/var/run/tunejob/ca/ca.crt",
        "TUNEJOB_S3_ADDRESSING": "virtual",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_supported",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_supported",
        "HF_TOKEN_PATH": "/var/run/secrets/tunejob/hub/token",
        "TUNEJOB_SCRATCH_LIMIT": "20Gi",
        "OMP_NUM_THREADS": "2",
        "NCCL_DEBUG": "WARN",
    }
    mounts = {one["name"]: one["mountPath"] for one in container(rendered)["volumeMounts"]}
    volumes = {one["name"]: one for one in pod(rendered)["volumes"]}
    assert mounts.keys() == volumes.keys()
    assert variables(rendered)["AWS_CA_BUNDLE"].startswith(mounts["ca"])
    assert variables(rendered)["HF_TOKEN_PATH"].startswith(mounts["hub"])
    assert volumes["ca"]["configMap"]["name"] == "corp-ca"
    assert volumes["hub"]["secret"] == {"secretName": "hf", "defaultMode": 0o440}


def test_without_a_secret_the_cloud_gives_the_pod_its_rights(tmp_path: Path) -> None:
    rendered = render(spec(), profile(tmp_path, store={"output": "s3://runs"}))
    assert {one["name"] for one in pod(rendered)["volumes"]} == {"spec", "scratch", "tmp", "shm"}
    assert not [name for name in variables(rendered) if name.startswith("AWS_")]


def test_images_are_pulled_with_the_profiles_secrets(tmp_path: Path) -> None:
    assert pod(render(spec(), profile(tmp_path, pull_secrets=["a", "b"])))["imagePullSecrets"] == [
        {"name": "a"},
        {"name": "b"},
    ]


def scratch(rendered: Rendered) -> dict[str, Any]:
    (volume,) = (one for one in pod(rendered)["volumes"] if one["name"] == "scratch")
    return dict(volume)


@pytest.mark.parametrize(
    ("resources", "of_profile", "size", "on_node"),
    [
        ({}, {}, "20Gi", "21Gi"),
        ({"gpus": 1}, {}, "100Gi", "101Gi"),
        ({}, {"scratch": {"size": "50Gi"}}, "50Gi", "51Gi"),
        ({"ephemeral_storage": "512Mi"}, {"scratch": {"size": "50Gi"}}, "512Mi", "1536Mi"),
    ],
)
def test_scratch_is_on_the_node_within_what_the_pod_may_use_there(
    tmp_path: Path, resources: dict[str, Any], of_profile: dict[str, Any], size: str, on_node: str
) -> None:
    rendered = render(spec(resources=resources), profile(tmp_path, **of_profile))
    assert scratch(rendered) == {"name": "scratch", "emptyDir": {"sizeLimit": size}}
    assert variables(rendered)["TUNEJOB_SCRATCH_LIMIT"] == size
    for part in container(rendered)["resources"].values():
        assert part["ephemeral-storage"] == on_node


def test_a_storage_class_gives_scratch_a_volume_that_goes_with_the_pod(tmp_path: Path) -> None:
    rendered = render(spec(), profile(tmp_path, scratch={"size": "300Gi", "storage_class": "fast"}))
    assert scratch(rendered)["ephemeral"]["volumeClaimTemplate"]["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "300Gi"}},
        "storageClassName": "fast",
        "volumeMode": "Filesystem",
    }
    assert container(rendered)["resources"]["limits"]["ephemeral-storage"] == "1Gi"


@pytest.mark.parametrize(
    ("resources", "cpu", "limit", "memory", "threads"),
    [
        ({}, "1", "2", "4Gi", "2"),
        ({"cpu": "0.5", "memory": "1536Mi"}, "500m", "2", "1536Mi", "2"),
        ({"gpus": 4}, "16", "16", "128Gi", "4"),
        ({"gpus": 1, "cpu": "7.5", "memory": "2048Mi"}, "7500m", "8", "2Gi", "8"),
    ],
)
def test_cpu_and_memory_have_requests_and_limits(
    tmp_path: Path, resources: dict[str, Any], cpu: str, limit: str, memory: str, threads: str
) -> None:
    rendered = render(spec(resources=resources), profile(tmp_path))
    found = container(rendered)["resources"]
    assert (found["requests"]["cpu"], found["limits"]["cpu"]) == (cpu, limit)
    assert found["requests"]["memory"] == found["limits"]["memory"] == memory
    assert variables(rendered)["OMP_NUM_THREADS"] == threads


def test_the_profile_may_set_the_number_of_threads(tmp_path: Path) -> None:
    rendered = render(spec(), profile(tmp_path, env={"OMP_NUM_THREADS": "1"}))
    names = [one["name"] for one in container(rendered)["env"]]
    assert variables(rendered)["OMP_NUM_THREADS"] == "1"
    assert len(names) == len(set(names))


def test_a_schedule_makes_a_job_for_each_fire(tmp_path: Path) -> None:
    weekly = spec(scheduling={"cron": "0 3 * * 1", "time_zone": "Asia/Tokyo", "queue": "ml"})
    rendered = render(weekly, profile(tmp_path))
    cron, fire = rendered.workload["spec"], rendered.workload["spec"]["jobTemplate"]
    template = cron.pop("jobTemplate")
    assert cron == {
        "schedule": "0 3 * * 1",
        "timeZone": "Asia/Tokyo",
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
    }
    assert template["spec"]["podFailurePolicy"] == pod_failure_policy()
    assert fire["metadata"]["labels"].items() >= {QUEUE: "ml", PER_FIRE: "true"}.items()
    made = {"kind": "Job", "metadata": {"name": f"{rendered.name}-29461234", **fire["metadata"]}}
    made["metadata"]["name"] = f"{rendered.name}-29461234"
    assert run_of(made).startswith(f"{rendered.run}-")
    assert fire["metadata"]["annotations"][OUTPUT] == "s3://runs"


def test_a_schedule_keeps_its_name_and_may_be_pruned_so_that_no_two_of_them_fire(tmp_path: Path) -> None:
    before = render(spec(scheduling={"cron": "@daily"}), profile(tmp_path))
    after = render(spec(scheduling={"cron": "@daily"}, training={"epochs": 1}), profile(tmp_path, image="other:2"))
    assert before.name == after.name == "support"
    assert before.run != after.run
    assert not before.workload["metadata"]["annotations"].keys() & KEPT.keys()
    assert before.workload["spec"]["timeZone"] == "Etc/UTC"


REFUSED = {
    "several nodes": ({"resources": {"nodes": 2}}, "resources.nodes: 2: .* set nodes to 1"),
    "no such type": ({"resources": {"gpus": 1, "gpu_type": "h200"}}, "gpu_types of the profile has h100, mig; did you"),
    "type without GPUs": ({"resources": {"gpu_type": "h100"}}, "resources.gpu_type: h100, but resources.gpus is 0"),
    "local data": ({"data": {"train": "rows.jsonl"}}, r"data\.train\.0\.from: rows\.jsonl is a file of this machine"),
    "local evaluation": ({"data": {"train": "s3://a/b", "eval": "./e.jsonl"}}, r"data\.eval: \./e\.jsonl"),
    "local model": ({"model": "./model"}, r"model\.from: \./model is a folder of this machine"),
    "local template": ({"data": {"train": "s3://a/b", "chat_template": "a.jinja"}}, r"data\.chat_template: a\.jinja"),
    "zone": ({"scheduling": {"cron": "@daily", "time_zone": "Asia/Tokio"}}, "did you mean Asia/Tokyo"),
}


@pytest.mark.parametrize(("changes", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_pod_can_do_is_refused_by_its_key(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SpecInvalid, match=sentence):
        render(spec(**changes), profile(tmp_path, **GPUS))


def test_every_refusal_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid) as caught:
        render(spec(model="./m", data={"train": "a.jsonl"}, resources={"nodes": 3}), profile(tmp_path))
    assert len(str(caught.value).splitlines()) == 3


def test_a_model_of_the_hub_and_a_path_of_the_image_are_left_to_the_pod(tmp_path: Path) -> None:
    for model in ("meta-llama/Llama-3.1-8B", "gpt2", "/models/llama"):
        assert render(spec(model=model), profile(tmp_path)).workload


def test_a_spec_too_big_for_a_config_map_is_refused_with_its_size(tmp_path: Path) -> None:
    many = [f"s3://corpus/{'x' * 40}/{number:06d}.jsonl" for number in range(13000)]
    with pytest.raises(SpecInvalid, match=r"the resolved spec has 1,\d{3},\d{3} bytes, and a ConfigMap holds 1 MiB"):
        render(spec(data={"train": many}), profile(tmp_path))


CANONICAL = [
    ("0.5", "500m"),
    ("1000m", "1"),
    ("1500m", "1500m"),
    ("8", "8"),
    ("1000", "1k"),
    ("1024Mi", "1Gi"),
    ("1.5Gi", "1536Mi"),
    ("512Mi", "512Mi"),
    ("1000Mi", "1000Mi"),
    ("1e3", "1k"),
    ("64000M", "64G"),
    ("0.5Ki", "512"),
]


@pytest.mark.parametrize(("text", "written"), CANONICAL)
def test_a_quantity_is_written_as_the_server_writes_it(text: str, written: str) -> None:
    assert canonical(text) == written
    assert amount(written) == amount(text)


def test_what_is_no_quantity_has_no_amount() -> None:
    for text in ("", "Gi", "1GB", "-1", "1 Gi"):
        with pytest.raises(ValueError, match="no Kubernetes quantity"):
            amount(text)
