"""Why a run is where it is: a table of causes over what ``gather`` found. Only the store is asked."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from job.errors import JobError
from job.exits import EXITS
from launcher.causes.cause import Cause
from launcher.causes.ending import DISRUPTIONS, REMEDIES, failing, last_ended, of_code, of_pod
from launcher.causes.evidence import Evidence
from launcher.causes.standing import LOST, QUEUE, STATES
from launcher.causes.starting import START
from launcher.codes import Code

if TYPE_CHECKING:
    from job.status import Status

__all__ = ["Cause", "diagnose", "reference", "startup_problem"]

Told = tuple["Status | None", Sequence[Mapping[str, Any]]]
"""What the store tells of a run: its status and its ledger, oldest attempt first."""
AskStore = Callable[[], Told | None]


def diagnose(evidence: Evidence, ask_store: AskStore | None = None) -> list[Cause]:
    """Why a run is where it is, the likeliest cause first; never empty.

    Args:
        ask_store: what the store tells; asked only where the cluster cannot tell any more. It may raise JobError.
    """
    if failing(evidence):
        return [*_of_failure(evidence, ask_store), *_blind(evidence)]
    found = _told_once([cause for rule in RULES if (cause := rule.cause(evidence))])
    state = next(cause for rule in STATES if (cause := rule.cause(evidence)))
    before = [] if evidence.run.state == "complete" else _before(evidence)
    return [*(found or [state]), *before, *_blind(evidence)]


def startup_problem(evidence: Evidence) -> Cause | None:
    """What keeps a run from starting and does not pass by itself; None while there is hope."""
    # A Job that its queue has not let in yet has no pods that could be in trouble, only a past.
    for rule in QUEUE if evidence.run.state == "queued" else (*QUEUE, *START):
        if (found := rule.find(evidence)) and found.is_lasting:
            return rule.cause(evidence)
    return None


def _told_once(causes: Sequence[Cause]) -> list[Cause]:
    """Without those that conclude less from what an earlier one was concluded from already."""
    kept: list[Cause] = []
    for cause in causes:
        known = {line for one in kept for line in one.seen}
        if not kept or not set(cause.seen) <= known:
            kept.append(cause)
    return kept


def _of_failure(evidence: Evidence, ask_store: AskStore | None) -> list[Cause]:
    """Of a Job that failed: its deadline, its last pod, or what the store remembers."""
    run, condition = evidence.run, failing(evidence)
    line = f"Job {run.job}: {condition.get('reason', '')}: {condition.get('message', '')}"
    ended = last_ended(evidence)
    if condition.get("reason") == "DeadlineExceeded":
        return [_deadline(evidence, line, ask_store)]
    if ended:
        cause = of_pod(ended, run.id)
        count = run.kube_job.get("status", {}).get("failed") or 0
        often = (f"{count} pods failed",) if count > 1 else ()
        return [Cause(cause.name, cause.sentence, cause.remedy, Code.JOB_FAILED, (*cause.seen, line, *often))]
    return [_remembered(evidence, line, ask_store)]


def _deadline(evidence: Evidence, line: str, ask_store: AskStore | None) -> Cause:
    run = evidence.run
    seconds = run.kube_job["spec"].get("activeDeadlineSeconds")
    told, lines = _asked(ask_store)
    status = told[0] if told else None
    at = f"; it was at step {status.step} of {status.steps}, committed {status.committed}" if status else ""
    refused = [one.line for one in evidence.events if one.is_warning and one.reason != "DeadlineExceeded"]
    remedy = "raise resources.deadline_seconds in the spec and submit again: it goes on from the last checkpoint"
    if refused and not (status and status.step):
        remedy = f"see first why it did not start (the event above); then {remedy}"
    return Cause(
        "deadline",
        f"it was active longer than its deadline of {seconds} s allows{at}",
        remedy,
        Code.JOB_FAILED,
        (line, *refused[-1:], *lines),
    )


def _remembered(evidence: Evidence, line: str, ask_store: AskStore | None) -> Cause:
    """The pods are gone, and what they said with them: the ledger in the store has it."""
    run = evidence.run
    told, lines = _asked(ask_store)
    mine = [one for one in (told[1] if told else []) if one.get("job") in (None, "", run.job)]
    last = mine[-1] if mine else {}
    if told and last:
        seen = (f"ledger of the store, attempt {last.get('attempt')}", line, "no pod of it is left")
        if last.get("exit_code") is None:
            status = told[0]
            at = f" in {status.phase}, at step {status.step}" if status else ""
            remedy = f"kubectl get events; tunejob retry {run.id} goes on from the last checkpoint"
            return Cause("vanished", f"its last attempt vanished{at}", remedy, Code.JOB_FAILED, seen)
        return of_code(int(last["exit_code"]), str(last.get("message") or ""), run.id, seen)
    return Cause(
        "pods-gone",
        f"it failed ({failing(evidence).get('message') or 'no reason given'}); its pods are gone with what they said",
        f"tunejob retry {run.id}; tunejob doctor says whether the store, which remembers, can be asked",
        Code.JOB_FAILED,
        (line, *lines),
    )


def _asked(ask_store: AskStore | None) -> tuple[Told | None, tuple[str, ...]]:
    """What the store tells, and a line if it cannot be asked: that is never the run's failure."""
    if ask_store is None:
        return None, ()
    try:
        told = ask_store()
    except JobError as error:
        return None, (f"the store cannot be asked from here: {error}",)
    return told, () if told else ("the store knows nothing of it",)


