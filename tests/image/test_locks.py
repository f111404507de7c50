"""The locks say what the image installs: everything, exactly, by hash, and still to be had."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("cpu", "cuda")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
_OF_CUDA = re.compile(r"nvidia-|cuda-|triton$")


def text(variant: str) -> str:
    """One lock."""
    return (ROOT / "docker" / f"requirements-{variant}.txt").read_text(encoding="utf-8")


def pins(lines: str) -> dict[str, str]:
    """Package -> its version."""
    return {canonicalize_name(name): version for name, version in _PIN.findall(lines)}


def check(variant: str, *options: str) -> "subprocess.CompletedProcess[str]":
    """What `make lock` would change; skips where the package index cannot be reached."""
    command = [sys.executable, str(ROOT / "docker" / "lock.py"), "--check", variant, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and re.search(r"dns error|error sending request|timed out", done.stderr, re.IGNORECASE):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    return done


@pytest.mark.parametrize("variant", LOCKS)
def test_every_package_has_hashes_and_no_index_is_named(variant: str) -> None:
    blocks = re.split(r"\n(?=[A-Za-z])", text(variant).strip())
    assert [block.splitlines()[0] for block in blocks if "==" in block and "--hash=sha256:" not in block] == []
    assert not re.search(r"https?://|^\s*-(?!-hash)|@ ", text(variant), re.MULTILINE)


@pytest.mark.parametrize("variant", LOCKS)
def test_the_image_has_the_versions_that_are_tested(variant: str) -> None:
    tested = pins((ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8"))
    locked = {name: version for name, version in pins(text(variant)).items() if not _OF_CUDA.match(name)}
    locked["torch"] = locked["torch"].removesuffix("+cpu")
    assert locked == {name: tested.get(name) for name in locked}


@pytest.mark.parametrize("variant", LOCKS)
def test_everything_the_container_needs_is_locked_in_a_version_that_the_project_allows(variant: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    locked = pins(text(variant))
    for wanted in map(Requirement, project["dependencies"] + extras["job"] + extras["s3"]):
        if wanted.name == "kubernetes":  # the launcher's: a run asks the API server for nothing
            assert "kubernetes" not in locked
            continue
        assert wanted.specifier.contains(locked.get(canonicalize_name(wanted.name), "0")), str(wanted)


def test_the_locks_differ_in_torch_and_what_cuda_brings_alone() -> None:
    cpu, cuda = pins(text("cpu")), pins(text("cuda"))
    assert cpu.pop("torch") == f"{cuda.pop('torch')}+cpu"
    beyond = set(cuda) - set(cpu)
    assert {"nvidia-nccl-cu13", "nvidia-cudnn-cu13", "triton"} <= beyond
    assert [name for name in beyond if not _OF_CUDA.match(name)] == []
    assert cpu == {name: cuda.get(name) for name in cpu}


@pytest.mark.image
def test_the_cuda_lock_is_what_the_index_says_and_its_wheels_are_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that was taken back, a hash that changed, a package that is missing or too many: each shows here."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    done = check("cuda")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    fetched = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*") if file.is_file())
    assert 0 < fetched < 100 << 20, "wheels were downloaded"


@pytest.mark.image
def test_the_cpu_lock_is_what_the_index_and_the_wheel_of_torch_say() -> None:
    wheels = os.environ.get("TUNEJOB_TEST_WHEELS", "")
    if not wheels:
        pytest.skip("no wheel of torch for the CPU: name a folder or page with it in TUNEJOB_TEST_WHEELS")
    done = check("cpu", "--find-links", wheels)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
