"""A WSGI server on the standard library: HTTP/1.1 with keep-alive.

One thread, the poller, waits for all clients, and reads what they send until a request is whole.
Then it has a thread while the application works, or is one of a
group that the application answers together.

It is kept instead of http.server, which is lenient where two readers of a message may differ and
takes three times as long to parse a request (83 against 26 microseconds). It reads a whole request
before it answers, so that no answer can put a kept connection out of step (RFC 9112)."""

import contextlib
import errno
import functools
import logging
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable

import http_limits
import http_message
from http_application import Application, Environ, ErrorLog, WsgiApp
from http_connection import Closed, Connection
from http_groups import Group, Groups
from http_message import Refused
from http_threads import Threads

log = logging.getLogger("http")

MAX_CONNECTIONS = 512
CLOSING_AT_ONCE = 64  # over the cap: told to close, and about to end
BACKLOG = 256
EVENTS = 64  # of one look at the clients
TURN_SECONDS = 0.1
EXPIRE_SECONDS = 1
READABLE_ONCE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT


class Server:
    """Listens at once; serve() answers from threads of its own until close().

    authorize gets the environ of a head and returns how the request is refused, before its body is
    read, or None. At max_connections the connection that is idle for the longest is closed for a
    new one: its client has not sent a whole head, or has had its last answer.

    A connection belongs to one thread at a time: to the poller while its client is to send, to
    another while a request is answered. watch() gives it back.
    """

    def __init__(
        self,
        host: str,
        port: int,
        app: WsgiApp,
        authorize: Callable[[Environ], Refused | None] | None = None,
        max_connections: int = MAX_CONNECTIONS,
        group: Group | None = None,
    ) -> None:
        self.errors = ErrorLog()
        self.application = Application(app, self.errors)
        self.authorize = authorize
        self.max_connections = max_connections
        self.stopping = threading.Event()
        self.closed = threading.Event()
        self.transit = http_limits.Transit()
        self.work = http_limits.Work()
        self.threads = Threads("http")
        self.groups = Groups(self, group)
        self.lock = threading.Lock()  # guards the next one
        self.idle: dict[Connection, None] = {}  # the one that is idle for the longest first
        self.connections: dict[int, Connection] = {}  # by file descriptor; only the poller adds
        self.accept_at = 0.0  # of time.monotonic(): not before, for lack of file descriptors
        self.expire_at = 0.0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        self.listener.setblocking(False)
        self.server_address = self.listener.getsockname()
        self.epoll = select.epoll()
        self.epoll.register(self.listener, select.EPOLLIN)
        self.base: Environ = {
            "SERVER_NAME": self.server_address[0],
            "SERVER_PORT": str(self.server_address[1]),
            "SCRIPT_NAME": "",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.errors": self.errors,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }

    def serve(self) -> None:
        """Start to accept connections; returns at once."""
        http_limits.share_arena()
        threading.Thread(target=self.poll, name="http", daemon=True).start()
        self.groups.start()

    def poll(self) -> None:
        """Look after all clients until close() is done, and wait for none: the poller's body."""
        while not self.closed.is_set():
            try:
                self.turn()
            except Exception:  # without this thread the service is deaf
                log.error("the HTTP server failed, it goes on")
                self.errors.write(traceback.format_exc())
                time.sleep(TURN_SECONDS)

    def turn(self) -> None:
        """Accept and read what there is now, and pass on the requests that are whole."""
        group: list[Connection] = []
        try:
            for descriptor, _ in self.epoll.poll(TURN_SECONDS, EVENTS):
                connection = self.connections.get(descriptor)
                if connection is None:
                    self.accept()
                elif self.read(connection):
                    group.append(connection)
        finally:  # these are watched no more: whatever happens, they are answered
            if group:
                self.groups.gathered.put(group)
        now = time.monotonic()
        if self.accept_at and now > self.accept_at:
            self.accept_at = 0.0
            self.listen(select.EPOLLIN)
        if now > self.expire_at:
            self.expire_at = now + EXPIRE_SECONDS
            for each in list(self.connections.values()):
                if each.is_watched and now > each.deadline:
                    self.end(each, "too slow")

    def listen(self, events: int) -> None:
        """Look for new connections, or do not for now."""
        with contextlib.suppress(OSError, ValueError):  # closed meanwhile
            self.epoll.modify(self.listener, events)

    def accept(self) -> None:
        """Take a new connection, or answer it with a 503 when too many are open. Without a file
        descriptor for it, close an idle one."""
        try:
            socket_, address = self.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # its client has gone
        except OSError as error:
            if not self.stopping.is_set():
                log.warning("a new connection was not accepted: %s", error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.end_longest_idle()
            self.accept_at = time.monotonic() + TURN_SECONDS
            return self.listen(0)
        socket_.setblocking(False)
        connection = Connection(self, socket_, address)
        if not self.admit(connection):
            return self.refuse(socket_)
        self.connections[socket_.fileno()] = connection
        try:
            # An answer is one write: waiting for more (Nagle) would only delay it.
            socket_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.epoll.register(socket_, READABLE_ONCE)
        except Exception:
            self.fail(connection)
        if self.stopping.is_set():  # close() may not have seen it
            connection.end_soon()

    def admit(self, connection: Connection) -> bool:
        """Count a new connection as idle, in place of another one at the cap; tell whether it may
        stay."""
        if len(self.connections) >= self.max_connections + CLOSING_AT_ONCE:
            return False
        if len(self.connections) >= self.max_connections and not self.end_longest_idle():
            return False
        self.mark_idle(connection)
        return True

    def end_longest_idle(self) -> bool:
        """End the connection that is idle for the longest; return False if none is."""
        with self.lock:
            longest = next(iter(self.idle), None)
            if longest is not None:
                del self.idle[longest]
        if longest is not None:
            longest.end_soon()
        return longest is not None

    def refuse(self, request: socket.socket) -> None:
        """Answer a new connection with a 503, as far as that takes no time, and close it."""
        reason = f"too many open connections, expected at most {self.max_connections}"
        with request, contextlib.suppress(OSError):
            request.sendall(http_message.refusal(reason))
            request.shutdown(socket.SHUT_WR)
            request.recv(64 * 1024)  # closing over unread bytes would reset the connection

    def read(self, connection: Connection) -> bool:
        """Read what a client has sent; tell whether that is a request for a group. Another that
        is whole gets a thread."""
        connection.is_watched = False
        try:
            connection.receive()
            if not connection.has_request():
                self.watch(connection)
            elif self.groups.takes(connection):
                return True
            else:
                self.start(connection)
        except (Closed, OSError) as error:
            self.end(connection, str(error))
        except Exception:
            self.fail(connection)
        return False

    def watch(self, connection: Connection) -> None:
        """Give a connection to the poller, until its client has sent more."""
        connection.is_watched = True
        self.epoll.modify(connection.socket, READABLE_ONCE)

    def start(self, connection: Connection) -> None:
        """Give a connection a thread."""
        try:
            self.threads.run(functools.partial(self.run, connection))
        except RuntimeError as error:
            log.warning("a request was refused: %s", error)  # no more threads
            if connection.unsent:
                return self.end(connection, "half answered")
            self.forget(connection)
            self.refuse(connection.socket)

    def run(self, connection: Connection, may_wait: bool = True) -> None:
        """Answer what a client has sent: in a thread that may wait for it, or else as far as that
        goes without."""
        try:
            while True:
                if not connection.unsent:
                    connection.answer()
                connection.send(may_wait)
                if not connection.unsent:
                    if not (connection.keeps and self.mark_idle(connection)):
                        return self.end(connection, "answered")
                    if not connection.has_request():
                        return self.watch(connection)
                if not may_wait:
                    return self.start(connection)
        except (Closed, OSError) as error:
            self.end(connection, str(error))
        except Exception:
            self.fail(connection)

    def fail(self, connection: Connection) -> None:
        """Log an exception that nobody has expected, and close the connection."""
        log.error("connection from %s failed", connection.address)
        self.errors.write(traceback.format_exc())
        self.end(connection, "failed")

    def mark_busy(self, connection: Connection) -> None:
        """Note that a connection has a request under way."""
        with self.lock:
            self.idle.pop(connection, None)

    def mark_idle(self, connection: Connection) -> bool:
        """Note that a connection waits for its client; tell whether the server goes on."""
        with self.lock:
            self.idle[connection] = None
        return not self.stopping.is_set()

    def end(self, connection: Connection, reason: str) -> None:
        """Close a connection."""
        log.debug("connection from %s ended: %.200a", connection.address, reason)
        self.forget(connection)
        with connection.socket, contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_WR)

    def forget(self, connection: Connection) -> None:
        """Give back the place of a connection, before the number of its socket can be another's."""
        with self.lock:
            self.idle.pop(connection, None)
        self.connections.pop(connection.socket.fileno(), None)

    def close(self, seconds: float) -> None:
        """Stop accepting, let what clients have sent be answered, at most so many seconds."""
        self.stopping.set()
        self.epoll.unregister(self.listener)
        self.listener.close()
        with self.lock:
            idle = list(self.idle)
        for connection in idle:
            connection.end_soon()
        deadline = time.monotonic() + seconds
        while self.connections and time.monotonic() < deadline:
            time.sleep(0.01)
        self.closed.set()
