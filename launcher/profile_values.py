"""Kinds of text in a profile, checked. Each check returns the value, or raises ValueError with the user's sentence."""

import re
from typing import Final

SECRET: Final = "a profile holds no secrets; put it in a Secret and name that in store.secret or hub.secret"

_SET_BY: Final = {
    "TUNEJOB_OUTPUT": "store.output",
    "TUNEJOB_S3_ADDRESSING": "store.addressing",
    "AWS_ENDPOINT_URL": "store.endpoint",
    "AWS_ENDPOINT_URL_S3": "store.endpoint",
    "AWS_REGION": "store.region",
    "AWS_DEFAULT_REGION": "store.region",
    "AWS_SHARED_CREDENTIALS_FILE": "store.secret",
    "AWS_CA_BUNDLE": "store.ca_config_map",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "store.checksums",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "store.checksums",
    "HF_TOKEN_PATH": "hub.secret",
    **dict.fromkeys(("TUNEJOB_JOB", "TUNEJOB_POD", "TUNEJOB_SCRATCH", "TUNEJOB_SCRATCH_LIMIT"), ""),
    **dict.fromkeys(("TUNEJOB_LOG", "TUNEJOB_TERMINATION_LOG", "PYTHONSAFEPATH", "HOME", "TMPDIR"), ""),
}
"""Environment variables of the container that are ours, and the key of the profile that sets each."""

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_SECRET = re.compile(r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|CREDENTIALS?|(SECRET_|ACCESS_|API_)KEY(_ID)?)$")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_OUR_LABELS = ("tunejob.dev/", "app.kubernetes.io/", "batch.kubernetes.io/", "kueue.x-k8s.io/", "job-name")
_RESOURCE = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def require_endpoint(text: str) -> str:
    """The address of a store."""
    if "@" in text:
        raise ValueError(f"carries credentials; {SECRET}")
    if not re.fullmatch(r"https?://[^\s/?#]+/?", text):
        raise ValueError(f'"{text}" is no address of a store; write it like http://minio.minio:9000')
    return text.rstrip("/")


def require_output(text: str) -> str:
    """A folder of runs in S3, without a slash at its end."""
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[^\s?#]*)?", text):
        raise ValueError(f'"{text}" is no place in S3; write it like s3://bucket/runs (a pod keeps no files)')
    return text.rstrip("/")


def require_env(values: dict[str, str]) -> dict[str, str]:
    """Variables that are neither ours nor secret."""
    for name in values:
        if not _ENV_NAME.fullmatch(name):
            raise ValueError(f'"{name}" is no name of a variable; write letters, digits and underscores')
        if name in _SET_BY:
            how = f"set {_SET_BY[name]} of the profile" if _SET_BY[name] else "remove it"
            raise ValueError(f"{name} is set by tunejob; {how}")
        if _ENV_SECRET.search(name.upper()):
            raise ValueError(f"{name}: {SECRET}")
    return values


def require_labels(values: dict[str, str]) -> dict[str, str]:
    """Labels that are not ours."""
    for name, value in values.items():
        if not _LABEL_KEY.fullmatch(name) or not _LABEL_VALUE.fullmatch(value):
            raise ValueError(
                f'"{name}: {value}" is no label: letters, digits, dashes, dots and underscores, a letter or digit at '
                "both ends, at most 63 characters"
            )
        if name.startswith(_OUR_LABELS):
            raise ValueError(f"{name} is set by tunejob or by Kubernetes; remove it")
    return values


def require_node_labels(values: dict[str, str]) -> dict[str, str]:
    """Labels that nodes can have."""
    for name, value in values.items():
        if not _LABEL_KEY.fullmatch(name) or not _LABEL_VALUE.fullmatch(value):
            raise ValueError(f'"{name}: {value}" is no label that a node can have; kubectl get nodes --show-labels')
    return values


def require_resource(text: str) -> str:
    """An extended resource."""
    if not _RESOURCE.fullmatch(text):
        raise ValueError(f'"{text}" is no extended resource; write it like nvidia.com/gpu')
    return text


def require_image(text: str) -> str:
    """The name of an image."""
    if not text or "://" in text or re.search(r"\s", text):
        raise ValueError(f'"{text}" is no name of an image; write it like registry.example/tunejob:0.1')
    return text
