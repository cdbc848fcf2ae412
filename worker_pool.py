"""The consumer's worker pool: one thread that feeds the worker processes and looks after them."""

import functools
import logging
import math
import resource
import time

import process
from entry import Entry
from in_flight import STUCK_SECONDS, InFlight
from supervisor import (
    AHEAD_SECONDS,
    CONCURRENCY,
    SLOW_SECONDS,
    TASKS_PER_WORKER,
    Supervisor,
    limit_of,
)
from worker_process import WORKER, WorkerProcess

log = logging.getLogger("workers")

MAX_AHEAD = 256
MAX_AHEAD_BYTES = 48 * 1024  # what a pipe holds: a line behind it would wait in our memory
QUICK_SECONDS = 0.0002  # of tasks whose outcomes are read together, once in COALESCE_SECONDS
COALESCE_SECONDS = 0.001
LOOK_SECONDS = 0.25  # between two looks for processes that have ended
TERM_SHARE, KILL_SHARE = 0.8, 0.9  # of STOP_SECONDS: what still runs is told to end, then killed


class Pool(Supervisor):
    """Feeds each worker its share of what waits, and lets them go at a stop."""

    def __init__(self, in_flight: InFlight) -> None:
        super().__init__(in_flight)
        self.full_since: float | None = None  # since when every worker is busy with one task
        self.stops: list[Entry] = []  # tasks that are not to run, until that is so
        self.look_at = 0.0
        self.ready_at = 0.0  # when a worker was last ready
        self.is_broken = False  # there has been none for a while
        self.stop_at = math.inf  # of time.monotonic(), when the consumer was told to stop
        self.term_at = math.inf

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
            self.failures.turn()
            for worker in list(self.workers):
                self.look_after(worker, now)
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
                times.append(worker.fed[0].started + self.patience())
            if limit := limit_of(worker.fed[0]):
                times.append(worker.fed[0].started + limit)
        soonest = min(times)
        return max(0.0, soonest - time.monotonic()) if soonest < math.inf else 1.0

    def feed(self, now: float) -> None:
        """Give each worker its share of what waits: one task at a time while tasks are slow, or a
        suspect waits for an idle worker, else about AHEAD_SECONDS of work."""
        waiting, suspects = self.in_flight.waiting.count()
        if not waiting:
            return
        ahead = 1
        if not (WORKER or suspects) and 0 < self.pace < SLOW_SECONDS:
            # One more than runs, so that no worker waits for this thread's turn.
            ahead = min(MAX_AHEAD, 1 + math.ceil(AHEAD_SECONDS / self.pace))
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

    def stop(self, now: float) -> None:
        """Let what runs end by itself, then by signals; let idle workers go."""
        if self.stop_at == math.inf:
            self.stop_at = now
            self.term_at = now + TERM_SHARE * process.STOP_SECONDS
            for worker in self.workers:
                self.in_flight.give_back(worker.take_back())
        for worker in self.workers:
            if not worker.fed and not worker.kill_at:
                self.unwatch(worker.stdin)
                worker.retire()
        if now >= self.term_at:
            most = self.stop_at + KILL_SHARE * process.STOP_SECONDS
            for worker in self.workers:
                if worker.fed and not worker.kill_at:
                    self.end(worker)
                    worker.kill_at = min(worker.kill_at, most)


def fitting(entries: list[Entry]) -> list[Entry]:
    """Return the first of these tasks, as many as a worker's pipe can hold, or one."""
    size = 0
    for index, entry in enumerate(entries):
        size += entry.size
        if index and size > MAX_AHEAD_BYTES:
            return entries[:index]
    return entries


def raise_limit() -> None:
    """Allow as many open files as the workers' pipes may need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 256 + 8 * CONCURRENCY
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
