"""What `check` says of device memory: the estimate, and whether it fits the profile's GPU; without torch if it can."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.quantity import amount

if TYPE_CHECKING:
    from job.spec import JobSpec
    from launcher.profile import Profile

_NEEDED = ("torch", "transformers", "accelerate")


def room_of(spec: "JobSpec", profile: "Profile | None") -> int | None:
    """Bytes of one GPU of the spec's type; None where the profile does not say."""
    if profile is None or not spec.resources.gpus:
        return None
    types = profile.gpu_types
    name = spec.resources.gpu_type or (next(iter(types)) if len(types) == 1 else "")
    memory = types[name].memory if name in types else None
    return None if memory is None else int(amount(memory))


def lines_of(spec: "JobSpec", room: int | None) -> Iterator[str]:
    """The estimate for a model that lies on this machine; one line that says why there is none for others."""
    from job.sizing.fits import UNKNOWN, lines_of
    from job.sizing.shapes import UnknownFamily

    folder = Path(spec.model.source)
    if "://" in spec.model.source or not folder.is_dir():
        yield f"{UNKNOWN}; check --data fetches it from a store, or finds it in this machine's hub cache"
        return
    try:
        yield from lines_of(folder, spec, room)
    except UnknownFamily as family:
        yield from _built(spec, room, str(family))


def _built(spec: "JobSpec", room: int | None, family: str) -> list[str]:
    """By a process of its own that builds the model without weights."""
    from launcher.local import child_environment, missing_libraries, spec_file

    if missing := missing_libraries(_NEEDED):
        return [f"device memory: not estimated: a {family} has to be built for it, which needs {', '.join(missing)}"]
    with spec_file(spec) as path:
        command = [sys.executable, "-m", "job.sizing.built", str(path), *(["--room", str(room)] if room else [])]
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return [f"device memory: not estimated: a {family} could not be built ({said.removeprefix('tunejob: ')})"]
    return done.stdout.splitlines()
