"""Where the old commands put a run, and what they make of a folder that is already there."""

from datetime import datetime
from enum import Enum
from pathlib import Path

from job import layout
from job.errors import Conflict, InputMissing, SpecInvalid
from job.storage.store import local_path

HOME = Path("models/fine_tuned_models")
_STAMP = "%Y%m%d_%H%M%S"


class Found(Enum):
    """What stands in an output folder."""

    NOTHING = "nothing"
    FINISHED = "finished"
    BEGUN = "begun"
    """With a committed checkpoint in it."""
    ENTERED = "entered"
    """Refused or left before the first checkpoint: nothing in it is worth keeping."""
    FOREIGN = "foreign"


def default_folder(method: str, now: datetime) -> Path:
    """The folder of a run that was given none, for instance ``…/lora_model_20250115_143022``."""
    return HOME / f"{method}_model_{now.strftime(_STAMP)}"


def found_in(folder: Path) -> Found:
    """What stands in ``folder``; a folder that is empty or absent holds nothing."""
    if (folder / layout.MANIFEST).is_file():
        return Found.FINISHED
    if any((folder / layout.CHECKPOINTS).glob(f"*/{layout.COMMIT}")):
        return Found.BEGUN
    if (folder / layout.OWNER).is_file() or (folder / layout.ATTEMPTS).is_dir():
        return Found.ENTERED
    if folder.is_dir():
        return Found.FOREIGN if any(folder.iterdir()) else Found.NOTHING
    return Found.FOREIGN if folder.exists() else Found.NOTHING


def settle(method: str, named: str | None, now: datetime, resume: bool, overwrite: bool) -> tuple[Path, Path | None]:
    """The folder to write to, and where the finished run that stood there was moved (None if nothing was).

    Raises:
        Conflict: something stands there that the options do not allow for.
        InputMissing: there is nothing to resume.
        SpecInvalid: the folder's name is that of a remote store, or --resume names no folder.
    """
    if named is None:
        if resume:
            raise SpecInvalid("--resume: say which run, with --output-dir")
        return default_folder(method, now), None
    folder = as_folder(named)
    found = found_in(folder)
    if found is Found.FINISHED and overwrite:
        return folder, _set_aside(folder, now)
    if problem := _objection(found, folder, resume):
        raise problem
    return folder, None


def as_folder(named: str) -> Path:
    """A folder of this machine by its path or ``file:`` URI. Raises SpecInvalid for another kind of store."""
    if not named.strip():
        raise SpecInvalid("--output-dir: empty; name a folder")
    path = local_path(named)
    if path is None:
        raise SpecInvalid(f"--output-dir {named}: a folder of this machine is due; name one")
    return path if named.startswith("file:") else Path(named).expanduser()


def _objection(found: Found, folder: Path, resume: bool) -> Conflict | InputMissing | None:
    """Why ``folder`` cannot be written to as things stand. A finished run that is resumed stays as it is."""
    match found, resume:
        case Found.NOTHING, True:
            return InputMissing(f"--resume: nothing was begun in {folder}; leave --resume out to start there")
        case Found.FINISHED, False:
            return Conflict(f"{folder} holds a finished run; name another folder, or set it aside with --overwrite")
        case Found.BEGUN, False:
            return Conflict(f"{folder} holds a run that was begun and not finished; go on with --resume")
        case Found.FOREIGN, _:
            return Conflict(f"{folder} is there already and is no run of ours; name a new or an empty folder")
    return None


def _set_aside(folder: Path, now: datetime) -> Path:
    aside = folder.with_name(f"{folder.name}.{now.strftime(_STAMP)}")
    if aside.exists():
        raise Conflict(f"{aside} is there already, so {folder} cannot be moved there; try again in a second")
    return folder.rename(aside)
