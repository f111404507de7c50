"""The locks say what the image installs: everything, exactly, by hash, and still to be had."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("cpu", "cuda")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+) \\$", re.MULTILINE)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def text(variant: str) -> str:
    return (ROOT / "docker" / f"requirements-{variant}.txt").read_text(encoding="utf-8")


def pins(variant: str) -> dict[str, str]:
    return {normal(name): version for name, version in _PIN.findall(text(variant))}


def constraints() -> dict[str, str]:
    lines = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}


@pytest.mark.parametrize("variant", LOCKS)
def test_every_package_has_hashes_and_no_index_is_named(variant: str) -> None:
    blocks = re.split(r"\n(?=[A-Za-z])", text(variant).strip())
    assert [block.splitlines()[0] for block in blocks if "==" in block and "--hash=sha256:" not in block] == []
    assert not re.search(r"https?://|--(extra-)?index-url|--find-links|@ ", text(variant))


@pytest.mark.parametrize("variant", LOCKS)
def test_the_image_has_the_versions_that_are_tested(variant: str) -> None:
    tested = constraints()
    other = {name: version for name, version in pins(variant).items() if name in tested}
    other["torch"] = other["torch"].removesuffix("+cpu")
    assert other == {name: tested[name] for name in other}
    assert len(other) > 40


@pytest.mark.parametrize("variant", LOCKS)
def test_everything_the_container_needs_is_locked(variant: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = {
        normal(re.split(r"[<>=\[; ]", line)[0]) for line in project["dependencies"] + extras["job"] + extras["s3"]
    }
    assert wanted - set(pins(variant)) == set()


def test_the_locks_differ_in_torch_and_what_cuda_brings_alone() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    assert cpu["torch"] == f"{cuda['torch']}+cpu"
    beyond = set(cuda) - set(cpu)
    assert all(name.startswith(("nvidia-", "cuda-")) or name == "triton" for name in beyond)
    assert {"nvidia-nccl-cu13", "nvidia-cudnn-cu13", "triton"} <= beyond
    assert {name: cpu[name] for name in cpu if name != "torch"} == {name: cuda[name] for name in cpu if name != "torch"}


def test_the_cuda_lock_still_resolves_without_its_wheels_being_downloaded(tmp_path: Path) -> None:
    """Against the index itself: a version that was taken back, or a hash that changed, shows here."""
    resolve = [sys.executable, "-m", "uv", "pip", "install", "--dry-run", "--require-hashes", "--no-deps"]
    resolve += ["--target", str(tmp_path / "nowhere"), "--python-version", "3.11"]
    resolve += ["--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:"]
    resolve += ["-r", str(ROOT / "docker" / "requirements-cuda.txt"), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(resolve, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode and re.search(r"dns error|error sending request|timed out", done.stderr, re.IGNORECASE):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert f"Would install {len(pins('cuda'))} packages" in done.stderr
    fetched = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert fetched < 50 << 20, "wheels were downloaded"
