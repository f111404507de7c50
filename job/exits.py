"""The exit contract: one table for the supervisor, the Job's podFailurePolicy, ``why`` and the documentation.

Codes follow sysexits.h where it has a word for the case.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any


class JobReaction(Enum):
    """What the Kubernetes Job does with a pod that left with a code."""

    COMPLETE = "complete"
    IGNORE = "ignore"
    """Start another pod; nothing is counted."""
    COUNT = "count"
    """Start another pod, counted against the back-off limit."""
    FAIL = "fail"
    """No further pod: trying again cannot help."""


class ExitCode(IntEnum):
    """How a run's process left. 2 and 137 are the argument parser's and the kernel's."""

    OK = 0
    CRASH = 1
    CALLED_WRONGLY = 2
    USAGE = 64
    DATA = 65
    NOINPUT = 66
    INTERNAL = 70
    CONFLICT = 73
    DISK = 74
    TEMPFAIL = 75
    INTEGRITY = 76
    NOPERM = 77
    CONFIG = 78
    FENCED = 80
    PEER = 81
    DEVICE = 82
    OOM = 83
    HANG = 85
    DIVERGED = 86
    NOPROGRESS = 93
    BUDGET = 94
    MEMORY = 137
    INTERRUPTED = 143


@dataclass(frozen=True)
class Exit:
    """One row of the contract."""

    code: ExitCode
    meaning: str
    reaction: JobReaction


_ROWS = (
    Exit(ExitCode.OK, "manifest published and read back, or the run was already complete", JobReaction.COMPLETE),
    Exit(ExitCode.CRASH, "unclassified", JobReaction.COUNT),
    Exit(ExitCode.CALLED_WRONGLY, "called wrongly", JobReaction.FAIL),
    Exit(ExitCode.USAGE, "spec not mounted", JobReaction.FAIL),
    Exit(ExitCode.DATA, "unreadable data, no trainable tokens, bad row N of object K", JobReaction.FAIL),
    Exit(ExitCode.NOINPUT, "input or base model proven missing", JobReaction.FAIL),
    Exit(ExitCode.INTERNAL, "an invariant of ours broke", JobReaction.COUNT),
    Exit(ExitCode.CONFLICT, "the run's prefix belongs to another spec, or its data changed", JobReaction.FAIL),
    Exit(ExitCode.DISK, "no space, I/O error, or 95 % of the pod's own limit", JobReaction.COUNT),
    Exit(
        ExitCode.TEMPFAIL,
        "store, network or a rank of this pod still failing after its budget",
        JobReaction.COUNT,
    ),
    Exit(ExitCode.INTEGRITY, "hash or size mismatch that retry and fallback cannot cure", JobReaction.FAIL),
    Exit(ExitCode.NOPERM, "credentials missing, refused or expired; gated model", JobReaction.FAIL),
    Exit(ExitCode.CONFIG, "spec invalid", JobReaction.FAIL),
    Exit(ExitCode.FENCED, "another attempt owns the run; nothing published", JobReaction.COUNT),
    Exit(ExitCode.PEER, "another pod of this multi-node run left, own state committed", JobReaction.IGNORE),
    Exit(ExitCode.DEVICE, "no GPU, or lost", JobReaction.COUNT),
    Exit(ExitCode.OOM, "device memory", JobReaction.FAIL),
    Exit(ExitCode.HANG, "no progress within the limit; stacks dumped", JobReaction.COUNT),
    Exit(ExitCode.DIVERGED, "NaN or Inf that the scaler does not explain", JobReaction.FAIL),
    Exit(
        ExitCode.NOPROGRESS,
        "three attempts that ended by themselves, or twenty that were interrupted or vanished, committed nothing new",
        JobReaction.FAIL,
    ),
    Exit(ExitCode.BUDGET, "resources.budget used up; checkpoint and partial result are there", JobReaction.FAIL),
    Exit(ExitCode.MEMORY, "container memory", JobReaction.COUNT),
    Exit(ExitCode.INTERRUPTED, "the supervisor got SIGTERM, last commit recorded", JobReaction.IGNORE),
)

EXITS: dict[ExitCode, Exit] = {row.code: row for row in _ROWS}

CONTAINER = "tunejob"
"""Name of our container in a pod; every rule of the policy names it, or a sidecar's code would be taken for ours."""


def codes(reaction: JobReaction) -> list[int]:
    """The codes a Job treats one way, sorted."""
    return sorted(int(row.code) for row in _ROWS if row.reaction is reaction)


def pod_failure_policy() -> dict[str, Any]:
    """The Job's ``podFailurePolicy``: disruptions and interruptions are not counted, what none can cure fails the Job.

    Fields that the server would fill in are written out, so that applying the same manifest twice changes nothing.
    """
    disrupted = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    actions = (("Ignore", JobReaction.IGNORE), ("FailJob", JobReaction.FAIL))
    by_code = [
        {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": codes(reaction)}}
        for action, reaction in actions
    ]
    return {"rules": [disrupted, *by_code]}
