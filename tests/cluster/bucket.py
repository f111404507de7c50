"""The object store of the tests: SeaweedFS as a pod, and a bucket of it as this machine sees it."""

import json
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.kubectl import Kubectl, manifest, wait_for

BUCKET = "training"
IMAGE = "localhost/seaweedfs:test"
PORT = 8333


@dataclass(frozen=True)
class Key:
    """One identity of the store; made up anew for every session."""

    id: str = field(default_factory=lambda: f"AKIA{secrets.token_hex(8).upper()}")
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(30))

    @property
    def file(self) -> str:
        """As AWS_SHARED_CREDENTIALS_FILE reads it."""
        return f"[default]\naws_access_key_id = {self.id}\naws_secret_access_key = {self.secret}\n"


class Bucket:
    """The store's pod, and its bucket through a forwarded port. Keys are relative to the bucket."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl
        self._admin = Key()
        self.trainer = Key()
        """May do in this bucket what a run needs."""
        self._link = ExitStack()
        self._client: Any = None

    def deploy(self) -> None:
        """Starts the pod and makes the bucket."""
        actions = [f"{verb}:{BUCKET}" for verb in ("Read", "Write", "List", "Tagging")]
        identities = [
            {"name": name, "credentials": [{"accessKey": key.id, "secretKey": key.secret}], "actions": granted}
            for name, key, granted in (("admin", self._admin, ["Admin"]), ("trainer", self.trainer, actions))
        ]
        text = json.dumps(json.dumps({"identities": identities}))
        self._kubectl.apply(manifest("store", identities=text, store_image=IMAGE))
        self.connect()
        self._client.create_bucket(Bucket=BUCKET)

    def connect(self) -> None:
        """Waits until the pod answers, and reaches it by a new forwarded port."""
        import boto3
        from botocore.config import Config

        self.disconnect()
        self._kubectl("wait", "pod/store", "--for=condition=Ready", "--timeout=120s")
        port = self._link.enter_context(self._kubectl.forwarded("pod/store", PORT))
        self._client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-east-1",
            aws_access_key_id=self._admin.id,
            aws_secret_access_key=self._admin.secret,
            config=Config(s3={"addressing_style": "path"}, retries={"mode": "standard", "total_max_attempts": 10}),
        )
        wait_for(self._answers, "answer of the store")

    def disconnect(self) -> None:
        """Gives the forwarded port back."""
        self._link.close()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """No store while the block runs; what it holds is there again afterwards.

        The container is stopped by naming an image that does not exist: the pod, and with it its volume, stays.
        """
        before = self._container_id()
        self._set_image("localhost/no-such-image:0")
        wait_for(lambda: not self._is_running(), "stop of the store")
        try:
            yield
        finally:
            self._set_image(IMAGE)
            wait_for(lambda: self._is_running() and self._container_id() != before, "start of the store")
            self.connect()

    def put(self, path: Path, key: str) -> None:
        """Uploads a file, or everything in a folder."""
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            name = f"{key}/{file.relative_to(path).as_posix()}" if path.is_dir() else key
            self._client.upload_file(str(file), BUCKET, name)

    def get(self, key: str) -> bytes:
        """An object's bytes."""
        data: bytes = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def json(self, key: str) -> Any:
        """An object of JSON; None if there is none."""
        return json.loads(self.get(key)) if self.has(key) else None

    def has(self, key: str) -> bool:
        """Whether there is such an object."""
        return key in self.etags(key)

    def etags(self, prefix: str) -> dict[str, str]:
        """Every key below a prefix with its etag; a time of change belongs to it, for another write of the same."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return {
            entry["Key"]: f"{entry['ETag']} {entry['LastModified']}"
            for page in pages
            for entry in page.get("Contents", [])
        }

    def fetch(self, prefix: str, folder: Path) -> Path:
        """Downloads the objects directly below a prefix ending in '/'."""
        folder.mkdir(parents=True, exist_ok=True)
        for key in self.etags(prefix):
            name = key.removeprefix(prefix)
            if "/" not in name:
                (folder / name).write_bytes(self.get(key))
        return folder

    def _answers(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.list_buckets()
        except (BotoCoreError, ClientError):
            return False
        return True

    def _set_image(self, image: str) -> None:
        self._kubectl("set", "image", "pod/store", f"store={image}")

    def _status(self) -> Any:
        return self._kubectl.get("pod", "store")["status"]["containerStatuses"][0]

    def _is_running(self) -> bool:
        return "running" in self._status()["state"]

    def _container_id(self) -> str:
        return str(self._status().get("containerID"))
