"""A store that is a prefix of an S3 bucket.

Every write carries the SHA-256 of its bytes as metadata, so that what is read back proves itself whatever lies between.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from job.errors import IntegrityFailure, JobError, SpecInvalid
from job.files import FileEntry
from job.storage.s3_ask import HASTY, Asker, Patience
from job.storage.s3_client import Link, parse
from job.storage.s3_errors import Absent, Question
from job.storage.s3_move import Mover, Snapshot, etag_of
from job.storage.s3_proof import SHA256_KEY, compare, told
from job.storage.store import Entry, PreconditionFailed, is_key, size_text, translated

__all__ = ["HASTY", "S3Store"]

log = logging.getLogger(__name__)

CONTROL_BYTES = 64 << 20
"""A control object that is larger is none of ours."""


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
        self._location = parse(uri)
        self._bucket, self._prefix = self._location.bucket, self._location.prefix
        self._asker = Asker(patience or Patience(), settings)
        self._mover = Mover(self._location, self._asker)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def get(self, key: str, to: Path) -> FileEntry:
        question = self._about(key, "cannot be brought here", to.parent)
        return self._asker.ask(question, lambda link: self._mover.fetch(link, key, to, self._name(key)), is_bulk=True)

    def put(self, path: Path, key: str, *, if_absent: bool = False, if_match: str | None = None) -> FileEntry:
        question = self._about(key, "cannot be written", path.parent)
        with translated(f"{path}: cannot be read", path.parent):
            file = Snapshot.of(path, key)

        def send(condition: Mapping[str, str]) -> None:
            self._asker.ask(question, lambda link: self._mover.send(link, file, condition), is_bulk=True)

        condition = _condition(if_absent, if_match)
        try:
            with self._promised(key):
                send(condition)
        except PreconditionFailed:
            if not self._holds(file.entry):  # else an earlier try landed, and only its reply was lost
                raise
        except SpecInvalid as error:
            if not condition or file.data is not None:
                raise
            log.warning("%s: sent without a condition: not every store knows them on large objects (%s)", key, error)
            send({})
        with translated(f"{path}: cannot be read", path.parent):
            if not file.is_what_was_sent():
                raise IntegrityFailure(f"{path}: changed while it was sent to {self.uri}")
        return file.entry

    def read(self, key: str) -> tuple[bytes, str] | None:
        def read(link: Link) -> tuple[bytes, str]:
            answer = link.client.get_object(**self._location.at(key))
            with closing(answer["Body"]) as body:
                if answer["ContentLength"] > CONTROL_BYTES:
                    size = size_text(answer["ContentLength"])
                    raise IntegrityFailure(f"{self._name(key)}: {size}, which is too large for a file of a run's own")
                data: bytes = body.read()
            compare(answer, hashlib.sha256(data).hexdigest())
            return data, etag_of(answer)

        try:
            return self._asker.ask(self._about(key, "cannot be read"), read)
        except Absent:
            return None

    def write(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        metadata = {SHA256_KEY: hashlib.sha256(data).hexdigest()}
        condition = _condition(if_absent, if_match)

        def write(link: Link) -> str:
            arguments = {**self._location.at(key), **condition, **link.options}
            return etag_of(link.client.put_object(Body=data, Metadata=metadata, **arguments))

        try:
            with self._promised(key):
                return self._asker.ask(self._about(key, "cannot be written"), write)
        except SpecInvalid as error:
            if not condition:
                raise
            raise SpecInvalid(
                f"{error}; or else it knows no conditions on writes (If-None-Match, If-Match), by which one attempt at "
                "a time owns a run"
            ) from error

    @contextmanager
    def _promised(self, key: str) -> Iterator[None]:
        """For a write on a condition: so some stores say that what If-Match names is gone; others answer 412."""
        try:
            yield
        except Absent as error:
            raise PreconditionFailed(f"{self._name(key)}: is gone meanwhile") from error

    def _holds(self, entry: FileEntry) -> bool:
        """Whether an object is there that its writer sent with these bytes."""
        try:
            head = self._asker.ask(
                self._about(entry.name, "cannot be looked at"), lambda link: self._mover.head(link, entry.name)
            )
        except Absent:
            return False
        return bool(head["ContentLength"] == entry.size and told(head) == entry.sha256)

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
            head = self._asker.ask(self._about(key, "cannot be looked at"), lambda link: self._mover.head(link, key))
        except Absent:
            return None
        return Entry(key, head["ContentLength"], etag_of(head))

    def delete(self, key: str) -> None:
        try:
            self._asker.ask(
                self._about(key, "cannot be deleted"), lambda link: link.client.delete_object(**self._location.at(key))
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
            answer, entry = self._mover.read_through(link, key)
            found.append(entry)
            if found[-2:-1] != found[-1:]:  # twice the same: they are stored so, nothing changed on the way
                compare(answer, entry.sha256)
            return entry

        return self._asker.ask(self._about(key, "cannot be read"), read, is_bulk=True)

    def hurry(self, until: float) -> None:
        self._asker.hurry(until)

    # What is asked once, and may fail

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
            found |= {item["Key"]: (item["Size"], etag_of(item)) for item in page.get("Contents", ())}
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


def _condition(if_absent: bool, if_match: str | None) -> dict[str, str]:
    """How S3 is told the condition of a write."""
    condition = {"IfNoneMatch": "*"} if if_absent else {}
    return condition if if_match is None else {**condition, "IfMatch": f'"{if_match}"'}


def _page(asked: Mapping[str, str], link: Link) -> Any:
    return link.client.list_objects_v2(**asked)


def _abort(upload: Mapping[str, str], link: Link) -> None:
    with suppress(link.client.exceptions.NoSuchUpload):  # it was completed, or aborted, meanwhile
        link.client.abort_multipart_upload(**upload)
