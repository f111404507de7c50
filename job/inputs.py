"""Where the inputs of a run lie on this machine, as the supervisor tells the other processes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.files import read_json, write_json


@dataclass(frozen=True)
class Input:
    """One input: what the user called it, and where its bytes are."""

    uri: str
    """As the spec names it; messages use this name, never the path."""
    path: Path


@dataclass(frozen=True)
class Inputs:
    """Everything the spec named, brought here."""

    model: Input
    """A folder."""
    train: tuple[Input, ...]
    """In the order of ``data.train``."""
    eval: Input | None


def write_inputs(path: Path, inputs: Inputs) -> None:
    """Writes the record the other processes read."""
    everything = {"model": [inputs.model], "train": inputs.train, "eval": [inputs.eval] if inputs.eval else []}
    write_json(path, {kind: [{"uri": i.uri, "path": str(i.path)} for i in items] for kind, items in everything.items()})


def read_inputs(path: Path) -> Inputs:
    """Reads what ``write_inputs`` wrote."""
    record: dict[str, list[dict[str, Any]]] = read_json(path)
    model, train, evaluation = (
        tuple(Input(item["uri"], Path(item["path"])) for item in record[kind]) for kind in ("model", "train", "eval")
    )
    return Inputs(model[0], train, evaluation[0] if evaluation else None)
