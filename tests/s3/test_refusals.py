"""A store that says no: never read as "not there", always with the reason and what to try."""

import logging
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from job.errors import AccessDenied, DiskFailure, InputMissing, JobError, SpecInvalid, TemporaryFailure
from job.storage.s3 import S3Store
from job.storage.s3_ask import Patience
from job.storage.store import probe
from tests.s3.certificates import Authority
from tests.s3.conftest import IMPATIENT, QUICK, Enter
from tests.s3.proxy import Fault, Proxy, answer, between
from tests.s3.weed import BUCKET, Weed

REPOSITORY = Path(__file__).parents[2]
WAYS = "AWS_SHARED_CREDENTIALS_FILE.*AWS_ACCESS_KEY_ID.*AWS_SECRET_ACCESS_KEY.*IRSA"

Call = Callable[[S3Store], object]

CALLS: dict[str, Call] = {
    "read": lambda store: store.read("there"),
    "stat": lambda store: store.stat("there"),
    "get": lambda store: store.get("there", Path("never")),
    "digest": lambda store: store.digest("there"),
    "list": lambda store: list(store.list("")),
    "write": lambda store: store.write("new", b"1"),
    "put": lambda store: store.put(Path(__file__), "new"),
    "delete": lambda store: store.delete("there"),
}


@pytest.mark.parametrize(
    ("identity", "call", "action"),
    [
        ("nobody", "read", "s3:GetObject"),
        ("nobody", "stat", "s3:GetObject"),
        ("nobody", "get", "s3:GetObject"),
        ("nobody", "digest", "s3:GetObject"),
        ("nobody", "list", "s3:ListBucket"),
        ("nobody", "write", "s3:PutObject"),
        ("nobody", "put", "s3:PutObject"),
        ("nobody", "delete", "s3:DeleteObject"),
        ("blind", "list", "s3:ListBucket"),
        ("reader", "write", "s3:PutObject"),
        ("reader", "delete", "s3:DeleteObject"),
        ("writer", "read", "s3:GetObject"),
    ],
)
def test_a_right_that_lacks_is_named(identity: str, call: str, action: str, enter: Enter, uri: str) -> None:
    enter("owner")
    S3Store(uri, patience=QUICK).write("there", b"1")
    enter(identity)
    with pytest.raises(AccessDenied, match=rf"{uri}.*{action} on bucket {BUCKET}"):
        CALLS[call](S3Store(uri, patience=QUICK))


@pytest.mark.parametrize(
    ("identity", "action"), [("reader", "s3:PutObject"), ("writer", "s3:GetObject"), ("blind", "s3:ListBucket")]
)
def test_a_probe_names_the_right_that_lacks(identity: str, action: str, enter: Enter, uri: str) -> None:
    enter(identity)
    with pytest.raises(AccessDenied, match=action):
        probe(S3Store(uri, patience=QUICK))


