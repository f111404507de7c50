"""Moving one object's bytes to and from S3; everything here is tried once, and ``job.storage.s3`` asks again."""

import hashlib
import os
import threading
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from botocore import exceptions as sdk
from s3transfer.exceptions import CancelledError
from s3transfer.subscribers import BaseSubscriber

from job.files import FileEntry
from job.storage.s3_ask import Asker
from job.storage.s3_client import Link, Location
from job.storage.s3_errors import Damaged
from job.storage.s3_proof import CHUNK_BYTES, SHA256_KEY, compare, is_md5_of, parts_of, told
from job.storage.store import install, require_space

SMALL_BYTES = 4 << 20
"""What is not larger travels out of memory, as it was at one moment."""

_TICK_SECONDS = 0.2


@dataclass(frozen=True)
class Snapshot:
    """A file as it stood when it was first looked at."""

    path: Path
    entry: FileEntry
    data: bytes | None
    """Its bytes, if they are few."""
    _written: int

    @classmethod
    def of(cls, path: Path, key: str) -> "Snapshot":
        """Of a file that goes under a key."""
        with path.open("rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_size > SMALL_BYTES:
                sha256 = _digest(path, status.st_size)
                return cls(path, FileEntry(key, status.st_size, sha256), None, status.st_mtime_ns)
            data = stream.read(status.st_size)
        entry = FileEntry(key, len(data), hashlib.sha256(data).hexdigest())
        return cls(path, entry, data, status.st_mtime_ns)

    def is_what_was_sent(self) -> bool:
        """Whether the bytes that went are those described. What was only added to, as a log is, went as it stood."""
        if self.data is not None or self.path.stat().st_mtime_ns == self._written:
            return True
        return _digest(self.path, self.entry.size) == self.entry.sha256


class Mover:
    """Moves the objects of one place."""

    def __init__(self, location: Location, asker: Asker) -> None:
        self._location, self._asker = location, asker

    def fetch(self, link: Link, key: str, to: Path, name: str) -> FileEntry:
        """Brings an object here, proven.

        Args:
            name: the user's, for messages.
        """
        head = self.head(link, key)
        size: int = head["ContentLength"]
        require_space(to.parent, size, name)

        def fill(out: BinaryIO) -> FileEntry:
            if size:
                known = _Known(size, head.get("ETag"))
                self._move(link.transfers.download(*self._location.pair(key), out, subscribers=[known]), known)
            out.flush()
            arrived = os.fstat(out.fileno()).st_size
            if arrived != size:
                raise Damaged(f"{arrived} bytes arrive instead of {size}")
            entry = FileEntry(key, size, _digest(Path(out.name), size))
            self._prove(link, head, Path(out.name), entry)
            return entry

        return install(to, fill)

    def _prove(self, link: Link, head: Mapping[str, Any], path: Path, entry: FileEntry) -> None:
        """Raises Damaged if what arrived is not the object: S3's own clients take altered bytes for good.

        An object of ours says its SHA-256. Another program's is known by an etag that is an MD5, else read once more:
        what changes on the way does not do so twice alike.
        """
        compare(head, entry.sha256)
        if told(head) is not None or is_md5_of(etag_of(head), path, self._part_bytes(link, head, entry.name)):
            return
        if self.read_through(link, entry.name)[1].sha256 != entry.sha256:
            raise Damaged("two readings differ")

    def _part_bytes(self, link: Link, head: Mapping[str, Any], key: str) -> int:
        """Size of the first part of an object that was written in several; 0 if that is not known."""
        if not parts_of(etag_of(head)):
            return 0
        with suppress(sdk.ClientError):  # not every store knows parts once they are one object
            return int(link.client.head_object(**self._location.at(key), PartNumber=1)["ContentLength"])
        return 0

    def read_through(self, link: Link, key: str) -> tuple[Mapping[str, Any], FileEntry]:
        """The store's answer, and size and hash of the bytes, which are not kept."""
        answer = link.client.get_object(**self._location.at(key))
        digest, size = hashlib.sha256(), 0
        with closing(answer["Body"]) as body:
            for chunk in body.iter_chunks(CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                if self._asker.is_late():
                    raise CancelledError
        return answer, FileEntry(key, size, digest.hexdigest())

    def send(self, link: Link, file: "Snapshot", condition: Mapping[str, str]) -> None:
        """Sends a file, and sees that it is there."""
        entry = file.entry
        arguments = {"Metadata": {SHA256_KEY: entry.sha256}, **link.options}
        if file.data is not None:
            link.client.put_object(**self._location.at(entry.name), Body=file.data, **condition, **arguments)
        else:
            known = _Known(entry.size)
            place = self._location.pair(entry.name)
            with link.on_condition(place, condition):
                sent = link.transfers.upload(str(file.path), *place, extra_args=arguments, subscribers=[known])
                self._move(sent, known)
        head = self.head(link, entry.name)
        if head["ContentLength"] != entry.size:
            raise Damaged(f"{head['ContentLength']} bytes are there after {entry.size} were sent")
        compare(head, entry.sha256)

    def _move(self, transfer: Any, known: "_Known") -> None:
        """Returns when all parts have moved; gives up when it is time to leave."""
        while not known.done.wait(_TICK_SECONDS):
            if self._asker.is_late():
                transfer.cancel()
                raise CancelledError
        transfer.result()

    def head(self, link: Link, key: str) -> Any:
        """What the store says of an object."""
        try:
            return link.client.head_object(**self._location.at(key))
        except sdk.ClientError as error:
            # This answer has no body. The same question with one tells why, and whether there is a bucket at all.
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            if status in (400, 403):
                link.client.get_object(**self._location.at(key), Range="bytes=0-0")["Body"].close()
            if status == 404 and not self._asker.was_granted:
                link.client.list_objects_v2(Bucket=self._location.bucket, MaxKeys=1)
            raise


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


def _digest(path: Path, size: int) -> str:
    """SHA-256 of a file's first bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while size and (chunk := stream.read(min(size, CHUNK_BYTES))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()


def etag_of(answer: Mapping[str, Any]) -> str:
    """The etag in an answer."""
    return str(answer.get("ETag", "")).strip('"')
