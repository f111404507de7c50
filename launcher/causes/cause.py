"""What ``why`` answers with: a cause, and a row of the table of causes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.causes.evidence import Evidence
from launcher.codes import Code


@dataclass(frozen=True)
class Cause:
    """Why a run is where it is."""

    name: str
    """Of the row of the table."""
    sentence: str
    remedy: str
    """What to try: a command, or something to change."""
    code: Code = Code.STUCK
    """How ``wait`` leaves because of it; OK where nothing is wrong."""
    seen: tuple[str, ...] = ()
    """What it was concluded from."""

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "cause": self.name,
            "sentence": self.sentence,
            "seen": list(self.seen),
            "try": self.remedy,
            "code": int(self.code),
        }

    def text(self) -> str:
        """Several lines, for people."""
        lines = [f"{self.name}: {self.sentence}", *(f"  seen: {line}" for line in self.seen)]
        return "\n".join([*lines, f"  try:  {self.remedy}"] if self.remedy else lines)


@dataclass(frozen=True)
class Found:
    """A rule that fits: what is special about this run."""

    sentence: str
    remedy: str
    seen: tuple[str, ...] = ()
    is_lasting: bool = True
    """Whether waiting cannot help."""


@dataclass(frozen=True)
class Rule:
    """A row of the table of causes."""

    name: str
    meaning: str
    """For the manual."""
    find: Callable[[Evidence], Found | None]
    code: Code = Code.STUCK

    def cause(self, evidence: Evidence) -> Cause | None:
        """The cause, if the evidence shows it."""
        found = self.find(evidence)
        return Cause(self.name, found.sentence, found.remedy, self.code, found.seen) if found else None
