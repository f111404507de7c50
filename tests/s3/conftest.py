"""A real S3 server on this machine, proxies before it, and stores over both kinds."""

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from botocore.config import Config

from job.storage.directory import DirectoryStore
from job.storage.s3 import S3Store
from job.storage.s3_ask import Patience
from job.storage.store import Store
from tests.s3.certificates import Authority
from tests.s3.proxy import Proxy, between
from tests.s3.weed import BUCKET, Identity, Weed, running

QUICK = Patience(
    control_seconds=20,
    bulk_seconds=20,
    settle_seconds=0,
    first_wait=0.01,
    longest_wait=0.05,
    connect_seconds=5,
    read_seconds=5,
    sdk_attempts=1,
)
"""Of the times only the waits are short: on a busy machine nothing is given up too early."""
IMPATIENT = Patience(
    control_seconds=0, bulk_seconds=0, settle_seconds=0, first_wait=0.01, longest_wait=0.01, sdk_attempts=1
)
"""Gives up at the first failure."""

Enter = Callable[..., None]


def client(url: str, identity: Identity) -> "boto3.client":
    """A plain client, to look at the server behind the store's back."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=identity.key,
        aws_secret_access_key=identity.secret,
        config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
    )


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    """The server, with the bucket that everybody knows."""
    with running(tmp_path_factory.mktemp("weed")) as server:
        client(server.url, server.identities["admin"]).create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of this machine's own S3 settings is seen by a test."""
    for name in [name for name in os.environ if name.startswith("AWS_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "there-is-none"))


@pytest.fixture
def enter(weed: Weed, monkeypatch: pytest.MonkeyPatch) -> Enter:
    """Sets the environment as a pod has it: ``enter("reader", url)``."""

    def set_environment(name: str = "owner", url: str | None = None, **more: str) -> None:
        settings = {**weed.identities[name].environment, "AWS_ENDPOINT_URL_S3": url or weed.url, **more}
        for variable, value in settings.items():
            monkeypatch.setenv(variable, value)

    return set_environment


@pytest.fixture(scope="session")
def the_proxy(weed: Weed) -> Iterator[Proxy]:
    """One proxy for all tests: a client is made anew only where its settings change."""
    with between(weed.url) as found:
        yield found


@pytest.fixture
def proxy(the_proxy: Proxy) -> Proxy:
    """A proxy before the server that lets everything through, at first."""
    the_proxy.begin_anew()
    return the_proxy


@pytest.fixture
def uri() -> str:
    """A prefix of this test's own."""
    return f"s3://{BUCKET}/tests/t-{secrets.token_hex(6)}"


@pytest.fixture
def s3(enter: Enter, proxy: Proxy, uri: str) -> S3Store:
    """A store of S3, asked through the proxy."""
    enter("owner", proxy.url)
    return S3Store(uri, patience=QUICK)


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store of each kind."""
    if request.param == "s3":
        found: Store = request.getfixturevalue("s3")
        return found
    return DirectoryStore(tmp_path / "store", "file:out")


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Signs servers' certificates."""
    return Authority(tmp_path_factory.mktemp("authority"))
