"""The consumer's worker processes: one thread starts and feeds them, reads their outcomes, and ends
those that take too long, write garbage, or are told to stop."""

import contextlib
import functools
import logging
import math
import resource
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable

import process
from entry import Entry
from in_flight import STUCK_SECONDS, InFlight
from worker_process import READY_SECONDS, SILENT_SECONDS, WORKER, Garbage, WorkerProcess

log = logging.getLogger("workers")

CONCURRENCY = process.setting("CONCURRENCY", 1, process.whole(1, 1000))
TASK_TIMEOUT_SECONDS = process.setting("TASK_TIMEOUT_SECONDS", 0.0, process.number(0, 10**7))
TASKS_PER_WORKER = process.setting("TASKS_PER_WORKER", 0, process.whole(0, 10**9))

AHEAD_SECONDS = 0.01  # of work, which a worker is fed at once
MAX_AHEAD = 256
MAX_AHEAD_BYTES = 48 * 1024  # what a pipe holds: a line behind it would wait in our memory
QUICK_SECONDS = 0.0002  # of tasks whose outcomes are read together, once in COALESCE_SECONDS
COALESCE_SECONDS = 0.001
STARTING = 4  # workers at a time: each takes 30 ms of a processor
START_SECONDS = 600  # a model may be large
LOOK_SECONDS = 0.25  # between two looks for processes that have ended
TERM_SHARE, KILL_SHARE = 0.8, 0.9  # of STOP_SECONDS: what still runs is told to end, then killed


