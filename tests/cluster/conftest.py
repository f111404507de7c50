"""Fixtures of the tests on a cluster: images loaded, a namespace, a store as a pod, tiny models and data in its bucket.

The tests ask for nothing but kubectl, TUNEJOB_TEST_KUBECONFIG, TUNEJOB_TEST_LOAD_IMAGE (a command; an archive's path is
appended) and the archives that `make image image-store` makes (in build/images, or TUNEJOB_TEST_IMAGES).
"""

import os
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bucket import BUCKET, PORT, Bucket
from tests.cluster.kit import ROLES, Kit, install, kubeconfig_of, write_profile
from tests.cluster.kubectl import Kubectl, manifest
from tests.cluster.running import CREDENTIALS, SMALL, Ended, Lab, lacking, tiny_spec
from tests.job import tiny

ROOT = Path(__file__).resolve().parents[2]
ARCHIVES = ("seaweedfs.tar", "tunejob.tar")


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    """A kubeconfig for a cluster that may be used for tests."""
    if not shutil.which("kubectl"):
        lacking("no cluster: kubectl is not on the PATH")
    named = os.environ.get("TUNEJOB_TEST_KUBECONFIG", "")
    if not named:
        lacking("no cluster: set TUNEJOB_TEST_KUBECONFIG (CONTRIBUTING.md, Tests on a cluster)")
    if not Path(named).is_file():
        lacking(f"no cluster: TUNEJOB_TEST_KUBECONFIG={named} is no file")
    return Path(named)


@pytest.fixture(scope="session")
def images(kubeconfig: Path) -> None:
    """The images are on the node."""
    command = os.environ.get("TUNEJOB_TEST_LOAD_IMAGE", "")
    if not command:
        lacking("no images: set TUNEJOB_TEST_LOAD_IMAGE to a command that loads one (CONTRIBUTING.md)")
    folder = Path(os.environ.get("TUNEJOB_TEST_IMAGES", ROOT / "build" / "images"))
    for name in ARCHIVES:
        if not (folder / name).is_file():
            lacking(f"no images: {folder / name} is absent; make image image-store")
        done = subprocess.run([*shlex.split(command), str(folder / name)], capture_output=True, text=True)
        assert done.returncode == 0, f"{command} {folder / name}: {done.stderr or done.stdout}"


@pytest.fixture(scope="session")
def kubectl(kubeconfig: Path) -> Iterator[Kubectl]:
    """kubectl in a namespace of this session's own, with Pod Security `restricted`; it is deleted at the end."""
    call = Kubectl(kubeconfig, f"tunejob-test-{secrets.token_hex(4)}")
    call.apply(manifest("namespace", namespace=call.namespace))
    yield call
    if not os.environ.get("TUNEJOB_TEST_KEEP"):
        call("delete", "namespace", call.namespace, "--wait=false")


@pytest.fixture(scope="session")
def lab(images: None, kubectl: Kubectl, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The namespace with a store that holds the tiny Llama and the toy data."""
    lab = Lab(kubectl, Bucket(kubectl))
    try:
        fill(lab, tiny_llama, tmp_path_factory.mktemp("data"))
        yield lab
    finally:
        lab.bucket.disconnect()


def fill(lab: Lab, model: Path, folder: Path) -> None:
    """Starts the store, makes the Secret, and uploads model and data."""
    lab.bucket.deploy()
    lab.make_credentials(CREDENTIALS, lab.bucket.trainer)
    lab.bucket.put(model, "models/tiny-llama")
    rows = tiny.write_rows(folder / "toy.jsonl", tiny.numbered_rows(60))
    lab.bucket.put(rows, "data/toy.jsonl")


@pytest.fixture(scope="session")
def kit(images: None, kubeconfig: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """The base that `k8s/` ships, installed in a namespace of this session's own, and every role's way in."""
    folder = tmp_path_factory.mktemp("kit")
    kubectl = Kubectl(kubeconfig, f"tunejob-kit-{secrets.token_hex(4)}")
    bucket = Bucket(kubectl)
    try:
        installed = install(kubectl, folder / "base")
        assert "Warning" not in installed.err, installed.err
        fill(Lab(kubectl, bucket), tiny_llama, folder)
        configs = {role: kubeconfig_of(kubectl, f"tunejob-{role}", folder / f"{role}.kubeconfig") for role in ROLES}
        with kubectl.forwarded("pod/store", PORT) as port:
            profile = write_profile(folder / "tunejob.profile.yaml", kubectl.namespace, port)
            yield Kit(kubectl, bucket, folder, profile, configs)
    finally:
        bucket.disconnect()
        if not os.environ.get("TUNEJOB_TEST_KEEP"):
            kubectl.ask("delete", "namespace", kubectl.namespace, "--wait=false", "--ignore-not-found")


@pytest.fixture(scope="session")
def small_model(lab: Lab) -> str:
    """URI of SmolLM2-135M, the small real model."""
    if not SMALL.is_dir():
        lacking(f"{SMALL} is absent; make models/SmolLM2-135M-Instruct")
    lab.bucket.put(SMALL, "models/smollm2")
    return f"s3://{BUCKET}/models/smollm2"


# Long enough that there is time to disturb it between two checkpoints, and no longer.
LONG = {
    "training": {"max_steps": 600, "batch_size": 4, "max_length": 64, "logging_steps": 1, "learning_rate": 5e-3},
    "checkpoints": {"every_steps": 60},
}


@pytest.fixture(scope="session")
def straight(lab: Lab) -> Ended:
    """A run that nothing disturbs; those that are disturbed must end like it."""
    return lab.job(tiny_spec("long", **LONG)).run().completed()
