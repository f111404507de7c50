"""How a pod or a Job ended, and what to try: evictions, memory, every code of the exit contract. Pure."""

import re
from collections.abc import Mapping
from typing import Any

from job.exits import EXITS, ExitCode
from launcher.causes.cause import Cause
from launcher.causes.evidence import Evidence
from launcher.codes import Code
from launcher.runs import Attempt

AGAIN = "tunejob retry RUN"

REMEDIES: dict[ExitCode, str] = {
    ExitCode.OK: "tunejob results RUN",
    ExitCode.CRASH: f"tunejob logs RUN shows where; {AGAIN} goes on from the last checkpoint",
    ExitCode.CALLED_WRONGLY: "the image is another version's, or its command was changed: submit what tunejob renders",
    ExitCode.USAGE: "the ConfigMap is not mounted at /etc/tunejob: submit what tunejob renders",
    ExitCode.DATA: "mend the row or the key that it names (tunejob check FILE --data looks), then submit again",
    ExitCode.NOINPUT: f"upload what is missing, or mend its name in the spec; then submit again, or {AGAIN}",
    ExitCode.INTERNAL: f"please report it with tunejob logs RUN; {AGAIN} goes on from the last checkpoint",
    ExitCode.CONFLICT: "its data changed, or another spec has this place: another name, or the old data",
    ExitCode.DISK: "raise resources.ephemeral_storage in the spec (or scratch.size in the profile), then submit again",
    ExitCode.TEMPFAIL: f"check that the store answers (tunejob doctor), then {AGAIN}",
    ExitCode.INTEGRITY: "restore the object it names, or delete it with what is made of it",
    ExitCode.NOPERM: f"mend the Secret, or the right that it names, then {AGAIN}",
    ExitCode.CONFIG: "mend the spec (tunejob check FILE), then submit again",
    ExitCode.FENCED: "another pod works on this run: tunejob list shows which Job; wait for it, or cancel it",
    ExitCode.PEER: "another pod of the run left first: see what that one said",
    ExitCode.DEVICE: f"kubectl describe node shows whether it still has its GPUs; then {AGAIN}",
    ExitCode.OOM: "halve training.micro_batch_size in the spec (same result) and submit again: it goes on",
    ExitCode.HANG: f"the stacks are in tunejob logs RUN; {AGAIN} goes on from the last checkpoint",
    ExitCode.DIVERGED: "lower training.learning_rate in the spec, then submit again: that is a new run",
    ExitCode.NOPROGRESS: f"mend the cause that it names, then {AGAIN}",
    ExitCode.BUDGET: "raise resources.budget in the spec and submit again: it goes on; or take the last checkpoint",
    ExitCode.MEMORY: "raise resources.memory in the spec and submit again: it goes on from the last checkpoint",
    ExitCode.INTERRUPTED: "nothing: the next pod goes on from the last checkpoint",
}
"""What to try, by how the container left. RUN stands for the run's id."""

DISRUPTIONS = {
    "PreemptionByScheduler": "a pod of higher priority took its place",
    "DeletionByTaintManager": "its node was tainted: it was lost, or is being emptied",
    "EvictionByEvictionAPI": "its node was drained",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node ran short of something, or was shut down",
}
"""Reasons of a pod's condition DisruptionTarget; the Job does not count such a pod."""


def failing(evidence: Evidence) -> Mapping[str, Any]:
    """The Job's condition that it failed, or is about to; empty if it is neither."""
    run = evidence.run
    return run.condition("Failed") or run.condition("FailureTarget") or {}


def last_ended(evidence: Evidence) -> Attempt | None:
    """The newest pod that has ended without success."""
    pods = [one for one in evidence.run.pods if one.phase == "Failed" or (one.code is not None and one.code != 0)]
    return pods[-1] if pods else None


def of_pod(attempt: Attempt, run: str) -> Cause:
    """Why a pod ended; ``run`` is the run's id, for the commands that are named."""
    for look in (_evicted, _disrupted, _out_of_memory, _not_started, _by_contract, _killed):
        if cause := look(attempt, run):
            return cause
    said = attempt.manifest.get("status", {}).get("message") or attempt.reason or "nothing"
    code = "without an exit code" if attempt.code is None else f"with {attempt.code}, which is no code of ours"
    return _cause(attempt, "ended", f"its pod left {code}; the cluster says: {said}", _named(AGAIN, run))