class Pool:
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
        self.full_since: float | None = None  # since when every worker is busy with one task
        self.stops: list[Entry] = []
        self.look_at = 0.0
        self.ready_at = 0.0  # when a worker was last ready
        self.is_broken = False  # there has been none for a while
        self.starts = process.Backoff(log, "no worker could start")
        self.start_at = 0.0
        self.started = threading.Event()  # the first worker was ready, or will never be
        self.refusal = ""  # why not
        self.stop_at = math.inf  # of time.monotonic(), when the consumer was told to stop
        self.term_at = math.inf

    def wake(self) -> None:
        """Let the pool look for work: for any thread."""
        if not self.awake:
            self.awake = True
            with contextlib.suppress(BlockingIOError):
                self.bell.send(b"!")

    def run(self) -> None:
        """Run tasks until all workers have ended after a stop: the body of a thread that lives as
        long as the process."""
        raise_limit()
        while True:
            self.awake = False
            try:
                self.turn()
                if self.in_flight.stopping and not self.workers:
                    return
                if self.pace < QUICK_SECONDS and any(len(each.fed) > 8 for each in self.workers):
                    time.sleep(COALESCE_SECONDS)  # the workers have enough to do meanwhile
                for key, _ in self.selector.select(self.pause()):
                    key.data()
            except Exception:  # the top of a loop: without it nothing would run any more
                log.exception("the pool failed")
                time.sleep(1)

    def turn(self) -> None:
        """Look after every worker, then feed those that may have more."""
        now = time.monotonic()
        if now >= self.look_at:
            self.look_at = now + LOOK_SECONDS
            for worker in list(self.workers):
                if worker.has_exited():
                    self.bury(worker)
        for worker in list(self.workers):
            self.attend(worker, now)
        if any(worker.ready for worker in self.workers):
            self.ready_at = now
        self.is_broken = now - self.ready_at > STUCK_SECONDS
        self.stops += self.in_flight.take_stops()
        self.stops = [entry for entry in self.stops if not self.stop_task(entry)]
        if self.in_flight.stopping:
            self.stop(now)
        else:
            self.feed(now)
            self.start_workers(now)
        self.in_flight.announce()
        heads = [worker.fed[0].started for worker in self.workers if worker.fed]
        self.full_since = max(heads) if len(heads) >= CONCURRENCY else None

    def pause(self) -> float | None:
        """Return how long nothing needs to be done unless something happens."""
        if not self.workers:
            return LOOK_SECONDS
        is_busy = self.in_flight.waiting.count()[0] or any(
            worker.is_busy() for worker in self.workers
        )
        times = [self.look_at if is_busy else math.inf]
        if self.term_at > time.monotonic():
            times.append(self.term_at)
        for worker in self.workers:
            if worker.kill_at or not worker.fed:
                continue
            if len(worker.fed) > 1:
                times.append(worker.fed[0].started + 2 * AHEAD_SECONDS)
            if limit := limit_of(worker.fed[0]):
                times.append(worker.fed[0].started + limit)
        soonest = min(times)
        return max(0.0, soonest - time.monotonic()) if soonest < math.inf else 1.0

    # Starting and feeding

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

    def feed(self, now: float) -> None:
        """Give each worker its share of what waits: one task at a time while tasks are slow, or a
        suspect waits for an idle worker, else about AHEAD_SECONDS of work."""
        waiting, suspects = self.in_flight.waiting.count()
        if not waiting:
            return
        ahead = 1
        if not (WORKER or suspects) and self.pace:
            ahead = int(min(MAX_AHEAD, max(1, AHEAD_SECONDS / self.pace)))
        able = [worker for worker in self.workers if worker.can_work()]
        hungry = [worker for worker in able if len(worker.fed) <= ahead // 2]
        idle = [worker for worker in hungry if not worker.fed]
        entries = self.in_flight.take(len(idle), sum(ahead - len(each.fed) for each in hungry))
        hungry.sort(key=lambda worker: len(worker.fed))
        try:
            for index, worker in enumerate(hungry):
                share = math.ceil(len(entries) / (len(hungry) - index))
                share = min(share, ahead - len(worker.fed))
                if TASKS_PER_WORKER:
                    share = min(share, TASKS_PER_WORKER - worker.answered - len(worker.fed))
                if fed := fitting(entries[: max(share, 0)]):
                    del entries[: len(fed)]
                    self.feed_worker(worker, fed, now)
        finally:
            self.in_flight.give_back(entries)

    def feed_worker(self, worker: WorkerProcess, entries: list[Entry], now: float) -> None:
        """Write lines to a worker, the rest of them when it has room."""
        worker.feed(entries, now)
        if worker.unsent and not worker.is_watched:
            worker.is_watched = True
            self.watch(worker.stdin, functools.partial(self.on_room, worker), write=True)

    def on_room(self, worker: WorkerProcess) -> None:
        """Go on writing lines."""
        worker.write()
        if not worker.unsent:
            worker.is_watched = False
            self.unwatch(worker.stdin)

    # What workers say

    def on_outcomes(self, worker: WorkerProcess) -> None:
        """Take what a worker has written. It may have been buried a moment ago."""
        if worker not in self.workers:
            return
        was_ready = worker.ready
        self.read(worker)
        if worker.ready and not was_ready:
            self.is_ready()
        elif worker.refusal and not self.started.is_set():
            self.refusal = worker.refusal
            self.started.set()
        if worker.silent_at:
            self.unwatch(worker.stdout)
            if worker.has_exited():
                self.bury(worker)

    def is_ready(self) -> None:
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
            worker.why = worker.why or str(error)
        if ended:
            now = time.monotonic()
            seconds = now - began
            pace = seconds / len(ended)
            self.pace = (self.pace + pace) / 2 if self.pace else pace
            if worker.fed:
                worker.fed[0].started = now
            self.in_flight.finish(ended, seconds)
        if worker.why and not worker.kill_at:
            self.kill(worker, worker.why)
        elif TASKS_PER_WORKER and worker.answered >= TASKS_PER_WORKER and not worker.why:
            self.unwatch(worker.stdin)
            worker.retire()

    def on_log(self, worker: WorkerProcess) -> None:
        """Log what a worker has written to stderr."""
        if worker in self.workers and not worker.drain_log():
            self.unwatch(worker.stderr)

    # How workers end

    def attend(self, worker: WorkerProcess, now: float) -> None:
        """Act on how long a worker has taken: for its task, to start, or to end."""
        if WORKER and not worker.ready and not worker.why and now - worker.began >= READY_SECONDS:
            worker.ready = True
            self.is_ready()
        if worker.kill_at:
            if now >= worker.kill_at:
                worker.signal(signal.SIGKILL)
        elif worker.silent_at and now - worker.silent_at >= SILENT_SECONDS:
            self.kill(worker, "closed its stdout")
        elif worker.deaf_at and now - worker.deaf_at >= SILENT_SECONDS:
            self.end(worker, "closed its stdin")
        elif not worker.ready and now - worker.began >= START_SECONDS:
            self.kill(worker, f"was not ready after {START_SECONDS} s")
        elif worker.fed:
            elapsed = now - worker.fed[0].started
            limit = limit_of(worker.fed[0])
            if limit and elapsed >= limit:
                self.end(worker, f"timed out after {limit:g} s")
            elif len(worker.fed) > 1 and elapsed >= 2 * AHEAD_SECONDS:
                self.pace = max(self.pace, elapsed)
                self.in_flight.give_back(worker.take_back())

    def end(self, worker: WorkerProcess, why: str) -> None:
        """End a worker for what it runs, unless that is answered by now."""
        running = worker.fed[0] if worker.fed else None
        back = worker.take_back()
        self.in_flight.give_back(back)
        if worker.fed:
            self.read(worker)
        if worker.kill_at:
            return
        if running is None or (worker.fed and worker.fed[0] is running):
            self.kill(worker, why)
        elif running in back and why != "stopped":  # it has not even begun in all that time
            self.kill(worker, "took no task")

    def kill(self, worker: WorkerProcess, why: str) -> None:
        """Tell a worker to end; what it has not begun is for others."""
        self.in_flight.give_back(worker.take_back())
        worker.end(why)

    def stop_task(self, entry: Entry) -> bool:
        """Have a task that a worker was fed not run, or not run on; return whether that is done."""
        for worker in self.workers:
            if entry in worker.fed:
                if worker.fed[0] is entry:
                    self.end(worker, "stopped")
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
            reason = worker.refusal or worker.why or f"a worker has ended with {cause}"
            self.start_at = time.monotonic() + self.starts.failed(reason)
        if worker.fed:
            self.judge(worker, worker.fed.popleft(), cause)
            self.in_flight.give_back(list(worker.fed))

    def judge(self, worker: WorkerProcess, entry: Entry, cause: str) -> None:
        """Say what becomes of the task that a worker has ended with."""
        why = worker.why
        if why in ("", "stopped", "retired") or entry.stopped:
            log.warning("task %s ended its worker: %s", entry.message.id, why or cause)
            self.in_flight.died(entry, cause)
            return
        reason = why if why.startswith("timed out") else f"its worker {why}"
        log.warning("task %s failed: %s", entry.message.id, reason)
        self.in_flight.finish([(entry, entry.report(error=reason))], 0.0)

    def stop(self, now: float) -> None:
        """Let what runs end by itself, then by signals; let idle workers go."""
        if self.stop_at == math.inf:
            self.stop_at = now
            self.term_at = now + TERM_SHARE * process.STOP_SECONDS
            for worker in self.workers:
                self.in_flight.give_back(worker.take_back())
        for worker in self.workers:
            if not worker.fed and not worker.why:
                self.unwatch(worker.stdin)
                worker.retire()
        if now >= self.term_at:
            most = self.stop_at + KILL_SHARE * process.STOP_SECONDS
            for worker in self.workers:
                if worker.fed and not worker.kill_at:
                    self.end(worker, "stopped")
                    worker.kill_at = min(worker.kill_at, most)


def fitting(entries: list[Entry]) -> list[Entry]:
    """Return the first of these tasks, as many as a worker's pipe can hold, or one."""
    size = 0
    for index, entry in enumerate(entries):
        size += entry.size
        if index and size > MAX_AHEAD_BYTES:
            return entries[:index]
    return entries


def limit_of(entry: Entry) -> float | None:
    """Return the seconds that a run of a task may take; None for no limit."""
    return entry.message.timeout or TASK_TIMEOUT_SECONDS or None


def raise_limit() -> None:
    """Allow as many open files as the workers' pipes may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 256 + 8 * CONCURRENCY
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
