"""What a refusal of S3 means for the run, and whether asking again may help."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import Enum
from pathlib import Path
from typing import Any

from botocore import exceptions as sdk
from botocore.parsers import ResponseParserError
from s3transfer import exceptions as moving

from job.errors import (
    AccessDenied,
    DiskFailure,
    InputMissing,
    IntegrityFailure,
    JobError,
    SpecInvalid,
    TemporaryFailure,
)
from job.storage.s3_client import Link
from job.storage.store import PreconditionFailed, foreseen


class Absent(InputMissing):
    """The bucket answered; the object is proven not to be there."""


class Damaged(Exception):
    """Bytes that arrived are not those that were sent."""


class Hope(Enum):
    """Whether the same question may be answered otherwise."""

    NONE = "none"
    LATER = "it may pass"
    DAMAGED = "bytes changed on the way"
    REFUSED = "with other credentials, or once the rights are known everywhere"


@dataclass(frozen=True)
class Verdict:
    """A failure, understood."""

    error: JobError
    hope: Hope = Hope.NONE


WAYS = (
    "mount a Secret's file and name it in AWS_SHARED_CREDENTIALS_FILE, or set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or give the pod the cloud's own identity (IRSA or another web identity, Pod Identity)"
)

ACTIONS = {
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "ListObjectsV2": "s3:ListBucket",
    "DeleteObject": "s3:DeleteObject",
}
"""What a policy calls the right to do it."""

_PASSING = {
    "SlowDown",
    "ServiceUnavailable",
    "InternalError",
    "RequestTimeout",
    "RequestLimitExceeded",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "ConditionalRequestConflict",
    "OperationAborted",
    "IncompleteBody",
    "NoSuchUpload",
}
_DAMAGED = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
_KEYS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "InvalidToken",
    "TokenRefreshRequired",
    "ExpiredToken",
    "ExpiredTokenException",
    "AuthFailure",
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "NotSignedUp",
}
_ELSEWHERE = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
}
_UNKNOWN = {"NotImplemented", "MissingContentMD5", "InvalidRequest", "InvalidArgument"}
_WRONG = {
    "InvalidBucketName",
    "KeyTooLongError",
    "EntityTooLarge",
    "MethodNotAllowed",
    "InvalidURI",
    "InvalidStorageClass",
}
_FULL = re.compile(r"Quota|StorageFull|InsufficientStorage")
_UNTRUSTED = re.compile(
    r"CERTIFICATE_VERIFY_FAILED|WRONG_VERSION_NUMBER|doesn't match|UNKNOWN_PROTOCOL|certificate", re.IGNORECASE
)
_UNRESOLVED = re.compile(r"resol|getaddrinfo|Name or service|gaierror|No address associated", re.IGNORECASE)
_SKEWS = {"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"}


@dataclass(frozen=True)
class Question:
    """What was tried, for the sentence."""

    what: str
    """The beginning of the sentence: the object, and that it cannot be read or written."""
    bucket: str
    folder: Path
    """Of this machine, where bytes come from or go to."""
    needed: int | None = None
    """Bytes that come."""


def judge(error: Exception, question: Question, link: Link | None) -> Verdict | None:
    """What a failure means; None for one that nobody foresaw.

    Args:
        link: that was asked; None if there is none yet.
    """
    what = question.what
    if isinstance(error, JobError):
        return Verdict(error)
    if isinstance(error, sdk.ClientError) and link:
        return _answered(error, question, link)
    if isinstance(error, moving.RetriesExceededError):
        return judge(error.last_exception, question, link)
    if isinstance(error, Damaged | sdk.FlexibleChecksumError | sdk.ChecksumError):
        return Verdict(IntegrityFailure(f"{what}: bytes change on the way ({error})"), Hope.DAMAGED)
    if isinstance(error, moving.S3DownloadFailedError):
        return Verdict(TemporaryFailure(f"{what}: the object is replaced again and again while it is read"), Hope.LATER)
    if isinstance(error, moving.CancelledError):
        return Verdict(TemporaryFailure(f"{what}: given up, there is no time left"))
    if isinstance(error, sdk.BotoCoreError | moving.S3ValidationError | ResponseParserError):
        return _unanswered(error, question, link)
    if isinstance(error, OSError):
        return Verdict(foreseen(error, what, question.folder, question.needed))
    return None


def _unanswered(error: Exception, question: Question, link: Link | None) -> Verdict:
    """Of what went wrong on this side, or on the way."""
    what, text = question.what, link.masked(_short(error)) if link else _short(error)
    endpoint = link.endpoint if link else "the store"
    if isinstance(
        error, sdk.NoCredentialsError | sdk.PartialCredentialsError | sdk.ProfileNotFound | sdk.ConfigParseError
    ):
        return Verdict(AccessDenied(f"{what}: no usable credentials ({text}); {WAYS}"))
    if isinstance(error, sdk.CredentialRetrievalError | sdk.TokenRetrievalError):
        return Verdict(AccessDenied(f"{what}: the credentials cannot be had ({text}); {WAYS}"), Hope.REFUSED)
    if isinstance(error, sdk.SSLError) and _UNTRUSTED.search(str(error)):
        return Verdict(
            SpecInvalid(
                f"{what}: {endpoint} cannot be trusted ({_short(error.kwargs.get('error', error))}); name the "
                "file with its authority's certificate in AWS_CA_BUNDLE, and check the host in AWS_ENDPOINT_URL_S3"
            )
        )
    if isinstance(error, sdk.ProxyConnectionError):
        return Verdict(
            TemporaryFailure(
                f"{what}: {endpoint} cannot be reached through the proxy of HTTPS_PROXY or HTTP_PROXY; check it, "
                "or name the host in NO_PROXY"
            ),
            Hope.LATER,
        )
    if isinstance(error, sdk.ConnectionError | sdk.HTTPClientError | sdk.IncompleteReadError):
        return Verdict(TemporaryFailure(f"{what}: {_unreachable(error, endpoint)}"), Hope.LATER)
    if isinstance(error, ResponseParserError | moving.S3ValidationError):
        return Verdict(TemporaryFailure(f"{what}: {endpoint} answers what is no answer of S3 ({text})"), Hope.LATER)
    return Verdict(SpecInvalid(f"{what}: cannot be asked for ({text}); check the AWS_ variables"))


def _unreachable(error: Exception, endpoint: str) -> str:
    text = str(getattr(error, "kwargs", {}).get("error", error))
    if isinstance(error, sdk.EndpointConnectionError) and _UNRESOLVED.search(text):
        return f"the name {endpoint.rpartition(':')[0]} cannot be resolved; check AWS_ENDPOINT_URL_S3 and the DNS"
    if isinstance(error, sdk.ConnectionError):
        return f"endpoint {endpoint} cannot be reached; is egress to it allowed?"
    if isinstance(error, sdk.ReadTimeoutError):
        return f"endpoint {endpoint} falls silent"
    return f"the connection to {endpoint} breaks off"


def _answered(error: sdk.ClientError, question: Question, link: Link) -> Verdict:
    """Of what the store itself said."""
    answer = _Answer(error, question, link)
    found = next((verdict(answer) for applies, verdict in _TABLE if applies(answer)), None)
    return found or Verdict(TemporaryFailure(f"{question.what}: {link.endpoint} answers {answer.said}"))


class _Answer:
    """A refusal in the store's words."""

    def __init__(self, error: sdk.ClientError, question: Question, link: Link) -> None:
        about: dict[str, Any] = error.response.get("Error", {})
        metadata: dict[str, Any] = error.response.get("ResponseMetadata", {})
        self.code = str(about.get("Code", ""))
        self.status = int(metadata.get("HTTPStatusCode", 0))
        self.headers: dict[str, str] = metadata.get("HTTPHeaders", {})
        self.message = link.masked(_short(about.get("Message", "")))
        self.region = about.get("Region") or self.headers.get("x-amz-bucket-region")
        self.operation = error.operation_name
        self.question, self.link = question, link

    @property
    def said(self) -> str:
        """Code, status and text, for people."""
        code = self.code if not self.code.isdigit() else ""
        return " ".join(filter(None, (code, f"({self.status})", self.message)))