@pytest.mark.parametrize("call", CALLS)
def test_without_credentials_the_three_ways_are_named(
    call: str, enter: Enter, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    enter()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(AccessDenied, match=f"{uri}.*: no usable credentials .*{WAYS}"):
        CALLS[call](S3Store(uri))


def test_half_a_credential_is_none(enter: Enter, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    enter()
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDenied, match=WAYS):
        S3Store(uri).read("a")


@pytest.mark.parametrize(
    "text", ["[other]\naws_access_key_id = AKIAX\n", "no ini", "[default]\naws_access_key_id = K1\n", ""]
)
def test_a_credentials_file_that_says_nothing_is_no_credential(
    text: str, enter: Enter, monkeypatch: pytest.MonkeyPatch, uri: str, tmp_path: Path
) -> None:
    enter()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(text)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(AccessDenied, match=WAYS):
        S3Store(uri).read("a")


def test_a_wrong_secret_is_refused_with_the_key_masked(enter: Enter, weed: Weed, uri: str) -> None:
    secret = "wrong-wrong-wrong"
    enter("owner", AWS_SECRET_ACCESS_KEY=secret)
    key = weed.identities["owner"].key
    with pytest.raises(
        AccessDenied, match=rf"key {key[:4]}\.\.\.{key[-2:]}\) are refused, SignatureDoesNotMatch"
    ) as refusal:
        S3Store(uri, patience=QUICK).read("a")
    assert key not in str(refusal.value)
    assert secret not in str(refusal.value)


def test_an_unknown_key_is_refused_with_the_key_masked(enter: Enter, uri: str) -> None:
    key = "AKIA" + "Z" * 16
    enter("owner", AWS_ACCESS_KEY_ID=key)
    with pytest.raises(AccessDenied, match=r"key AKIA\.\.\.ZZ\) are refused, InvalidAccessKeyId") as refusal:
        S3Store(uri, patience=QUICK).stat("a")
    assert key not in str(refusal.value)


def write_credentials(path: Path, weed: Weed, name: str) -> None:
    identity = weed.identities[name]
    path.write_text(f"[default]\naws_access_key_id = {identity.key}\naws_secret_access_key = {identity.secret}\n")


@pytest.mark.parametrize("call", ["read", "put", "list"])
def test_credentials_that_were_rotated_are_read_again(
    call: str, enter: Enter, monkeypatch: pytest.MonkeyPatch, weed: Weed, proxy: Proxy, uri: str, tmp_path: Path
) -> None:
    enter("owner", proxy.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write_credentials(tmp_path / "credentials", weed, "owner")
    store = S3Store(uri, patience=QUICK)
    store.write("there", b"1")
    proxy.on("GET|PUT|HEAD", "/", answer(400, "ExpiredToken", "The provided token has expired."))
    CALLS[call](store)
    write_credentials(tmp_path / "credentials", weed, "nobody")
    CALLS[call](store)  # nobody asks for what is not refused
    proxy.on("GET|PUT|HEAD", "/", answer(403, "ExpiredToken"))
    with pytest.raises(AccessDenied):
        CALLS[call](store)
    write_credentials(tmp_path / "credentials", weed, "owner")
    CALLS[call](store)


def test_rights_that_are_not_known_everywhere_yet_are_waited_for(enter: Enter, proxy: Proxy, uri: str) -> None:
    enter("owner", proxy.url)
    proxy.on("PUT", "/a", answer(403, "AccessDenied"), times=5)
    store = S3Store(uri, patience=Patience(settle_seconds=60, first_wait=0.01, longest_wait=0.05))
    store.write("a", b"1")
    proxy.on("PUT", "/b", answer(403, "AccessDenied"), times=5)
    with pytest.raises(AccessDenied):
        store.write("b", b"1")
    assert proxy.count("PUT .*/b") == 2


@pytest.mark.parametrize(("minutes", "words"), [(20, "20 minutes behind"), (-20, "20 minutes ahead")])
def test_clocks_that_differ_are_named_with_by_how_much(
    minutes: int, words: str, enter: Enter, proxy: Proxy, uri: str
) -> None:
    enter("owner", proxy.url)
    proxy.on("GET", "/a", answer(403, "RequestTimeTooSkewed", clock=60 * minutes), times=None)
    with pytest.raises(AccessDenied, match=f"RequestTimeTooSkewed, the clocks differ: this machine's is {words}"):
        S3Store(uri).read("a")


@pytest.mark.parametrize("call", CALLS)
def test_a_bucket_that_is_not_there_is_a_missing_input(call: str, enter: Enter, proxy: Proxy) -> None:
    enter("admin")
    with pytest.raises(InputMissing, match=r"s3://no-such-bucket/x.*no bucket no-such-bucket at 127\.0\.0\.1:\d+"):
        CALLS[call](S3Store("s3://no-such-bucket/x", patience=QUICK))


ELSEWHERE = {"x-amz-bucket-region": "eu-west-3"}
SAID: list[tuple[Fault, type[JobError], str]] = [
    (
        answer(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-3"}),
        SpecInvalid,
        "says eu-west-3; set AWS_REGION",
    ),
    (answer(400, "AuthorizationHeaderMalformed", "the region 'us-east-1' is wrong"), SpecInvalid, "AWS_REGION"),
    (answer(501, "NotImplemented", "a header is not implemented"), SpecInvalid, "AWS_REQUEST_CHECKSUM_CALCULATION"),
    (answer(400, "InvalidRequest", "checksum of this type"), SpecInvalid, "AWS_REQUEST_CHECKSUM_CALCULATION"),
    (answer(400, "MissingContentMD5"), SpecInvalid, "AWS_REQUEST_CHECKSUM_CALCULATION"),
    (answer(400, "KMS.DisabledException", "arn is disabled"), AccessDenied, "KMS.*kms:GenerateDataKey"),
    (answer(403, "AccessDenied", "not authorized to perform: kms:Decrypt"), AccessDenied, "KMS.*kms:GenerateDataKey"),
    (answer(403, "InvalidObjectState"), InputMissing, "archived"),
    (answer(507, "XMinioStorageFull"), DiskFailure, "the store has no space left"),
    (answer(403, "QuotaExceeded"), DiskFailure, "the store has no space left"),
    (answer(418, "Teapot", "short and stout"), TemporaryFailure, r"answers Teapot \(418\) short and stout"),
]


@pytest.mark.parametrize(("fault", "kind", "words"), SAID, ids=[words[:25] for _, _, words in SAID])
@pytest.mark.parametrize("call", ["read", "write", "stat"])
def test_what_a_store_says_has_a_class_of_ours(
    fault: Fault, kind: type[JobError], words: str, call: str, enter: Enter, proxy: Proxy, uri: str
) -> None:
    enter("owner", proxy.url)
    proxy.on("GET|PUT", "/(there|new)", fault, times=None)
    proxy.on("HEAD", "/there", answer(403, "") if "403" in str(kind) else answer(400, ""), times=None)
    with pytest.raises(JobError, match=words) as refusal:
        CALLS[call](S3Store(uri, patience=IMPATIENT))
    assert type(refusal.value) is kind


# The way there


def test_an_endpoint_nobody_listens_at_is_named_with_its_port(enter: Enter, uri: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    enter("owner", f"http://127.0.0.1:{port}")
    with pytest.raises(
        TemporaryFailure, match=rf"endpoint 127\.0\.0\.1:{port} cannot be reached; is egress to it allowed"
    ):
        S3Store(uri, patience=IMPATIENT).read("a")


def test_an_endpoint_that_swallows_everything_is_given_up(enter: Enter, uri: str) -> None:
    with ExitStack() as stack:
        deaf = stack.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):  # its queue is full: what comes now is dropped without a word
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        enter("owner", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        patience = Patience(control_seconds=0, connect_seconds=0.5, read_seconds=0.5, sdk_attempts=1)
        with pytest.raises(TemporaryFailure, match=r"cannot be reached; is egress to it allowed\?"):
            S3Store(uri, patience=patience).read("a")


def test_a_name_that_cannot_be_resolved_is_named(enter: Enter, uri: str) -> None:
    enter("owner", "http://no-such-host.invalid:9000")
    with pytest.raises(TemporaryFailure, match=r"the name no-such-host\.invalid cannot be resolved"):
        S3Store(uri, patience=IMPATIENT).read("a")


def test_a_proxy_that_does_not_answer_is_named(enter: Enter, uri: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    enter("owner", "http://store.invalid:9000", HTTP_PROXY=f"http://someone:hidden@127.0.0.1:{port}")
    with pytest.raises(TemporaryFailure, match=r"through the proxy of HTTPS_PROXY or HTTP_PROXY.*NO_PROXY") as refusal:
        S3Store(uri, patience=IMPATIENT).read("a")
    assert "hidden" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["of an unknown authority", "expired", "for another host"])
def test_a_server_that_cannot_be_trusted_is_refused_and_never_believed(
    kind: str, authority: Authority, weed: Weed, enter: Enter, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with between(weed.url, authority.server(kind)) as proxy:
        enter("owner", proxy.url)
        if kind != "of an unknown authority":
            monkeypatch.setenv("AWS_CA_BUNDLE", str(authority.bundle))
        with pytest.raises(SpecInvalid, match=r"127\.0\.0\.1:\d+ cannot be trusted .*AWS_CA_BUNDLE"):
            S3Store(uri).read("a")
        assert proxy.asked == []


def test_a_private_authority_is_believed_and_payloads_are_signed_over_tls_too(
    authority: Authority, weed: Weed, enter: Enter, uri: str, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(bytes(20_000_000))
    with between(weed.url, authority.server("good")) as proxy:
        enter("owner", proxy.url, AWS_CA_BUNDLE=str(authority.bundle))
        store = S3Store(uri, patience=QUICK)
        assert probe(store) == ()
        assert store.put(tmp_path / "a", "a") == store.get("a", tmp_path / "b")
        signed = {headers.get("X-Amz-Content-SHA256", "") for headers in proxy.headers}
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in signed)


def test_a_bundle_that_is_not_there_is_named(enter: Enter, uri: str, tmp_path: Path) -> None:
    enter("owner", AWS_CA_BUNDLE=str(tmp_path / "ca.crt"))
    with pytest.raises(SpecInvalid, match=r"AWS_CA_BUNDLE=.*ca\.crt: no such file"):
        S3Store(uri).read("a")


# Secrets


def test_no_secret_is_in_any_message_or_log_line(
    enter: Enter, weed: Weed, proxy: Proxy, uri: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("boto3", "botocore", "s3transfer", "urllib3"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    me, token = weed.identities["reader"], "session-token-canary"
    echo = answer(403, "AccessDenied", f"{me.key} with {me.secret} and {token} may not", headers=None)
    enter("reader", proxy.url, AWS_SESSION_TOKEN=token)
    proxy.on("GET|PUT|DELETE|HEAD", "/", echo, times=None)
    said = []
    for call in CALLS.values():
        try:
            call(S3Store(uri, patience=QUICK))
        except JobError as error:
            said.append(str(error))
    assert len(said) == len(CALLS)
    everything = "\n".join([*said, caplog.text])
    for secret in (me.key, me.secret, token):
        assert secret not in everything
