"""``render -o DIR``: files that can be committed, applied, and rendered again without surprise."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.errors import AccessDenied, DiskFailure, SpecInvalid
from job.spec import JobSpec, from_mapping, run_id
from launcher.bundle import write
from launcher.profile import Profile, read
from launcher.render import render

SPEC = {"name": "support", "model": "s3://models/llama", "data": {"train": "s3://corpus/train.jsonl"}}


def spec(**changes: Any) -> JobSpec:
    return from_mapping(SPEC | changes, "run.yaml")


def profile(folder: Path, image: str = "tunejob:1") -> Profile:
    path = folder / "profile.yaml"
    path.write_text(json.dumps({"image": image, "store": {"output": "s3://runs"}}), encoding="utf-8")
    return read(path)


def names(paths: list[Path], folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in paths)


def listed(folder: Path) -> list[str]:
    """What the kustomization has."""
    found: list[str] = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    return found


def applied(folder: Path) -> list[str]:
    """Names of the objects that the files of ``objects/`` hold."""
    files = sorted((folder / "objects").iterdir())
    return [yaml.safe_load(path.read_text(encoding="utf-8"))["metadata"]["name"] for path in files]


def test_the_folder_holds_the_objects_and_a_kustomization_of_them(tmp_path: Path) -> None:
    folder, run = tmp_path / "out", run_id(spec())
    written = write(folder, spec(), profile(tmp_path))
    objects = [f"objects/{run}-spec.yaml", f"objects/{run}.yaml"]
    assert names(written, folder) == ["kustomization.yaml", *objects]
    assert listed(folder) == objects
    rendered = render(spec(), profile(tmp_path))
    assert applied(folder) == [rendered.config_map["metadata"]["name"], rendered.name]


def test_no_file_of_objects_is_a_kustomization_because_kubectl_apply_would_refuse_it(tmp_path: Path) -> None:
    write(tmp_path / "out", spec(), profile(tmp_path))
    assert [path.name for path in (tmp_path / "out" / "objects").iterdir() if "kustomization" in path.name] == []


def test_rendering_again_writes_nothing_even_after_an_upgrade_of_the_image(tmp_path: Path) -> None:
    write(tmp_path / "out", spec(), profile(tmp_path))
    before = applied(tmp_path / "out")
    assert write(tmp_path / "out", spec(), profile(tmp_path, "tunejob:2")) == []
    assert applied(tmp_path / "out") == before


def test_rerender_takes_the_new_image_in_the_same_files(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, spec(), profile(tmp_path))
    written = write(folder, spec(), profile(tmp_path, "tunejob:2"), rerender=True)
    assert names(written, folder) == listed(folder)
    assert applied(folder)[1] == render(spec(), profile(tmp_path, "tunejob:2")).name


@pytest.mark.parametrize("change", [{"restart": 1}, {"resources": {"memory": "8Gi"}}], ids=["restart", "memory"])
def test_a_changed_spec_of_the_same_run_is_rendered_by_itself(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "out"
    write(folder, spec(), profile(tmp_path))
    assert names(write(folder, spec(**change), profile(tmp_path)), folder) == listed(folder)
    assert applied(folder)[1] == render(spec(**change), profile(tmp_path)).name


def test_several_specs_share_a_folder_and_a_finished_run_stays(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, spec(), profile(tmp_path))
    first = applied(folder)
    write(folder, spec(training={"epochs": 1}), profile(tmp_path))
    assert set(first) < set(applied(folder))
    assert len(applied(folder)) == len(listed(folder)) == 4
    assert listed(folder) == sorted(f"objects/{path.name}" for path in (folder / "objects").iterdir())


def test_a_schedule_is_one_object_whatever_its_spec_says(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    for epochs in (1, 2):
        write(folder, spec(scheduling={"cron": "@daily"}, training={"epochs": epochs}), profile(tmp_path))
    assert listed(folder) == ["objects/support-spec.yaml", "objects/support.yaml"]
    assert applied(folder)[1] == "support"
    newest = spec(scheduling={"cron": "@daily"}, training={"epochs": 2})
    assert applied(folder)[0] == render(newest, profile(tmp_path)).config_map["metadata"]["name"]


def test_what_people_added_to_the_kustomization_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    own = {"namespace": "prod", "resources": ["quota.yaml"], "commonAnnotations": {"a": "b"}}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    write(folder, spec(), profile(tmp_path))
    found = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    assert found.items() >= {"namespace": "prod", "commonAnnotations": {"a": "b"}, "kind": "Kustomization"}.items()
    assert found["resources"][0] == "quota.yaml"
    assert len(found["resources"]) == 3


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("kustomization.yaml", "resources: foo\n", "resources: not a list of names"),
        ("kustomization.yaml", "resources: [{a: b}]\n", "resources: not a list of names"),
        ("kustomization.yaml", "- a\n", "kustomization.yaml:1"),
    ],
)
def test_a_kustomization_that_is_none_is_told_and_left_as_it_is(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SpecInvalid, match=words):
        write(tmp_path, spec(), profile(tmp_path))
    assert (tmp_path / name).read_text(encoding="utf-8") == text
    assert not (tmp_path / "objects").exists(), "nothing is written beside it either"


@pytest.mark.parametrize(
    "left",
    [
        "metadata: text\n",
        "metadata: {labels: [a]}\n",
        "metadata:\n",
        "data: 1\n",
        "metadata: {labels: {LABEL}}\ndata: {SPEC: 1}\n",
    ],
)
def test_what_people_left_of_a_config_map_is_written_anew(tmp_path: Path, left: str) -> None:
    folder, run = tmp_path / "out", run_id(spec())
    write(folder, spec(), profile(tmp_path))
    file = folder / "objects" / f"{run}-spec.yaml"
    before = file.read_text(encoding="utf-8")
    file.write_text(
        left.replace("{LABEL}", f"{{tunejob.dev/run: {run}}}").replace("SPEC", "spec.yaml"), encoding="utf-8"
    )
    write(folder, spec(), profile(tmp_path))
    assert file.read_text(encoding="utf-8") == before


def test_a_folder_that_cannot_be_one_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for place in ("file", "file/below"):
        with pytest.raises(SpecInvalid, match="has to be a folder, or new"):
            write(tmp_path / place, spec(), profile(tmp_path))
    (tmp_path / "out" / "objects").mkdir(parents=True)
    (tmp_path / "out" / "objects" / f"{run_id(spec())}.yaml").mkdir()
    with pytest.raises(SpecInvalid, match="in the way"):
        write(tmp_path / "out", spec(), profile(tmp_path))
    with pytest.raises(DiskFailure, match="cannot be written"):
        write(tmp_path / ("x" * 300), spec(), profile(tmp_path))


def test_a_folder_that_may_not_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises((AccessDenied, DiskFailure), match=r"another folder|cannot be written"):
        write(Path("/proc/tunejob"), spec(), profile(tmp_path))


def test_a_file_that_nobody_can_read_is_told_and_left_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(folder, spec(), profile(tmp_path))
    broken = folder / "objects" / f"{run_id(spec())}-spec.yaml"
    broken.write_text("<<<<<<< HEAD\n", encoding="utf-8")
    with pytest.raises(SpecInvalid, match=rf"{broken.name}:1"):
        write(folder, spec(), profile(tmp_path))
    assert broken.read_text(encoding="utf-8") == "<<<<<<< HEAD\n"
