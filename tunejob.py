"""tunejob from Python: what the command line does, as data instead of text.

    import tunejob

    results = tunejob.train("configs/quickstart.yaml")
    results["evaluation.tuned.exact_match"]

Importing this module imports nothing heavy; each call brings what it needs. What goes wrong in a foreseen way is a
``tunejob.JobError``, whose sentence says what was looked for and what to try, and whose ``exit_code`` is the command
line's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.errors import JobError, error_for

if TYPE_CHECKING:
    from job.spec import JobSpec
    from launcher.results import Results

__all__ = ["JobError", "check", "compare", "results", "schema", "train"]


def check(spec: "str | Path | Mapping[str, Any] | JobSpec", overrides: Sequence[str] = ()) -> "JobSpec":
    """The spec, validated and with every default spelled out.

    Args:
        spec: a file's name, or what would stand in the file.
        overrides: changes such as ``"training.learning_rate=1e-4"``.

    Raises:
        JobError: the spec cannot be used; every problem on a line of its own.
    """
    from job.spec import JobSpec, parse, read, resolved
    from job.strict_yaml import dump_document

    if isinstance(spec, JobSpec):
        spec = spec.model_dump(mode="json", by_alias=True, exclude_unset=True)
    if isinstance(spec, Mapping):
        return resolved(parse(dump_document(spec), "spec", overrides))
    return resolved(read(Path(spec), overrides))


def train(
    spec: "str | Path | Mapping[str, Any] | JobSpec",
    output: "str | Path" = "file:./runs",
    overrides: Sequence[str] = (),
) -> "Results":
    """Trains, evaluates and publishes a run on this machine, and gives its results.

    A run that is finished already is not trained again; one that was interrupted goes on. Progress goes to stderr.

    Args:
        output: folder of runs; each run has a folder of its own in it.

    Raises:
        JobError: the run did not come to its end; its class says whose problem it is.
    """
    from launcher.local import under, work
    from launcher.results import load

    checked = check(spec, overrides)
    finished = work(checked, under(str(output), checked))
    if finished.code:
        raise error_for(finished.code, str(finished))
    return load(finished.folder)


def results(run: "str | Path") -> "Results":
    """What a finished run left: ``results(run)["evaluation.tuned.loss"]``; None for a figure it does not have.

    Raises:
        JobError: there is no finished run in the folder.
    """
    from launcher.results import load

    return load(str(run))


def compare(runs: "Sequence[str | Path]", language: str = "en") -> str:
    """A Markdown table of finished runs side by side: memory, speed, accuracy.

    Args:
        runs: the runs' folders.
        language: ``en`` or ``ja``.

    Raises:
        JobError: a run that is not there or not finished, or another language.
    """
    from job.errors import SpecInvalid
    from launcher.compare import LANGUAGES, table

    if language not in LANGUAGES:
        raise SpecInvalid(f"language {language!r}: known are {', '.join(LANGUAGES)}")
    return table([results(run) for run in runs], language)


def schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors and other checkers."""
    from job.spec import json_schema

    return json_schema()
