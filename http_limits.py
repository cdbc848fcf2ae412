"""Bounds on the memory of the HTTP server: bytes of large bodies and answers on their way, and of
large bodies in the application. Both are taken from threads, one for each connection."""

import collections
import contextlib
import ctypes
import socket
import threading
import time
from collections.abc import Iterator

from http_message import MAX_BODY_BYTES, Refused

SMALL_BYTES = 64 * 1024  # bodies and answers up to this are not counted
TRANSIT_BYTES = 64 * 1024 * 1024
WORK_BYTES = 8 * 1024 * 1024
# Even a small text takes a kilobyte as a task, so a large body of them weighs at least this.
WORK_LEAST_BYTES = 1024 * 1024
SLOW_BYTES_PER_SECOND = 64 * 1024
SLOW_SECONDS = 1  # below that rate for about so long is slow
WAIT_SECONDS = 5  # for room in transit, then 503
WORK_WAIT_SECONDS = 20  # for room in the application, then 503
LOOK_SECONDS = 0.1  # how soon the first that waits notices who has become slow
M_ARENA_MAX = -8  # mallopt(3)


def share_arena() -> None:
    """Let all threads of the process allocate from one arena. glibc would give them eight for each
    core, each of which keeps the largest memory that its threads have ever had at once."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def no_room(reason: str, keep: bool = False) -> Refused:
    """Return the refusal of a request for which there is no memory now."""
    return Refused("503 Service Unavailable", reason, ("Retry-After", "1"), keep=keep)


class Transfer:
    """A large body on its way in or a large answer on its way out, and the bytes that it holds."""

    def __init__(self, connection: socket.socket, lock: threading.Lock, is_upload: bool) -> None:
        self.connection = connection
        self.is_upload = is_upload
        self.held = 0
        self.due = time.monotonic() + SLOW_SECONDS  # later than this without progress is slow
        self.waits = False
        self.is_shed = False
        self.turn = threading.Condition(lock)

    def advance(self, size: int) -> None:
        """Note that the client has sent or read so many bytes."""
        paid = self.due + size / SLOW_BYTES_PER_SECOND
        self.due = min(paid, time.monotonic() + SLOW_SECONDS)


class Transit:
    """The bytes of large bodies and answers in memory, counted as they arrive and not as announced.

    When they are too many, the slowest client is closed, so that no slow one keeps another waiting.
    If none is slow, uploads wait for each other. The last MAX_BODY_BYTES are for the eldest of them
    alone: it can always go on, and gives its bytes back after that.
    """

    def __init__(self, size: int = TRANSIT_BYTES) -> None:
        self.size = size
        self.free = size
        self.lock = threading.Lock()
        self.transfers: dict[Transfer, None] = {}  # waiting for their clients, the eldest first

    def begin_upload(self, connection: socket.socket) -> Transfer:
        """Return a new upload that holds nothing yet."""
        upload = Transfer(connection, self.lock, True)
        with self.lock:
            self.transfers[upload] = None
        return upload

    def begin_answer(self, connection: socket.socket, size: int) -> Transfer:
        """Return a new answer. It is in memory already, so only slow ones make room for it."""
        answer = Transfer(connection, self.lock, False)
        with self.lock:
            self.transfers[answer] = None
            answer.held = size
            self.free -= size
            while self.free < 0 and self.shed_slowest():
                pass
        return answer

    def take(self, upload: Transfer, size: int) -> None:
        """Count bytes of an upload that have arrived; raise Refused if there is no room in time, or
        if others needed the room of this upload."""
        upload.advance(size)
        with self.lock:
            if self.free < size + MAX_BODY_BYTES:
                self.wait(upload, size)
            if upload.is_shed:
                raise too_slow()
            self.free -= size
            upload.held += size

    def wait(self, upload: Transfer, size: int) -> None:
        """Make room for an upload, or wait for it; called with the lock held."""
        deadline = time.monotonic() + WAIT_SECONDS
        upload.waits = True
        try:
            while not upload.is_shed and not self.fits(upload, size):
                leads = upload is self.first_waiting()
                if leads and self.shed_slowest():
                    continue
                seconds = deadline - time.monotonic()
                if seconds <= 0:
                    raise no_room("too many large bodies at once")
                upload.turn.wait(min(seconds, LOOK_SECONDS) if leads else seconds)
        finally:
            upload.waits = False
            upload.due = time.monotonic() + SLOW_SECONDS
            self.wake()

    def fits(self, upload: Transfer, size: int) -> bool:
        """Tell whether an upload may take so many bytes now."""
        eldest = next((transfer for transfer in self.transfers if transfer.is_upload), None)
        return self.free >= size + (0 if upload is eldest else MAX_BODY_BYTES)

    def first_waiting(self) -> Transfer | None:
        """Return the eldest upload that waits for room."""
        return next((transfer for transfer in self.transfers if transfer.waits), None)

    def wake(self) -> None:
        """Let the eldest upload that waits look again; it wakes the next one when it has gone."""
        if (first := self.first_waiting()) is not None:
            first.turn.notify()

    def shed_slowest(self) -> bool:
        """Close the transfer that is furthest behind; return False if none is slow."""
        now = time.monotonic()
        slow = [
            transfer for transfer in self.transfers if not transfer.waits and transfer.due < now
        ]
        if not slow:
            return False
        slowest = min(slow, key=lambda transfer: transfer.due)
        slowest.is_shed = True
        self.give_back(slowest)
        how = socket.SHUT_RD if slowest.is_upload else socket.SHUT_RDWR
        with contextlib.suppress(OSError):  # the client is gone
            slowest.connection.shutdown(how)  # ends its thread's wait for the client
        return True

    def give_back(self, transfer: Transfer) -> None:
        """Count the bytes of a transfer as free; called with the lock held."""
        self.transfers.pop(transfer, None)
        self.free += transfer.held
        transfer.held = 0

    def complete(self, upload: Transfer) -> None:
        """Note that an upload does not wait for its client any more; it holds its bytes still."""
        with self.lock:
            self.transfers.pop(upload, None)
            self.wake()

    def end(self, transfer: Transfer) -> None:
        """Give back what a transfer holds."""
        with self.lock:
            self.give_back(transfer)
            self.wake()


def too_slow() -> Refused:
    """Return the refusal of an upload whose room others needed."""
    return no_room("the body came too slowly while memory was short")


class Work:
    """The bytes of large bodies in the application, each of which takes many times its size while
    it is parsed, stored and answered. First come, first served; nobody waits for a client here."""

    def __init__(self, size: int = WORK_BYTES) -> None:
        self.size = size
        self.free = size
        self.lock = threading.Lock()
        self.queue: collections.deque[tuple[int, threading.Lock]] = collections.deque()

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Hold room for a body of so many bytes, all there is for a larger one; raise Refused if
        there is none in time."""
        weight = min(max(size, WORK_LEAST_BYTES), self.size)
        self.enter(weight)
        try:
            yield
        finally:
            with self.lock:
                self.free += weight
                self.admit()

    def enter(self, weight: int) -> None:
        """Wait for room."""
        gate = threading.Lock()  # held until somebody opens it
        gate.acquire()
        with self.lock:
            self.queue.append((weight, gate))
            self.admit()
        if gate.acquire(timeout=WORK_WAIT_SECONDS):
            return
        with self.lock:
            if (weight, gate) in self.queue:  # else it was let in at the last moment
                self.queue.remove((weight, gate))
                self.admit()
                raise no_room("too many large bodies at once", keep=True)

    def admit(self) -> None:
        """Let in the first ones that fit; called with the lock held."""
        while self.queue and self.queue[0][0] <= self.free:
            weight, gate = self.queue.popleft()
            self.free -= weight
            gate.release()