def of_code(code: int, said: str, run: str, seen: tuple[str, ...]) -> Cause:
    """What a code of the exit contract means; ``said`` is the container's own sentence, if it left one."""
    row = EXITS.get(ExitCode(code)) if code in ExitCode.__members__.values() else None
    if row is None:
        return Cause("ended", said or f"it left with {code}", _named(AGAIN, run), Code.JOB_FAILED, seen)
    sentence = said or row.meaning
    name = row.code.name.lower().replace("_", "-")
    return Cause(name, f"{sentence} ({code}, {row.code.name})", _named(REMEDIES[row.code], run), Code.JOB_FAILED, seen)


def _named(remedy: str, run: str) -> str:
    return re.sub(r"\bRUN\b", run, remedy)


def _cause(attempt: Attempt, name: str, sentence: str, remedy: str, *more: str) -> Cause:
    return Cause(name, sentence, remedy, Code.JOB_FAILED, (*more, line_of(attempt)))


def line_of(attempt: Attempt) -> str:
    """A pod as evidence."""
    code = "" if attempt.code is None else f", exit code {attempt.code}"
    reason = f" ({attempt.reason})" if attempt.reason else ""
    return f"pod {attempt.pod}: {attempt.phase}{reason}{code}"


def _limit(attempt: Attempt, what: str) -> str:
    return str(attempt.container.get("resources", {}).get("limits", {}).get(what) or "")


def _evicted(attempt: Attempt, run: str) -> Cause | None:
    status = attempt.manifest.get("status", {})
    if status.get("reason") != "Evicted":
        return None
    said = " ".join(str(status.get("message") or "").split())
    if "low on resource" in said:
        remedy = f"its node ran short, not the run alone: {AGAIN}, or ask who runs the cluster"
    else:
        remedy = (
            "raise resources.ephemeral_storage in the spec (scratch.size in the profile) and submit again: it goes on "
            "from the last checkpoint"
        )
    return _cause(attempt, "evicted", f"the kubelet of node {attempt.node} evicted it: {said}", _named(remedy, run))


def _disrupted(attempt: Attempt, run: str) -> Cause | None:
    conditions = attempt.manifest.get("status", {}).get("conditions") or []
    found = next((one for one in conditions if one["type"] == "DisruptionTarget" and one["status"] == "True"), None)
    if found is None:
        return None
    reason = str(found.get("reason") or "")
    why = DISRUPTIONS.get(reason, reason or "the cluster took it away")
    line = f"condition DisruptionTarget: {reason}: {found.get('message', '')}".rstrip(": ")
    remedy = _named(REMEDIES[ExitCode.INTERRUPTED], run)
    return _cause(attempt, "disrupted", f"{why}; the Job does not count it", remedy, line)


def _out_of_memory(attempt: Attempt, run: str) -> Cause | None:
    if attempt.reason != "OOMKilled" and attempt.word.get("code") != ExitCode.MEMORY:
        return None
    limit = _limit(attempt, "memory")
    sentence = f"it used up its container's memory{f' ({limit})' if limit else ''}"
    said = str(attempt.word.get("message") or "")
    return _cause(
        attempt,
        "memory",
        f"{sentence}: {said}" if said else sentence,
        _named(REMEDIES[ExitCode.MEMORY], run) + (f" (it had {limit})" if limit else ""),
    )


def _not_started(attempt: Attempt, run: str) -> Cause | None:
    if attempt.reason not in ("StartError", "ContainerCannotRun"):
        return None
    ended = attempt.state.get("terminated", {})
    return _cause(
        attempt,
        "not-started",
        f"its container could not be started: {ended.get('message', '')}",
        "the image is none of tunejob's, or is broken: mend `image` in the profile",
    )


def _by_contract(attempt: Attempt, run: str) -> Cause | None:
    code = attempt.code
    if code is None or code not in EXITS or (code == ExitCode.MEMORY and not attempt.word):
        return None
    return of_code(code, str(attempt.word.get("message") or ""), run, (line_of(attempt),))


def _killed(attempt: Attempt, run: str) -> Cause | None:
    if attempt.code != ExitCode.MEMORY:
        return None
    return _cause(
        attempt,
        "killed",
        "its container was ended by SIGKILL, and not for its memory limit: it outlived its grace period, or the node's "
        "own memory ran out",
        _named(f"kubectl describe node {attempt.node}; {AGAIN} goes on from the last checkpoint", run),
    )
