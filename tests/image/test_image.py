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
USERS = ["10001:10001", "1000660000:0"]
"""The manifest's own, and one as a platform picks it at random."""

ENVIRONMENT = {
    "HOME": "/scratch/home",
    "TMPDIR": "/scratch/tmp",
    "XDG_CACHE_HOME": "/scratch/cache",
    "HF_HOME": "/scratch/cache/huggingface",
    "TRITON_CACHE_DIR": "/scratch/cache/triton",
    "TORCHINDUCTOR_CACHE_DIR": "/scratch/cache/inductor",
    "CUDA_CACHE_PATH": "/scratch/cache/cuda",
    "MPLCONFIGDIR": "/scratch/cache/matplotlib",
    "TUNEJOB_SCRATCH": "/scratch",
    "TUNEJOB_LOG": "json",
    "PYTHONSAFEPATH": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
    "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""What the pod counts on. NVIDIA_VISIBLE_DEVICES is not there: it would show GPUs to a pod that asked for none."""

ABSENT = {
    "pip",
    "pip3",
    "ensurepip",
    "gcc",
    "cc",
    "c++",
    "clang",
    "tcc",
    "cc1",
    "as",
    "ld",
    "make",
    "curl",
    "wget",
    "git",
}
"""Commands that install, compile or fetch."""

STARTED_BY_EVERY_PYTHON = {"distutils-precedence.pth": "SETUPTOOLS_USE_DISTUTILS"}
"""Name -> a word of its only line. setuptools brings it, and torch brings setuptools."""

# A container's view, out of what util-linux has: the image read-only, its volumes empty, no network, no privileges.
_ENTER = """
set -e
root=$1 user=$2
shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for node in null urandom random zero; do touch "$root/dev/$node"; mount --bind /dev/$node "$root/dev/$node"; done
mkdir -m 1777 "$root/dev/shm"
mount -t tmpfs -o mode=0777 tmpfs "$root/scratch"
mount -o remount,ro,bind "$root"
exec chroot "$root" /usr/bin/setpriv --reuid "${user%:*}" --regid "${user#*:}" --clear-groups --no-new-privs \\
    --bounding-set=-all --inh-caps=-all /usr/bin/env -i "$@"
"""


def lacking(what: str) -> NoReturn:
    """Skips with the reason; where the image is required, fails with it."""
    if os.environ.get("TUNEJOB_TEST_REQUIRE_IMAGE"):
        pytest.fail(f"no image to test: {what}", pytrace=False)
    pytest.skip(f"no image to test: {what}")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The image's configuration, as OCI has it."""
    if not shutil.which("buildah"):
        lacking("buildah is not installed")
    done = subprocess.run(["buildah", "inspect", "--type", "image", IMAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        lacking(f"buildah has no {IMAGE} (make image)")
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


@pytest.fixture(scope="module")
def packages(root: Path) -> Path:
    """Where its Python packages are."""
    return next((root / "opt/tunejob/lib").glob("python3.*/site-packages"))


def run(root: Path, config: dict[str, Any], *command: str, user: str = USERS[0]) -> "subprocess.CompletedProcess[str]":
    """A command in the image: read-only root, an empty scratch volume, no network, another user."""
    inside = ["bash", "-c", _ENTER, "image", str(root), user, *config["Env"], *command]
    return subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--net", *inside],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def found(root: Path, *what: str) -> list[str]:
    """Paths in the image, as `find` finds them."""
    command = [
        "find",
        ".",
        "-xdev",
        "(",
        "-path",
        "./proc",
        "-o",
        "-path",
        "./dev",
        ")",
        "-prune",
        "-o",
        *what,
        "-print",
    ]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()


def test_it_runs_as_nobody_in_particular_and_says_what_it_is(config: dict[str, Any]) -> None:
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["python", "-m", "job"], ["run"])
    labels = config["Labels"]
    names = ("title", "description", "licenses", "version", "revision", "created")
    assert all(labels[f"org.opencontainers.image.{name}"] not in ("", "unknown", "0") for name in names)


def test_its_environment_is_what_the_pod_counts_on(config: dict[str, Any]) -> None:
    environment = dict(line.split("=", 1) for line in config["Env"])
    assert environment.pop("PATH").split(":")[0] == "/opt/tunejob/bin"
    assert {name: environment.get(name) for name in ENVIRONMENT} == ENVIRONMENT
    assert "NVIDIA_VISIBLE_DEVICES" not in environment


def test_nothing_in_it_installs_compiles_or_fetches(root: Path) -> None:
    assert [path for path in found(root, "!", "-type", "d", "-perm", "/111") if Path(path).name in ABSENT] == []
    assert found(root, "-type", "d", "(", "-name", "pip", "-o", "-name", "ensurepip", ")") == []


def test_no_file_makes_its_caller_somebody_else(root: Path) -> None:
    assert found(root, "-type", "f", "-perm", "/6000") == []


def test_nobody_can_write_to_it_but_where_volumes_are_mounted(root: Path) -> None:
    writable = found(root, "!", "-type", "l", "(", "-perm", "-o=w", "-o", "!", "-uid", "0", ")")
    # Below /var the base has folders of its own users, none of whom runs here.
    outside = {path for path in writable if not path.startswith("./var/")}
    assert {"./scratch", "./tmp"} <= outside <= {"./scratch", "./tmp", "./run/lock"}
    assert (root / "scratch").stat().st_mode & 0o777 == 0o777


def test_no_unexpected_file_runs_at_the_start_of_every_python(root: Path, packages: Path) -> None:
    hooks = {Path(path).name for path in found(root, "-name", "*.pth", "-path", "*python3*")}
    assert hooks == set(STARTED_BY_EVERY_PYTHON)
    for name, word in STARTED_BY_EVERY_PYTHON.items():
        line = (packages / name).read_text(encoding="utf-8")
        assert word in line, line
        assert line.count("\n") <= 1, line
    assert list(packages.glob("*customize*")) == []


def test_it_carries_our_code_and_no_more_of_the_checkout(packages: Path) -> None:
    assert (packages / "job" / "__main__.py").is_file()
    assert (packages / "launcher" / "cli.py").is_file()
    assert not (packages / "tests").exists()


@pytest.mark.parametrize("user", USERS)
def test_it_works_with_a_read_only_root_as_any_user(user: str, root: Path, config: dict[str, Any]) -> None:
    code = (
        "import torch, transformers, peft, accelerate, bitsandbytes, datasets, boto3, psutil\n"
        "import job.training.train, job.data.prepare, job.evaluation.verify, job.supervision.supervisor\n"
        "bitsandbytes.functional.quantize_4bit(torch.randn(64, 64))\n"
        "try:\n    open('/opt/tunejob/x', 'w')\nexcept OSError as error:\n    print(error.errno)\n"
        "import importlib.util; print(importlib.util.find_spec('pip'), importlib.util.find_spec('ensurepip'))"
    )
    shell = 'mkdir -p "$HOME" "$TMPDIR" && python -c "$0" && python -m job --help'
    done = run(root, config, "sh", "-c", shell, code, user=user)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("30\nNone None\n"), done.stdout  # 30: EROFS
    assert "Runs one attempt of one run" in done.stdout


def test_its_modules_come_compiled_because_nobody_can_keep_what_a_pod_compiles(
    root: Path, config: dict[str, Any]
) -> None:
    done = run(
        root, config, "python", "-v", "-c", "import job.supervision.supervisor, job.training.train, transformers, torch"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("# code object from ")]
    assert len(lines) > 1000
    assert [line for line in lines if ".pyc" not in line] == []


def test_without_a_spec_it_says_so_and_leaves_with_64(root: Path, config: dict[str, Any]) -> None:
    done = run(root, config, *config["Entrypoint"], *config["Cmd"])
    assert done.returncode == 64, done.stderr
    assert "no spec at /etc/tunejob/spec.yaml" in done.stderr


def test_a_gpu_that_is_asked_for_and_not_there_is_82_and_no_run_on_the_cpu(root: Path, config: dict[str, Any]) -> None:
    spec = "name: toy\nmodel: /scratch/model\ndata: {train: /scratch/t.jsonl}\nresources: {gpus: 1}\n"
    shell = (
        'printf "%s" "$0" > /scratch/spec.yaml && exec python -m job run --spec /scratch/spec.yaml --output /scratch/o'
    )
    done = run(root, config, "sh", "-c", shell, spec)
    assert done.returncode == 82, done.stderr
    assert "resources.gpus: 1 asked for" in done.stderr
