"""One client connection of the HTTP server: reads requests and sends answers, one after another."""

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
from http_application import Answer, Environ
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


class Closed(Exception):
    """The client went away or sent nothing in time; nobody waits for an answer."""


class Connection:
    """One client connection: requests one after another until either side closes. Its socket does
    not wait, but for what a thread of the connection's own waits for."""

    def __init__(self, server: "Server", socket_: socket.socket, address: Any) -> None:
        self.server = server
        self.socket = socket_
        self.address = address
        self.received = b""  # what is not read yet of what the client has sent
        self.environ: Environ | None = (
            None  # of the request that is under way, once its head is there
        )
        self.body: http_message.Body = http_message.NO_BODY
        self.refused: Refused | None = None
        self.upload: http_limits.Transfer | None = None  # the request's body, once it is large
        self.unsent = b""  # of its answer
        self.unsent_body = b""  # the same, if that is large
        self.drains = False  # after the answer
        self.keeps = True  # after the answer
        self.is_last = False  # the server wants no request after the one under way
        self.is_watched = True  # the poller waits for the client
        self.deadline = time.monotonic() + IDLE_SECONDS  # for that
        self.base = server.base | {"REMOTE_ADDR": address[0], "tasks.is_gone": self.is_gone}

    def end_soon(self) -> None:
        """Let what the client has sent already be answered, then close; for any thread."""
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

    def receive(self) -> None:
        """Append what the client has sent to self.received; raise Closed if it sends no more."""
        try:
            data = self.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise Closed("closed by the client")
        if not self.received and self.environ is None:
            self.deadline = time.monotonic() + HEAD_SECONDS
        self.received += data

    def receive_until(self, deadline: float) -> None:
        """Wait for more of what the client sends; raise Closed after the deadline."""
        self.socket.settimeout(time_left(deadline))
        self.receive()

    def has_request(self) -> bool:
        """Read a head, if there is one; tell whether there is something to answer. What is still to
        come of a large body, or of one that the client holds back, is read by answer()."""
        if self.environ is None and self.refused is None:
            try:
                self.read_head()
            except Refused as refused:
                self.refused = refused
        if self.environ is None or self.refused is not None or self.is_whole():
            return self.environ is not None or self.refused is not None
        is_small = 0 < self.body.missing <= http_limits.SMALL_BYTES
        return not is_small or http_message.expects_continue(self.environ)

    def is_whole(self) -> bool:
        """Tell whether a request can be answered that has been read to the end of its body."""
        is_read = self.body.done or 0 < self.body.missing <= len(self.received)
        return self.refused is None and is_read and isinstance(self.body, http_message.SizedBody)

    def take_whole(self) -> Environ:
        """Return a request that is whole, with its body."""
        assert self.environ is not None
        self.read_body(self.environ)
        return self.environ

    def read_head(self) -> None:
        """Read the next request's head into self.environ, if it is there; raise Refused if it is
        none, or not to be served."""
        end, limit = self.received.find(b"\r\n\r\n"), http_message.MAX_HEAD_BYTES
        if end < 0 and len(self.received) <= limit:
            return
        self.server.mark_busy(self)
        if not 0 <= end <= limit:
            raise Refused("431 Request Header Fields Too Large", "the head is over 32 KiB")
        head, self.received = self.received[:end], self.received[end + 4 :]
        self.environ = self.base | http_message.parse_head(head.decode("latin-1"))
        self.body = http_message.body_of(self.environ)
        self.deadline = time.monotonic() + BODY_SECONDS
        if self.server.authorize is not None:
            refused = self.server.authorize(self.environ)
            if refused is not None:
                refused.keep = self.body.done
                raise refused

    def answer(self) -> None:
        """Read the rest of a request and run the application; send() sends the answer."""
        environ = self.environ or {"REQUEST_METHOD": ""}
        try:
            if self.refused is not None:
                raise self.refused
            status, headers, content = self.handle(environ)
            keep = True
        except Refused as refused:
            content = json.dumps({"error": str(refused)}).encode()
            headers = [("Content-Type", "application/json"), *refused.headers]
            headers.append(("Content-Length", str(len(content))))
            status, keep = refused.status, refused.keep
        self.reply(status, headers, content, keep)

    def reply(
        self, status: str, headers: list[tuple[str, str]], content: bytes, keep: bool = True
    ) -> None:
        """Make an answer for send(). Unless keep, not all of the request has been read."""
        environ = self.environ or {"REQUEST_METHOD": ""}
        self.keeps = keep and http_message.keeps_connection(environ) and not self.is_last
        self.keeps = self.keeps and not self.server.stopping.is_set()
        self.drains = not keep
        lines = [f"HTTP/1.1 {status}", f"Date: {http_date(int(time.time()))}"]
        lines += [f"{name}: {value}" for name, value in headers]
        lines.append(f"Connection: {'keep-alive' if self.keeps else 'close'}\r\n\r\n")
        self.unsent = "\r\n".join(lines).encode("latin-1")
        if environ["REQUEST_METHOD"] == "HEAD":
            pass
        elif len(content) <= http_limits.SMALL_BYTES:
            self.unsent += content
        else:
            self.unsent_body = content
        self.environ = self.refused = None

    def handle(self, environ: Environ) -> Answer:
        """Return the application's answer; the request's body is out of memory then."""
        try:
            size = 0 if "wsgi.input" in environ else self.read_body(environ)
            if self.upload is None:
                return self.server.application.call(environ)
            with self.server.work.room(size):
                return self.server.application.call(environ)
        finally:
            environ.pop("wsgi.input", None)  # Bottle keeps the environ until the next request
            if self.upload is not None:
                self.server.transit.end(self.upload)
                self.upload = None

    def read_body(self, environ: Environ) -> int:
        """Read the whole body into the environ, as one whose size is known; return that size."""
        if not self.body.done and not self.received and http_message.expects_continue(environ):
            self.socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        content, size = io.BytesIO(), 0
        while not self.body.done:
            piece, self.received = self.body.decode(self.received)
            size += content.write(piece)
            if size > http_limits.SMALL_BYTES:
                self.count(len(piece), size)
            if not self.body.done:
                self.receive_body()
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

    def receive_body(self) -> None:
        """Receive more of a body; raise Refused if the server has closed it as too slow."""
        try:
            self.receive_until(self.deadline)
        except Closed:
            if self.upload is not None and self.upload.is_shed:
                raise http_limits.too_slow() from None
            raise

    def send(self, may_wait: bool) -> None:
        """Send the answer: a small one in one write, a large one without a copy of it. Unless it
        may wait, some may stay in self.unsent."""
        if not self.unsent_body:
            with contextlib.suppress(BlockingIOError):
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        if self.unsent and not may_wait:
            return
        if self.unsent_body:
            self.send_large()
        elif self.unsent:
            self.socket.settimeout(SEND_SECONDS)
            self.socket.sendall(self.unsent)
        self.unsent = self.unsent_body = b""
        if self.drains:
            self.drain()
        if self.socket.gettimeout():
            self.socket.settimeout(0)
        self.deadline = time.monotonic() + (HEAD_SECONDS if self.received else IDLE_SECONDS)

    def send_large(self) -> None:
        """Send an answer that is counted while it is on its way."""
        deadline, view = time.monotonic() + SEND_SECONDS, memoryview(self.unsent_body)
        answer = self.server.transit.begin_answer(self.socket, len(view))
        try:
            self.socket.settimeout(SEND_SECONDS)
            self.socket.sendall(self.unsent)
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
            self.receive_until(min(deadline, time.monotonic() + DRAIN_SILENCE_SECONDS))
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
