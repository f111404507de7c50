"""The only door to the API server: the official client's ``ApiClient`` for kubeconfig, authentication and transport;
bodies are plain JSON.

Every call is idempotent, so that a reply that got lost is asked for again.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

from launcher.answers import Absent, NotStarted, Transient, Unable, masked, of_answer, of_failure, said
from launcher.codes import ClusterUnreachable
from launcher.kinds import ACCESS, PODS, Kind
from launcher.labels import FIELD_MANAGER, Manifest

T = TypeVar("T")

PAGE = 500
"""Objects per answer of a list."""
TIMEOUT = (5.0, 30.0)
"""Seconds to connect, and between two bytes of an answer."""
LOG_TIMEOUT = (5.0, 60.0)
TRIES = 3

_WARNING = re.compile(r'299 \S+ "((?:[^"\\]|\\.)*)"')
_OWN_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


@dataclass
class Cluster:
    """One namespace of one API server. Every call raises ClusterUnreachable, NotAllowed, Refused and NotFound."""

    client: Any
    """``kubernetes.client.ApiClient``."""
    namespace: str
    context: str = ""
    """Of the kubeconfig; empty within a pod."""
    warnings: list[str] = field(default_factory=list)
    """What the server warned of so far, each once."""
    requests: int = 0
    """Asked so far."""

    @property
    def server(self) -> str:
        """The API server's address, as people may see it."""
        return masked(str(self.client.configuration.host))

    @property
    def place(self) -> str:
        """Where this is, as people call it."""
        return f"context {self.context}, namespace {self.namespace}" if self.context else f"namespace {self.namespace}"

    def get(self, kind: Kind, name: str) -> Manifest | None:
        """One object; None if it is proven not to be there."""
        try:
            return self._json("GET", self._path(kind, name))
        except Absent:
            return None

    def list(self, kind: Kind, selector: str = "", fields: str = "") -> list[Manifest]:
        """Every object that the selectors take, in pages; an empty list also where the namespace is not there."""
        found: list[Manifest] = []
        query = {"limit": str(PAGE), "labelSelector": selector, "fieldSelector": fields}
        while True:
            page = self._json("GET", self._path(kind), query)
            found += page.get("items") or []
            query["continue"] = page.get("metadata", {}).get("continue") or ""
            if not query["continue"]:
                return found

    def apply(self, kind: Kind, manifest: Mapping[str, Any], dry_run: bool = False) -> Manifest:
        """Server-side apply, never forced: makes the object, or proves that it is as the manifest has it.

        Raises:
            Refused: another field manager has another value, a field is immutable, or admission says no.
        """
        query = {"fieldManager": FIELD_MANAGER, "dryRun": "All" if dry_run else ""}
        path = self._path(kind, manifest["metadata"]["name"])
        return self._json("PATCH", path, query, dict(manifest), "application/apply-patch+yaml")

    def merge(self, kind: Kind, name: str, patch: Mapping[str, Any]) -> Manifest:
        """JSON merge patch (RFC 7396); a ``metadata.uid`` in it makes it fail for another object of the name."""
        query = {"fieldManager": FIELD_MANAGER}
        return self._json("PATCH", self._path(kind, name), query, dict(patch), "application/merge-patch+json")

    def delete(self, kind: Kind, name: str, uid: str = "", version: str = "", propagation: str = "Foreground") -> bool:
        """Asks for an object's end; False if it was not there.

        Args:
            uid: keeps its successor of the same name safe.
            version: keeps it safe if anybody has changed it since.

        Raises:
            Refused: it is another, or was changed.
        """
        options: Manifest = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if fixed := {key: value for key, value in (("uid", uid), ("resourceVersion", version)) if value}:
            options["preconditions"] = fixed
        try:
            self._json("DELETE", self._path(kind, name), body=options)
        except Absent:
            return False
        return True

    def log(
        self,
        pod: str,
        container: str = "tunejob",
        follow: bool = False,
        since_time: str = "",
        tail: int | None = None,
        timestamps: bool = False,
    ) -> Iterator[str]:
        """Lines of a container's log, without their ends; nothing if it has not started. Ends with the stream.

        Args:
            follow: goes on while the container runs.
            since_time: RFC 3339; lines from then on, the second of it included.
            tail: only so many lines at the end.
            timestamps: each line begins with its time and a space.
        """
        query = {"container": container, "sinceTime": since_time}
        query |= {"follow": "true"} if follow else {}
        query |= {"timestamps": "true"} if timestamps else {}
        query |= {"tailLines": str(tail)} if tail is not None else {}
        try:
            response = self._retried(
                lambda: self._open("GET", f"{self._path(PODS, pod)}/log", query, timeout=LOG_TIMEOUT)
            )
        except (Absent, NotStarted):
            return
        yield from self._lines(response)

    def allowed(self, verb: str, kind: Kind, subresource: str = "") -> bool:
        """Whether this account may do it here."""
        attributes = {"verb": verb, "group": kind.group, "resource": kind.plural, "subresource": subresource}
        if kind.is_namespaced:
            attributes["namespace"] = self.namespace
        body = {"apiVersion": ACCESS.api, "kind": ACCESS.name, "spec": {"resourceAttributes": attributes}}
        return bool(self._json("POST", self._path(ACCESS), body=body)["status"]["allowed"])

    def version(self) -> tuple[int, int]:
        """The server's version, for instance (1, 37)."""
        told = self._json("GET", "/version")
        return int(told["major"]), int(re.match(r"\d+", told["minor"])[0])  # type: ignore[index]

    def _path(self, kind: Kind, name: str = "") -> str:
        root = f"/apis/{kind.api}" if kind.group else f"/api/{kind.api}"
        where = f"/namespaces/{quote(self.namespace, safe='')}" if kind.is_namespaced else ""
        return f"{root}{where}/{kind.plural}" + (f"/{quote(name, safe='')}" if name else "")

    def _json(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content: str = "application/json",
    ) -> Manifest:
        def ask() -> Manifest:
            response = self._open(method, path, query or {}, body, content)
            try:
                found: Manifest = json.loads(response.read())
            except Exception as error:  # the connection broke, or a proxy answered in between
                raise of_failure(error) from error
            return found

        return self._retried(ask)

    def _retried(self, ask: Callable[[], T]) -> T:
        from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception_type, stop_after_attempt

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return max(0.5 * 2.0**state.attempt_number, min(float(getattr(error, "after", 0.0)), 10.0))

        trying = Retrying(
            retry=retry_if_exception_type(Transient), stop=stop_after_attempt(TRIES), wait=pause, reraise=False
        )
        try:
            return trying(ask)
        except RetryError as error:
            cause = error.last_attempt.exception()
            if isinstance(cause, Unable):
                raise ClusterUnreachable(
                    f"{self.server}: the cluster cannot do it now ({cause}), asked {TRIES} times; try again later"
                ) from None
            raise ClusterUnreachable(
                f"{self.server}: the cluster does not answer ({cause}); is it up, and is this machine on its network? "
                "kubectl cluster-info asks the same"
            ) from None

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Manifest | None = None,
        content: str = "application/json",
        timeout: tuple[float, float] = TIMEOUT,
    ) -> Any:
        """One request; the answer's body is not read yet."""
        self.requests += 1
        headers = {"Accept": "application/json, */*", "Content-Type": content, "User-Agent": "tunejob"}
        asked = urlencode({key: value for key, value in query.items() if value})
        url = f"{self.client.configuration.host}{path}" + (f"?{asked}" if asked else "")
        try:
            self.client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            response = self.client.call_api(method, url, headers, body=body, _request_timeout=timeout)
        except Exception as error:
            raise of_failure(error) from error
        self._hear(response.headers)
        if response.status >= 300:
            raise of_answer(self.server, self.namespace, response, path)
        return response

    def _hear(self, headers: Any) -> None:
        told = headers.getlist("Warning") if hasattr(headers, "getlist") else []
        for quoted in _WARNING.findall(", ".join(told)):
            if (text := quoted.replace('\\"', '"')) not in self.warnings:
                self.warnings.append(text)

    def _lines(self, response: Any) -> Iterator[str]:
        rest = b""
        try:
            for chunk in response.response.stream(65536, decode_content=False):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from (line.decode("utf-8", errors="replace") for line in lines)
        except GeneratorExit:
            response.response.close()
            raise
        except Exception as error:
            raise ClusterUnreachable(f"{self.server}: the log's connection broke ({said(error)})") from error
        if rest:
            yield rest.decode("utf-8", errors="replace")


