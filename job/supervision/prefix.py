"""Whose a run's prefix in the store is: one spec's and one set of inputs', as soon as something was committed there."""

from collections.abc import Sequence
from pathlib import Path

from job import layout
from job.errors import Conflict
from job.inputs import Input
from job.spec import JobSpec, differences, digest, parse
from job.storage import transfer
from job.storage.store import Store, from_json
from job.supervision import pull


def holds_something(store: Store) -> bool:
    """A run that was refused or left before its first checkpoint has nothing that another could spoil."""
    return transfer.any_committed(store) or transfer.read_manifest(store) is not None


def require_spec(store: Store, spec: JobSpec) -> None:
    """Raises Conflict, with what differs, if the prefix belongs to another spec."""
    found = store.read(layout.TRAINING_CONFIG)
    if found is None or not holds_something(store):
        return
    theirs = parse(found[0], f"{store.uri}/{layout.TRAINING_CONFIG}")
    if digest(theirs) != digest(spec):
        changes = "; ".join(differences(spec, theirs))
        raise Conflict(f"{store.uri}: belongs to another spec ({changes}); name another output")


def survey(store: Store, spec: JobSpec, folder: Path) -> tuple[pull.Survey, Sequence[pull.Record]]:
    """The inputs where they lie, seen to be those that earlier attempts read, and what these wrote down.

    Args:
        folder: where they will be brought to.

    Raises:
        Conflict: they changed; the message names which.
    """
    found = store.read(layout.INPUTS)
    recorded = from_json(found[0], layout.INPUTS)["inputs"] if found else []
    # A hub's branch may have moved on; the run stays with the commit it began on.
    commit = next((record["commit"] for record in recorded if record.get("commit")), None)
    made = pull.survey(spec, folder, commit=commit, others=_template_file(spec))
    changes = made.changed(recorded) if recorded else []
    if changes:
        raise Conflict(
            f"{store.uri}: the inputs changed since this run began: {', '.join(changes)}; "
            "name another output to train on what is there now"
        )
    return made, recorded


def _template_file(spec: JobSpec) -> list[Input]:
    """The chat template that is a file of the user's: an input like the data."""
    name = spec.data.chat_template or ""
    return [Input(name, Path(name))] if name.endswith(".jinja") and Path(name).is_file() else []
