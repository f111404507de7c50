"""A base model from the hub: only the files a run reads, of one commit, every byte compared with the hub's own hashes.

The only door to the hub. Its library is imported inside the functions: it is slow to load and most runs have a folder.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from tenacity import Retrying, before_sleep_log, retry_if_exception_type, stop_after_delay, wait_random_exponential

from job.errors import AccessDenied, InputMissing, IntegrityFailure, JobError, TemporaryFailure
from job.files import sha256_of
from job.storage.basemodel import wanted
from job.storage.store import foreseen, require_space

log = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE_SECONDS = 30.0
"""How long a hub that does not answer is asked again."""
_REQUEST_SECONDS = 15.0
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HASHING_THREADS = 4
_ELSEWHERE = "if the model is on this machine, name its folder"


@dataclass(frozen=True)
class HubFile:
    """One file of a commit, as the hub lists it."""

    name: str
    size: int | None
    """Bytes."""
    sha256: str | None
    """Of a large file."""
    blob: str | None
    """Of a small one: git's SHA-1 of its content."""


def looks_like_hub_id(text: str) -> bool:
    """Whether a text has the form org/name; nothing is asked."""
    return bool(_HUB_ID.fullmatch(text)) and ".." not in text and "--" not in text and not text.endswith(".git")


def commit_of(folder: Path) -> str | None:
    """The commit of a model that ``pull`` brought here; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


def pull(
    name: str,
    revision: str | None,
    to: Path,
    token: str | None = None,
    *,
    patience_seconds: float = PATIENCE_SECONDS,
) -> tuple[Path, str]:
    """A model of the hub, as a folder of this machine, and its commit.

    Args:
        name: org/name.
        revision: branch, tag or commit; None for the main branch.
        to: folder to download into; a model that the machine's own hub cache holds stays there.
        token: left out: the environment's HF_TOKEN, or the one saved by the hub's own login.

    Raises:
        InputMissing: there is no such model, revision, or nothing in it to train.
        AccessDenied: gated, private, or the token is refused.
        TemporaryFailure: the hub cannot be reached, and the cache does not hold the model.
        IntegrityFailure: downloaded bytes are not what the hub says they are, twice.
        DiskFailure: it does not fit.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    if constants.is_offline_mode():
        cached = _cached(name, revision, None)
        if cached is None:
            raise InputMissing(f"model {name}: HF_HUB_OFFLINE is set and the hub cache does not hold it; {_ELSEWHERE}")
        return cached, cached.name
    try:
        commit, files = _patiently(patience_seconds, lambda: _listing(name, revision, token))
    except TemporaryFailure as error:
        cached = _cached(name, revision, None)
        if cached is None:
            raise
        log.warning("%s; taking the copy in the local hub cache, commit %s", error, cached.name)
        return cached, cached.name
    if not any(file.name.endswith((".safetensors", ".bin")) for file in files):
        raise InputMissing(
            f"model {name}: the hub has no safetensors or pytorch_model.bin of it at commit {commit[:12]}"
        )
    cached = _cached(name, commit, files)
    if cached is not None and not _damaged(cached, files):
        return cached, commit
    require_space(to, sum(file.size or 0 for file in files), f"model {name}")
    return _patiently(patience_seconds, lambda: _download(name, commit, files, to, token)), commit


