"""A run's folder as this machine sees it: the profile's way to the store, and the user's own credentials."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from job.errors import AccessDenied, InputMissing, TemporaryFailure
from job.layout import ATTEMPTS, MANIFEST, STATUS
from job.status import Status, parse_status
from job.storage.store import Store, open_store

if TYPE_CHECKING:
    from launcher.profile import Profile

OWN = "this machine asks with its own credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, ~/.aws), not with the pods' Secret"


def open_run(uri: str, profile: "Profile") -> Store:
    """The folder of a run, proven to answer; a store that does not is given up after some seconds.

    Args:
        uri: of the folder, as the pods name it.

    Raises:
        TemporaryFailure: it cannot be reached from this machine.
        AccessDenied: it refuses this machine's credentials, or there are none.
        InputMissing: there is no such bucket.
        SpecInvalid: the client for S3 is not installed, or a setting cannot be used.
    """
    store = open_store(uri, settings_of(profile))
    about = f"{store.uri.rstrip('/')}/{MANIFEST}: cannot be read: "
    where = profile.store.client_endpoint or profile.store.endpoint or "AWS"
    try:
        store.read(MANIFEST)
    except TemporaryFailure as error:
        raise TemporaryFailure(
            f"{uri}: the store at {where} does not answer this machine ({str(error).removeprefix(about)}); name an "
            "address that it can reach as store.client_endpoint in the profile (for a store inside the cluster: "
            "kubectl port-forward service/NAME PORT). Runs on the cluster are not concerned"
        ) from None
    except AccessDenied as error:
        raise AccessDenied(f"{error}; {OWN}") from None
    except InputMissing as error:
        raise InputMissing(f"{error}; it was asked for at {where}, as the profile says") from None
    return store


def settings_of(profile: "Profile") -> dict[str, str]:
    """How this machine reaches the profile's store, as environment variables of the SDK's and of ours."""
    store = profile.store
    settings = {
        "AWS_ENDPOINT_URL_S3": store.client_endpoint or store.endpoint,
        "AWS_REGION": store.region,
        "TUNEJOB_S3_ADDRESSING": store.addressing,
        "AWS_REQUEST_CHECKSUM_CALCULATION": store.checksums,
        "AWS_RESPONSE_CHECKSUM_VALIDATION": store.checksums,
    }
    return {name: value for name, value in settings.items() if value}


def probe(profile: "Profile") -> str:
    """A sentence once the profile's store has answered this machine. Raises as ``open_run`` does."""
    where = profile.store.client_endpoint or profile.store.endpoint or "AWS"
    open_run(profile.store.output, profile)
    return f"{profile.store.output} answers this machine at {where}"


def told(store: Store) -> tuple[Status | None, list[Mapping[str, Any]]] | None:
    """What a run's folder tells of it: its status, and its ledger, oldest attempt first; None if it tells nothing.

    A record that cannot be understood is left out: a newer image may have written it.
    """
    found = store.read(STATUS)
    ledger = [record for entry in store.list(ATTEMPTS) if (record := _record(store.read(entry.key)))]
    status = parse_status(found[0]) if found and _record(found) else None
    return (status, ledger) if status or ledger else None


def _record(found: tuple[bytes, str] | None) -> Mapping[str, Any]:
    try:
        value = json.loads(found[0]) if found else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
