"""The image that `make image` built: what is in it, what is not, and that it works where it cannot write."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytestmark = pytest.mark.image

IMAGE = os.environ.get("TUNEJOB_TEST_IMAGE", "localhost/tunejob:test")

_ENTER = """
set -e
root=$1 user=$2 scratch=$3
shift 3
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null urandom random zero; do touch "$root/dev/$node"; mount --bind /dev/$node "$root/dev/$node"; done
mkdir -m 1777 "$root/dev/shm"
mount -t tmpfs -o mode="$scratch" tmpfs "$root/scratch"
mount -o remount,ro,bind "$root"
exec chroot "$root" /usr/bin/setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs \\
    --bounding-set=-all --inh-caps=-all /usr/bin/env -i "$@"
"""


def lacking(what: str) -> NoReturn:
    pytest.skip(f"no image to test: {what}")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The image's configuration, as OCI has it."""
    if not shutil.which("buildah"):
        lacking("buildah is not installed")
    done = subprocess.run(["buildah", "inspect", "--type", "image", IMAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        lacking(f"{IMAGE} is not built (make image)")
    found: dict[str, Any] = json.loads(done.stdout)["OCIv1"]["config"]
    return found


@pytest.fixture(scope="module")
def root(config: dict[str, Any]) -> Iterator[Path]:
    """The image's files, mounted."""
    if os.geteuid() != 0:
        lacking("needs root, to mount it")

    def buildah(*arguments: str) -> str:
        return subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    container = buildah("from", "--pull-never", IMAGE)
    try:
        yield Path(buildah("mount", container))
    finally:
        buildah("rm", container)


def run(
    root: Path, config: dict[str, Any], *command: str, user: str = "10001:10001", **more: str
) -> "subprocess.CompletedProcess[str]":
    """A command in the image: read-only root, an empty scratch volume, no network, another user."""
    environment = [*config["Env"], *(f"{name}={value}" for name, value in more.items())]
    inside = ["bash", "-c", _ENTER, "image", str(root), user, "0777", *environment, *command]
    return subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--net", *inside],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_it_runs_as_nobody_in_particular_and_says_what_it_is(config: dict[str, Any]) -> None:
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["python", "-m", "job"], ["run"])
    labels = config["Labels"]
    names = ("title", "description", "licenses", "version", "revision", "created")
    assert all(labels[f"org.opencontainers.image.{name}"] not in ("", "unknown", "0") for name in names)


def test_what_libraries_write_goes_to_the_scratch_volume(config: dict[str, Any]) -> None:
    environment = dict(line.split("=", 1) for line in config["Env"])
    writable = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    for name in (*writable, "CUDA_CACHE_PATH", "MPLCONFIGDIR", "TUNEJOB_SCRATCH"):
        assert environment[name].startswith("/scratch"), name
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert "NVIDIA_VISIBLE_DEVICES" not in environment
    assert environment["PYTHONSAFEPATH"] == "1"


@pytest.mark.parametrize("name", ["pip", "pip3", "gcc", "cc", "clang", "make", "curl", "wget", "git"])
def test_nothing_installs_or_compiles_there(name: str, root: Path) -> None:
    for folder in ("opt/tunejob/bin", "usr/local/bin", "usr/bin", "bin"):
        assert not (root / folder / name).exists(), f"{folder}/{name}"


def test_no_file_makes_its_caller_somebody_else(root: Path) -> None:
    found = subprocess.run(
        ["find", str(root), "-xdev", "-type", "f", "-perm", "/6000"], capture_output=True, text=True, check=True
    )
    assert found.stdout == ""


def test_no_file_runs_at_the_start_of_every_python(root: Path) -> None:
    packages = next((root / "opt/tunejob/lib").glob("python3.*/site-packages"))
    assert {path.name for path in packages.glob("*.pth")} <= {"distutils-precedence.pth"}
    assert not list(packages.glob("sitecustomize*"))
    assert not (packages / "pip").exists()


@pytest.mark.parametrize("user", ["10001:10001", "1000660000:0"])
def test_it_works_with_a_read_only_root_as_any_user(user: str, root: Path, config: dict[str, Any]) -> None:
    code = (
        "import os, getpass, torch, transformers, peft, accelerate, bitsandbytes, datasets, boto3, psutil\n"
        "import job.train, job.prepare, job.verify, job.supervisor\n"
        "bitsandbytes.functional.quantize_4bit(torch.randn(64, 64))\n"
        "try:\n    open('/opt/tunejob/x', 'w')\nexcept OSError as error:\n    print(error.errno)\n"
        "import importlib.util; print(importlib.util.find_spec('pip'), importlib.util.find_spec('ensurepip'))"
    )
    shell = 'mkdir -p "$HOME" "$TMPDIR" && python -c "$0" && python -m job --help'
    done = run(root, config, "sh", "-c", shell, code, user=user)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("30\nNone None\n"), done.stdout  # 30: EROFS
    assert "Runs one attempt of one run" in done.stdout


def test_without_a_spec_it_says_so_and_leaves_with_64(root: Path, config: dict[str, Any]) -> None:
    done = run(root, config, "python", "-m", "job", "run")
    assert done.returncode == 64, done.stderr
    assert "no spec at /etc/tunejob/spec.yaml" in done.stderr


def test_a_gpu_that_is_asked_for_and_not_there_is_82_and_no_run_on_the_cpu(
    root: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    spec = "name: toy\nmodel: /scratch/model\ndata: {train: /scratch/t.jsonl}\nresources: {gpus: 1}\n"
    shell = (
        'printf "%s" "$0" > /scratch/spec.yaml && exec python -m job run --spec /scratch/spec.yaml --output /scratch/o'
    )
    done = run(root, config, "sh", "-c", shell, spec)
    assert done.returncode == 82, done.stderr
    assert "resources.gpus: 1 asked for" in done.stderr
