"""What happened so far: the record of a run that anyone may read while it goes on."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Status:
    """The latest word on a run. Unknown keys are ignored on reading: a newer version may have written them."""

    run: str
    """The run's id, or its folder's name."""
    attempt: int
    """Number of this attempt, from 1."""
    phase: str
    """One of ``PHASES``."""
    step: int = 0
    """Optimizer steps done."""
    steps: int = 0
    """Optimizer steps in all; 0 while unknown."""
    committed: int = 0
    """Step of the newest committed checkpoint; 0 if there is none."""
    loss: float | None = None
    """Mean cross entropy (nats) of the latest step."""
    exit_code: int | None = None
    """How the attempt ended; None while it goes on."""
    message: str = ""
    """Why, in a sentence, if it failed."""
    memory: float | None = None
    """Share of the container's memory limit in use at the last look; None where there is no limit."""
    elapsed: float = 0.0
    """Seconds since the attempt began."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds spent in each phase that is over."""

    def dump(self) -> bytes:
        """As the store holds it."""
        return (json.dumps(asdict(self), ensure_ascii=False) + "\n").encode()


PHASES = ("preflight", "own", "pull", "prepare", "load", "train", "seal", "evaluate", "verify", "publish")
"""In the order in which a run passes them."""


def parse_status(data: bytes) -> Status:
    """Reads what ``dump`` wrote, by this version or another."""
    record: dict[str, Any] = json.loads(data)
    known = {one.name for one in fields(Status)}
    return Status(**{key: value for key, value in record.items() if key in known})
