"""An API server out of memory, for measuring and for tests: what the launcher asks is answered and counted.

Jobs that are applied get a pod at once, which runs for a while and succeeds. What is owned goes with its last owner.
"""

import json
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launcher.labels import JOB_NAME, Manifest

_OBJECT = re.compile(
    r"/(?:api/v1|apis/[^/]+/[^/]+)(?:/namespaces/(?P<namespace>[^/]+))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+))?(?:/(?P<sub>[a-z]+))?$"
)
_LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
NAMESPACE = "bench"
Refusal = tuple[int, Manifest]
"""A status code, and the body that comes with it."""


class Objects:
    """What the server holds, and what it was asked."""

    def __init__(self, run_seconds: float) -> None:
        self.run_seconds = run_seconds
        self.asked: Counter[str] = Counter()
        """Requests since it was last cleared, as ``LIST jobs``."""
        self.refuse: Callable[[str, str], Refusal | None] = lambda asked, name: None
        """Asked before each request, as ``APPLY jobs`` (``DRY jobs`` for a dry run) and the object's name."""
        self.logs: dict[str, str] = {}
        """Of pods whose log is another than the usual one."""
        self._versions = 0
        self._held: dict[tuple[str, str], Manifest] = {}
        self._text: dict[tuple[str, str], bytes] = {}
        self._ends: dict[str, float] = {}
        self._lock = threading.Lock()
        self.put("namespaces", {"kind": "Namespace", "metadata": {"name": NAMESPACE}})
        self.put("serviceaccounts", {"kind": "ServiceAccount", "metadata": {"name": "tunejob"}})

    def put(self, plural: str, manifest: Manifest) -> Manifest:
        """Stores an object as the server would have it."""
        self._versions += 1
        metadata = {"namespace": NAMESPACE, "uid": secrets.token_hex(16), "generation": 1}
        metadata |= {"creationTimestamp": _now()} | manifest["metadata"] | {"resourceVersion": str(self._versions)}
        stored = manifest | {"metadata": metadata}
        key = plural, metadata["name"]
        self._held[key] = stored
        # Encoded once: the time of a list is to be the launcher's, not this server's.
        self._text[key] = json.dumps(stored).encode()
        return stored

    def names(self, plural: str) -> list[str]:
        """Of everything of a kind."""
        with self._lock:
            return sorted(name for kind, name in self._held if kind == plural)

    def get(self, plural: str, name: str) -> Manifest | None:
        """One object."""
        with self._lock:
            self._age()
            return self._held.get((plural, name))

    def page(self, plural: str, selector: str, first: int, limit: int) -> bytes:
        """Objects of a kind that a label selector takes, as a list of the API."""
        with self._lock:
            self._age()
            keys = [key for key in self._held if key[0] == plural and _takes(selector, self._held[key])]
        end = first + limit if limit else len(keys)
        more = str(end) if end < len(keys) else ""
        metadata = json.dumps({"resourceVersion": "1", "continue": more}).encode()
        items = b",".join(self._text[key] for key in keys[first:end])
        return b'{"apiVersion":"v1","kind":"List","metadata":' + metadata + b',"items":[' + items + b"]}"

    def apply(self, plural: str, manifest: Manifest, is_dry: bool) -> Manifest:
        """Makes an object, a Job with its pod; of one that is there it changes what is applied otherwise."""
        with self._lock:
            there = self._held.get((plural, manifest["metadata"]["name"]))
            if there:
                changed = there | manifest | {"metadata": there["metadata"] | manifest["metadata"]}
                return there if changed == there or is_dry else self.put(plural, changed)
            if is_dry:
                return manifest
            if plural != "jobs":
                return self.put(plural, manifest)
            self._ends[manifest["metadata"]["name"]] = time.monotonic() + self.run_seconds
            self.put("pods", pod(manifest["metadata"]["name"]))
            return self.put(plural, manifest | {"status": {"active": 1, "ready": 1, "startTime": _now()}})

    def merge(self, plural: str, name: str, patch: Manifest) -> Manifest:
        """Changes an object's metadata."""
        with self._lock:
            there = self._held[plural, name]
            return self.put(plural, there | {"metadata": there["metadata"] | patch.get("metadata", {})})

    def delete(self, plural: str, name: str, fixed: Mapping[str, str]) -> int:
        """Takes an object away, with all that is owned by it alone; gives the status code.

        Args:
            fixed: what its metadata has to be (the preconditions), else nothing is done.
        """
        with self._lock:
            there = self._held.get((plural, name))
            if there is None:
                return 404
            if any(there["metadata"].get(key) != value for key, value in fixed.items()):
                return 409
            self._take(plural, name)
            return 200

    def _take(self, plural: str, name: str) -> None:
        gone = self._held.pop((plural, name))["metadata"]["uid"]
        for key, one in list(self._held.items()):
            owners = one["metadata"].get("ownerReferences") or []
            left = [owner for owner in owners if owner["uid"] != gone]
            is_pod_of_it = key[0] == "pods" and (one["metadata"].get("labels") or {}).get(JOB_NAME) == name
            if is_pod_of_it or (owners and not left):
                self._take(*key)
            elif len(left) < len(owners):
                self.put(key[0], one | {"metadata": one["metadata"] | {"ownerReferences": left}})

    def _age(self) -> None:
        """Ends the Jobs whose time has come."""
        for name in [name for name, end in self._ends.items() if end < time.monotonic()]:
            del self._ends[name]
            self.put("jobs", self._held["jobs", name] | {"status": complete()})
            self.put("pods", pod(name, has_ended=True))

    def is_running(self, pod_name: str) -> bool:
        """Whether a pod is there and has not ended."""
        with self._lock:
            self._age()
            return self._held.get(("pods", pod_name), {}).get("status", {}).get("phase") == "Running"


