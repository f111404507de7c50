"""An API server that says what a test wrote down, over real HTTP; for what a real one does not do on request."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

from launcher.cluster import Cluster, open_cluster
from tests.bench.stub import wrong_selector


@dataclass(frozen=True)
class Answer:
    """What one request gets."""

    status: int = 200
    body: Any = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    breaks: bool = False
    """The connection is closed instead of an answer."""


def refusal(code: int, message: str, reason: str = "", **details: str) -> Answer:
    """A Status object as the API server sends it."""
    body = {"kind": "Status", "apiVersion": "v1", "code": code, "message": message, "reason": reason}
    return Answer(code, body | {"details": details})


@dataclass
class Script:
    """The answers of one server, and what it was asked."""

    answers: dict[str, list[Answer]]
    """``METHOD path`` (without the query) -> answers in turn, the last one for ever."""
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path with query, body."""

    def next(self, method: str, path: str, body: Any) -> Answer:
        """Notes a request, and what it gets."""
        self.asked.append((method, path, body))
        selector = parse_qs(urlsplit(path).query).get("labelSelector", [""])[-1]
        if wrong := wrong_selector(selector):
            return Answer(400, wrong)
        waiting = self.answers.get(f"{method} {path.partition('?')[0]}")
        if not waiting:
            return refusal(404, f"nothing written down for {method} {path}", "NotFound")
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]


@contextmanager
def served(folder: Path, answers: Mapping[str, Answer | list[Answer]]) -> Iterator[tuple[Cluster, Script]]:
    """The door to a server with these answers, in namespace ``team``."""
    script = Script({key: list(value) if isinstance(value, list) else [value] for key, value in answers.items()})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            text = self.rfile.read(length)
            answer = script.next(self.command, self.path, json.loads(text) if text else None)
            if answer.breaks:
                self.close_connection = True
                return
            data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = do_DELETE = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    file = folder / "kubeconfig"
    file.write_text(kubeconfig(f"http://127.0.0.1:{server.server_port}"), encoding="utf-8")
    try:
        yield open_cluster("stub", "team", file), script
    finally:
        server.shutdown()
        server.server_close()


def kubeconfig(address: str) -> str:
    """A kubeconfig whose context ``stub`` is at an address."""
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "stub", "cluster": {"server": address}}],
            "users": [{"name": "stub", "user": {"token": "a-token-of-the-test"}}],
            "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "stub"}}],
            "current-context": "stub",
        }
    )
