"""What goes wrong between us and the store: it passes, or it is named; it never passes for success."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from job.errors import DiskFailure, Fenced, IntegrityFailure, SpecInvalid, TemporaryFailure
from job.process import Identity
from job.storage import transfer
from job.storage.s3 import S3Store
from job.storage.s3_ask import DAMAGES, Patience
from job.storage.s3_client import PART_BYTES
from job.storage.store import PreconditionFailed, probe
from job.supervision.own import claim
from tests.s3.conftest import IMPATIENT, QUICK, Enter, client
from tests.s3.proxy import (
    Exchange,
    Fault,
    Proxy,
    Reply,
    answer,
    drop,
    flip_reply,
    flip_request,
    lose_reply,
    silence,
    slowly,
    truncate,
)
from tests.s3.weed import BUCKET, Weed

LARGE = PART_BYTES + 100_000
"""Bytes of a file that travels in two parts."""


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(LARGE))
    return path


def unfinished(weed: Weed) -> list[str]:
    found = client(weed.url, weed.identities["admin"]).list_multipart_uploads(Bucket=BUCKET)
    return [upload["Key"] for upload in found.get("Uploads", ())]


PASSING: dict[str, Fault] = {
    "500": answer(500, "InternalError", "We encountered an internal error"),
    "503": answer(503, "SlowDown", "Please reduce your request rate."),
    "429": answer(429, "TooManyRequests"),
    "409": answer(409, "ConditionalRequestConflict"),
    "a proxy's page": lambda exchange: exchange.send(Reply(502, [], b"<html>Bad Gateway</html>")),
    "nonsense": lambda exchange: exchange.send(Reply(500, [], b"\0\1")),
    "reset": drop,
    "lost reply": lose_reply,
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_borne_by_every_call(name: str, s3: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"bytes")
    calls: dict[str, Callable[[], object]] = {
        "PUT": lambda: s3.put(tmp_path / "a", "a"),
        "HEAD": lambda: s3.stat("a"),
        "GET": lambda: s3.get("a", tmp_path / "b"),
        "GET .*list-type": lambda: list(s3.list("")),
        "DELETE": lambda: s3.delete("a"),
    }
    for what, call in calls.items():
        method, _, path = what.partition(" ")
        proxy.on(method, path or "/a", PASSING[name], times=3)
        call()
        proxy.heal()
    assert (tmp_path / "b").read_bytes() == b"bytes"
    assert s3.read("a") is None


@pytest.mark.parametrize("method", ["POST", "PUT"])
@pytest.mark.parametrize("fault", [drop, lose_reply, answer(503, "SlowDown")], ids=["reset", "lost reply", "503"])
def test_a_file_in_parts_survives_what_passes(
    method: str, fault: Fault, s3: S3Store, proxy: Proxy, large: Path, weed: Weed
) -> None:
    proxy.on(method, "upload", fault)
    sent = s3.put(large, "large")
    assert s3.digest("large") == sent
    assert sent.sha256 == hashlib.sha256(large.read_bytes()).hexdigest()


@pytest.mark.parametrize("size", [1000, LARGE])
def test_a_write_on_a_condition_whose_reply_is_lost_has_landed(
    size: int, s3: S3Store, proxy: Proxy, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(os.urandom(size))
    proxy.on("PUT" if size < LARGE else "POST", "/a(\\?uploadId=.*)?$", lose_reply)
    sent = s3.put(tmp_path / "a", "a", if_absent=True)
    assert proxy.count("^(PUT|POST) [^?]*/a(\\?uploadId=[^&]*)?$") > 1
    assert s3.digest("a") == sent


def test_a_store_that_knows_no_condition_on_large_objects_gets_them_without(
    s3: S3Store, proxy: Proxy, large: Path
) -> None:
    def refuse(exchange: Exchange) -> None:
        if any(name.lower() == "if-none-match" for name in exchange.headers):
            answer(501, "NotImplemented", "A header you provided implies functionality that is not implemented")(
                exchange
            )
        else:
            exchange.send(exchange.forward())

    proxy.on("POST", "uploadId=", refuse, times=None)
    sent = s3.put(large, "large", if_absent=True)
    assert s3.digest("large") == sent


def test_a_completion_that_turns_into_an_error_is_tried_again(s3: S3Store, proxy: Proxy, large: Path) -> None:
    def error_with_200(exchange: Exchange) -> None:
        body = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>again</Message></Error>"
        exchange.send(Reply(200, [("Content-Type", "application/xml")], body))

    proxy.on("POST", "uploadId=", error_with_200, times=2)
    sent = s3.put(large, "large")
    assert s3.digest("large") == sent


def opaque_etag(exchange: Exchange) -> None:
    """A store whose etag is its own, as some have it: parts then cannot be asked for by it."""
    reply = exchange.forward()
    fields = [(name, value) for name, value in reply.headers if name.lower() != "etag"]
    exchange.send(Reply(reply.status, fields, reply.body))


@pytest.mark.parametrize("etag", ["an MD5", "opaque"])
@pytest.mark.parametrize("size", [0, 1000, LARGE])
def test_what_another_program_uploaded_is_proven_too(
    size: int, etag: str, s3: S3Store, uri: str, weed: Weed, proxy: Proxy, tmp_path: Path
) -> None:
    """A plain client writes no SHA-256 beside its objects, and takes altered bytes for good."""
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    key = f"{uri.removeprefix(f's3://{BUCKET}/')}/a"
    client(weed.url, weed.identities["admin"]).upload_file(str(tmp_path / "a"), BUCKET, key)
    if etag == "opaque":
        proxy.on("HEAD", "/a", opaque_etag, times=None)
    if size:
        proxy.on("GET", "/a", flip_reply)
    got = s3.get("a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
    assert got.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("fault", [truncate, flip_reply, drop], ids=["truncated", "flipped", "reset"])
@pytest.mark.parametrize("size", [1000, LARGE])
def test_bytes_damaged_on_the_way_here_are_brought_again(
    fault: Fault, size: int, s3: S3Store, proxy: Proxy, tmp_path: Path
) -> None:
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    s3.put(tmp_path / "a", "a")
    proxy.on("GET", "/a", fault)
    s3.get("a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == data
    proxy.on("GET", "/a", fault)
    assert s3.digest("a").sha256 == hashlib.sha256(data).hexdigest()
    if size < LARGE:
        proxy.on("GET", "/a", fault)
        found = s3.read("a")
        assert found is not None
        assert found[0] == data


def test_bytes_that_never_arrive_whole_are_an_integrity_failure_and_leave_nothing(
    s3: S3Store, proxy: Proxy, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    s3.put(tmp_path / "a", "a")
    proxy.on("GET", "/a", flip_reply, times=None)
    with pytest.raises(IntegrityFailure, match=f"{s3.uri}/a: cannot be brought here: bytes change on the way"):
        s3.get("a", tmp_path / "to" / "a")
    assert proxy.count("GET .*/a") == DAMAGES
    assert list((tmp_path / "to").iterdir()) == []
    with pytest.raises(IntegrityFailure):
        s3.read("a")


def test_a_digest_is_of_the_bytes_as_stored_even_if_they_are_not_what_was_sent(
    s3: S3Store, proxy: Proxy, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    s3.put(tmp_path / "a", "a")
    proxy.on("GET", "/a", flip_reply, times=None)
    assert s3.digest("a").sha256 != hashlib.sha256(b"0123456789").hexdigest()


@pytest.mark.parametrize("size", [1000, LARGE])
def test_bytes_damaged_on_the_way_there_are_refused_and_sent_again(
    size: int, s3: S3Store, proxy: Proxy, tmp_path: Path
) -> None:
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    proxy.on("PUT", "/a", flip_request)
    s3.put(tmp_path / "a", "a")
    assert s3.digest("a").sha256 == hashlib.sha256(data).hexdigest()


def test_bytes_that_never_get_there_whole_are_not_stored(s3: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    proxy.on("PUT", "/a", flip_request, times=None)
    with pytest.raises(IntegrityFailure, match="the store gets other bytes than were sent"):
        s3.put(tmp_path / "a", "a")
    with pytest.raises(IntegrityFailure):
        s3.write("a", b"0123456789")
    proxy.heal()
    assert s3.stat("a") is None


def test_an_object_replaced_while_it_is_brought_is_asked_for_again(
    s3: S3Store, proxy: Proxy, large: Path, tmp_path: Path, weed: Weed
) -> None:
    s3.put(large, "large")
    new = os.urandom(LARGE)

    def replace(exchange: Exchange) -> None:
        client(weed.url, weed.identities["admin"]).put_object(
            Bucket=BUCKET, Key=f"{s3.uri.removeprefix(f's3://{BUCKET}/')}/large", Body=new
        )
        exchange.send(exchange.forward())

    proxy.on("GET", "/large", replace, after=1)
    s3.get("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == new


def test_an_object_that_is_shorter_than_was_said_is_never_a_short_file(
    s3: S3Store, proxy: Proxy, tmp_path: Path
) -> None:
    s3.write("a", b"0123456789")

    def shorter(exchange: Exchange) -> None:
        reply = exchange.forward()
        exchange.send(Reply(200, [item for item in reply.headers if "range" not in item[0].lower()], reply.body[:5]))

    proxy.on("GET", "/a", shorter, times=None)
    with pytest.raises(IntegrityFailure, match="5 bytes arrive instead of 10"):
        s3.get("a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize("condition", ["absent", "match"])
def test_a_conditional_write_that_landed_without_a_reply_meets_itself(
    condition: str, attempts: int, enter: Enter, proxy: Proxy, uri: str
) -> None:
    enter("owner", proxy.url)
    s3 = S3Store(uri, patience=Patience(first_wait=0.01, longest_wait=0.05, sdk_attempts=attempts))
    etag = s3.write("run/owner.json", b"before") if condition == "match" else None
    proxy.on("PUT", "owner.json", lose_reply)
    with pytest.raises(PreconditionFailed):
        s3.write("run/owner.json", b"mine", if_absent=etag is None, if_match=etag)
    found = s3.read("run/owner.json")
    assert found is not None
    assert found[0] == b"mine"


def test_lost_replies_cost_neither_ownership_nor_a_checkpoint_nor_the_result(
    s3: S3Store, proxy: Proxy, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "adapter").write_bytes(b"weights")
    proxy.on("PUT", "owner.json", lose_reply, times=1)
    mine = claim(s3, "spec", Identity(1, "pod"), heartbeat=False)
    proxy.on("PUT", "owner.json", lose_reply, times=1)
    mine.check()
    mine.check()
    proxy.on("PUT", "COMMIT|commit", lose_reply, times=1)
    transfer.push_checkpoint(s3, tmp_path / "folder", 1, mine.generation, {})
    proxy.on("PUT", "manifest", lose_reply, times=1)
    transfer.publish(s3, {"adapter": tmp_path / "folder" / "adapter"}, {})
    assert [commit.step for commit in transfer.committed(s3)] == [1]
    manifest = transfer.read_manifest(s3)
    assert manifest is not None
    transfer.verify_manifest(s3, manifest)


@pytest.mark.parametrize("late", ["eval_results.json", "adapter_model.safetensors", "manifest.json"])
def test_what_a_cut_off_owner_still_had_under_way_spoils_nothing_of_its_successor_s(
    late: str, enter: Enter, proxy: Proxy, weed: Weed, uri: str, tmp_path: Path
) -> None:
    """One of its writes arrives when the run was taken over and published."""

    def files(who: str) -> dict[str, Path]:
        folder = tmp_path / who
        folder.mkdir()
        (folder / "eval_results.json").write_text(f"of {who}")
        (folder / "adapter_model.safetensors").write_bytes(who.encode() * PART_BYTES)
        return {path.name: path for path in folder.iterdir()}

    enter("owner", proxy.url)
    old = S3Store(uri, patience=QUICK)
    new = S3Store(uri, patience=QUICK, settings={"AWS_ENDPOINT_URL_S3": weed.url})
    goes_on, held = threading.Event(), threading.Event()

    def hold(exchange: Exchange) -> None:
        held.set()
        goes_on.wait(60)
        exchange.send(exchange.forward())

    cut_off = claim(old, "spec", Identity(1, "pod-a"), interval_seconds=0.5)

    def publish() -> None:
        transfer.publish(old, files("a"), {"run": "a"}, cut_off.check)

    method, path = ("POST", "uploadId=") if late.startswith("adapter") else ("PUT", f"/{late}")
    proxy.on(method, path, hold)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(publish)
        assert held.wait(60)
        proxy.on("PUT", "owner.json", drop, times=None)  # from here on no heartbeat arrives
        successor = claim(new, "spec", Identity(1, "pod-b"), interval_seconds=0.5)
        assert successor.generation == 2
        transfer.publish(new, files("b"), {"run": "b"}, successor.check)
        successor.release("OK")
        proxy.heal()
        goes_on.set()
        with pytest.raises(Fenced):
            ended.result(60)
    manifest = transfer.read_manifest(new)
    assert manifest is not None
    assert manifest.record["run"] == "b"
    transfer.verify_manifest(new, manifest)


@pytest.mark.parametrize(("status", "code"), [(404, "NoSuchKey"), (412, "PreconditionFailed")], ids=["404", "412"])
def test_if_match_on_what_is_gone_is_a_failed_condition_however_the_store_says_it(
    status: int, code: str, s3: S3Store, proxy: Proxy
) -> None:
    proxy.on("PUT", "/a", answer(status, code))
    with pytest.raises(PreconditionFailed):
        s3.write("a", b"1", if_match="0")


def test_a_probe_whose_first_reply_is_lost_is_no_failure(s3: S3Store, proxy: Proxy) -> None:
    proxy.on("PUT", "probe", lose_reply)
    assert probe(s3) == ()


def test_a_probe_tells_a_cache_from_a_store(s3: S3Store, proxy: Proxy) -> None:
    empty = b"<?xml version='1.0'?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"
    proxy.on("GET", "list-type", lambda exchange: exchange.send(Reply(200, [], empty)))
    with pytest.raises(IntegrityFailure, match="does not list what was just written"):
        probe(s3)
    proxy.on("GET", "probe", answer(404, "NoSuchKey"))
    with pytest.raises(IntegrityFailure, match="does not give back what was just written"):
        probe(s3)


def test_a_slow_server_that_goes_on_is_waited_for(s3: S3Store, proxy: Proxy, enter: Enter, tmp_path: Path) -> None:
    s3.write("a", b"0123456789" * 100)
    patience = Patience(read_seconds=2, bulk_seconds=0, control_seconds=0, sdk_attempts=1)
    proxy.on("GET", "/a", slowly(0.3))
    assert S3Store(s3.uri, patience=patience).get("a", tmp_path / "a").size == 1000


def test_a_server_that_falls_silent_is_asked_again(s3: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    s3.write("a", b"0123456789")
    impatient = S3Store(s3.uri, patience=Patience(read_seconds=0.5, first_wait=0.01, longest_wait=0.05, sdk_attempts=1))
    proxy.on("GET", "/a", silence(10))
    assert impatient.get("a", tmp_path / "a").size == 10


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(answer(503, "SlowDown", "later"), r"answers SlowDown \(503\) later"), (drop, "breaks off")],
    ids=["503", "reset"],
)
def test_what_does_not_pass_is_temporary_and_named(fault: Fault, reason: str, s3: S3Store, proxy: Proxy) -> None:
    proxy.on("GET", "/a", fault, times=None)
    with pytest.raises(TemporaryFailure, match=f"{s3.uri}/a: cannot be read: .*{reason}"):
        S3Store(s3.uri, patience=IMPATIENT).read("a")


def test_after_the_moment_to_leave_nothing_is_asked_again(s3: S3Store, proxy: Proxy, large: Path) -> None:
    proxy.on("GET|PUT|POST", "/", answer(503, "SlowDown"), times=None)
    s3.hurry(time.monotonic())
    with pytest.raises(TemporaryFailure):
        s3.read("a")
    assert proxy.count("GET") == 1
    with pytest.raises(TemporaryFailure):
        s3.put(large, "large")


def test_a_silent_server_holds_nobody_up_who_has_to_leave(s3: S3Store, proxy: Proxy) -> None:
    patient = S3Store(s3.uri, patience=Patience(connect_seconds=3600, read_seconds=3600, late_seconds=0.5))
    s3.write("a", b"1")
    leave = threading.Event()

    def stall(exchange: Exchange) -> None:
        leave.wait(60)
        exchange.drop()

    proxy.on("GET", "/a", stall, times=None)
    patient.hurry(time.monotonic())
    with pytest.raises(TemporaryFailure, match="falls silent"):
        patient.read("a")
    leave.set()


def test_a_store_that_refuses_conditions_is_told_so(s3: S3Store, proxy: Proxy) -> None:
    proxy.on("PUT", "/a", answer(501, "NotImplemented", "If-None-Match"))
    with pytest.raises(SpecInvalid, match="knows no conditions on writes"):
        s3.write("a", b"1", if_absent=True)


def test_a_wait_is_cut_short_when_it_is_time_to_leave(s3: S3Store, proxy: Proxy) -> None:
    forever = S3Store(
        s3.uri, patience=Patience(first_wait=3600, longest_wait=3600, control_seconds=1e9, sdk_attempts=1)
    )
    asked = threading.Event()

    def fault(exchange: Exchange) -> None:
        answer(503, "SlowDown")(exchange)
        asked.set()

    proxy.on("GET", "/a", fault, times=None)
    failures: list[Exception] = []

    def read() -> None:
        try:
            forever.read("a")
        except TemporaryFailure as error:
            failures.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert asked.wait(60)
    forever.hurry(time.monotonic())
    reader.join(60)
    assert len(failures) == 1


def test_a_transfer_under_way_is_given_up_when_the_time_is_over(s3: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    s3.write("a", b"0123456789")
    begun, leave = threading.Event(), threading.Event()

    def stall(exchange: Exchange) -> None:
        exchange.begin(exchange.forward())
        begun.set()
        leave.wait(60)
        exchange.drop()

    proxy.on("GET", "/a", stall, times=None)
    patient = S3Store(s3.uri, patience=Patience(sdk_attempts=1))
    failures: list[Exception] = []

    def get() -> None:
        try:
            patient.get("a", tmp_path / "to" / "a")
        except TemporaryFailure as error:
            failures.append(error)

    getter = threading.Thread(target=get, daemon=True)
    getter.start()
    assert begun.wait(60)
    patient.hurry(time.monotonic())
    getter.join(60)
    leave.set()
    assert "no time left" in str(failures[0])
    assert list((tmp_path / "to").iterdir()) == []


def test_uploads_that_were_cut_off_are_swept_below_the_prefix_and_nowhere_else(s3: S3Store, weed: Weed) -> None:
    admin = client(weed.url, weed.identities["admin"])
    prefix = s3.uri.removeprefix(f"s3://{BUCKET}/")
    keys = [f"{prefix}/checkpoints/a", f"{prefix}/run/b", f"{prefix}-other/c"]
    for key in keys:
        admin.create_multipart_upload(Bucket=BUCKET, Key=key)
    assert s3.sweep("checkpoints/") == 1
    assert set(keys) & set(unfinished(weed)) == set(keys[1:])
    assert s3.sweep("") == 1
    assert set(keys) & set(unfinished(weed)) == {keys[2]}
    assert s3.sweep("") == 0
    assert S3Store(f"s3://{BUCKET}", patience=QUICK).sweep("") == 0
    assert keys[2] in unfinished(weed)


def test_a_failed_upload_leaves_no_parts_behind(s3: S3Store, proxy: Proxy, large: Path, weed: Weed) -> None:
    proxy.on("PUT", "partNumber=2", answer(400, "EntityTooLarge"), times=None)
    with pytest.raises(Exception, match="EntityTooLarge"):
        s3.put(large, "large")
    assert not [key for key in unfinished(weed) if s3.uri.endswith(key.rpartition("/")[0])]
    assert s3.stat("large") is None


def test_a_listing_shows_thousands_of_objects_and_survives_a_lost_place(s3: S3Store, proxy: Proxy, weed: Weed) -> None:
    keys = [f"many/{number:05d}" for number in range(2500)]
    prefix, admin = s3.uri.removeprefix(f"s3://{BUCKET}/"), client(weed.url, weed.identities["admin"])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: admin.put_object(Bucket=BUCKET, Key=f"{prefix}/{key}"), keys))
    assert [entry.key for entry in s3.list("")] == keys
    assert proxy.count("list-type") >= 3
    proxy.on(
        "GET", "continuation-token", answer(400, "InvalidArgument", "The continuation token provided is incorrect")
    )
    assert len(list(s3.list("many/"))) == 2500


def test_too_little_space_is_said_before_anything_is_brought(s3: S3Store, proxy: Proxy, tmp_path: Path) -> None:
    s3.write("a", b"1")

    def huge(exchange: Exchange) -> None:
        reply = exchange.forward()
        kept = [item for item in reply.headers if item[0].lower() != "content-length"]
        exchange.send(Reply(reply.status, [*kept, ("Content-Length", str(1 << 50))], b""))

    proxy.on("HEAD", "/a", huge)
    with pytest.raises(DiskFailure, match=r"1024\.0 TiB"):
        s3.get("a", tmp_path / "b")
    assert proxy.count("GET") == 0


def test_a_disk_that_fills_up_meanwhile_is_a_disk_failure(s3: S3Store, tmp_path: Path) -> None:
    s3.write("a", bytes(100_000))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from job.storage.s3 import S3Store; from job.errors import DiskFailure\n"
        "S3Store(sys.argv[1]).stat('a')\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n    S3Store(sys.argv[1]).get('a', Path(sys.argv[2]) / 'a')\n"
        "except DiskFailure as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, s3.uri, str(tmp_path / "to")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "cannot be brought here: File too large" in done.stdout, done.stderr
    assert list((tmp_path / "to").iterdir()) == []
