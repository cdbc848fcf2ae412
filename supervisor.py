"""Looks after the consumer's worker processes: starts them, reads what they say, and ends those
that take too long, write garbage, or are told to stop. Only the pool's thread runs this."""

import contextlib
import functools
import logging
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable

import process
from entry import Entry
from in_flight import InFlight
from task import TIMED_OUT
from worker_process import READY_SECONDS, SILENT_SECONDS, WORKER, Garbage, WorkerProcess

log = logging.getLogger("workers")

CONCURRENCY = process.setting("CONCURRENCY", 1, process.whole(1, 1000))
TASK_TIMEOUT_SECONDS = process.setting("TASK_TIMEOUT_SECONDS", 0.0, process.number(0, 10**7))
TASKS_PER_WORKER = process.setting("TASKS_PER_WORKER", 0, process.whole(0, 10**9))

AHEAD_SECONDS = 0.01  # of work, which a worker is fed at once
SLOW_SECONDS = 0.05  # such tasks are fed one at a time
STARTING = 4  # workers at a time: each takes 30 ms of a processor
# To take the ticket of the task that comes next, which takes microseconds; less than HOLD_SECONDS.
CLAIM_SECONDS = 25
START_SECONDS = 600  # a model may be large
FAILURES_A_SECOND = 100  # that are logged


class FailureLog:
    """A line for each failure. Of a flood only the first of each second are warnings: thousands
    would take a fifth of the consumer's time, and the rows have all texts."""

    def __init__(self) -> None:
        self.second, self.count = 0, 0

    def add(self, entry: Entry, error: str | None) -> None:
        """Log why a task has failed."""
        self.turn()
        self.count += 1
        level = logging.WARNING if self.count <= FAILURES_A_SECOND else logging.DEBUG
        if log.isEnabledFor(level):
            log.log(level, "task %s failed: %s", entry.message.id, process.printable(error))

    def turn(self) -> None:
        """Say how many failures of the last second were left out, when that is over."""
        if (second := int(time.monotonic())) == self.second:
            return
        if self.count > FAILURES_A_SECOND:
            more = self.count - FAILURES_A_SECOND
            log.warning("task failures without a line: %d more in a second", more)
        self.second, self.count = second, 0


