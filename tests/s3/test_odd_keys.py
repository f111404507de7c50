"""Keys that no store of ours would write; moto keeps every one of them, as Amazon does. And what else moto lacks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from job.errors import IntegrityFailure
from job.storage.s3 import S3Store
from job.storage.store import probe
from tests.s3.conftest import QUICK, client
from tests.s3.proxy import between, flip_request, without
from tests.s3.weed import BUCKET, Identity

ODD = [
    "p/a/../../outside",
    "p/..",
    "p/../outside",
    "p//absolute",
    "p/a\\b",
    "p/a//b",
    "p/.hidden",
    "p/.git/config",
    "p/folder/",
    "p/",
]
FINE = ["p/folder", "p/folder/x", "p/a..b", "p/x/y", "p/x", "p/Größe", "p/a b+c&d?e#f", "p/%2e%2e", "p/empty"]


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    url = "http://127.0.0.1:{1}".format(*server.get_host_and_port())
    plain = client(url, Identity("anybody", "anything"))
    plain.create_bucket(Bucket=BUCKET)
    for key in [*ODD, *FINE]:
        plain.put_object(Bucket=BUCKET, Key=key, Body=b"" if key.endswith(("/", "empty")) else b"bytes")
    yield url
    server.stop()


@pytest.fixture
def bucket(moto: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anybody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    return S3Store(f"s3://{BUCKET}/p", patience=QUICK)


def test_a_listing_leaves_out_what_is_no_name_and_shows_all_else(bucket: S3Store, tmp_path: Path) -> None:
    entries = list(bucket.list(""))
    assert [entry.key for entry in entries] == sorted(key.removeprefix("p/") for key in FINE)
    for number, entry in enumerate(entries):
        assert bucket.get(entry.key, tmp_path / str(number)).size == entry.size == (0 if entry.key == "empty" else 5)
        assert bucket.stat(entry.key) == entry


@pytest.mark.parametrize("key", [key.removeprefix("p/") for key in ODD])
def test_nothing_is_written_outside_the_folder_for_a_key_that_leaves_it(
    key: str, bucket: S3Store, tmp_path: Path
) -> None:
    (tmp_path / "to").mkdir()
    with pytest.raises(IntegrityFailure, match="is no key of a store"):
        bucket.get(key, tmp_path / "to" / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    assert list((tmp_path / "to").iterdir()) == []


@pytest.mark.parametrize("names", [("if-none-match",), ("if-match",), ("if-none-match", "if-match")])
def test_a_probe_tells_a_store_that_ignores_conditions(
    names: tuple[str, ...], moto: str, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with between(moto) as proxy:
        proxy.on("PUT", "probe", without(*names), times=None)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        assert [name.lower() for name in probe(bucket)] == list(names)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto)
    assert probe(bucket) == ()


def test_a_store_that_does_not_compare_what_it_gets_is_found_out(
    moto: str, bucket: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with between(moto) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        proxy.on("PUT", "/flipped", flip_request)
        bucket.write("flipped", b"0123456789")
        with pytest.raises(IntegrityFailure, match="bytes change on the way"):
            bucket.read("flipped")
    bucket.delete("flipped")