def open_cluster(context: str | None = None, namespace: str | None = None, kubeconfig: Path | None = None) -> Cluster:
    """The cluster of a kubeconfig context (KUBECONFIG, ~/.kube/config); without one, that which this pod runs in.

    Args:
        context: left out: the current one.
        namespace: left out: the context's, else ``default``.
        kubeconfig: left out: KUBECONFIG, else ~/.kube/config.

    Raises:
        ClusterUnreachable: the client is not installed, or there is no such context.
    """
    try:
        from kubernetes import config
        from kubernetes.client import ApiClient, Configuration
    except ModuleNotFoundError as error:
        raise ClusterUnreachable(f"a cluster needs the package {error.name}: pip install tunejob brings it") from None
    settings = Configuration()
    # Our own retries know what may be asked again; the client's would hide for long that a server is away.
    settings.retries = False
    file = str(kubeconfig) if kubeconfig else os.environ.get("KUBECONFIG") or "~/.kube/config"
    try:
        config.load_kube_config(file, context=context, client_configuration=settings, persist_config=False)
        context, usual = _chosen(config, file, context)
    except Exception as error:
        if context or kubeconfig or "KUBERNETES_SERVICE_HOST" not in os.environ:
            raise ClusterUnreachable(_no_config(file, context, said(error))) from None
        config.load_incluster_config(client_configuration=settings)
        usual = _OWN_NAMESPACE.read_text(encoding="utf-8").strip()
    return Cluster(ApiClient(settings), namespace or usual or "default", context or "")


def _chosen(config: Any, file: str, context: str | None) -> tuple[str, str]:
    """The context, and its usual namespace."""
    contexts, current = config.list_kube_config_contexts(file)
    chosen = next((one for one in contexts if one["name"] == context), current)
    return str(chosen["name"]), str(chosen.get("context", {}).get("namespace") or "")


def _no_config(file: str, context: str | None, said: str) -> str:
    what = f"no context {context} that can be used" if context else "no usable current context"
    return f"{file}: {what} ({said}); kubectl config get-contexts lists them, and the profile's `context` chooses one"
