"""What a finished run left behind, read from its folder here or in a store."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from job import layout
from job.errors import InputMissing, IntegrityFailure
from job.storage.store import open_store
from launcher.codes import NoResult, Refused, RunFailed

if TYPE_CHECKING:
    from job.storage.store import Store
    from launcher.runs import Run


@dataclass(frozen=True)
class Results:
    """One finished run: where it is, and what eval_results.json says of it.

    Figures that a run could not take (or that an older image did not know) are None.
    """

    uri: str
    """The run's folder, as the user named it."""
    record: Mapping[str, Any]
    """eval_results.json as it stands."""

    def __getitem__(self, path: str) -> Any:
        """The value at a dotted path of the record, for instance ``performance.device``; None where there is none."""
        value: Any = self.record
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    @property
    def name(self) -> str:
        """The run's id; the folder's name where the record has none."""
        return str(self["run"] or self.uri.rstrip("/").rpartition("/")[2])

    def figure(self, path: str) -> float | None:
        """A number at a dotted path."""
        value = self[path]
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def peak_memory(self) -> float | None:
        """Bytes at the highest point of loading and training."""
        figures = [self.figure(f"performance.peak_memory_bytes.{phase}") for phase in ("load", "train")]
        return max((figure for figure in figures if figure is not None), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens trained per second of training, in the attempt that finished; None if nothing was left to train."""
        return self.figure("performance.tokens_per_second")


def load(uri: str) -> Results:
    """The results of the finished run in a folder.

    Raises:
        InputMissing: no run is there, or it is not finished: the manifest comes last, and there is none.
        IntegrityFailure: the file is there but is no JSON object.
    """
    store = open_store(uri)
    found = _record(store, uri)
    if found is None:
        begun = store.read(layout.OWNER) is not None
        raise InputMissing(
            f"{uri}: the run is not finished ({layout.MANIFEST} is missing); start it again, it goes on where it was"
            if begun
            else f"{uri}: no finished run ({layout.MANIFEST} and {layout.EVAL_RESULTS} are looked for); "
            "name the folder of one run, as `train` prints it"
        )
    return found


def read(store: "Store", run: "Run") -> Results:
    """The results of a run on the cluster, out of its folder. The manifest decides whether there are any.

    Raises:
        Refused: it has not ended.
        RunFailed: it failed.
        NoResult: its Job is complete, and nothing is published.
        IntegrityFailure: the file is there but is no JSON object.
    """
    found = _record(store, run.output)
    if found is not None:
        return found
    if run.state == "complete":
        raise NoResult(
            f"{run.output}: {run.job} is complete, but {layout.MANIFEST} or {layout.EVAL_RESULTS} is missing"
        )
    if run.state == "failed":
        raise RunFailed(
            f"{run.id} failed and published nothing; tunejob why {run.id} says why, tunejob retry {run.id} goes on "
            "from the last checkpoint"
        )
    raise Refused(f"{run.id} is {run.state} and has published nothing yet; tunejob wait {run.id} waits for its end")


def _record(store: "Store", uri: str) -> Results | None:
    """What eval_results.json says; None if nothing is published."""
    found = store.read(layout.EVAL_RESULTS) if store.read(layout.MANIFEST) else None
    if found is None:
        return None
    try:
        record = json.loads(found[0])
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise IntegrityFailure(f"{uri}/{layout.EVAL_RESULTS}: not a JSON object; the file was changed after the run")
    return Results(uri, record)
