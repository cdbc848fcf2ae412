"""One worker process as the consumer sees it: its pipes, what it was fed, and how it ends. Only the
pool's thread uses it."""

import collections
import contextlib
import json
import json.encoder
import logging
import os
import pathlib
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import process
from entry import Entry
from task import Report, storable

log = logging.getLogger("worker")


def program(value: str) -> list[str]:
    """Return the words of a command whose program can be found."""
    words = shlex.split(value)
    if not words or shutil.which(words[0]) is None:
        raise ValueError("expected a program that can be run, and its arguments")
    return words


HANDLER = process.setting("HANDLER", "", str)
WORKER: list[str] = process.setting("WORKER", [], program)
IMITATION = {
    "PROCESSING_SECONDS": str(process.setting("PROCESSING_SECONDS", 0.1, process.number(0, 10**6))),
    "FAILURE_RATE": str(process.setting("FAILURE_RATE", 0.1, process.number(0, 1))),
}
# -P: modules of this project are not the user's.
COMMAND = WORKER or [sys.executable, "-P", str(pathlib.Path(__file__).with_name("worker.py"))]
READY_SECONDS = 0.5  # a program of WORKER that lives for so long, or says so, is ready
KILL_SECONDS = 5  # from SIGTERM to SIGKILL
SILENT_SECONDS = 1  # from the end of its stdout to the end of the process
quote = json.encoder.encode_basestring_ascii  # in ASCII: some languages end lines at U+2028
MAX_LINE_BYTES = 1024 * 1024
READ_BYTES = 64 * 1024
LOG_BYTES_A_SECOND = 64 * 1024
MAX_LOG_LINE_BYTES = 1000


class Garbage(Exception):
    """A worker wrote what is no outcome of its task; the text is what that fails with."""


def tied(command: list[str]) -> list[str]:
    """Return the command that is killed when its consumer dies, even by SIGKILL. The kernel watches
    the thread that started it: the pool's, which lives as long as the process."""
    if shutil.which("setpriv") is None:
        return command  # it still ends with its stdin
    return ["setpriv", "--pdeathsig=SIGKILL", "--", *command]


