"""The kinds of object that the launcher asks for, and where the API has them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of object: where the API has it."""

    name: str
    api: str
    plural: str
    is_namespaced: bool = True

    @property
    def group(self) -> str:
        """API group; empty for the core."""
        return self.api.rpartition("/")[0]


JOBS = Kind("Job", "batch/v1", "jobs")
CRON_JOBS = Kind("CronJob", "batch/v1", "cronjobs")
CONFIG_MAPS = Kind("ConfigMap", "v1", "configmaps")
PODS = Kind("Pod", "v1", "pods")
EVENTS = Kind("Event", "v1", "events")
SECRETS = Kind("Secret", "v1", "secrets")
SERVICE_ACCOUNTS = Kind("ServiceAccount", "v1", "serviceaccounts")
QUOTAS = Kind("ResourceQuota", "v1", "resourcequotas")
LIMIT_RANGES = Kind("LimitRange", "v1", "limitranges")
NAMESPACES = Kind("Namespace", "v1", "namespaces", is_namespaced=False)
NODES = Kind("Node", "v1", "nodes", is_namespaced=False)
LOCAL_QUEUES = Kind("LocalQueue", "kueue.x-k8s.io/v1beta1", "localqueues")
WORKLOADS = Kind("Workload", "kueue.x-k8s.io/v1beta1", "workloads")
ACCESS = Kind("SelfSubjectAccessReview", "authorization.k8s.io/v1", "selfsubjectaccessreviews", is_namespaced=False)
