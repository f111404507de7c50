"""Whether a pod fits what the namespace allows: ResourceQuota and LimitRange. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from launcher.labels import Manifest
from launcher.quantity import amount

_AT_ONCE = ("count/jobs.batch", "count/cronjobs.batch", "count/configmaps", "configmaps")
"""What is counted when a run is submitted; the rest is counted when its pod is made, and that is tried again."""
_OTHER_SCOPES = ("Terminating", "BestEffort", "CrossNamespacePodAffinity", "PriorityClass", "VolumeAttributesClass")
"""Scopes of quotas that may not take in our pods: they ask for memory, and only their Job has a deadline."""


@dataclass(frozen=True)
class Shortage:
    """One limit that stands against a run."""

    sentence: str
    is_lasting: bool
    """Whether it stands even if nothing else runs."""


def template_of(workload: Manifest) -> Manifest:
    """The pod template of a Job or CronJob."""
    spec = workload["spec"]
    spec = spec["jobTemplate"]["spec"] if workload["kind"] == "CronJob" else spec
    template: Manifest = spec["template"]
    return template


def needs(workload: Manifest) -> dict[str, Fraction]:
    """What one run takes of a quota, by the quota's own names."""
    spec = template_of(workload)["spec"]
    found = {"pods": Fraction(1), "count/pods": Fraction(1), "configmaps": Fraction(1), "count/configmaps": Fraction(1)}
    found["count/cronjobs.batch" if workload["kind"] == "CronJob" else "count/jobs.batch"] = Fraction(1)
    for side in ("requests", "limits"):
        for container in spec["containers"]:
            for name, quantity in (container.get("resources", {}).get(side) or {}).items():
                key = f"{side}.{name}"
                found[key] = found.get(key, Fraction(0)) + amount(quantity)
    for name in ("cpu", "memory", "ephemeral-storage"):
        if f"requests.{name}" in found:
            found[name] = found[f"requests.{name}"]
    for volume in spec.get("volumes") or []:
        if claim := volume.get("ephemeral", {}).get("volumeClaimTemplate", {}).get("spec"):
            found["requests.storage"] = amount(claim["resources"]["requests"]["storage"])
            found["persistentvolumeclaims"] = Fraction(1)
    return found


def short_of_quota(workload: Manifest, quotas: Sequence[Manifest]) -> Iterator[Shortage]:
    """Where a run does not fit, for now or for ever."""
    asked = needs(workload)
    for quota in quotas:
        spec, status = quota.get("spec", {}), quota.get("status") or {}
        scopes = [*(spec.get("scopes") or []), *_selected(spec)]
        if any(scope in _OTHER_SCOPES for scope in scopes):
            continue
        used = status.get("used") or {}
        for name, hard in (status.get("hard") or spec.get("hard") or {}).items():
            shortage = _short(quota["metadata"]["name"], name, asked.get(name), hard, str(used.get(name, "0")))
            if shortage:
                yield shortage


def _selected(spec: Mapping[str, Any]) -> list[str]:
    return [str(one.get("scopeName")) for one in (spec.get("scopeSelector") or {}).get("matchExpressions") or []]


def _short(quota: str, name: str, asked: Fraction | None, hard: str, used: str) -> Shortage | None:
    if asked is None or asked + amount(used) <= amount(hard):
        return None
    what = f"ResourceQuota {quota}: {name} {_written(name, asked)} asked"
    if asked > amount(hard):
        return Shortage(f"{what}, {hard} is all there is; lower resources in the spec, or have it raised", True)
    if name in _AT_ONCE:
        return Shortage(
            f"{what}, {used} of {hard} in use; delete finished runs (tunejob list), or have it raised", True
        )
    return Shortage(f"{what}, {used} of {hard} in use; its pod waits until others end", False)


def _written(name: str, number: Fraction) -> str:
    if name.endswith(("memory", "storage")):
        return f"{float(number) / 2**30:g}Gi" if number >= 2**30 else f"{float(number) / 2**20:g}Mi"
    return f"{float(number):g}"


def outside_of_limits(workload: Manifest, limit_ranges: Sequence[Manifest]) -> Iterator[str]:
    """A sentence for each bound of a LimitRange that a run's pod is outside of."""
    containers = template_of(workload)["spec"]["containers"]
    for one in limit_ranges:
        for limit in one.get("spec", {}).get("limits") or []:
            where = f"LimitRange {one['metadata']['name']}"
            if limit["type"] == "Container":
                for container in containers:
                    yield from _outside(where, "container", limit, container.get("resources", {}))
            elif limit["type"] == "Pod":
                yield from _outside(where, "pod", limit, _together(containers))


def _together(containers: Sequence[Manifest]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for side in ("requests", "limits"):
        sums: dict[str, Fraction] = {}
        for container in containers:
            for name, quantity in (container.get("resources", {}).get(side) or {}).items():
                sums[name] = sums.get(name, Fraction(0)) + amount(quantity)
        found[side] = {name: f"{float(number):.9f}" for name, number in sums.items()}
    return found


def _outside(where: str, what: str, limit: Mapping[str, Any], resources: Mapping[str, Any]) -> Iterator[str]:
    """The server compares a maximum with the limit, a minimum with the request."""
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for name, most in (limit.get("max") or {}).items():
        if name in limits and amount(limits[name]) > amount(most):
            asked = _written(name, amount(limits[name]))
            yield f"{where}: a {what} may have at most {most} of {name}, and this one's limit is {asked}"
    for name, least in (limit.get("min") or {}).items():
        if name in requests and amount(requests[name]) < amount(least):
            asked = _written(name, amount(requests[name]))
            yield f"{where}: a {what} has to ask for at least {least} of {name}, and this one asks for {asked}"
    for name, most in (limit.get("maxLimitRequestRatio") or {}).items():
        if name in requests and name in limits and amount(limits[name]) > amount(most) * amount(requests[name]):
            ratio = float(amount(limits[name]) / amount(requests[name]))
            yield f"{where}: limit and request of {name} may differ by a factor of {most}, and these by {ratio:g}"