class WorkerProcess:
    """A worker process; its own session, so that signals to the consumer's group spare it."""

    def __init__(self) -> None:
        """Start it; raise OSError if there is no process or descriptor for it."""
        self.tickets: socket.socket | None = None
        self.unclaimed: socket.socket | None = None  # our copy of the worker's end
        command, passed = COMMAND, []
        if not WORKER:
            self.tickets, self.unclaimed = socket.socketpair()
            passed = [self.unclaimed.fileno()]
            command = [*COMMAND, str(passed[0])]
        self.process = subprocess.Popen(
            tied(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=passed,
            env=os.environ | IMITATION,
            start_new_session=True,
        )
        pipes = (self.process.stdin, self.process.stdout, self.process.stderr)
        self.stdin, self.stdout, self.stderr = (pipe.fileno() for pipe in pipes if pipe)
        for descriptor in (self.stdin, self.stdout, self.stderr):
            os.set_blocking(descriptor, False)
        self.began = time.monotonic()
        self.ready = False
        self.refusal = ""  # why it will never be ready
        self.fed: collections.deque[Entry] = collections.deque()  # the first one runs
        self.lines = 0  # fed so far: the number of the last ticket
        self.answered = 0
        self.unsent = bytearray()  # to its stdin
        self.unread = bytearray()  # of its stdout, up to the next line's end
        self.silent_at = 0.0  # since when nothing of its stdout counts: it has ended, or is garbage
        self.deaf_at = 0.0  # when it turned out that it does not read any more
        self.is_watched = False  # for room in its stdin
        self.failure = ""  # what its task fails with, if that is the worker's fault
        self.kill_at = 0.0  # it is to end, by then at last
        self.retired = False  # it may end by itself
        self.log_second, self.log_bytes, self.unlogged = 0, 0, b""

    def feed(self, entries: list[Entry], now: float) -> None:
        """Write tasks, each as a line and a ticket; the first one runs if nothing else does."""
        if not self.fed:
            entries[0].started = now
        self.fed.extend(entries)
        first, self.lines = self.lines + 1, self.lines + len(entries)
        lines = []
        for entry in entries:
            task_id, text, attempt = entry.message[:3]
            lines.append(f'{{"id": "{task_id}", "text": {quote(text)}, "attempt": {attempt}}}\n')
        self.unsent += "".join(lines).encode()
        if self.tickets is not None:
            numbers = range(first, self.lines + 1)
            tickets = b"".join(number.to_bytes(4, "little") for number in numbers)
            with contextlib.suppress(OSError):  # it has died: its stdout says so too
                self.tickets.send(tickets, socket.MSG_DONTWAIT)
        self.write()

    def write(self) -> None:
        """Write to its stdin what that has room for."""
        try:
            while self.unsent:
                del self.unsent[: os.write(self.stdin, self.unsent)]
        except BlockingIOError:
            pass
        except OSError:  # it has died, or closed its stdin
            self.unsent.clear()
            self.deaf_at = self.deaf_at or time.monotonic()

    def take_back(self) -> list[Entry]:
        """Return what it has not begun, and will not: its tickets are taken, the last of all."""
        if self.unclaimed is None:
            return []
        try:
            tickets = self.unclaimed.recv(4 * max(len(self.fed), 1), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        entries = [self.fed.pop() for _ in range(len(tickets) // 4)]
        return entries[::-1]

    def read(self) -> list[tuple[Entry, Report]]:
        """Return the outcomes that it has written; raise Garbage for what is none."""
        ended: list[tuple[Entry, Report]] = []
        while not self.silent_at:
            try:
                data = os.read(self.stdout, READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                self.silent_at = time.monotonic()
                break
            self.unread += data
            *lines, rest = bytes(self.unread).split(b"\n")
            self.unread = bytearray(rest)
            try:
                for line, value in zip(lines, parse_lines(lines), strict=True):
                    if outcome := self.outcome(line, value):
                        ended.append(outcome)
                if len(rest) > MAX_LINE_BYTES:
                    raise Garbage(f"its worker wrote a line of over {MAX_LINE_BYTES} bytes")
            except Garbage as error:
                self.silent_at = time.monotonic()
                if not ended:
                    raise
                self.fail(str(error))  # after what it has done well
                break
            if len(data) < READ_BYTES:
                break
        return ended

    def outcome(self, line: bytes, outcome: Any) -> tuple[Entry, Report] | None:
        """Return the task and its report that a line stands for; None for a word about itself."""
        if isinstance(outcome, dict) and "ready" in outcome and "id" not in outcome:
            self.ready = outcome["ready"] is True
            self.refusal = "" if self.ready else storable(outcome.get("error"))
            return None
        if not isinstance(outcome, dict) or not self.fed:
            expected = 'expected {"id", "result"} or {"id", "error"}'
            raise Garbage(f"its worker wrote {start_of(line)}, {expected}")
        entry = self.fed[0]
        if outcome.get("id") != entry.message.id:
            shown = process.printable(outcome.get("id"))
            raise Garbage(f"its worker answered {shown}, expected the id of its task")
        result, error = outcome.get("result"), outcome.get("error")
        if not isinstance(error if error is not None else result, str | None):
            raise Garbage(f"its worker wrote {start_of(line)}, expected a string or null")
        self.fed.popleft()
        self.answered += 1
        if error is None:
            text = None if result is None else storable(result)
            report = Report(entry.message.id, "success", entry.message.attempt, text)
        else:
            report = entry.report(error=storable(error))
        return entry, report

    def drain_log(self) -> bool:
        """Log what it wrote to stderr, cut, with the id of its task; return whether more may come.
        Of a flood only the first part of each second is logged."""
        try:
            data = os.read(self.stderr, READ_BYTES)
        except BlockingIOError:
            return True
        if (second := int(time.monotonic())) != self.log_second:
            self.log_second, self.log_bytes = second, 0
        self.unlogged += data[: max(0, LOG_BYTES_A_SECOND - self.log_bytes)]
        self.log_bytes += len(data)
        lines = self.unlogged.split(b"\n")
        is_over = not data or len(lines[-1]) > MAX_LOG_LINE_BYTES  # else the line may go on
        self.unlogged = b"" if is_over else lines.pop()
        for line in filter(None, lines):
            text = line[:MAX_LOG_LINE_BYTES].decode("utf-8", "replace")
            task_id = self.fed[0].message.id if self.fed else "no task"
            log.info("%s: %s", task_id, "".join(c if c.isprintable() else " " for c in text))
        return bool(data)

    def signal(self, number: int) -> None:
        """Send a signal to the worker and what it has started."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, number)

    def fail(self, failure: str) -> None:
        """Note what its task fails with: the first reason, and none once it is told to end."""
        if not self.kill_at:
            self.failure = self.failure or failure

    def end(self, failure: str = "") -> None:
        """Have it end, with SIGTERM now and SIGKILL later."""
        self.fail(failure)
        if not self.kill_at:
            self.kill_at = time.monotonic() + KILL_SECONDS
            self.signal(signal.SIGTERM)
            self.signal(signal.SIGCONT)  # a frozen one could not end

    def retire(self) -> None:
        """Let it end by itself, with its stdin."""
        self.retired = True
        self.kill_at = time.monotonic() + KILL_SECONDS
        self.close_input()

    def close_input(self) -> None:
        """Close its stdin and the tickets."""
        for each in (self.process.stdin, self.tickets, self.unclaimed):
            if each is not None:
                each.close()
        self.tickets = self.unclaimed = None
        self.stdin = -1  # the number may be another one's soon
        self.unsent.clear()

    def is_busy(self) -> bool:
        """Tell whether it starts, works or ends: then its process is to be looked at."""
        return bool(self.fed or self.kill_at or self.silent_at or self.deaf_at or not self.ready)

    def can_work(self) -> bool:
        """Tell whether it may be fed."""
        return self.ready and not (self.kill_at or self.silent_at or self.deaf_at)

    def has_exited(self) -> bool:
        """Tell whether it has ended; it is not reaped, so that its group keeps its number."""
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.process.pid, flags) is not None

    def bury(self) -> str:
        """Reap it and kill what it has left behind; return what ended it."""
        if not self.retired:
            self.signal(signal.SIGKILL)
        code = self.process.wait()
        self.close_input()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        with contextlib.suppress(ValueError):  # a number without a name
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"signal {-code}"


def parse_lines(lines: list[bytes]) -> list[Any]:
    """Return the values of lines of JSON, None for what is none; all at once costs a third."""
    try:
        values: list[Any] = json.loads(b"[" + b",".join(lines) + b"]")
        if len(values) == len(lines):
            return values
    except (ValueError, RecursionError):
        pass
    if len(lines) == 1:
        return [None]
    return [value for line in lines for value in parse_lines([line])]


def start_of(line: bytes) -> str:
    """Return what stands in an error for a line."""
    return process.printable(line[:80].decode("utf-8", "replace"))
