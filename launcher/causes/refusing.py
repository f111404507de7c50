"""Why no pod can be made: account, Pod Security, quota, limits, admission. Rules of ``launcher.why``; pure."""

import re
from collections.abc import Mapping

from launcher.causes.cause import Found, Rule
from launcher.causes.evidence import Event, Evidence, moment
from launcher.codes import Code
from launcher.quantity import amount

_ABSENT_ACCOUNT = re.compile(r'serviceaccount "(?P<name>[^"]+)" not found')
_PRIORITY = re.compile(r"no PriorityClass with name (?P<name>\S+) was found")
_QUOTA = re.compile(
    r"exceeded quota: (?P<name>[^,]+), requested: (?P<asked>.*), used: (?P<used>.*), limited: (?P<hard>.*)"
)
_QUOTA_ASKS = re.compile(r"failed quota: (?P<name>[^:]+): must specify (?P<what>.*)")
_LIMITED = re.compile(r"(min|max)imum \S+ usage per (Container|Pod)|max limit to request ratio")
_WEBHOOK = re.compile(r'admission webhook "(?P<name>[^"]+)" denied the request:? ?(?P<said>.*)')
_POLICY = re.compile(r"ValidatingAdmissionPolicy '(?P<name>[^']+)'.* denied request: (?P<said>.*)")


def _refused(evidence: Evidence) -> Event | None:
    """The newest refusal of a pod, if no pod came after it."""
    if evidence.live or evidence.run.has_ended or evidence.run.state == "deleting":
        return None
    found = evidence.about(evidence.run.job, "FailedCreate")
    newest = evidence.newest
    if not found or (newest and moment(found[0].last) < moment(newest.manifest["metadata"]["creationTimestamp"])):
        return None
    return found[0]


def _said(event: Event) -> str:
    """What admission said, without the pod's made-up name."""
    return re.sub(r'^Error creating: (pods "[^"]*" is forbidden: )?', "", event.message)


def _account(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    match = _ABSENT_ACCOUNT.search(event.message) if event else None
    if not event or not match:
        return None
    return Found(
        f"its pods cannot be made: there is no ServiceAccount {match['name']} in namespace {evidence.run.namespace}",
        f"kubectl -n {evidence.run.namespace} create serviceaccount {match['name']} (kubectl apply -k k8s/ does), or "
        "name another in the profile: service_account",
        (event.line,),
    )


def _security(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    match = re.search(r'violates PodSecurity "([^"]+)": (.*)', event.message) if event else None
    if not event or not match:
        return None
    return Found(
        f"its pods are refused: they violate Pod Security {match[1]} of namespace {evidence.run.namespace}: {match[2]}",
        "submit what tunejob renders, which passes `restricted`; what changed the pod (a hand-edited manifest, an "
        "admission webhook) has to be undone",
        (event.line,),
    )


def _quota(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    if not event:
        return None
    if match := _QUOTA_ASKS.search(event.message):
        return Found(
            f"its pods are refused: ResourceQuota {match['name']} wants every pod to say {match['what']}",
            "name it in the spec's resources, or have a LimitRange fill it in",
            (event.line,),
        )
    match = _QUOTA.search(event.message)
    if not match:
        return None
    asked, used, hard = (_amounts(match[part]) for part in ("asked", "used", "hard"))
    tight = [what for what in hard if amount(asked[what]) + amount(used.get(what, "0")) > amount(hard[what])]
    never = [what for what in tight if amount(asked[what]) > amount(hard[what])]
    figures = ", ".join(f"{what} {asked[what]} asked, {used.get(what, '0')} of {hard[what]} in use" for what in tight)
    remedy = (
        f"lower the spec's resources below the quota ({', '.join(f'{what} {hard[what]}' for what in never)}), or have "
        "the quota raised"
        if never
        else f"it goes on when others end (tunejob list; kubectl -n {evidence.run.namespace} describe quota), or have "
        "the quota raised"
    )
    return Found(
        f"its pods are refused: they exceed ResourceQuota {match['name']} of namespace {evidence.run.namespace} "
        f"({figures})",
        remedy,
        (event.line,),
        is_lasting=bool(never),
    )


def _amounts(text: str) -> Mapping[str, str]:
    """``pods=1,requests.memory=64Mi``."""
    return dict(pair.split("=", 1) for pair in text.strip().split(",") if "=" in pair)


def _limits(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    if not event or not _LIMITED.search(event.message):
        return None
    names = ", ".join(one["metadata"]["name"] for one in evidence.limit_ranges)
    return Found(
        f"its pods are refused: they are outside the LimitRange {names + ' ' if names else ''}of namespace "
        f"{evidence.run.namespace}: {_said(event).strip('[]')}",
        f"change the spec's resources (kubectl -n {evidence.run.namespace} describe limitrange shows what is allowed)",
        (event.line,),
    )


def _webhook(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    match = event and (_WEBHOOK.search(event.message) or _POLICY.search(event.message))
    if not event or not match:
        return None
    return Found(
        f"its pods are refused by the admission policy {match['name']}: {match['said']}",
        "do as it says, or ask who runs the cluster",
        (event.line,),
    )


def _priority(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    match = _PRIORITY.search(event.message) if event else None
    if not event or not match:
        return None
    return Found(
        f"its pods are refused: there is no PriorityClass {match['name']}",
        "mend scheduling.priority in the spec (kubectl get priorityclasses)",
        (event.line,),
    )


def _other_refusal(evidence: Evidence) -> Found | None:
    event = _refused(evidence)
    if not event:
        return None
    return Found(
        f"its pods cannot be made: {_said(event)}",
        f"kubectl -n {evidence.run.namespace} describe job {evidence.run.job}; the cluster goes on trying",
        (event.line,),
        is_lasting=False,
    )


REFUSALS = (
    Rule("service-account", "the ServiceAccount of the pods is missing", _account, Code.REFUSED),
    Rule("pod-security", "the namespace's Pod Security level refuses the pods", _security, Code.REFUSED),
    Rule("quota", "a ResourceQuota refuses the pods, for now or for ever", _quota, Code.REFUSED),
    Rule("limit-range", "a LimitRange refuses the pods", _limits, Code.REFUSED),
    Rule("priority", "the PriorityClass is missing", _priority, Code.REFUSED),
    Rule("admission", "an admission webhook or policy refuses the pods", _webhook, Code.REFUSED),
    Rule("not-made", "the pods cannot be made, for another reason", _other_refusal, Code.REFUSED),
)
"""In the order in which they are asked."""
