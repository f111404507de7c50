"""What an answer of the API server's means, or that there was none: a sentence, and the class that decides the code."""

import json
import re
from collections.abc import Mapping
from typing import Any

from launcher.codes import ClusterUnreachable, LauncherError, NotAllowed, NotFound, Refused
from launcher.permissions import CLUSTER_WIDE, role_for

_RBAC = re.compile(r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]*)"')
_OF_A_LOG = re.compile(r"/pods/[^/]+/log")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")


class Transient(Exception):
    """No answer, or one that asks to come again."""

    def __init__(self, what: str, after: float = 0.0) -> None:
        super().__init__(what)
        self.after = after


class Unable(Transient):
    """An answer that it cannot be done now."""


class Absent(NotFound):
    """A proven 404 of the object that was asked for."""


class NotStarted(LauncherError):
    """The container has no log yet."""


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    reason = getattr(error, "reason", None)
    text = str(reason if isinstance(reason, Exception | str) else error) or type(error).__name__
    return masked(" ".join(re.sub(r"<[^>]* object at 0x[0-9a-f]+>:? ?", "", text).split()))


def masked(text: str) -> str:
    """A text without the names and passwords that an address may carry."""
    return _LOGIN.sub("***@", text)


def of_failure(error: Exception) -> Exception:
    """No answer is asked for again; a wrong certificate or a failing login program is not."""
    text = said(error)
    if "certificate" in text.lower():
        return ClusterUnreachable(f"the API server's certificate is not trusted ({text}); check the kubeconfig's CA")
    if "exec" in text.lower() and "ConfigException" in type(error).__name__:
        return ClusterUnreachable(f"the kubeconfig's login program failed ({text}); log in again")
    return Transient(text)


def of_answer(server: str, namespace: str, response: Any, path: str) -> Exception:
    """What an answer of 300 or more means."""
    status = _status(response)
    message = " ".join(str(status.get("message") or response.reason or "no reason given").split())
    code, reason = int(response.status), status.get("reason", "")
    if code == 401:
        return ClusterUnreachable(
            f"{server}: the credentials of the kubeconfig are not accepted (401); log in to the cluster again"
        )
    if code == 403:
        return _forbidden(namespace, message)
    if code == 404:
        return _absent(server, namespace, status, message, path)
    if code == 429 or code >= 500:
        after = str(response.headers.get("Retry-After") or "")
        return Unable(f"{code}: {message}", float(after) if after.isdecimal() else 0.0)
    if code == 400 and _OF_A_LOG.search(path):
        return NotStarted(message)
    if code == 409 and reason == "Conflict":
        return Refused(f"{message}; another manager has changed it since: compare with kubectl diff")
    return Refused(f"the cluster refuses it: {message}")


def _forbidden(namespace: str, message: str) -> LauncherError:
    """RBAC is a missing permission; admission and quota stand in the way of what may otherwise be done."""
    denied = _RBAC.search(message)
    if denied is None:
        return Refused(f"namespace {namespace} refuses it: {message}")
    what = f"{denied['user']} may not {denied['verb']} {denied['resource']}"
    if denied["resource"] == CLUSTER_WIDE:
        return NotAllowed(f"{what}, which are cluster-wide: no Role grants it, and no run needs it")
    role = role_for(denied["verb"], denied["resource"])
    remedy = (
        f"ask for a RoleBinding to the role {role}: k8s/ of the project has it"
        if role
        else "ask who runs the cluster: no role of k8s/ grants it"
    )
    return NotAllowed(f"{what} in namespace {namespace}; {remedy}")


def _absent(server: str, namespace: str, status: Mapping[str, Any], message: str, path: str) -> LauncherError:
    """The object is not there; its namespace is not there; or the server does not know such a kind."""
    details = status.get("details") or {}
    if details.get("kind") == "namespaces":
        return no_namespace(server, namespace)
    return Absent(f"{path}: {message}")


def no_namespace(server: str, namespace: str) -> NotFound:
    """The namespace is proven not to be there."""
    return NotFound(
        f"no namespace {namespace} on {server}: name another in the profile, or have it made (kubectl apply -k k8s/)"
    )


def _status(response: Any) -> Mapping[str, Any]:
    try:
        found = json.loads(response.read())
    except Exception:  # not the API server's own answer
        return {}
    return found if isinstance(found, dict) else {}
