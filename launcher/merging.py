"""``tunejob merge``: an adapter and its base become one model, in a process that has the libraries for it."""

import sys
from pathlib import Path

from job.errors import SpecInvalid
from launcher.local import NotInstalled, child_environment, missing_libraries, supervised

_NEEDED = ("torch", "transformers", "peft", "safetensors", "bitsandbytes")


def merge(adapter: str, output: str, base: str | None = None, onto: str | None = None, dtype: str | None = None) -> int:
    """Writes the merged model to a folder and prints how it differs; the code is the child's (``job.exits``).

    Args:
        adapter: folder of a finished run, or of an adapter; a path or a file: URI.
        output: folder that is not there yet.
        base: folder of the base model; left out: the one the adapter names.
        onto: `16bit` or `dequantised`; left out: de-quantised weights for QLoRA, the base's own otherwise.
        dtype: of the result; left out: the base's.

    Raises:
        NotInstalled: what merges is not on this machine.
        SpecInvalid: the adapter is not on this machine.
    """
    if missing := missing_libraries(_NEEDED):
        raise NotInstalled(f"merging needs {', '.join(missing)}: pip install 'tunejob[job]'")
    command = [sys.executable, "-m", "job.training.merge", _path(adapter), "--output", _path(output)]
    for option, value in (("--base", base and _path(base)), ("--onto", onto), ("--dtype", dtype)):
        command += [option, value] if value else []
    return supervised(command, child_environment())


def _path(text: str) -> str:
    """A folder here, absolute. The child must not take a name that begins with a dash for an option."""
    path = text.removeprefix("file://").removeprefix("file:")
    if "://" in path:
        raise SpecInvalid(
            f"{text}: merging works on folders of this machine; fetch it first (tunejob results --download)"
        )
    return str(Path(path).expanduser().resolve())