def _denied(answer: _Answer) -> Verdict:
    action = ACTIONS.get(answer.operation, answer.operation)
    key, hint = answer.link.key_id(), ""
    if answer.operation in ("HeadObject", "GetObject"):
        hint = "; without s3:ListBucket a store says this of objects that are not there, too"
    sentence = (
        f"{answer.question.what}: refused, {answer.said}; the key {key or '(unknown)'} needs {action} on bucket "
        f"{answer.question.bucket} for this{hint}"
    )
    return Verdict(AccessDenied(sentence), Hope.REFUSED)


def _keyless(answer: _Answer) -> Verdict:
    sentence = (
        f"{answer.question.what}: the credentials (key {answer.link.key_id()}) are refused, {answer.said}; {WAYS}"
    )
    return Verdict(AccessDenied(sentence), Hope.REFUSED)


def _skewed(answer: _Answer) -> Verdict:
    try:
        ahead = (datetime.now(UTC) - parsedate_to_datetime(answer.headers["date"])).total_seconds() / 60
    except (KeyError, ValueError, TypeError):
        differ = "differ too much"
    else:
        differ = f"differ: this machine's is {abs(ahead):.0f} minutes {'ahead' if ahead > 0 else 'behind'}"
    return Verdict(
        AccessDenied(f"{answer.question.what}: {answer.code}, the clocks {differ}; set this machine's clock")
    )


