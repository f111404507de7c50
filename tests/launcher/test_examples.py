"""k8s/examples/ is what ``tunejob render -o`` makes of the specs in configs/, byte for byte."""

from pathlib import Path

import pytest
import yaml

from job.spec import read
from launcher import bundle, profile
from launcher.documents import EXAMPLES, UPLOADED, left_over

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_what_its_spec_renders_to(name: str, tmp_path: Path) -> None:
    spec = read(ROOT / "configs" / f"{name}.yaml", UPLOADED.get(name, ()))
    bundle.write(tmp_path, spec, profile.read(ROOT / "configs" / "profiles" / f"{EXAMPLES[name]}.yaml"))
    assert files(tmp_path) == files(ROOT / "k8s" / "examples" / name), "run: make docs"


def test_every_spec_in_configs_has_an_example_and_every_example_a_spec() -> None:
    specs = {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"config"}
    assert specs == set(EXAMPLES) == {path.name for path in (ROOT / "k8s" / "examples").iterdir()}
    assert left_over(ROOT) == [], "run: make docs"


def test_every_profile_in_configs_is_one_of_an_example() -> None:
    assert {path.stem for path in (ROOT / "configs" / "profiles").glob("*.yaml")} == set(EXAMPLES.values())


def test_an_example_holds_no_secret() -> None:
    kinds = [
        yaml.safe_load(path.read_text(encoding="utf-8"))["kind"] for path in (ROOT / "k8s" / "examples").rglob("*.yaml")
    ]
    assert set(kinds) == {"Kustomization", "ConfigMap", "Job", "CronJob"}
