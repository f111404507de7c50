"""A proxy that goes wrong on demand: it stands between the store's client and a server, and counts what is asked."""

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Reply:
    """What a server says."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange:
    """One request under way; a fault decides what becomes of it."""

    def __init__(self, handler: BaseHTTPRequestHandler, server: tuple[str, int]) -> None:
        self._handler, self._server = handler, server
        self.method, self.path = handler.command, handler.path
        self.headers = dict(handler.headers.items())
        self.body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))

    def forward(self) -> Reply:
        """The server's own reply to the request as it is now."""
        connection = http.client.HTTPConnection(*self._server, timeout=60)
        try:
            connection.request(self.method, self.path, self.body, self.headers)
            answer = connection.getresponse()
            return Reply(answer.status, answer.getheaders(), answer.read())
        finally:
            connection.close()

    def begin(self, reply: Reply) -> None:
        """Sends the head of a reply, that of the whole body."""
        self._handler.send_response_only(reply.status)
        for name, value in reply.headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self._handler.send_header(name, value)
        length = next((value for name, value in reply.headers if name.lower() == "content-length"), None)
        self._handler.send_header(
            "Content-Length", length if self.method == "HEAD" and length else str(len(reply.body))
        )
        self._handler.end_headers()

    def write(self, data: bytes) -> None:
        """Sends a piece of the body."""
        self._handler.wfile.write(data)
        self._handler.wfile.flush()

    def send(self, reply: Reply) -> None:
        """Sends a whole reply."""
        self.begin(reply)
        if self.method != "HEAD":
            self.write(reply.body)

    def drop(self) -> None:
        """Cuts the connection."""
        self._handler.close_connection = True
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._handler.connection.close()


Fault = Callable[[Exchange], None]


@dataclass
class _Rule:
    method: str
    path: str
    fault: Fault
    times: int | None
    after: int

    def takes(self, exchange: Exchange) -> bool:
        """Whether this request is one of those the rule is for; counts it."""
        if not re.fullmatch(self.method, exchange.method) or not re.search(self.path, exchange.path):
            return False
        if self.after > 0:
            self.after -= 1
            return False
        if self.times is not None:
            self.times -= 1
            return self.times >= 0
        return True


@dataclass
class Proxy:
    """A proxy that runs."""

    url: str
    asked: list[str] = field(default_factory=list)
    """Method and path of every request."""
    headers: list[dict[str, str]] = field(default_factory=list)
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def on(self, method: str, path: str, fault: Fault, times: int | None = 1, after: int = 0) -> None:
        """Lets requests whose method and path match (regular expressions) go wrong; ``after`` so many went well."""
        self._rules.append(_Rule(method, path, fault, times, after))

    def heal(self) -> None:
        """Lets everything go well again."""
        self._rules.clear()

    def begin_anew(self) -> None:
        """Forgets rules and requests."""
        self.heal()
        self.asked.clear()
        self.headers.clear()

    def count(self, pattern: str) -> int:
        """Requests so far whose "METHOD PATH" matches."""
        return sum(bool(re.search(pattern, asked)) for asked in self.asked)

    def handle(self, exchange: Exchange) -> None:
        """Passes a request on, or lets it go wrong."""
        with self._lock:
            self.asked.append(f"{exchange.method} {exchange.path}")
            self.headers.append(exchange.headers)
            rule = next((rule for rule in list(self._rules) if rule.takes(exchange)), None)
        if rule is None:
            exchange.send(exchange.forward())
        else:
            rule.fault(exchange)


@contextmanager
def between(server_url: str, tls: ssl.SSLContext | None = None) -> Iterator[Proxy]:
    """A proxy before a server, until the block ends."""
    parts = urlsplit(server_url)
    server = (parts.hostname or "", parts.port or 0)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def handle_any(self) -> None:
            try:
                proxy.handle(Exchange(self, server))
            except OSError:  # the client went, or the fault cut the connection
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: object) -> None:
            """Says nothing: a handshake that a client breaks off is what some tests are about."""

        def finish_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:  # type: ignore[override]
            if tls is not None:
                request = tls.wrap_socket(request, server_side=True)
            super().finish_request(request, client_address)

    listener = Server(("127.0.0.1", 0), Handler)
    proxy = Proxy(f"{'https' if tls else 'http'}://127.0.0.1:{listener.server_address[1]}")
    threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield proxy
    finally:
        listener.shutdown()
        listener.server_close()


# Faults


def drop(exchange: Exchange) -> None:
    """The connection breaks before the server hears of it."""
    exchange.drop()


def lose_reply(exchange: Exchange) -> None:
    """The server does it, and nobody learns."""
    exchange.forward()
    exchange.drop()


def truncate(exchange: Exchange) -> None:
    """The connection breaks in the middle of the reply."""
    reply = exchange.forward()
    exchange.begin(reply)
    exchange.write(reply.body[: len(reply.body) // 2])
    exchange.drop()


def flipped(data: bytes) -> bytes:
    """The same with one bit wrong in the middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def flip_reply(exchange: Exchange) -> None:
    """A bit is wrong in the reply."""
    reply = exchange.forward()
    exchange.send(Reply(reply.status, reply.headers, flipped(reply.body)))


def flip_request(exchange: Exchange) -> None:
    """A bit is wrong in what the server gets."""
    exchange.body = flipped(exchange.body)
    exchange.send(exchange.forward())


def without(*names: str) -> Fault:
    """The server does not get some headers."""

    def fault(exchange: Exchange) -> None:
        exchange.headers = {name: value for name, value in exchange.headers.items() if name.lower() not in names}
        exchange.send(exchange.forward())

    return fault


def slowly(seconds: float) -> Fault:
    """The reply comes in eight pieces, with a pause before each."""

    def fault(exchange: Exchange) -> None:
        reply = exchange.forward()
        exchange.begin(reply)
        step = len(reply.body) // 8 + 1
        for start in range(0, len(reply.body), step):
            time.sleep(seconds)
            exchange.write(reply.body[start : start + step])

    return fault


def silence(seconds: float) -> Fault:
    """The reply's body does not come."""

    def fault(exchange: Exchange) -> None:
        exchange.begin(exchange.forward())
        time.sleep(seconds)
        exchange.drop()

    return fault


def stuck(seconds: float) -> Fault:
    """Nothing comes back, and the server never hears of it."""

    def fault(exchange: Exchange) -> None:
        time.sleep(seconds)
        exchange.drop()

    return fault


def answer(
    status: int, code: str, message: str = "", *, headers: dict[str, str] | None = None, clock: float = 0.0
) -> Fault:
    """The proxy answers by itself, as S3 would. ``clock``: seconds its clock is ahead."""

    def fault(exchange: Exchange) -> None:
        region = f"<Region>{headers['x-amz-bucket-region']}</Region>" if headers else ""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{region}</Error>".encode()
        fields = [("Content-Type", "application/xml"), ("Date", formatdate(time.time() + clock, usegmt=True))]
        exchange.send(Reply(status, [*fields, *(headers or {}).items()], b"" if exchange.method == "HEAD" else body))

    return fault
