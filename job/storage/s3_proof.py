"""Whether bytes that arrived are an object's own: by what its writer said of them, else by the store's etag."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from job.storage.s3_errors import Damaged

SHA256_KEY = "tunejob-sha256"
"""Metadata under which every write of ours says the SHA-256 of its bytes."""
CHUNK_BYTES = 1 << 20

_MD5 = re.compile(r"(?P<digest>[0-9a-f]{32})(-(?P<parts>[1-9][0-9]*))?")


def told(answer: Mapping[str, Any]) -> str | None:
    """The SHA-256 that the writer of an object sent with it; objects of other programs have none."""
    return {name.lower(): value for name, value in answer.get("Metadata", {}).items()}.get(SHA256_KEY)


def compare(answer: Mapping[str, Any], sha256: str) -> None:
    """Raises Damaged if the bytes are not those that the writer of an object sent; others' objects do not say."""
    if told(answer) not in (None, sha256):
        raise Damaged("SHA-256 is not what the writer sent")


def parts_of(etag: str) -> int:
    """How many parts an object was written in, as its etag says: 0 for one that was written whole."""
    match = _MD5.fullmatch(etag)
    return int(match["parts"] or 0) if match else 0


def is_md5_of(etag: str, path: Path, part_bytes: int) -> bool:
    """Whether an etag is the MD5 of a file: most stores make it so, unless they encrypt.

    An object of several parts has the MD5 of their MD5s, and their number behind a hyphen.

    Args:
        part_bytes: size of every part but the last; without meaning for an object that was written whole.
    """
    match = _MD5.fullmatch(etag)
    if match is None:
        return False
    size = path.stat().st_size
    if not match["parts"]:
        return bool(_digests(path, max(1, size))[-1].hex() == match["digest"])
    if part_bytes < 1 or -(-size // part_bytes) != int(match["parts"]):
        return False
    of_parts = hashlib.md5(b"".join(_digests(path, part_bytes)), usedforsecurity=False)
    return of_parts.hexdigest() == match["digest"]


def _digests(path: Path, part_bytes: int) -> list[bytes]:
    """MD5 of every part of a file; of one part if it is empty."""
    found: list[bytes] = []
    with path.open("rb") as stream:
        while True:
            digest, left = hashlib.md5(usedforsecurity=False), part_bytes
            while left and (chunk := stream.read(min(left, CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
            if left < part_bytes or not found:
                found.append(digest.digest())
            if left:
                return found
