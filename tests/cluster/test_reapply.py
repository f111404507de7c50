"""Applying what is there already changes nothing, whoever does it: a person, a GitOps controller, ``submit``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.spec import JobSpec, read
from launcher import bundle, profile
from launcher.documents import EXAMPLES
from launcher.kinds import CONFIG_MAPS, CRON_JOBS, JOBS
from launcher.render import Rendered, render
from launcher.verbs import Door
from tests.cluster.kit import ROOT, Kit
from tests.cluster.kubectl import wait_for

pytestmark = pytest.mark.cluster

# Amounts as people write them; the server writes them otherwise, and what differs as text would be a conflict.
AMOUNTS = {"cpu": "0.1", "memory": "2048Mi", "ephemeral_storage": "0.5Gi"}
KINDS = {kind.name: kind for kind in (JOBS, CRON_JOBS, CONFIG_MAPS)}
LONG = {"max_steps": 600, "batch_size": 4, "max_length": 64, "logging_steps": 1}


def versions(kit: Kit, rendered: Rendered) -> tuple[list[int | None], list[str]]:
    """Generation and resource version of each object of a run."""
    found = [kit.kubectl.get(one["kind"], one["metadata"]["name"])["metadata"] for one in rendered.objects]
    return [one.get("generation") for one in found], [one["resourceVersion"] for one in found]


def managers(kit: Kit, door: Door, spec: JobSpec, rendered: Rendered, folder: Path) -> dict[str, Callable[[], Any]]:
    """Everybody who may apply a run, by name; each call applies it once."""
    bundle.write(folder, spec, door.profile)
    objects, other = str(folder / "objects"), ("--server-side", "--field-manager=other")
    return {
        "kubectl": lambda: kit.kubectl("apply", "-f", objects),
        "another manager": lambda: kit.kubectl("apply", *other, "-k", str(folder)),
        "the launcher": lambda: [door.cluster.apply(KINDS[one["kind"]], one) for one in rendered.objects],
        "submit": lambda: door.submit(spec),
    }


def change_nothing(kit: Kit, rendered: Rendered, turns: dict[str, Callable[[], Any]]) -> None:
    """Each applies twice in a row: no conflict, no new generation, and the second time not even a new version."""
    generations, _ = versions(kit, rendered)
    for name, apply in turns.items():
        apply()
        first = versions(kit, rendered)
        apply()
        assert (first[0], versions(kit, rendered)) == (generations, first), name


def test_a_pending_run_is_applied_by_everybody_in_turn(kit: Kit, tmp_path: Path) -> None:
    spec = read(kit.spec("reapply-pending", resources=AMOUNTS))
    with kit.python(profile=kit.profile_with("never", image="localhost/no-such-image:0")) as door:
        rendered = render(spec, door.profile)
        turns = managers(kit, door, spec, rendered, tmp_path / "out")
        turns["kubectl"]()
        wait_for(lambda: kit.kubectl.get("job", rendered.name)["status"].get("active"), "pod")
        change_nothing(kit, rendered, turns)
        assert door.delete(rendered.run)


@pytest.mark.full
def test_a_running_and_a_finished_run_are_applied_by_everybody_in_turn(kit: Kit, tmp_path: Path) -> None:
    spec = read(kit.spec("reapply-running", resources=AMOUNTS, training=LONG))
    with kit.python() as door:
        rendered = render(spec, door.profile)
        turns = managers(kit, door, spec, rendered, tmp_path / "out")
        turns["the launcher"]()

        def status() -> dict[str, Any]:
            found: dict[str, Any] = kit.kubectl.get("job", rendered.name)["status"]
            return found

        wait_for(lambda: status().get("ready"), "running pod", lambda: str(status()))
        change_nothing(kit, rendered, turns)
        assert status().get("ready"), "it should still have been running"
        wait_for(lambda: status().get("completionTime"), "end", lambda: str(status()))
        change_nothing(kit, rendered, turns)
        assert status()["succeeded"] == 1
        assert door.delete(rendered.run)


def test_a_schedule_is_applied_by_everybody_in_turn_and_changed_in_place(kit: Kit, tmp_path: Path) -> None:
    never = {"cron": "0 0 30 2 *", "time_zone": "Asia/Tokyo"}
    spec = read(kit.spec("reapply-cron", resources=AMOUNTS, scheduling=never))
    with kit.python(role="scheduler") as door:
        rendered = render(spec, door.profile)
        turns = managers(kit, door, spec, rendered, tmp_path / "out")
        turns["kubectl"]()
        del turns["submit"]
        change_nothing(kit, rendered, turns)
        changed = read(kit.spec("reapply-cron", resources=AMOUNTS, scheduling=never | {"cron": "0 0 31 2 *"}))
        bundle.write(tmp_path / "out", changed, door.profile)
        kit.kubectl("apply", "-f", str(tmp_path / "out" / "objects"))
        (schedule,) = kit.kubectl.listed("cronjobs", f"tunejob.dev/run={rendered.run}")
        assert schedule["spec"]["schedule"] == "0 0 31 2 *"
        kit.kubectl("delete", "cronjob", rendered.name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_server_takes_every_example_without_a_warning(kit: Kit, name: str) -> None:
    folder = ROOT / "k8s" / "examples" / name
    namespace = profile.read(ROOT / "configs" / "profiles" / f"{EXAMPLES[name]}.yaml").namespace
    text = kit.kubectl("kustomize", str(folder)).replace(f"namespace: {namespace}\n", f"namespace: {kit.namespace}\n")
    said = kit.kubectl.ask("apply", "--dry-run=server", "-f", "-", text=text)
    assert (said.code, said.err) == (0, "")
    assert said.out.count("created") == 2
