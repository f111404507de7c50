"""What a user of the launcher has: the installed base in a namespace of its own, a profile, a kubeconfig of each role
that `k8s/` ships, and a spec. Tests act as the submitter; the admin prepares and injects faults.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.bucket import BUCKET, Bucket
from tests.cluster.kubectl import SECONDS, Kubectl, Said
from tests.cluster.running import IMAGE, tiny_spec

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "k8s"
ROLES = ("viewer", "submitter", "scheduler")
CREDENTIALS = "s3-credentials"


@dataclass(frozen=True)
class Kit:
    """The installed base, and everybody's way in."""

    kubectl: Kubectl
    """As the admin."""
    bucket: Bucket
    folder: Path
    profile: Path
    kubeconfig: Mapping[str, Path]
    """Of each role."""

    @property
    def namespace(self) -> str:
        """The namespace it is installed in."""
        return self.kubectl.namespace

    def cli(
        self, *words: str, role: str = "submitter", profile: Path | None = None, env: Mapping[str, str] | None = None
    ) -> Said:
        """What ``tunejob WORDS`` says and how it leaves, called by one who has a role.

        Args:
            role: of ``kubeconfig``.
            profile: another one than the kit's.
            env: variables that are set for it besides, or empty ones that are taken away.
        """
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from launcher.cli import main; sys.exit(main())", *words],
            cwd=self.folder,
            env=self._env(role, profile, env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert "Traceback" not in done.stderr, f"tunejob {' '.join(words)}: {done.stderr}"
        return Said(done.returncode, done.stdout, done.stderr)

    def spec(self, name: str, **sections: Any) -> Path:
        """The file of a run of the tiny Llama: 6 steps, unless ``sections`` say otherwise."""
        resources = {"cpu": "100m", "memory": "2Gi", "ephemeral_storage": "512Mi", "grace_seconds": 30}
        content = tiny_spec(name, resources=resources | sections.pop("resources", {}), **sections)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    def profile_with(self, name: str, **changes: Any) -> Path:
        """Another profile file: the kit's with other values; ``store`` is merged, a None takes a key away."""
        content = yaml.safe_load(self.profile.read_text(encoding="utf-8"))
        store = content["store"] | changes.pop("store", {})
        content = {key: value for key, value in (content | {"store": store} | changes).items() if value is not None}
        path = self.folder / f"{name}.profile.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return path

    @contextmanager
    def python(self, role: str = "submitter", profile: Path | None = None) -> Iterator[Any]:
        """Yields ``launcher.verbs.Door``, the environment of this process being that of one who has a role."""
        from launcher.verbs import Door

        before = dict(os.environ)
        os.environ.clear()
        os.environ.update(self._env(role, profile, {}))
        try:
            yield Door(str(profile or self.profile))
        finally:
            os.environ.clear()
            os.environ.update(before)

    def environment(self, role: str = "submitter") -> dict[str, str]:
        """The variables of one who has a role."""
        return self._env(role, None, {})

    def _env(self, role: str, profile: Path | None, more: Mapping[str, str]) -> dict[str, str]:
        foreign = ("AWS_", "TUNEJOB_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        env |= {
            "KUBECONFIG": str(self.kubeconfig[role]),
            "TUNEJOB_PROFILE": str(profile or self.profile),
            "AWS_ACCESS_KEY_ID": self.bucket.trainer.id,
            "AWS_SECRET_ACCESS_KEY": self.bucket.trainer.secret,
            "HOME": str(self.folder),
            "PYTHONPATH": str(ROOT),
        } | dict(more)
        return {name: value for name, value in env.items() if value}


def install(kubectl: Kubectl, folder: Path) -> Said:
    """Installs the base as another kustomization does that wants another namespace."""
    folder.mkdir(parents=True)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": kubectl.namespace,
        # A kustomization takes no absolute path.
        "resources": [os.path.relpath(BASE, folder.resolve())],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization), encoding="utf-8")
    said = kubectl.ask("apply", "-k", str(folder))
    assert said.code == 0, said.err
    # Pods of the tests call their store, where the network plugin asks who may.
    kubectl("apply", "-f", str(BASE / "store" / "network-policy.yaml"))
    return said


def kubeconfig_of(kubectl: Kubectl, account: str, path: Path) -> Path:
    """Writes a kubeconfig whose only user is a ServiceAccount of the namespace, by a token of a few hours."""
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "--flatten", "-o", "json"))
    token = kubectl("create", "token", account, "--duration=6h").strip()
    cluster = config["clusters"][0]["name"]
    config["users"] = [{"name": account, "user": {"token": token}}]
    context = {"cluster": cluster, "user": account, "namespace": kubectl.namespace}
    config["contexts"] = [{"name": account, "context": context}]
    config["current-context"] = account
    path.touch(mode=0o600)
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def write_profile(path: Path, namespace: str, port: int) -> Path:
    """Writes the profile of the installed base; the store answers this machine on a port of 127.0.0.1."""
    profile = {
        "namespace": namespace,
        "image": IMAGE,
        "store": {
            "output": f"s3://{BUCKET}/runs",
            "endpoint": "http://store:8333",
            "client_endpoint": f"http://127.0.0.1:{port}",
            "region": "us-east-1",
            "secret": CREDENTIALS,
        },
        "env": {"TUNEJOB_HEARTBEAT_SECONDS": "2"},
    }
    path.write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")
    return path
