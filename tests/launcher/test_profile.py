"""A profile says what a cluster is like: found where it is looked for, every problem in it told at once."""

import json
from pathlib import Path

import pytest
import yaml

from job.errors import SpecInvalid
from launcher.profile import DEFAULT, Profile, find, json_schema, read, reference

ROOT = Path(__file__).resolve().parents[2]
PROFILES = ROOT / "configs" / "profiles"

SMALLEST = "image: registry.example/tunejob:0.1\nstore: {output: s3://runs}\n"


def profile(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> Profile:
    path = folder / "team.yaml"
    path.write_text(text, encoding="utf-8")
    return read(path, overrides)


def problems(folder: Path, text: str) -> list[str]:
    """What is said of a profile, without the folder."""
    with pytest.raises(SpecInvalid) as caught:
        profile(folder, text)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_a_profile_needs_an_image_and_a_place_for_runs_only(tmp_path: Path) -> None:
    found = profile(tmp_path, SMALLEST)
    assert (found.service_account, found.store.output, found.namespace) == ("tunejob", "s3://runs", None)
    assert found.gpu_types == found.labels == found.env == {}


def test_a_value_can_be_laid_over_it(tmp_path: Path) -> None:
    assert profile(tmp_path, SMALLEST, ("queue=urgent", "store.region=eu")).store.region == "eu"


PROBLEMS = {
    "no image": ("store: {output: s3://runs}", "team.yaml: image: missing; add a line like image: ", "make image"),
    "no store": ("image: x", "team.yaml: store: missing; add a line like store: {output: s3://bucket", ""),
    "typo": (SMALLEST + "namespce: a", "team.yaml:3: namespce: unknown key", "did you mean namespace?"),
    "of a GPU": (SMALLEST + "gpu_types: {h100: {resorce: a/b}}", "team.yaml:3: gpu_types.h100.resorce:", "resource?"),
    "of the spec": (SMALLEST + "training: {}", "team.yaml:3: training: ", "it belongs in the spec"),
    "another's name": (SMALLEST + "bucket: a", "team.yaml:3: bucket: unknown key", "did you mean store.output?"),
    "a secret key": (SMALLEST + "hf_token: abc", "team.yaml:3: hf_token: ", "a profile holds no secrets"),
    "a token": (SMALLEST + f"context: hf_{'a' * 24}", "team.yaml:3: context: looks like a secret", "store.secret"),
    "a token in env": (SMALLEST + "env: {HF_TOKEN: x}", "team.yaml:3: env: HF_TOKEN: ", "hub.secret"),
    "a key in env": (SMALLEST + "env: {AWS_SECRET_ACCESS_KEY: x}", "team.yaml:3: env: ", "no secrets"),
    "an id in env": (SMALLEST + "env: {AWS_ACCESS_KEY_ID: x}", "team.yaml:3: env: ", "no secrets"),
    "ours in env": (SMALLEST + "env: {AWS_REGION: eu}", "team.yaml:3: env: AWS_REGION is set", "set store.region"),
    "no variable": (SMALLEST + "env: {a-b: x}", "team.yaml:3: env: ", "no name of a variable"),
    "a number in env": (SMALLEST + "env: {A: 1}", "team.yaml:3: env.A: expected text, not 1", "quotes"),
    "label": (SMALLEST + "labels: {team: a b}", "team.yaml:3: labels: ", "is no label"),
    "our label": (SMALLEST + "labels: {tunejob.dev/run: a}", "team.yaml:3: labels: ", "remove it"),
    "endpoint": ("image: x\nstore: {output: s3://runs, endpoint: minio}", "team.yaml:2: store.endpoint: ", "http://"),
    "userinfo": (
        "image: x\nstore: {output: s3://runs, endpoint: 'http://a@m'}",
        "team.yaml:2: ",
        "carries credentials",
    ),
    "output": ("image: x\nstore: {output: runs}", "team.yaml:2: store.output: ", "s3://bucket/runs"),
    "image": ("image: https://a/b\nstore: {output: s3://runs}", "team.yaml:1: image: ", "no name of an image"),
    "size": (SMALLEST + "scratch: {size: 100GB}", "team.yaml:3: scratch.size: ", "did you mean 100Gi?"),
    "queue": (SMALLEST + "queue: Team A", "team.yaml:3: queue: ", "lower-case letters"),
    "toleration": (
        SMALLEST + "gpu_types: {a: {tolerations: [{effect: Never}]}}",
        "team.yaml:3: gpu_types.a.tolerations.0.effect: ",
        "NoSchedule",
    ),
    "no mapping": (SMALLEST + "gpu_types: [a]", "team.yaml:3: gpu_types: expected a block of keys", '["a"]'),
}


@pytest.mark.parametrize(("text", "beginning", "within"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_a_problem_is_told_with_its_line_and_what_to_try(
    tmp_path: Path, text: str, beginning: str, within: str
) -> None:
    (line,) = problems(tmp_path, text)
    assert line.startswith(beginning)
    assert within in line


def test_credentials_in_an_address_are_not_repeated(tmp_path: Path) -> None:
    lines = problems(tmp_path, "image: x\nstore: {output: s3://runs, client_endpoint: 'https://key:geheim@minio'}")
    assert len(lines) == 1
    assert "geheim" not in lines[0]


def test_every_problem_is_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = problems(tmp_path, "queue: A\nimage: x y\nstore: {output: here, regions: eu}\n")
    assert [line.split(": ")[:2] for line in lines] == [
        ["team.yaml:1", "queue"],
        ["team.yaml:2", "image"],
        ["team.yaml:3", "store.output"],
        ["team.yaml:3", "store.regions"],
    ]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the user's folder of profiles is ``config/tunejob`` below it."""
    (tmp_path / "config" / "tunejob").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


LOOKED_UP = [
    (None, "", "tunejob.profile.yaml"),
    (None, "prod", "config/tunejob/prod.yaml"),
    (None, "other.yml", "other.yml"),
    ("prod", "elsewhere", "config/tunejob/prod.yaml"),
    ("here/team", "", "here/team"),
    ("team.yaml", "prod", "team.yaml"),
]


@pytest.mark.parametrize(("name", "variable", "place"), LOOKED_UP)
def test_a_profile_is_looked_up_by_argument_then_variable_then_folder(
    home: Path, name: str | None, variable: str, place: str
) -> None:
    for there in ("tunejob.profile.yaml", "config/tunejob/prod.yaml", "config/tunejob/default.yaml"):
        (home / there).touch()
    found = find(name, {"XDG_CONFIG_HOME": str(home / "config"), "TUNEJOB_PROFILE": variable})
    assert found == Path(place) or found == home / place


def test_the_users_default_comes_last(home: Path) -> None:
    (home / "config" / "tunejob" / f"{DEFAULT}.yaml").touch()
    assert find(None, {"XDG_CONFIG_HOME": str(home / "config")}) == home / "config" / "tunejob" / "default.yaml"


def test_without_a_profile_every_place_is_named_and_what_to_copy(home: Path) -> None:
    with pytest.raises(SpecInvalid) as caught:
        find(None, {"XDG_CONFIG_HOME": str(home / "config")})
    for words in ("-p", "TUNEJOB_PROFILE", "tunejob.profile.yaml", "default.yaml", "configs/profiles/local.yaml"):
        assert words in str(caught.value)
    assert (ROOT / "configs" / "profiles" / "local.yaml").is_file()


def test_a_name_that_is_not_there_is_told_with_those_that_are(home: Path) -> None:
    (home / "config" / "tunejob" / "prod.yaml").touch()
    with pytest.raises(SpecInvalid, match=r"no profile prd, .*prd\.yaml; there are prod"):
        find("prd", {"XDG_CONFIG_HOME": str(home / "config")})


def test_a_file_that_is_not_there_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match=r"none\.yaml: no such file; .*configs/profiles"):
        read(tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_profile_in_configs_reads_and_fits_its_schema(path: Path) -> None:
    assert read(path).image
    first, content = path.read_text(encoding="utf-8").splitlines()[0], yaml.safe_load(path.read_text(encoding="utf-8"))
    assert first == "# yaml-language-server: $schema=../profile.schema.json"
    pytest.importorskip("jsonschema").Draft202012Validator(json_schema()).validate(content)


def test_the_manual_page_and_the_schema_explain_every_key() -> None:
    page = reference()
    for key in Profile.model_fields:
        assert f"| `{key}` |" in page
    assert "| `gpu_types.NAME.node_selector` |" in page
    assert "| `gpu_types.NAME.tolerations.N.effect` |" in page
    assert '"description": ""' not in json.dumps(json_schema())
