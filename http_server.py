"""A WSGI server on the standard library: HTTP/1.1 with keep-alive, a thread per connection.

wsgiref's own server answers one HTTP/1.0 request per connection; this one reads the whole request
first, so that no answer, early or late, can put a kept connection out of step (RFC 9112)."""

import contextlib
import functools
import io
import json
import logging
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any
from urllib.parse import unquote

log = logging.getLogger("http")

MAX_HEAD_BYTES = 32 * 1024
MAX_BODY_BYTES = 16 * 1024 * 1024
# A body takes six times its size while it is parsed and stored: large ones wait for each other.
LARGE_BODY_BYTES = 1024 * 1024
LARGE_AT_ONCE = 4
MAX_CONNECTIONS = 512
IDLE_SECONDS = 75  # a kept connection without a request
HEAD_SECONDS = 10  # from the first byte of a request to the end of its head
BODY_SECONDS = 60
SEND_SECONDS = 30
RECEIVE_BYTES = 64 * 1024

REQUEST_LINE = re.compile(r"([A-Z]+) (\S+) HTTP/1\.([01])")
HEADER = re.compile(r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*(.*?)[ \t]*")


class Refused(Exception):
    """A request that is answered before the application sees it; the connection closes after."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Closed(Exception):
    """The client went away or sent nothing in time; nobody waits for an answer."""


class Connection(socketserver.BaseRequestHandler):
    """One client connection: requests one after another until either side closes."""

    server: "Server"
    request: socket.socket

    def setup(self) -> None:
        """Send at once: an answer is one write, so waiting for more (Nagle) only delays it."""
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = b""  # bytes of the next request that came with the last one
        self.base = {
            "REMOTE_ADDR": self.client_address[0],
            "SERVER_NAME": self.server.server_address[0],
            "SERVER_PORT": str(self.server.server_address[1]),
            "SCRIPT_NAME": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def handle(self) -> None:
        """Answer requests until one says close, an error makes the rest unreadable, or idle."""
        try:
            keep = True
            while keep and not self.server.stopping.is_set():
                if not self.received:
                    self.receive(time.monotonic() + IDLE_SECONDS)
                self.server.busy.add(self)
                keep = self.answer()
                self.server.busy.discard(self)
        except (Closed, OSError) as error:
            log.debug("connection from %s ended: %s", self.client_address, error)
        finally:
            self.server.busy.discard(self)

    def answer(self) -> bool:
        """Read one request, run the application, send its answer; say whether to go on."""
        try:
            environ = self.read_head()
            size = body_size(environ)
            with self.server.large if size > LARGE_BODY_BYTES else contextlib.nullcontext():
                environ["wsgi.input"] = io.BytesIO(self.read_body(environ, size))
                status, headers, body = run(self.server.app, environ)
        except Refused as refused:
            body = json.dumps({"error": str(refused)}).encode()
            headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
            self.send(refused.status, headers, body, keep=False)
            self.drain()
            return False
        keep = wants_more(environ) and not self.server.stopping.is_set()
        self.send(status, headers, b"" if environ["REQUEST_METHOD"] == "HEAD" else body, keep)
        return keep

    def receive(self, deadline: float) -> None:
        """Append what the client sends next to self.received; raise Closed after the deadline."""
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise Closed("too slow")
        self.request.settimeout(seconds)
        data = self.request.recv(RECEIVE_BYTES)
        if not data:
            raise Closed("closed by the client")
        self.received += data

    def read_head(self) -> dict[str, Any]:
        """Return the next request's WSGI environ, without its body."""
        deadline = time.monotonic() + HEAD_SECONDS
        while (end := self.received.find(b"\r\n\r\n")) < 0 and len(self.received) <= MAX_HEAD_BYTES:
            self.receive(deadline)
        if not 0 <= end <= MAX_HEAD_BYTES:
            raise Refused("431 Request Header Fields Too Large", "the head is over 32 KiB")
        head, self.received = self.received[:end], self.received[end + 4 :]
        return self.base | parse_head(head.decode("latin-1"))

    def read_body(self, environ: dict[str, Any], size: int) -> bytes:
        """Return the request's whole body, saying 100 Continue to a client that waits for it."""
        if len(self.received) < size and environ.get("HTTP_EXPECT", "").lower() == "100-continue":
            self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = time.monotonic() + BODY_SECONDS
        parts, missing = [self.received[:size]], size - len(self.received)
        self.received = self.received[size:]
        while missing > 0:
            self.receive(deadline)
            parts.append(self.received[:missing])
            missing, self.received = missing - len(self.received), self.received[missing:]
        return b"".join(parts)

    def send(self, status: str, headers: list[tuple[str, str]], body: bytes, keep: bool) -> None:
        """Send one answer in one write."""
        lines = [f"HTTP/1.1 {status}", f"Date: {http_date(int(time.time()))}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines.append("Connection: keep-alive\r\n\r\n" if keep else "Connection: close\r\n\r\n")
        self.request.settimeout(SEND_SECONDS)
        self.request.sendall("\r\n".join(lines).encode("latin-1") + body)

    def drain(self) -> None:
        """Read on for a moment after a refusal: closing over unread bytes resets the connection,
        and the client would see that instead of the answer."""
        self.request.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 2
        for _ in range(1024):
            self.received = b""
            self.receive(deadline)


def parse_head(head: str) -> dict[str, Any]:
    """Turn a request's head into WSGI variables; raise Refused if it is not HTTP/1.0 or 1.1."""
    first, *lines = head.split("\r\n")
    match = REQUEST_LINE.fullmatch(first)
    if match is None:
        raise Refused("400 Bad Request", "expected a request line such as GET /path HTTP/1.1")
    method, target, minor = match.groups()
    if target.startswith("http://"):  # absolute form, from a client that believes us a proxy
        target = "/" + target[7:].partition("/")[2]
    path, _, query = target.partition("?")
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": unquote(path, "latin-1") if "%" in path else path,
        "QUERY_STRING": query,
        "SERVER_PROTOCOL": f"HTTP/1.{minor}",
    }
    for line in lines:
        match = HEADER.fullmatch(line)
        if match is None:
            raise Refused("400 Bad Request", "expected header lines of the form Name: value")
        key = match[1].upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = f"HTTP_{key}"
        if key == "CONTENT_LENGTH" and environ.get(key, match[2]) != match[2]:
            raise Refused("400 Bad Request", "expected one Content-Length")
        environ[key] = match[2]
    return environ


def body_size(environ: dict[str, Any]) -> int:
    """Return how many bytes of body follow the head; raise Refused if they cannot be read."""
    if "HTTP_TRANSFER_ENCODING" in environ:
        raise Refused("411 Length Required", "expected a Content-Length, not a chunked body")
    length = environ.get("CONTENT_LENGTH", "0")
    if not (length.isascii() and length.isdigit()):
        raise Refused("400 Bad Request", "Content-Length: expected a number of bytes")
    size = int(length) if len(length) < 20 else MAX_BODY_BYTES + 1
    if size > MAX_BODY_BYTES:
        raise Refused("413 Content Too Large", "expected a body of at most 16 MiB")
    return size


def wants_more(environ: dict[str, Any]) -> bool:
    """Tell whether the client keeps the connection."""
    connection = environ.get("HTTP_CONNECTION", "").lower()
    if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
        return "keep-alive" in connection
    return "close" not in connection


def run(app: Callable[..., Any], environ: dict[str, Any]) -> tuple[str, list, bytes]:
    """Call a WSGI application and collect its whole answer; 500 in JSON if it raises."""
    answer: list[Any] = []

    def start_response(status: str, headers: list, exc_info: Any = None) -> None:
        answer[:] = status, headers

    try:
        chunks = app(environ, start_response)
        body = b"".join(chunks)
        if hasattr(chunks, "close"):
            chunks.close()
        status, headers = answer
    except Exception:
        log.exception("%s %s failed", environ["REQUEST_METHOD"], environ["PATH_INFO"])
        status, body = "500 Internal Server Error", b'{"error": "internal error, see the log"}'
        headers = [("Content-Type", "application/json")]
    if not any(name.lower() == "content-length" for name, _ in headers):
        headers = [*headers, ("Content-Length", str(len(body)))]
    return status, headers, body


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """Return the Date header's value, made once a second."""
    return formatdate(second, usegmt=True)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens at once; serve() answers from threads of its own until close()."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, host: str, port: int, app: Callable[..., Any]) -> None:
        self.app = app
        self.stopping = threading.Event()
        self.busy: set[Connection] = set()  # connections with a request under way
        self.large = threading.BoundedSemaphore(LARGE_AT_ONCE)
        self.places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Connection)

    def serve(self) -> None:
        """Start to accept connections; returns at once."""
        threading.Thread(target=self.serve_forever, args=(0.1,), name="http", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection its thread, or a 503 when too many are open."""
        if self.places.acquire(blocking=False):
            thread = threading.Thread(
                target=self.process_request_thread,
                args=(request, client_address),
                name=f"http-{client_address[1]}",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError:  # no more threads: the server closes the connection
                self.places.release()
                raise
            return
        body = b'{"error": "too many open connections, expected at most %d"}' % MAX_CONNECTIONS
        with request:
            request.settimeout(1)
            request.sendall(
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body
            )

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection's thread; the other connections go on."""
        log.exception("connection from %s failed", client_address)

    def close(self, seconds: float) -> None:
        """Stop accepting, let the requests under way be answered, at most so many seconds."""
        self.stopping.set()
        self.shutdown()
        self.server_close()
        deadline = time.monotonic() + seconds
        while self.busy and time.monotonic() < deadline:
            time.sleep(0.01)
