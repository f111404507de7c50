"""What this account has to be allowed for each purpose, and which Role of ``k8s/`` grants it."""

from dataclasses import dataclass
from typing import Final

from launcher.kinds import (
    CONFIG_MAPS,
    CRON_JOBS,
    EVENTS,
    JOBS,
    LIMIT_RANGES,
    LOCAL_QUEUES,
    NAMESPACES,
    NODES,
    PODS,
    QUOTAS,
    SERVICE_ACCOUNTS,
    WORKLOADS,
    Kind,
)


@dataclass(frozen=True)
class Need:
    """One permission."""

    verbs: tuple[str, ...]
    kind: Kind
    subresource: str = ""

    @property
    def resource(self) -> str:
        """As RBAC writes it."""
        return self.kind.plural + (f"/{self.subresource}" if self.subresource else "")


PERMISSIONS: Final[dict[str, tuple[Need, ...]]] = {
    "look": (
        Need(("get", "list"), JOBS),
        Need(("get", "list"), CRON_JOBS),
        Need(("get", "list"), PODS),
        Need(("get",), PODS, "log"),
        Need(("get", "list"), CONFIG_MAPS),
        Need(("list",), EVENTS),
        Need(("list",), QUOTAS),
        Need(("list",), LIMIT_RANGES),
        Need(("get",), SERVICE_ACCOUNTS),
    ),
    "submit": (Need(("create", "patch", "delete"), JOBS), Need(("create", "patch", "delete"), CONFIG_MAPS)),
    "schedule": (Need(("create", "patch", "delete"), CRON_JOBS),),
}
"""What for -> the permissions it takes, as the Roles of ``k8s/`` grant them."""
QUEUEING: Final = (Need(("list",), LOCAL_QUEUES), Need(("list",), WORKLOADS))
"""What ``look`` takes besides where the profile names a queue."""
ROLES: Final = {"look": "tunejob-viewer", "submit": "tunejob-submitter", "schedule": "tunejob-scheduler"}
CLUSTER_WIDE: Final = NODES.plural
"""The one resource that is asked for and that no Role can grant; nothing depends on it."""

# Reading the namespace itself is asked of the server as a question about that namespace, so doctor does not ask it.
_GRANTED = PERMISSIONS | {"look": (*PERMISSIONS["look"], *QUEUEING, Need(("get",), NAMESPACES))}


def role_for(verb: str, resource: str) -> str | None:
    """The smallest Role that allows a verb on a resource (as RBAC writes it); None if none of ours does."""
    for purpose, needs in _GRANTED.items():
        if any(verb in need.verbs and resource == need.resource for need in needs):
            return ROLES[purpose]
    return None