def pod(job: str, has_ended: bool = False) -> Manifest:
    """The pod of a Job."""
    word = json.dumps({"code": 0, "name": "OK", "manifest_sha256": "0" * 64})
    ended = {"exitCode": 0, "reason": "Completed", "message": word, "startedAt": _now(), "finishedAt": _now()}
    state = {"terminated": ended} if has_ended else {"running": {"startedAt": _now()}}
    status = {"name": "tunejob", "ready": not has_ended, "restartCount": 0, "state": state}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{job}-x1y2z", "labels": {JOB_NAME: job}},
        "spec": {"nodeName": "node1", "containers": [{"name": "tunejob", "image": "tunejob"}]},
        "status": {"phase": "Succeeded" if has_ended else "Running", "containerStatuses": [status]},
    }


def complete() -> Manifest:
    """Status of a Job that is complete."""
    now = _now()
    condition = {"type": "Complete", "status": "True", "lastTransitionTime": now, "reason": "CompletionsReached"}
    return {"succeeded": 1, "startTime": now, "completionTime": now, "conditions": [condition]}


@contextmanager
def serving(objects: Objects) -> Iterator[str]:
    """Yields the server's address while the block runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(objects))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(objects: Objects) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # As the real server has it. Headers and body are two writes, and without this the second waits 40 ms for the
        # client's delayed acknowledgement of the first, at every request.
        disable_nagle_algorithm = True

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the terminal for the figures."""

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(url.query).items()}
            if url.path == "/version":
                objects.asked["GET version"] += 1
                return self._send({"major": "1", "minor": "37", "gitVersion": "v1.37.2"})
            plural, name, sub = self._target(url.path)
            if self._is_refused(f"{'LOG' if sub else 'GET' if name else 'LIST'} {plural}", name):
                return None
            if sub == "log":
                objects.asked["GET pods/log"] += 1
                return self._log(name, "follow" in query, query.get("timestamps") == "true")
            if name:
                return self._found("GET", plural, name)
            objects.asked[f"LIST {plural}"] += 1
            if wrong := wrong_selector(query.get("labelSelector", "")):
                return self._send(wrong, 400)
            first, limit = int(query.get("continue", 0)), int(query.get("limit", 0))
            return self._send_bytes(objects.page(plural, query.get("labelSelector", ""), first, limit))

        def do_PATCH(self) -> None:
            url = urlsplit(self.path)
            plural, name, _ = self._target(url.path)
            body = self._body()
            is_apply = "apply" in str(self.headers["Content-Type"])
            is_dry = "dryRun" in url.query
            objects.asked[f"{'APPLY' if is_apply else 'PATCH'} {plural}"] += 1
            if self._is_refused(f"{'DRY' if is_dry else 'APPLY' if is_apply else 'PATCH'} {plural}", name):
                return None
            if is_apply:
                return self._send(objects.apply(plural, body, is_dry))
            return self._send(objects.merge(plural, name, body))

        def do_POST(self) -> None:
            plural, _, _ = self._target(urlsplit(self.path).path)
            objects.asked[f"POST {plural}"] += 1
            self._send(self._body() | {"status": {"allowed": True}}, 201)

        def do_DELETE(self) -> None:
            body = self._body()
            plural, name, _ = self._target(urlsplit(self.path).path)
            objects.asked[f"DELETE {plural}"] += 1
            if not self._is_refused(f"DELETE {plural}", name):
                code = objects.delete(plural, name, body.get("preconditions") or {})
                self._send({"kind": "Status", "reason": "Conflict" if code == 409 else ""}, code)

        def _is_refused(self, asked: str, name: str) -> bool:
            """Whether the request got the answer that a test has for it."""
            refusal = objects.refuse(asked, name)
            if refusal:
                self._send(refusal[1], refusal[0])
            return refusal is not None

        def _target(self, path: str) -> tuple[str, str, str]:
            """Plural, name and subresource; the namespace itself is an object, too."""
            found = _OBJECT.match(path)
            if not found:
                return "unknown", "", ""
            return found["plural"], found["name"] or "", found["sub"] or ""

        def _found(self, verb: str, plural: str, name: str) -> None:
            objects.asked[f"{verb} {plural}"] += 1
            found = objects.get(plural, name)
            if found is None:
                details = {"name": name, "kind": plural}
                self._send({"kind": "Status", "reason": "NotFound", "message": "not found", "details": details}, 404)
            else:
                self._send(found)

        def _body(self) -> Manifest:
            found: Manifest = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
            return found

        def _send(self, value: Mapping[str, Any], status: int = 200) -> None:
            self._send_bytes(json.dumps(value).encode(), status)

        def _send_bytes(self, body: bytes, status: int = 200, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _log(self, pod_name: str, is_followed: bool, has_times: bool) -> None:
            """Two lines of progress, and an end when the pod has one."""
            self.send_response(200)
            self.send_header("Content-Type", "text/plain")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            if pod_name in objects.logs:
                self.wfile.write(objects.logs[pod_name].encode())
                return
            for step in (1, 2):
                line = json.dumps({"phase": "train", "step": step, "steps": 2, "loss": 1.0 / step})
                prefix = f"2026-01-01T00:00:0{step}.000000000Z " if has_times else ""
                self.wfile.write(f"{prefix}{line}\n".encode())
            self.wfile.flush()
            while is_followed and objects.is_running(pod_name):
                time.sleep(0.1)

    return Handler


def wrong_selector(selector: str) -> Manifest | None:
    """What the API server answers, with 400, to a label selector whose value is no label's; None for a right one."""
    for part in filter(None, selector.split(",")):
        key, _, value = part.partition("=")
        if not _LABEL.fullmatch(value):
            message = f'unable to parse requirement: values[0][{key}]: Invalid value: "{value}": a valid label must be'
            return {"kind": "Status", "code": 400, "reason": "BadRequest", "message": message}
    return None


def _takes(selector: str, manifest: Manifest) -> bool:
    labels = manifest["metadata"].get("labels") or {}
    for part in filter(None, selector.split(",")):
        key, is_valued, value = part.partition("=")
        if (labels.get(key) != value) if is_valued else (key not in labels):
            return False
    return True


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
