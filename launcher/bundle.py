"""``tunejob render -o DIR``: files for ``kubectl apply -k DIR``, ``kubectl apply -f DIR/objects`` and GitOps.

Several specs may share one folder. What is committed stays as it is until the spec changes, or ``--rerender`` asks:
an upgrade of tunejob, or of the image, gives no finished run a second Job.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from job.errors import AccessDenied, DiskFailure, SpecInvalid
from job.spec import JobSpec, parse, resolved
from job.strict_yaml import dump_document, parse_document
from launcher.labels import RUN
from launcher.pod import SPEC_FILE
from launcher.profile import Profile
from launcher.render import Rendered, render

OBJECTS: Final = "objects"
KUSTOMIZATION: Final = "kustomization.yaml"
_EMPTY: Final = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


def write(folder: Path, spec: JobSpec, profile: Profile, rerender: bool = False) -> list[Path]:
    """Writes the objects of a run and lists them in the folder's kustomization; gives the files that it wrote.

    Files of other runs are left alone, of finished ones too.

    Args:
        rerender: writes a run's files again though its spec has not changed: another image, another profile.

    Raises:
        SpecInvalid: the spec cannot be rendered, or what is in the folder is not what tunejob wrote.
        AccessDenied, DiskFailure: the folder cannot be written to.
    """
    with _of_folder(folder):
        return _write(folder, render(spec, profile), spec, rerender)


def _write(folder: Path, rendered: Rendered, spec: JobSpec, rerender: bool) -> list[Path]:
    found, index = objects(rendered), folder / KUSTOMIZATION
    before = _mapping(index) if index.is_file() else {}
    if not _are_names(before.get("resources")):
        raise SpecInvalid(f"{index}: resources: not a list of names; mend it, or remove the file")
    written: list[Path] = []
    if rerender or not _is_there(folder, rendered, spec):
        for name, text in found.items():
            _replace(folder / name, text)
        written = [folder / name for name in found]
    text = kustomization((path.name for path in (folder / OBJECTS).glob("*.yaml")), before)
    if not index.is_file() or index.read_text(encoding="utf-8") != text:
        _replace(index, text)
        written.append(index)
    return written


@contextmanager
def _of_folder(folder: Path) -> Iterator[None]:
    """What the disk says, in a sentence."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise SpecInvalid(f"{error.filename or folder}: in the way; -o {folder} has to be a folder, or new") from None
    except PermissionError as error:
        raise AccessDenied(f"{error.filename or folder}: this user may not write it; name another folder") from None
    except OSError as error:
        raise DiskFailure(f"{error.filename or folder}: cannot be written ({error.strerror})") from None


def _are_names(resources: object) -> bool:
    return resources is None or (isinstance(resources, list) and all(isinstance(name, str) for name in resources))


def objects(rendered: Rendered) -> dict[str, str]:
    """What stands in the files of a run, by their names below the folder.

    A schedule keeps its files when its spec changes, as it keeps its name; a run has files of its own.
    """
    stem = rendered.name if rendered.workload["kind"] == "CronJob" else rendered.run
    return {
        f"{OBJECTS}/{stem}-spec.yaml": dump_document(rendered.config_map),
        f"{OBJECTS}/{stem}.yaml": dump_document(rendered.workload),
    }


def kustomization(names: Iterable[str], before: Mapping[str, Any] | None = None) -> str:
    """A kustomization of the files in ``objects/``; whatever else ``before`` says is kept."""
    kept = {**_EMPTY, **(before or {})}
    others = [name for name in kept.get("resources") or [] if not str(name).startswith(f"{OBJECTS}/")]
    return dump_document({**kept, "resources": [*others, *(f"{OBJECTS}/{name}" for name in sorted(names))]})


def _is_there(folder: Path, rendered: Rendered, spec: JobSpec) -> bool:
    """Whether the files of the run are there, made of the same spec. An older tunejob may have spelled it otherwise."""
    paths = [folder / name for name in objects(rendered)]
    if not all(path.is_file() for path in paths):
        return False
    config_map = _mapping(paths[0])
    if _at(config_map, "metadata", "labels", RUN) != rendered.run:
        return False
    written = _at(config_map, "data", SPEC_FILE)
    return isinstance(written, str) and resolved(parse(written, str(paths[0]))) == resolved(spec)


def _at(value: Any, *keys: str) -> Any:
    """What stands below keys; None where people left something else."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _mapping(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = parse_document(path.read_bytes(), str(path)).value
    return found


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: whoever commits meanwhile finds no half a manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.partial")
    try:
        scratch.write_text(text, encoding="utf-8", newline="\n")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