def here(name: str, revision: str | None) -> Path | None:
    """The model in this machine's hub cache, weights or not; None if it is not there. Nothing is asked of the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, IncompleteSnapshotError, HFValidationError):
        return None
    return folder if (folder / "config.json").is_file() else None


def _listing(name: str, revision: str | None, token: str | None) -> tuple[str, list[HubFile]]:
    """The commit a revision is now, and the files of it that a run reads."""
    from huggingface_hub import HfApi

    with _translated(name, revision):
        info = HfApi(endpoint=_endpoint(), token=token).model_info(
            name, revision=revision, files_metadata=True, timeout=_REQUEST_SECONDS
        )
    if not info.sha or not _COMMIT.fullmatch(info.sha):
        raise TemporaryFailure(f"model {name}: {_endpoint()} answers without a commit; is it a hub?")
    files = [
        HubFile(item.rfilename, item.size, item.lfs.sha256 if item.lfs else None, None if item.lfs else item.blob_id)
        for item in info.siblings or []
    ]
    names = wanted({file.name for file in files})
    return info.sha, [file for file in files if file.name in names]


def _download(name: str, commit: str, files: list[HubFile], to: Path, token: str | None) -> Path:
    """The verified folder. What arrives damaged is asked for once more."""
    folder = _snapshot(name, commit, files, to, token, again=False)
    bad = _damaged(folder, files)
    if bad:
        log.warning("model %s: %s arrived damaged; downloading again", name, ", ".join(file.name for file in bad))
        _snapshot(name, commit, bad, to, token, again=True)
        bad = _damaged(folder, bad)
    if bad:
        raise IntegrityFailure(
            f"model {name}: {bad[0].name} is not what the hub says it is (size or hash), twice; "
            "try later, or name a folder that holds the model"
        )
    return folder


def _snapshot(name: str, commit: str, files: list[HubFile], to: Path, token: str | None, again: bool) -> Path:
    from huggingface_hub import snapshot_download

    with _translated(name, commit):
        folder = snapshot_download(
            name,
            revision=commit,
            cache_dir=to,
            allow_patterns=[_literal(file.name) for file in files],
            token=token,
            endpoint=_endpoint(),
            force_download=again,
            max_workers=_HASHING_THREADS,
        )
    return Path(folder)


def _cached(name: str, revision: str | None, files: list[HubFile] | None) -> Path | None:
    """The model in this machine's hub cache, if it is there as a whole.

    Args:
        files: what a whole model is; None if that is not known: then config and weights must be there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, IncompleteSnapshotError):
        return None
    if files is not None:
        return folder if all((folder / file.name).is_file() for file in files) else None
    names = {path.name for path in folder.iterdir() if path.is_file()}
    whole = "config.json" in names and any(item.endswith((".safetensors", ".bin")) for item in wanted(names))
    return folder if whole else None


def _damaged(folder: Path, files: list[HubFile]) -> list[HubFile]:
    """Those files that are not what the hub lists."""
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        sound = list(pool.map(lambda file: _is_sound(folder / file.name, file), files))
    return [file for file, good in zip(files, sound, strict=True) if not good]


def _is_sound(path: Path, file: HubFile) -> bool:
    if not path.is_file() or file.size not in (None, path.stat().st_size):
        return False
    if file.sha256 is not None:
        return sha256_of(path) == file.sha256
    if file.blob is None:
        return True
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == file.blob


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _endpoint() -> str:
    from huggingface_hub import constants

    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or constants.ENDPOINT


def _patiently(seconds: float, call: Callable[[], T]) -> T:
    """The call's result, tried again for a while after a temporary failure."""
    retrying = Retrying(
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(multiplier=0.5, max=8),
        retry=retry_if_exception_type(TemporaryFailure),
        before_sleep=before_sleep_log(log, logging.INFO),
        reraise=True,
    )
    return retrying(call)


@contextmanager
def _translated(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub's library raises into ours."""
    from httpx2 import HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: hf_xet, which downloads large files
        raise _foreseen(error, name, revision) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it came from: the library wraps a refusal in "not found in the cache"."""
    while error is not None:
        yield error
        error = error.__cause__


def _foreseen(error: Exception, name: str, revision: str | None) -> JobError:
    from huggingface_hub import errors

    where, page = urlsplit(_endpoint()).netloc, f"{_endpoint()}/{name}"
    status = next(
        (item.response.status_code for item in _chain(error) if isinstance(item, errors.HfHubHTTPError)), None
    )
    if any(isinstance(item, errors.GatedRepoError) for item in _chain(error)):
        return AccessDenied(
            f"model {name}: gated; ask for access at {page}, then set HF_TOKEN to a token of that account"
        )
    if status in (401, 403):
        return AccessDenied(
            f"model {name}: the hub refuses it ({status}): it is private, does not exist, or the token is wrong; "
            f"look at {page}, check the spelling, and set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputMissing(f"model {name}: the hub knows it, but no revision '{revision}'; see {page}/tree/main")
    if status == 404:
        return InputMissing(
            f"model {name}: not on the hub ({page}), and no folder '{name}' here either; check the spelling"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return foreseen(error, f"model {name}: download", Path(error.filename or "the download folder"))
    reason = f"answers {status}" if status else type(error).__name__
    return TemporaryFailure(f"model {name}: cannot reach the hub at {where} ({reason}); {_ELSEWHERE}")
