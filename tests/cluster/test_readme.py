"""The first cluster run of the README, as a newcomer copies it."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.kit import ROOT
from tests.cluster.kubectl import SECONDS, Kubectl
from tests.cluster.running import SMALL, lacking

pytestmark = pytest.mark.cluster

NAMESPACE = "tunejob"
PORT = 8333


def block() -> str:
    """The commands between the README's two marks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    marks = r"<!-- first cluster run.*?-->\n```bash\n(.*?)```\n<!-- end of first cluster run -->"
    found = re.search(marks, text, re.DOTALL)
    assert found, "README.md: no block of the first cluster run between its marks"
    return found[1]


@pytest.fixture
def admin(kubeconfig: Path, tmp_path: Path) -> Iterator[Kubectl]:
    """kubectl with a copy of the kubeconfig, for the block changes it; the README's namespace is deleted at the end."""
    copy = tmp_path / "kubeconfig"
    shutil.copy(kubeconfig, copy)
    kubectl = Kubectl(copy, NAMESPACE)
    if kubectl.ask("get", "namespace", NAMESPACE).code == 0:
        lacking(f"namespace {NAMESPACE} is there already; this test makes it and deletes it")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            lacking(f"port {PORT} of this machine is in use, and the README forwards it")
    yield kubectl
    if not os.environ.get("TUNEJOB_TEST_KEEP"):
        kubectl.ask("delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found")


@pytest.fixture
def checkout(images: None, tmp_path: Path) -> Path:
    """A copy of what the block uses of a checkout; images and the small model are large, and so are links."""
    if not SMALL.is_dir():
        lacking(f"{SMALL} is absent; make models/SmolLM2-135M-Instruct")
    folder = tmp_path / "checkout"
    for name in ("k8s", "configs", "data"):
        shutil.copytree(ROOT / name, folder / name)
    archives = Path(os.environ.get("TUNEJOB_TEST_IMAGES", ROOT / "build" / "images"))
    for link, target in (("build/images", archives), ("models/SmolLM2-135M-Instruct", SMALL)):
        (folder / link).parent.mkdir(parents=True)
        (folder / link).symlink_to(target)
    return folder


def run(commands: str, folder: Path, env: dict[str, str]) -> tuple[int, str, str]:
    """Runs a block of commands like a careful shell; nothing that it started in the background stays."""
    out, err = folder.with_name("out.txt"), folder.with_name("err.txt")
    with out.open("w") as out_file, err.open("w") as err_file:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", commands],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out_file,
            stderr=err_file,
            start_new_session=True,
        )
        try:
            code = shell.wait(2 * SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)
    return code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")


def test_the_first_cluster_run_works_as_it_stands(admin: Kubectl, checkout: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    foreign = ("AWS_", "XDG_", "TUNEJOB_PROFILE")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "KUBECONFIG": str(admin.kubeconfig),
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    code, out, err = run(block(), checkout, env)
    story = f"{out}\n{err}\n{admin.ask('get', 'jobs,pods,events').out}"
    assert code == 0, story
    assert "Warning" not in err, story
    for words in (r"first-[0-9a-f]{8}: finished", r"perplexity +[\d.]+ +[\d.]+", r"exact match"):
        assert re.search(words, out), story
    assert list((checkout / "adapters" / "first").rglob("adapter_model.safetensors")), story