class Supervisor:
    """Up to CONCURRENCY worker processes, started when there is work for them."""

    def __init__(self, in_flight: InFlight) -> None:
        self.in_flight = in_flight
        in_flight.wake = self.wake
        self.selector = selectors.DefaultSelector()
        self.workers: list[WorkerProcess] = []
        self.bell, bell = socket.socketpair()
        self.bell.setblocking(False)
        bell.setblocking(False)
        self.selector.register(bell, selectors.EVENT_READ, lambda: bell.recv(4096))
        self.awake = False
        self.pace = 0.0  # seconds that a task takes, a moving average
        self.starts = process.Backoff(log, "no worker could start")
        self.start_at = 0.0
        self.started = threading.Event()  # the first worker was ready, or will never be
        self.refusal = ""  # why not
        self.failures = FailureLog()

    def wake(self) -> None:
        """Let the pool look for work: for any thread."""
        if not self.awake:
            self.awake = True
            with contextlib.suppress(BlockingIOError):
                self.bell.send(b"!")

    def start_workers(self, now: float) -> None:
        """Start workers for what waits; one is always there."""
        waiting, _ = self.in_flight.waiting.count()
        starting = sum(not worker.ready for worker in self.workers)
        idle = sum(worker.ready and not worker.fed for worker in self.workers)
        missing = min(
            max(waiting, 1 if not self.workers else 0) - idle, CONCURRENCY - len(self.workers)
        )
        for _ in range(min(missing - starting, STARTING - starting)):
            if now < self.start_at:
                return
            try:
                worker = WorkerProcess()
            except OSError as error:
                self.start_at = now + self.starts.failed(error)
                return
            self.workers.append(worker)
            self.watch(worker.stdout, functools.partial(self.on_outcomes, worker))
            self.watch(worker.stderr, functools.partial(self.on_log, worker))

    def watch(self, descriptor: int, call: Callable[[], object], write: bool = False) -> None:
        """Have the loop call when a descriptor can be read, or written."""
        events = selectors.EVENT_WRITE if write else selectors.EVENT_READ
        self.selector.register(descriptor, events, call)

    def unwatch(self, descriptor: int) -> None:
        """Forget a descriptor, if it was watched."""
        with contextlib.suppress(KeyError, ValueError):
            self.selector.unregister(descriptor)

    def on_outcomes(self, worker: WorkerProcess) -> None:
        """Take what a worker has written. It may have been buried a moment ago."""
        if worker not in self.workers:
            return
        was_ready = worker.ready
        self.read(worker)
        if worker.ready and not was_ready:
            self.note_ready()
        elif worker.refusal and not self.started.is_set():
            self.refusal = worker.refusal
            self.started.set()
        if worker.silent_at:
            self.unwatch(worker.stdout)
            if worker.has_exited():
                self.bury(worker)

    def note_ready(self) -> None:
        """Note that workers can be started."""
        self.starts.succeeded()
        self.started.set()

    def read(self, worker: WorkerProcess) -> None:
        """Hand outcomes on, and measure how long their tasks took."""
        began = worker.fed[0].started if worker.fed else 0.0
        try:
            ended = worker.read()
        except Garbage as error:
            ended = []
            worker.fail(str(error))
        if ended:
            now = time.monotonic()
            seconds = now - began
            pace = seconds / len(ended)
            self.pace = (self.pace + pace) / 2 if self.pace else pace
            if worker.fed:
                worker.fed[0].started = now
            self.in_flight.finish(ended, seconds)
            for entry, report in ended:
                if report.status != "success":
                    self.failures.add(entry, report.error)
        if worker.kill_at:
            return
        if worker.failure:
            self.kill(worker)
        elif TASKS_PER_WORKER and worker.answered >= TASKS_PER_WORKER:
            self.unwatch(worker.stdin)
            worker.retire()

    def on_log(self, worker: WorkerProcess) -> None:
        """Log what a worker has written to stderr."""
        if worker in self.workers and not worker.drain_log():
            self.unwatch(worker.stderr)

    def attend(self, worker: WorkerProcess, now: float) -> None:
        """Act on how long a worker has taken: for its task, to start, or to end."""
        if worker.kill_at:
            if now >= worker.kill_at:
                worker.signal(signal.SIGKILL)
        elif worker.silent_at and now - worker.silent_at >= SILENT_SECONDS:
            self.kill(worker, "its worker closed its stdout")
        elif worker.deaf_at and now - worker.deaf_at >= SILENT_SECONDS:
            self.end(worker, "its worker closed its stdin")
        elif WORKER and not worker.ready and now - worker.began >= READY_SECONDS:
            worker.ready = True
            self.note_ready()
        elif not worker.ready and now - worker.began >= START_SECONDS:
            self.kill(worker, f"a worker was not ready after {START_SECONDS} s")
        elif worker.fed:
            elapsed = now - worker.fed[0].started
            limit = limit_of(worker.fed[0])
            if limit and elapsed >= limit:
                self.end(worker, f"{TIMED_OUT}{limit:g} s")
            elif len(worker.fed) > 1 and elapsed >= self.patience():
                self.pace = max(self.pace, elapsed)
                self.in_flight.give_back(worker.take_back())

    def look_after(self, worker: WorkerProcess, now: float) -> None:
        """Bury a worker that has ended; end one that is frozen with a task that it has not begun,
        which nobody would notice without a deadline."""
        if worker.has_exited():
            self.bury(worker)
        elif worker.fed and not worker.kill_at and now - worker.fed[0].started >= CLAIM_SECONDS:
            back = worker.take_back()
            unclaimed = bool(back) and not worker.fed
            self.in_flight.give_back(back)
            if unclaimed:
                log.warning("a worker has not begun its task in %d s", CLAIM_SECONDS)
                self.kill(worker)

    def patience(self) -> float:
        """Return after how many seconds of one task those behind it are taken back."""
        return 2 * max(AHEAD_SECONDS, min(self.pace, SLOW_SECONDS))

    def end(self, worker: WorkerProcess, failure: str = "") -> None:
        """End a worker for what it runs, unless that is answered by now."""
        running = worker.fed[0] if worker.fed else None
        back = worker.take_back()
        self.in_flight.give_back(back)
        if worker.fed:
            self.read(worker)
        # If it has not even begun: the task goes to another, and who claims nothing ends too.
        unclaimed = running in back and bool(failure)
        if unclaimed or running is None or (worker.fed and worker.fed[0] is running):
            self.kill(worker, failure)

    def kill(self, worker: WorkerProcess, failure: str = "") -> None:
        """Tell a worker to end; what it has not begun is for others."""
        self.in_flight.give_back(worker.take_back())
        worker.end(failure)

    def stop_task(self, entry: Entry) -> bool:
        """Have a task that a worker was fed not run, or not run on; return whether that is done."""
        for worker in self.workers:
            if entry in worker.fed:
                if worker.fed[0] is entry:
                    self.end(worker)
                else:
                    self.in_flight.give_back(worker.take_back())
                return entry not in worker.fed or bool(worker.kill_at)
        return True

    def bury(self, worker: WorkerProcess) -> None:
        """Take leave of a worker that has ended: read its last words, judge what it ran."""
        if worker.fed:
            self.read(worker)
        self.in_flight.give_back(worker.take_back())
        worker.drain_log()
        for descriptor in (worker.stdin, worker.stdout, worker.stderr):
            self.unwatch(descriptor)
        cause = worker.bury()
        self.workers.remove(worker)
        if worker.refusal:  # it was fed before it said so: what it had is not to blame
            worker.ready = False
            self.in_flight.give_back([worker.fed.popleft() for _ in range(len(worker.fed))])
        if not worker.ready and not self.in_flight.stopping:
            reason = worker.refusal or worker.failure or f"a worker has ended with {cause}"
            self.start_at = time.monotonic() + self.starts.failed(reason)
        if worker.fed:
            self.judge(worker, worker.fed.popleft(), cause)
            self.in_flight.give_back(list(worker.fed))

    def judge(self, worker: WorkerProcess, entry: Entry, cause: str) -> None:
        """Say what becomes of the task that a worker has ended with."""
        if worker.failure and not entry.stopped:
            self.failures.add(entry, worker.failure)
            seconds = time.monotonic() - entry.started
            self.in_flight.finish([(entry, entry.report(error=worker.failure))], seconds)
        else:
            log.warning("task %s ended with its worker: %s", entry.message.id, cause)
            self.in_flight.died(entry, cause)


def limit_of(entry: Entry) -> float | None:
    """Return the seconds that a run of a task may take; None for no limit."""
    return entry.message.timeout or TASK_TIMEOUT_SECONDS or None
