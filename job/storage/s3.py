"""A store that is a prefix of an S3 bucket.

Every write carries the SHA-256 of its bytes as metadata, so that what is read back proves itself whatever lies between.
"""

import hashlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from botocore import exceptions as sdk
from s3transfer.exceptions import CancelledError
from s3transfer.subscribers import BaseSubscriber

from job.errors import IntegrityFailure, JobError, SpecInvalid
from job.files import FileEntry
from job.storage.s3_ask import HASTY, Asker, Patience
from job.storage.s3_client import Link, parse
from job.storage.s3_errors import Absent, Damaged, Question
from job.storage.store import Entry, PreconditionFailed, checked, install, is_key, require_space, size_text, translated

__all__ = ["HASTY", "S3Store"]

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
SMALL_BYTES = 4 << 20
"""What is not larger travels out of memory, as it was at one moment."""
CONTROL_BYTES = 64 << 20
"""A control object that is larger is none of ours."""

_SHA256 = "tunejob-sha256"
_TICK_SECONDS = 0.2


class S3Store:
    """What ``s3://BUCKET/PREFIX`` names. Any number of threads may use it."""

    def __init__(
        self, uri: str, *, patience: Patience | None = None, settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Nothing is asked yet.

        Args:
            settings: see ``job.storage.s3_client.connection``.

        Raises:
            SpecInvalid: the URI names no place in S3.
        """
        self.uri = uri
        location = parse(uri)
        self._bucket, self._prefix = location.bucket, location.prefix
        self._asker = Asker(patience or Patience(), settings)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def get(self, key: str, to: Path) -> FileEntry:
        question = self._about(key, "cannot be brought here", to.parent)
        return self._asker.ask(question, lambda link: self._fetch(link, key, to), is_bulk=True)

    def put(self, path: Path, key: str) -> FileEntry:
        question = self._about(key, "cannot be written", path.parent)
        with translated(f"{path}: cannot be read", path.parent):
            before = path.stat().st_mtime_ns
            entry, data = _snapshot(path, key)
        self._asker.ask(question, lambda link: self._send(link, path, entry, data), is_bulk=True)
        with translated(f"{path}: cannot be read", path.parent):
            # What was only added to, as a log is, was sent as it stood at first.
            if data is None and path.stat().st_mtime_ns != before and _digest(path, entry.size) != entry.sha256:
                raise IntegrityFailure(f"{path}: changed while it was sent to {self.uri}")
        return entry

    def read(self, key: str) -> tuple[bytes, str] | None:
        def read(link: Link) -> tuple[bytes, str]:
            answer = link.client.get_object(**self._at(key))
            with closing(answer["Body"]) as body:
                if answer["ContentLength"] > CONTROL_BYTES:
                    size = size_text(answer["ContentLength"])
                    raise IntegrityFailure(f"{self._name(key)}: {size}, which is too large for a file of a run's own")
                data: bytes = body.read()
            _compare(answer, hashlib.sha256(data).hexdigest())
            return data, _etag(answer)

        try:
            return self._asker.ask(self._about(key, "cannot be read"), read)
        except Absent:
            return None

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        metadata = {_SHA256: hashlib.sha256(data).hexdigest()}
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        if if_match is not None:
            condition["IfMatch"] = f'"{if_match}"'

        def write(link: Link) -> str:
            arguments = {**self._at(key), **condition, **link.options}
            return _etag(link.client.put_object(Body=data, Metadata=metadata, **arguments))

        try:
            return self._asker.ask(self._about(key, "cannot be written"), write)
        except Absent as error:  # so some stores say that what If-Match names is gone; others answer 412
            raise PreconditionFailed(f"{self._name(key)}: is gone meanwhile") from error
        except SpecInvalid as error:
            if not condition:
                raise
            raise SpecInvalid(
                f"{error}; or else it knows no conditions on writes (If-None-Match, If-Match), by which one attempt at "
                "a time owns a run"
            ) from error

    def list(self, prefix: str) -> Iterator[Entry]:
        entries = self._listing(self._prefix + prefix)
        for key in sorted(entries):
            name = key.removeprefix(self._prefix)
            if is_key(name):
                yield Entry(name, *entries[key])
            elif not name.endswith("/"):
                log.debug("%s: an object of the name %r is left out", self.uri, name)

    def stat(self, key: str) -> Entry | None:
        try:
            head = self._asker.ask(self._about(key, "cannot be looked at"), lambda link: self._head(link, key))
        except Absent:
            return None
        return Entry(key, head["ContentLength"], _etag(head))

    def delete(self, key: str) -> None:
        try:
            self._asker.ask(
                self._about(key, "cannot be deleted"), lambda link: link.client.delete_object(**self._at(key))
            )
        except Absent:
            return

    def sweep(self, prefix: str) -> int:
        below = self._prefix + prefix
        question = self._about(prefix, "uploads that were cut off cannot be cleared away")
        if not below:  # a whole bucket is never ours alone
            return 0
        try:
            uploads = self._asker.ask(question, lambda link: self._unfinished(link, below))
            for upload in uploads:
                self._asker.ask(question, partial(_abort, upload))
        except JobError as error:  # they cost a little space; a rule of the bucket can clear them away as well
            log.warning("%s", error)
            return 0
        return len(uploads)

    def digest(self, key: str) -> FileEntry:
        found: list[FileEntry] = []

        def read(link: Link) -> FileEntry:
            answer = link.client.get_object(**self._at(key))
            digest, size = hashlib.sha256(), 0
            with closing(answer["Body"]) as body:
                for chunk in body.iter_chunks(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
            found.append(FileEntry(key, size, digest.hexdigest()))
            if found[-2:-1] != found[-1:]:  # twice the same: they are stored so, nothing changed on the way
                _compare(answer, found[-1].sha256)
            return found[-1]

        return self._asker.ask(self._about(key, "cannot be read"), read, is_bulk=True)

    def hurry(self, until: float) -> None:
        self._asker.hurry(until)

    # What is asked once, and may fail

    def _fetch(self, link: Link, key: str, to: Path) -> FileEntry:
        head = self._head(link, key)
        size: int = head["ContentLength"]
        require_space(to.parent, size, self._name(key))

        def fill(out: BinaryIO) -> FileEntry:
            if size:
                known = _Known(size, head.get("ETag"))
                self._move(link.transfers.download(*self._place(key), out, subscribers=[known]), known)
            out.flush()
            arrived = os.fstat(out.fileno()).st_size
            if arrived != size:
                raise Damaged(f"{arrived} bytes arrive instead of {size}")
            entry = FileEntry(key, size, _digest(Path(out.name), size))
            _compare(head, entry.sha256)
            return entry

        return install(to, fill)

    def _send(self, link: Link, path: Path, entry: FileEntry, data: bytes | None) -> None:
        arguments = {"Metadata": {_SHA256: entry.sha256}, **link.options}
        if data is not None:
            link.client.put_object(**self._at(entry.name), Body=data, **arguments)
        else:
            known = _Known(entry.size)
            place = self._place(entry.name)
            self._move(link.transfers.upload(str(path), *place, extra_args=arguments, subscribers=[known]), known)
        head = self._head(link, entry.name)
        if head["ContentLength"] != entry.size:
            raise Damaged(f"{head['ContentLength']} bytes are there after {entry.size} were sent")
        _compare(head, entry.sha256)

    def _move(self, transfer: Any, known: "_Known") -> None:
        """Returns when all parts have moved; gives up when it is time to leave."""
        while not known.done.wait(_TICK_SECONDS):
            if self._asker.is_late():
                transfer.cancel()
                raise CancelledError
        transfer.result()

    def _head(self, link: Link, key: str) -> Any:
        try:
            return link.client.head_object(**self._at(key))
        except sdk.ClientError as error:
            # This answer has no body. The same question with one tells why, and whether there is a bucket at all.
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in (400, 403):
                link.client.get_object(**self._at(key), Range="bytes=0-0")["Body"].close()
            if status == 404 and not self._asker.was_granted:
                link.client.list_objects_v2(Bucket=self._bucket, MaxKeys=1)
            raise

    def _listing(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Size and etag of every object, by its whole key."""
        question = self._about(prefix.removeprefix(self._prefix), "cannot be listed")
        found: dict[str, tuple[int, str]] = {}
        more: dict[str, str] = {}
        begun_anew = False
        while True:
            try:
                page = self._asker.ask(question, partial(_page, {"Bucket": self._bucket, "Prefix": prefix, **more}))
            except SpecInvalid:
                if not more or begun_anew:
                    raise
                found, more, begun_anew = {}, {}, True  # the place where it was to go on is no longer known there
                continue
            found |= {item["Key"]: (item["Size"], _etag(item)) for item in page.get("Contents", ())}
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not token:
                return found
            more = {"ContinuationToken": token}

    def _unfinished(self, link: Link, prefix: str) -> Sequence[dict[str, str]]:
        pages = link.client.get_paginator("list_multipart_uploads").paginate(Bucket=self._bucket, Prefix=prefix)
        found = [upload for page in pages for upload in page.get("Uploads", ())]
        ours = [upload for upload in found if upload["Key"].startswith(prefix)]
        return [{"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]} for upload in ours]

    def _about(self, key: str, problem: str, folder: Path = Path()) -> Question:
        return Question(f"{self._name(key)}: {problem}", self._bucket, folder)

    def _name(self, key: str) -> str:
        return f"{self.uri.rstrip('/')}/{key}"

    def _place(self, key: str) -> tuple[str, str]:
        return self._bucket, self._prefix + checked(key)

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + checked(key)}


class _Known(BaseSubscriber):  # type: ignore[misc]
    """What is known of a transfer before it begins, and when it is over."""

    def __init__(self, size: int, etag: str | None = None) -> None:
        self._size, self._etag = size, etag
        self.done = threading.Event()

    def on_queued(self, future: Any, **_: Any) -> None:
        """Spares a question, and holds every part to the same version of the object."""
        future.meta.provide_transfer_size(self._size)
        future.meta.provide_object_etag(self._etag)

    def on_done(self, **_: Any) -> None:
        """Lets go of whoever waits."""
        self.done.set()


def _snapshot(path: Path, key: str) -> tuple[FileEntry, bytes | None]:
    """Size and hash of a file as it stands, and its bytes if they are few."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > SMALL_BYTES:
            return FileEntry(key, size, _digest(path, size)), None
        data = stream.read(size)
    return FileEntry(key, len(data), hashlib.sha256(data).hexdigest()), data


def _digest(path: Path, size: int) -> str:
    """SHA-256 of a file's first bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while size and (chunk := stream.read(min(size, CHUNK_BYTES))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def _compare(answer: Mapping[str, Any], sha256: str) -> None:
    """Raises Damaged if the bytes are not those that the writer of an object sent; others' objects do not say."""
    told = {name.lower(): value for name, value in answer.get("Metadata", {}).items()}.get(_SHA256)
    if told is not None and told != sha256:
        raise Damaged("SHA-256 is not what the writer sent")


def _page(asked: Mapping[str, str], link: Link) -> Any:
    return link.client.list_objects_v2(**asked)


def _abort(upload: Mapping[str, str], link: Link) -> None:
    with suppress(link.client.exceptions.NoSuchUpload):  # it was completed, or aborted, meanwhile
        link.client.abort_multipart_upload(**upload)


def _etag(answer: Mapping[str, Any]) -> str:
    return str(answer.get("ETag", "")).strip('"')
