"""Text that Kubernetes would refuse only much later is refused in the spec, with what to write instead."""

import pytest

from job.errors import SpecInvalid
from job.spec import JobSpec, from_mapping

SPEC = {"name": "a", "model": "gpt2", "data": {"train": "s3://b/c.jsonl"}}


def spec(section: str, **keys: str) -> JobSpec:
    return from_mapping(SPEC | {section: keys}, "run.yaml")


@pytest.mark.parametrize("text", ["8", "0.5", "500m", ".5", "1e2", "2k"])
def test_an_amount_of_cpu_is_a_quantity(text: str) -> None:
    assert spec("resources", cpu=text).resources.cpu == text


@pytest.mark.parametrize("text", ["64Gi", "1.5Gi", "500M", "2e9", "1048576"])
def test_an_amount_of_memory_is_a_quantity_of_bytes(text: str) -> None:
    assert spec("resources", memory=text).resources.memory == text


CRON = ["0 3 * * 1", "*/15 0-6,12 1 jan-mar MON", "@daily", "@every 1h30m", "0 0 ? * 0"]


@pytest.mark.parametrize("text", CRON)
def test_a_cron_line_is_taken_as_kubernetes_takes_it(text: str) -> None:
    assert spec("scheduling", cron=text).scheduling.cron == text


REFUSED = {
    "64GB": ("resources", {"memory": "64GB"}, "resources.memory: ", "did you mean 64Gi?"),
    "unit alone": ("resources", {"memory": "Gi"}, "resources.memory: ", "64Gi"),
    "thousandths of bytes": ("resources", {"memory": "500m"}, "resources.memory: ", "a fraction of a byte"),
    "few bytes": ("resources", {"ephemeral_storage": "64"}, "resources.ephemeral_storage: ", "less than 1 MiB"),
    "nothing": ("resources", {"cpu": "0"}, "resources.cpu: ", "above zero"),
    "below nothing": ("resources", {"cpu": "-1"}, "resources.cpu: ", "Kubernetes quantity"),
    "cores": ("resources", {"cpu": "4 cores"}, "resources.cpu: ", "Kubernetes quantity"),
    "six fields": ("scheduling", {"cron": "0 0 3 * * 1"}, "scheduling.cron: ", "6 fields, not five"),
    "minute": ("scheduling", {"cron": "60 3 * * 1"}, "scheduling.cron: ", '"60" is no minute'),
    "seventh day": ("scheduling", {"cron": "0 3 * * 7"}, "scheduling.cron: ", "day of the week: 0 to 6"),
    "month": ("scheduling", {"cron": "0 3 * foo 1"}, "scheduling.cron: ", '"foo" is no month'),
    "backwards": ("scheduling", {"cron": "0 6-3 * * 1"}, "scheduling.cron: ", '"6-3" is no hour'),
    "step": ("scheduling", {"cron": "*/0 3 * * 1"}, "scheduling.cron: ", '"*/0" is no minute'),
    "word": ("scheduling", {"cron": "@fortnightly"}, "scheduling.cron: ", "1 fields, not five"),
    "zone in the line": ("scheduling", {"cron": "TZ=UTC 0 3 * * 1"}, "scheduling.cron: ", "time_zone"),
    "zone": ("scheduling", {"cron": "@daily", "time_zone": "Tokyo time"}, "scheduling.time_zone: ", "Asia/Tokyo"),
    "local zone": ("scheduling", {"cron": "@daily", "time_zone": "Local"}, "scheduling.time_zone: ", "Etc/UTC"),
    "zone alone": ("scheduling", {"time_zone": "UTC"}, "scheduling.time_zone: ", "only with scheduling.cron"),
    "queue": ("scheduling", {"queue": "ml.team"}, "scheduling.queue: ", "lower-case letters"),
    "priority": ("scheduling", {"priority": "High"}, "scheduling.priority: ", "lower-case letters"),
}


@pytest.mark.parametrize(("section", "keys", "where", "what"), REFUSED.values(), ids=REFUSED.keys())
def test_what_kubernetes_would_refuse_is_refused_with_what_to_write(
    section: str, keys: dict[str, str], where: str, what: str
) -> None:
    with pytest.raises(SpecInvalid) as caught:
        spec(section, **keys)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"run.yaml: {where}")
    assert what in line


def test_a_wrong_cron_line_is_told_once_though_a_time_zone_stands_beside_it() -> None:
    with pytest.raises(SpecInvalid) as caught:
        spec("scheduling", cron="daily", time_zone="Asia/Tokyo")
    assert len(str(caught.value).splitlines()) == 1