def _before(evidence: Evidence) -> list[Cause]:
    """How the attempt before ended, of a run that goes on."""
    ended = last_ended(evidence)
    if ended is None:
        return []
    cause = of_pod(ended, evidence.run.id)
    return [Cause(cause.name, f"the attempt before: {cause.sentence}", cause.remedy, Code.OK, cause.seen)]


def _blind(evidence: Evidence) -> list[Cause]:
    """What may not be read, as the last cause: something may be hidden."""
    if not evidence.missing:
        return []
    sentence = "not everything could be looked at: this account lacks a permission"
    return [Cause("not-allowed", sentence, "ask for the role that it names", Code.OK, evidence.missing)]


RULES = (*LOST, *QUEUE, *START)
"""What stands in the way of a run that has not ended, in the order in which it is asked."""

ENDINGS = {
    "deadline": "the Job was active longer than `resources.deadline_seconds`",
    "evicted": "the kubelet took the pod away: its own disk limit, or its node ran short",
    "disrupted": "the cluster took the pod away; not counted",
    "memory": "the container's memory limit",
    "not-started": "the container's program could not be started",
    "killed": "SIGKILL, and not for the memory limit",
    "vanished": "the pod vanished, and the ledger in the store has no end of it",
    "pods-gone": "pods and store tell nothing any more",
}
"""How a run or a pod ended, besides the codes of the exit contract."""


def reference() -> str:
    """The manual page of the causes, in Markdown."""
    return "\n".join(
        [
            "# Why: the causes\n",
            "Made from `launcher/why.py` by `make docs`; change it there. `tunejob why RUN` names the likeliest cause",
            "first, what it was concluded from, and what to try. The code is what `tunejob wait` leaves with once it",
            "is sure that the cause lasts (0: it goes on waiting, until `--timeout` if there is one).\n",
            "## Before the start, and while it goes on\n",
            *_table(("cause", "code", "meaning"), [(r.name, str(int(r.code)), r.meaning) for r in (*RULES, *STATES)]),
            "\n## How it ended\n",
            *_table(("cause", "meaning"), list(ENDINGS.items())),
            "\nA disruption is one of: " + "; ".join(f"{key}, {what}" for key, what in DISRUPTIONS.items()) + ".",
            "\n## The container's own codes\n",
            *_table(
                ("cause", "exit code", "meaning", "what to try"),
                [
                    (row.code.name.lower().replace("_", "-"), str(int(row.code)), row.meaning, REMEDIES[row.code])
                    for row in EXITS.values()
                ],
            ),
            "",
        ]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