def _elsewhere(answer: _Answer) -> Verdict:
    where = f"; it says {answer.region}" if answer.region else ""
    return Verdict(
        SpecInvalid(
            f"{answer.question.what}: bucket {answer.question.bucket} is in another region, {answer.said}{where}; set "
            "AWS_REGION, and AWS_ENDPOINT_URL_S3 if it names a region"
        )
    )


def _unknown(answer: _Answer) -> Verdict:
    return Verdict(
        SpecInvalid(
            f"{answer.question.what}: the store does not take the request, {answer.said}; set "
            "AWS_REQUEST_CHECKSUM_CALCULATION=when_required, and AWS_RESPONSE_CHECKSUM_VALIDATION too, if it does not "
            "know Amazon's checksums"
        )
    )


def _no_bucket(answer: _Answer) -> Verdict:
    return Verdict(
        InputMissing(
            f"{answer.question.what}: no bucket {answer.question.bucket} at {answer.link.endpoint}; check its name, "
            "AWS_ENDPOINT_URL_S3 and AWS_REGION"
        )
    )


def _plain(kind: type[JobError], sentence: str, hope: Hope = Hope.NONE) -> Callable[[_Answer], Verdict]:
    def verdict(answer: _Answer) -> Verdict:
        return Verdict(kind(f"{answer.question.what}: {sentence.format(answer=answer)}"), hope)

    return verdict


_TABLE: tuple[tuple[Callable[[_Answer], bool], Callable[[_Answer], Verdict]], ...] = (
    (lambda a: a.status == 412, _plain(PreconditionFailed, "it is there, has changed or is gone meanwhile")),
    (lambda a: a.code == "NoSuchBucket", _no_bucket),
    (
        lambda a: a.code in _PASSING or a.status in (408, 409, 429),
        _plain(TemporaryFailure, "{answer.link.endpoint} answers {answer.said}", Hope.LATER),
    ),
    (
        lambda a: a.code in _DAMAGED,
        _plain(IntegrityFailure, "the store gets other bytes than were sent, {answer.said}", Hope.DAMAGED),
    ),
    (lambda a: a.code in _SKEWS, _skewed),
    (lambda a: a.code in _ELSEWHERE or a.status in (301, 307, 308), _elsewhere),
    (lambda a: a.code in _KEYS or a.status == 401, _keyless),
    (
        lambda a: a.code.startswith("KMS.") or "kms:" in a.message.lower(),
        _plain(
            AccessDenied,
            "the bucket's encryption key (KMS) refuses, {answer.said}; the identity needs kms:GenerateDataKey and "
            "kms:Decrypt on it",
            Hope.REFUSED,
        ),
    ),
    (
        lambda a: a.code == "InvalidObjectState",
        _plain(InputMissing, "the object is archived; restore it first"),
    ),
    (
        lambda a: a.status == 507 or bool(_FULL.search(a.code)),
        _plain(DiskFailure, "the store has no space left, {answer.said}; raise its quota or free some"),
    ),
    (lambda a: a.status == 403, _denied),
    (lambda a: a.status == 404, _plain(Absent, "no such object")),
    (lambda a: a.code in _UNKNOWN or a.status == 501, _unknown),
    (lambda a: a.code in _WRONG, _plain(SpecInvalid, "the store does not take this, {answer.said}")),
    (
        lambda a: a.status >= 500,
        _plain(TemporaryFailure, "{answer.link.endpoint} answers {answer.said}", Hope.LATER),
    ),
)
"""What is asked of an answer, in this order, and what it then means."""


def _short(text: object) -> str:
    """One line of at most 300 letters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 300 else f"{line[:297]}..."
