"""The connection to S3: read from the environment, one client per process, made anew when credentials were rotated.

This module and its neighbours ``s3_move`` and ``s3_errors`` alone know botocore and s3transfer, of which boto3 is made.
"""

import base64
import hashlib
import ipaddress
import logging
import os
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.loaders import create_loader
from s3transfer.manager import TransferConfig, TransferManager

from job.errors import SpecInvalid
from job.storage.store import checked

ADDRESSING_VARIABLE = "TUNEJOB_S3_ADDRESSING"
PART_BYTES = 16 << 20
"""Of what is larger, parts travel beside each other; s3transfer doubles it until 10,000 parts suffice."""
PART_THREADS = 8
POOL = PART_THREADS + 12
"""Connections: one for each thread that moves parts, and for those of the run that ask something."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIXES = ("AWS_", "TUNEJOB_S3_")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")
_CHATTY = ("boto3", "botocore", "s3transfer", "urllib3")


@dataclass(frozen=True)
class Location:
    """Where a store lies."""

    bucket: str
    prefix: str
    """Empty, or ends in '/'."""

    def pair(self, key: str) -> tuple[str, str]:
        """Bucket and whole key of an object below the prefix. Raises IntegrityFailure if it would leave that."""
        return self.bucket, self.prefix + checked(key)

    def at(self, key: str) -> dict[str, str]:
        """The same as arguments of a client's call."""
        return dict(zip(("Bucket", "Key"), self.pair(key), strict=True))


def parse(uri: str) -> Location:
    """Bucket and prefix of ``s3://BUCKET/PREFIX``.

    Raises:
        SpecInvalid: naming what is wrong with it; a bucket's name is not repeated, it may be a key by mistake.
    """
    text = uri.removeprefix("s3://")
    bucket, _, prefix = text.partition("/")
    if text == uri or not bucket:
        raise SpecInvalid(f"{uri.split('@')[-1]}: names no bucket; an address is s3://BUCKET/PREFIX")
    if not _BUCKET.fullmatch(bucket) or ".." in bucket:
        raise SpecInvalid(
            f"s3://.../{prefix.rpartition('@')[2]}: the bucket's name is none: 3 to 63 small letters, digits, '-' and "
            "'.', without credentials and without a region"
        )
    parts = prefix.removesuffix("/").split("/") if prefix else []
    for part in parts:
        if part in ("", ".", "..") or "\\" in part or not part.isprintable():
            raise SpecInvalid(f"{uri!r}: the part {part!r} of the prefix is no name; take out '//', '.', '..' and '\\'")
    return Location(bucket, "".join(f"{part}/" for part in parts))


@dataclass(frozen=True)
class Link:
    """A client and what goes with it, all from one reading of credentials and settings."""

    client: Any
    transfers: TransferManager
    options: Mapping[str, str]
    """Arguments of every write: the checksum, where the store is asked to compare one."""
    endpoint: str
    """HOST:PORT."""
    is_custom: bool
    """Another store than Amazon's."""
    session: Any = field(repr=False)
    _conditions: dict[tuple[str, str], Mapping[str, str]] = field(default_factory=dict, repr=False)

    @contextmanager
    def on_condition(self, place: tuple[str, str], condition: Mapping[str, str]) -> Iterator[None]:
        """While the block runs, the object at bucket and key is written on a condition (IfNoneMatch, IfMatch).

        s3transfer, which moves large files, does not pass conditions on.
        """
        self._conditions[place] = condition
        try:
            yield
        finally:
            self._conditions.pop(place, None)

    def masked(self, text: str) -> str:
        """The text without our credentials: of the key's id the first and last letters are left."""
        with suppress(Exception):  # whatever hinders reading credentials again: they are in no message then
            found = self.session.get_credentials().get_frozen_credentials()
            for secret in filter(None, (found.secret_key, found.token)):
                text = text.replace(secret, "***")
            text = text.replace(found.access_key, mask(found.access_key))
        return re.sub(r"\b(A[KS]IA[A-Z0-9]{2})[A-Z0-9]{8,}", r"\1...", text)

    def key_id(self) -> str:
        """The masked id of the key in use; empty if there is none."""
        with suppress(Exception):
            return mask(self.session.get_credentials().access_key)
        return ""


def mask(key_id: str) -> str:
    """Enough of a key's id to tell it from another."""
    return f"{key_id[:4]}...{key_id[-2:]}" if len(key_id) >= 12 else f"{key_id[:2]}..."


_lock = threading.Lock()
_loader = create_loader()
"""Kept, so that a second client is made in a tenth of the time."""
_current: tuple[object, Link] | None = None


def connection(
    connect_seconds: float,
    read_seconds: float,
    attempts: int,
    *,
    instead_of: Link | None = None,
    settings: Mapping[str, str] = MappingProxyType({}),
) -> Link:
    """This process's connection, made on first use, after a fork and whenever the settings change.

    Args:
        connect_seconds, read_seconds: until a server that is silent is given up.
        attempts: that boto3 makes by itself.
        instead_of: one that was refused; if it is still the current one, credentials are read again.
        settings: values of environment variables (endpoint, region, addressing, checksums) that win over the
            environment's; credentials and certificates are always the environment's.

    Raises:
        SpecInvalid: a setting cannot be used.
    """
    global _current
    timing = (connect_seconds, read_seconds, attempts)
    wanted = (os.getpid(), timing, _settings(), frozenset(settings.items()))
    with _lock:
        if _current is None or _current[0] != wanted or _current[1] is instead_of:
            _current = (wanted, _connect(*timing, {**os.environ, **settings}))
        return _current[1]


