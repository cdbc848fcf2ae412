"""One client connection of the HTTP server: reads requests and sends answers, one after another, in
a thread of its own."""

import contextlib
import functools
import io
import json
import select
import socket
import time
from email.utils import formatdate
from typing import TYPE_CHECKING, Any

import http_limits
import http_message
from http_message import Refused

if TYPE_CHECKING:
    from http_server import Server

IDLE_SECONDS = 75  # a kept connection without a request
HEAD_SECONDS = 10  # from the first byte of a request to the end of its head
BODY_SECONDS = 60
SEND_SECONDS = 30
DRAIN_SECONDS = 10
DRAIN_SILENCE_SECONDS = 2
DRAIN_BYTES = 64 * 1024 * 1024
RECEIVE_BYTES = 64 * 1024

Environ = dict[str, Any]
Answer = tuple[str, list[tuple[str, str]], bytes]


class Closed(Exception):
    """The client went away or sent nothing in time; nobody waits for an answer."""


class Connection:
    """One client connection: requests one after another until either side closes."""

    def __init__(self, server: "Server", socket_: socket.socket, address: Any) -> None:
        self.server = server
        self.socket = socket_
        self.address = address
        self.received = b""  # bytes of the next request that came with the last one
        self.upload: http_limits.Transfer | None = None  # the request's body, once it is large
        self.is_last = False  # the server wants no request after the one under way
        self.base = server.base | {"REMOTE_ADDR": address[0], "tasks.is_gone": self.is_gone}

    def answer_requests(self) -> None:
        """Answer requests until one says close, or an error makes the rest unreadable. Raise Closed
        or OSError if the client has gone."""
        # An answer is one write: waiting for more (Nagle) would only delay it.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while self.answer() and self.server.mark_idle(self):
            pass

    def end_soon(self) -> None:
        """Let the thread answer what the client has sent already, then close; for any thread."""
        self.is_last = True
        with contextlib.suppress(OSError):  # closed meanwhile
            self.socket.shutdown(socket.SHUT_RD)  # what is in the socket can still be read

    def is_gone(self) -> bool:
        """Tell whether the client has closed, for an application that takes its time."""
        poller = select.poll()
        try:
            poller.register(self.socket, select.POLLRDHUP)
            return bool(poller.poll(0))
        except (OSError, ValueError):  # closed meanwhile
            return True

    def answer(self) -> bool:
        """Read one request, run the application, send its answer; say whether to go on."""
        environ: Environ = {"REQUEST_METHOD": ""}
        try:
            environ = self.read_head()
            status, headers, content = self.handle(environ)
            keep = True
        except Refused as refused:
            content = json.dumps({"error": str(refused)}).encode()
            headers = [("Content-Type", "application/json"), *refused.headers]
            headers.append(("Content-Length", str(len(content))))
            status, keep = refused.status, refused.keep
        more = keep and http_message.keeps_connection(environ) and not self.is_last
        more = more and not self.server.stopping.is_set()
        self.send(status, headers, b"" if environ["REQUEST_METHOD"] == "HEAD" else content, more)
        if not keep:
            self.drain()
        return more

    def handle(self, environ: Environ) -> Answer:
        """Return the application's answer; the request's body is out of memory then."""
        body = http_message.body_of(environ)
        if self.server.authorize is not None:
            refused = self.server.authorize(environ)
            if refused is not None:
                refused.keep = body.done
                raise refused
        try:
            size = self.read_body(environ, body)
            if self.upload is None:
                return self.server.call(environ)
            with self.server.work.room(size):
                return self.server.call(environ)
        finally:
            environ.pop("wsgi.input", None)  # Bottle keeps the environ until the next request
            if self.upload is not None:
                self.server.transit.end(self.upload)
                self.upload = None

    def receive(self, deadline: float) -> None:
        """Append what the client sends next to self.received; raise Closed after the deadline."""
        self.socket.settimeout(time_left(deadline))
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise Closed("closed by the client")
        self.received += data

    def read_head(self) -> Environ:
        """Return the next request's WSGI environ, without its body."""
        if not self.received:
            self.receive(time.monotonic() + IDLE_SECONDS)
        deadline, limit = time.monotonic() + HEAD_SECONDS, http_message.MAX_HEAD_BYTES
        while (end := self.received.find(b"\r\n\r\n")) < 0 and len(self.received) <= limit:
            self.receive(deadline)
        self.server.mark_busy(self)
        if not 0 <= end <= limit:
            raise Refused("431 Request Header Fields Too Large", "the head is over 32 KiB")
        head, self.received = self.received[:end], self.received[end + 4 :]
        return self.base | http_message.parse_head(head.decode("latin-1"))

    def read_body(self, environ: Environ, body: http_message.Body) -> int:
        """Read the whole body into the environ, as one whose size is known; return that size."""
        if not body.done and not self.received and http_message.expects_continue(environ):
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        deadline = time.monotonic() + BODY_SECONDS
        content, size = io.BytesIO(), 0
        while not body.done:
            piece, self.received = body.decode(self.received)
            size += content.write(piece)
            if size > http_limits.SMALL_BYTES:
                self.count(len(piece), size)
            if not body.done:
                self.receive_body(deadline)
        if self.upload is not None:
            self.server.transit.complete(self.upload)
            content.getvalue()  # cuts the buffer to its size: read() returns it without a copy
        content.seek(0)
        environ["wsgi.input"] = content
        if environ.pop("HTTP_TRANSFER_ENCODING", None):
            environ["CONTENT_LENGTH"] = str(size)
        return size

    def count(self, arrived: int, size: int) -> None:
        """Count what has arrived of a large body, all of it when it becomes large; may wait."""
        if self.upload is None:
            self.upload = self.server.transit.begin_upload(self.socket)
            arrived = size
        self.server.transit.take(self.upload, arrived)

    def receive_body(self, deadline: float) -> None:
        """Receive more of a body; raise Refused if the server has closed it as too slow."""
        try:
            self.receive(deadline)
        except Closed:
            if self.upload is not None and self.upload.is_shed:
                raise http_limits.too_slow() from None
            raise

    def send(self, status: str, headers: list[tuple[str, str]], body: bytes, more: bool) -> None:
        """Send one answer: a small one in one write, a large one without a copy of it."""
        lines = [f"HTTP/1.1 {status}", f"Date: {http_date(int(time.time()))}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines.append("Connection: keep-alive\r\n\r\n" if more else "Connection: close\r\n\r\n")
        head = "\r\n".join(lines).encode("latin-1")
        self.socket.settimeout(SEND_SECONDS)
        if len(body) <= http_limits.SMALL_BYTES:
            self.socket.sendall(head + body)
            return
        deadline, view = time.monotonic() + SEND_SECONDS, memoryview(body)
        answer = self.server.transit.begin_answer(self.socket, len(body))
        try:
            self.socket.sendall(head)
            while view:
                self.socket.settimeout(time_left(deadline))
                sent = self.socket.send(view)
                answer.advance(sent)
                view = view[sent:]
        finally:
            self.server.transit.end(answer)

    def drain(self) -> None:
        """Read on for a moment after a refusal: closing over unread bytes resets the connection,
        and the client would see that instead of the answer."""
        self.socket.shutdown(socket.SHUT_WR)
        self.server.mark_idle(self)
        deadline, drained = time.monotonic() + DRAIN_SECONDS, 0
        while not self.is_last and drained < DRAIN_BYTES:
            self.received = b""
            self.receive(min(deadline, time.monotonic() + DRAIN_SILENCE_SECONDS))
            drained += len(self.received)


def time_left(deadline: float) -> float:
    """Return the seconds until a deadline; raise Closed after it."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise Closed("too slow")
    return seconds


@functools.lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """Return the Date header's value, made once a second."""
    return formatdate(second, usegmt=True)
