"""Addresses and settings: what is wrong with them is said before anything is asked."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer

import pytest
from s3transfer.utils import ChunksizeAdjuster

from job.errors import AccessDenied, SpecInvalid
from job.storage.directory import DirectoryStore
from job.storage.s3 import S3Store
from job.storage.s3_client import PART_BYTES, connection, mask, parse
from job.storage.store import open_store
from tests.s3.conftest import IMPATIENT, Enter
from tests.s3.proxy import Proxy
from tests.s3.weed import BUCKET

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("uri", "bucket", "prefix"),
    [
        ("s3://bucket", "bucket", ""),
        ("s3://bucket/", "bucket", ""),
        ("s3://bucket/a", "bucket", "a/"),
        ("s3://my.bucket-1/a/b/", "my.bucket-1", "a/b/"),
        ("s3://bucket/a..b/Ä %20?#x", "bucket", "a..b/Ä %20?#x/"),
    ],
)
def test_an_address_names_a_bucket_and_a_prefix(uri: str, bucket: str, prefix: str) -> None:
    location = parse(uri)
    assert (location.bucket, location.prefix) == (bucket, prefix)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3:", "names no bucket"),
        ("s3:/", "names no bucket"),
        ("s3://", "names no bucket"),
        ("s3:///a", "names no bucket"),
        ("s3:bucket/a", "names no bucket"),
        ("s3://Bucket/a", "small letters"),
        ("s3://ab/a", "small letters"),
        ("s3://a..b/a", "small letters"),
        ("s3://bucket:9000/a", "small letters"),
        ("s3://-bucket/a", "small letters"),
        ("s3://bucket//a", "'//'"),
        ("s3://bucket/a//b", "'//'"),
        ("s3://bucket/../a", "is no name"),
        ("s3://bucket/a/./b", "is no name"),
        ("s3://bucket/a\\b", "is no name"),
        ("s3://bucket/a\0", "is no name"),
        ("s3://bucket/a\nb", "is no name"),
        ("s3://bucket/; rm -rf ~\n", "is no name"),
    ],
)
def test_an_address_that_names_no_place_is_refused(uri: str, words: str) -> None:
    with pytest.raises(SpecInvalid, match=words):
        open_store(uri)


@pytest.mark.parametrize("secret", ["hidden-secret", "hid/hidden", "a/hidden@b/hidden"])
def test_credentials_in_an_address_are_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(SpecInvalid, match="without credentials") as refusal:
        open_store(f"s3://AKIAABCDEFGHIJKLMNOP:{secret}@bucket/a")
    assert "hidden" not in str(refusal.value)
    assert "AKIA" not in str(refusal.value)


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://169.254.169.254",
        "http://169.254.169.254:80/latest",
        "http://[fe80::1]:9000",
        "http://2852039166",
        "http://0xA9FEA9FE",
        "http://[::ffff:169.254.169.254]",
    ],
)
def test_an_endpoint_where_machines_keep_their_own_credentials_is_refused(endpoint: str, enter: Enter) -> None:
    enter("owner", endpoint)
    with pytest.raises(SpecInvalid, match="a link-local address"):
        S3Store(f"s3://{BUCKET}/a", patience=IMPATIENT).read("a")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_ENDPOINT_URL_S3", "minio:9000", "no address of a store"),
        ("AWS_ENDPOINT_URL_S3", "http://", "no address of a store"),
        ("AWS_ENDPOINT_URL_S3", "ftp://host", "no address of a store"),
        ("AWS_ENDPOINT_URL_S3", "http://me:hidden@host", "carries credentials"),
        ("AWS_ENDPOINT_URL_S3", "me:hidden@host:9000", "carries credentials"),
        ("AWS_ENDPOINT_URL_S3", "http://me:hid/hidden@host", "carries credentials"),
        ("AWS_ENDPOINT_URL_S3", "http://host:many", "no address of a store"),
        ("AWS_ENDPOINT_URL_S3", "http://a b:9000", "AWS_ENDPOINT_URL_S3"),
        ("TUNEJOB_S3_ADDRESSING", "paths", "one of path, virtual and auto"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "never", "when_required"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(name: str, value: str, words: str, enter: Enter) -> None:
    enter()
    enter("owner", **({"url": value} if name == "AWS_ENDPOINT_URL_S3" else {name: value}))
    with pytest.raises(SpecInvalid, match=words) as refusal:
        S3Store(f"s3://{BUCKET}/a", patience=IMPATIENT).read("a")
    assert "hidden" not in str(refusal.value)


@pytest.mark.parametrize(
    ("endpoint", "addressing", "begins"),
    [
        ("http://127.0.0.1:9", None, "http://127.0.0.1:9/bucket/a"),
        ("http://127.0.0.1:9", "path", "http://127.0.0.1:9/bucket/a"),
        ("http://store.example:9", "virtual", "http://bucket.store.example:9/a"),
        (None, None, "https://bucket.s3.amazonaws.com/a"),
        (None, "path", "https://s3.amazonaws.com/bucket/a"),
    ],
)
def test_the_address_style_follows_the_endpoint_unless_it_is_named(
    endpoint: str | None, addressing: str | None, begins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ENDPOINT_URL_S3": endpoint, "TUNEJOB_S3_ADDRESSING": addressing}.items():
        if value:
            monkeypatch.setenv(name, value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anything")
    client = connection(1, 1, 1).client
    address = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "a"})
    assert address.partition("?")[0] == begins


@pytest.mark.parametrize(
    ("endpoint", "named", "options"),
    [
        (None, None, {"ChecksumAlgorithm": "SHA256"}),
        (None, "when_required", {}),
        ("http://127.0.0.1:9", None, {}),
        ("http://127.0.0.1:9", "when_supported", {"ChecksumAlgorithm": "SHA256"}),
    ],
)
def test_amazons_checksums_are_a_default_only_there(
    endpoint: str | None, named: str | None, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_REQUEST_CHECKSUM_CALCULATION": named}.items():
        if value:
            monkeypatch.setenv(name, value)
    assert connection(1, 1, 1).options == options


def test_no_checksum_header_is_sent_to_another_store_unless_asked(s3: S3Store, proxy: Proxy, enter: Enter) -> None:
    s3.write("a", b"1")
    s3.read("a")
    assert not any("checksum" in name.lower() for headers in proxy.headers for name in headers)
    enter("owner", proxy.url, AWS_REQUEST_CHECKSUM_CALCULATION="when_supported")
    s3.write("a", b"2")
    assert any(name.lower() == "x-amz-checksum-sha256" for headers in proxy.headers for name in headers)


def test_the_nodes_own_credentials_are_asked_for_only_if_that_is_wanted(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    class Metadata(BaseRequestHandler):
        def handle(self) -> None:
            asked.append(time.monotonic())

    with TCPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        enter("owner", AWS_EC2_METADATA_SERVICE_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        with pytest.raises(AccessDenied):
            S3Store(f"s3://{BUCKET}/a", patience=IMPATIENT).read("a")
        assert asked == []
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
        monkeypatch.setenv("AWS_METADATA_SERVICE_TIMEOUT", "5")
        with pytest.raises(AccessDenied):
            S3Store(f"s3://{BUCKET}/a", patience=IMPATIENT).read("a")
        assert asked != []
        server.shutdown()


def test_ten_thousand_parts_suffice_for_the_largest_object() -> None:
    for size in (5 << 30, 160 << 30, 5 << 40):
        part = ChunksizeAdjuster().adjust_chunksize(PART_BYTES, size)
        assert size <= 10_000 * part
        assert part <= 5 << 30


def test_a_key_is_masked_but_can_be_told_from_another() -> None:
    assert mask("AKIAIOSFODNN7EXAMPLE") == "AKIA...LE"
    assert mask("short") == "sh..."


def test_without_s3_nothing_of_it_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; import job.supervision.supervisor; from job.storage.store import open_store, probe\n"
        "probe(open_store(sys.argv[1]))\n"
        "print(*sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)
    assert not {"boto3", "botocore", "s3transfer"} & {name.partition(".")[0] for name in done.stdout.split()}


def test_without_its_client_an_address_of_s3_names_what_to_install() -> None:
    code = (
        "import sys; sys.modules['botocore'] = None\n"
        "from job.errors import SpecInvalid; from job.storage.store import open_store\n"
        "try:\n    open_store('s3://bucket/a')\n"
        "except SpecInvalid as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert "s3://bucket/a: needs botocore" in done.stdout, done.stderr
    assert "tunejob[s3]" in done.stdout


def test_a_plain_path_and_an_address_of_s3_open_different_stores(tmp_path: Path) -> None:
    assert isinstance(open_store(str(tmp_path)), DirectoryStore)
    assert isinstance(open_store(f"s3://{BUCKET}/a"), S3Store)


def test_opening_asks_nothing(enter: Enter, proxy: Proxy) -> None:
    enter("owner", proxy.url)
    store = open_store(f"s3://{BUCKET}/a")
    assert proxy.asked == []
    assert list(store.list("")) == []
    assert len(proxy.asked) == 1