def _settings() -> frozenset[tuple[str, str]]:
    names = (name for name in os.environ if name.startswith(_PREFIXES) or name in _PROXIES)
    return frozenset((name, os.environ[name]) for name in names)


def _connect(connect_seconds: float, read_seconds: float, attempts: int, environment: Mapping[str, str]) -> Link:
    for name in _CHATTY:  # at DEBUG they write credentials down
        logging.getLogger(name).setLevel(logging.WARNING)
    endpoint = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if endpoint:
        _require_plausible(endpoint)
    _require_files()
    session = botocore.session.get_session()
    session.register_component("data_loader", _loader)
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "false":
        session.get_component("credential_provider").remove("iam-role")  # nobody asked for the node's own rights
    try:
        config = _config(environment, is_custom=bool(endpoint)).merge(
            Config(
                connect_timeout=connect_seconds,
                read_timeout=read_seconds,
                retries={"mode": "standard", "total_max_attempts": attempts},
            )
        )
        region = environment.get("AWS_REGION") or session.get_config_variable("region")
        region = region or ("us-east-1" if endpoint else None)
        client = session.create_client("s3", region_name=region, endpoint_url=endpoint, config=config)
    except ValueError as error:
        raise SpecInvalid(
            f"the store's settings cannot be used: {error}; check AWS_ENDPOINT_URL_S3 and AWS_REGION"
        ) from error
    checks = client.meta.config.request_checksum_calculation == "when_supported"
    if not checks:
        for operation in ("PutObject", "UploadPart"):
            client.meta.events.register(f"before-call.s3.{operation}", _add_md5)
    conditions: dict[tuple[str, str], Mapping[str, str]] = {}
    for operation in ("PutObject", "CompleteMultipartUpload"):
        client.meta.events.register(f"provide-client-params.s3.{operation}", partial(_add_condition, conditions))
    return Link(
        client=client,
        transfers=TransferManager(client, _transfers()),
        options={"ChecksumAlgorithm": "SHA256"} if checks else {},
        endpoint=_host_and_port(client.meta.endpoint_url),
        is_custom=bool(endpoint),
        session=session,
        _conditions=conditions,
    )


def _add_condition(
    conditions: Mapping[tuple[str, str], Mapping[str, str]], params: Mapping[str, Any], **_: Any
) -> dict[str, Any]:
    """The arguments of a write, its condition among them."""
    return {**params, **conditions.get((params["Bucket"], params["Key"]), {})}


def _config(environment: Mapping[str, str], *, is_custom: bool) -> Config:
    addressing = environment.get(ADDRESSING_VARIABLE) or ("path" if is_custom else "auto")
    if addressing not in ("path", "virtual", "auto"):
        raise SpecInvalid(f"{ADDRESSING_VARIABLE}={addressing!r}: one of path, virtual and auto is known")
    # Other stores may not know Amazon's newer checksums. A signed payload and an MD5 serve there: what was altered on
    # the way is refused, over TLS too.
    checksums: dict[str, str] = {}
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        if wanted := environment.get(f"AWS_{name.upper()}") or ("when_required" if is_custom else ""):
            checksums[name] = wanted
    return Config(
        max_pool_connections=POOL,
        tcp_keepalive=True,
        user_agent_extra="tunejob",
        s3={"addressing_style": addressing} | ({"payload_signing_enabled": True} if is_custom else {}),
        **checksums,
    )


def _add_md5(params: dict[str, Any], **_: Any) -> None:
    """Gives a write the one checksum that every S3 compares: some do not look at the SHA-256 that was signed."""
    body, digest = params["body"], hashlib.md5(usedforsecurity=False)
    if isinstance(body, bytes):
        digest.update(body)
    else:
        start = body.tell()
        while chunk := body.read(1 << 20):
            digest.update(chunk)
        body.seek(start)
    params["headers"]["Content-MD5"] = base64.b64encode(digest.digest()).decode()


def _transfers() -> TransferConfig:
    # The queue of what is to be written to disk bounds the memory: 64 pieces of 256 KiB.
    return TransferConfig(
        multipart_threshold=PART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_request_concurrency=PART_THREADS,
        max_io_queue_size=64,
    )


def _require_files() -> None:
    """Raises SpecInvalid where the bundle of authorities is named and not there."""
    bundle = os.environ.get("AWS_CA_BUNDLE")
    if bundle and not os.path.isfile(bundle):
        raise SpecInvalid(f"AWS_CA_BUNDLE={bundle}: no such file; mount the authorities' certificates there")


def _require_plausible(endpoint: str) -> None:
    """Raises SpecInvalid if the endpoint is no address, or one where machines keep their own credentials."""
    shown = "" if "@" in endpoint else f"={endpoint}"  # what stands before an @ may be a key
    try:
        parts = urlsplit(endpoint)
        host, scheme, _ = parts.hostname, parts.scheme, parts.port
    except ValueError:
        host, scheme = None, ""
    if "@" in endpoint:
        raise SpecInvalid("AWS_ENDPOINT_URL_S3: carries credentials; they belong into a Secret")
    if scheme not in ("http", "https") or not host:
        raise SpecInvalid(f"AWS_ENDPOINT_URL_S3{shown}: no address of a store; it is https://HOST:PORT")
    addresses = []
    with suppress(OSError):  # a name that cannot be resolved now is asked for again when the store is
        addresses = [str(item[4][0]) for item in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    if any(_is_link_local(address) for address in addresses):
        raise SpecInvalid(
            f"AWS_ENDPOINT_URL_S3={endpoint}: a link-local address; machines serve their own credentials there, and "
            "no store"
        )


def _is_link_local(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_link_local


def _host_and_port(url: str) -> str:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{host}:{parts.port or (80 if parts.scheme == 'http' else 443)}"
