"""The consumer: takes tasks from RabbitMQ, has worker processes run them, reports success to the
producer by REST and sends failures to the dead letters. A DLQ watcher runs in it as a thread.

Run it with `python consumer.py`. Exit codes: 0 stopped, 1 crash, 2 bad configuration."""

import logging
import math
import os
import pathlib
import sys
import threading
import time
import uuid

import pika
from pika.adapters.blocking_connection import BlockingChannel

import broker
import dlq_watcher
import process
import reporter
from entry import REQUEUE
from in_flight import STUCK_SECONDS, InFlight
from subscription import Subscription
from supervisor import CONCURRENCY
from worker_pool import Pool

log = logging.getLogger("consumer")


def prefetch(value: str) -> int:
    """Return the number of a fixed window, 0 for auto."""
    return 0 if value == "auto" else process.whole(1, 65535)(value)


PREFETCH = process.setting("PREFETCH", 0, prefetch)
HEALTH_FILE = process.setting("HEALTH_FILE", None, pathlib.Path)

IN_FLIGHT_SECONDS = 0.1  # of work, which PREFETCH=auto aims at
MAX_WINDOW = 200  # if such tasks come to take 10 ms, the last one waits for STUCK_SECONDS
MAX_WINDOW_BYTES = 16 * 1024 * 1024
ADJUST_SECONDS = 0.1
HEALTH_SECONDS = 10
REPORT_TURN_SECONDS = 0.02
OVERTIME_SECONDS = 5  # after STOP_SECONDS; Compose kills at ten


class Consumer:
    """The broker's I/O thread: it alone touches the connection, and it never waits for a task."""

    def __init__(self, stop: threading.Event, in_flight: InFlight, pool: Pool) -> None:
        self.stop = stop
        self.in_flight = in_flight
        self.pool = pool
        self.width = PREFETCH or CONCURRENCY  # the window while no worker is busy with a held task
        self.window = 0
        self.counts: list[int] = []  # of the tags of a connection that is being renewed
        self.pace = 0.0  # seconds a task takes a worker, a moving average
        self.adjust_at = 0.0
        self.healthy_at = 0.0
        self.deadline = 0.0  # of time.monotonic(), for what runs to end

    def consume(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        """Take deliveries over one connection until stop, or until it should be renewed; raise when
        the broker takes it away."""
        subscription = Subscription(connection, channel)
        self.window = 0
        for count in self.counts:  # the broker gives to each tag in turn, whatever its count
            self.window += count
            subscription.resize(self.window)
        self.counts = []
        self.adjust(subscription)
        try:
            while not self.stop.is_set() and not subscription.is_worn():
                self.turn(subscription, process.TURN_SECONDS)
            self.counts = list(subscription.counts.values())
            subscription.end()
            while not (self.is_over() if self.stop.is_set() else subscription.is_empty()):
                self.turn(subscription, REPORT_TURN_SECONDS)
            connection.process_data_events()  # the last acks; the broker returns the rest
        finally:
            self.in_flight.forget(subscription)

    def is_over(self) -> bool:
        """Let nothing start any more; tell whether all is reported, or the time for it is up."""
        self.deadline = self.deadline or time.monotonic() + process.STOP_SECONDS
        self.in_flight.stop()
        return self.in_flight.is_quiet() or time.monotonic() > self.deadline

    def turn(self, subscription: Subscription, seconds: float) -> None:
        """Let the connection work for a moment; take in what came; keep the window right."""
        broker.pump(subscription.connection, subscription.channel, seconds)
        if subscription.arrived:
            self.in_flight.admit(subscription.arrived)
            subscription.arrived = []
        now = time.monotonic()
        if not self.stop.is_set() and (now >= self.adjust_at or subscription.held):
            self.adjust_at = now + ADJUST_SECONDS
            self.adjust(subscription)
        if subscription.held:
            held, subscription.held = subscription.held, {}
            subscription.settle(held)
        if not self.stop.is_set() and subscription.taken() < self.window:
            subscription.resize(self.window)  # messages of cancelled tags are settled
        if HEALTH_FILE and now >= self.healthy_at:
            self.healthy_at = now + HEALTH_SECONDS
            HEALTH_FILE.touch()

    def adjust(self, subscription: Subscription) -> None:
        """Hand back what is stuck, and fit the window to the workers: those that are busy with a
        task without a message need none, and without any worker nothing is taken."""
        self.fit_width(subscription)
        self.hand_back(subscription)
        free = 0 if self.pool.is_broken else CONCURRENCY - self.in_flight.held_count()
        window = math.ceil(self.width * max(free, 0) / CONCURRENCY)
        if window != self.window:
            self.window = window
            subscription.resize(window)

    def fit_width(self, subscription: Subscription) -> None:
        """Keep about IN_FLIGHT_SECONDS of work in flight, moved only for a factor of two or more,
        and narrowed only while the window is full: then no message comes back as redelivered."""
        count, seconds, size = self.in_flight.measure()
        if count:
            self.pace = (self.pace + seconds / count) / 2 if self.pace else seconds / count
        full_since = self.pool.full_since
        elapsed = 0.0 if full_since is None else time.monotonic() - full_since
        # Less may be a thread that waits for its turn, not a task.
        pace = max(self.pace, elapsed if elapsed > IN_FLIGHT_SECONDS else 0.0)
        if PREFETCH:
            self.width = PREFETCH if elapsed < STUCK_SECONDS else min(self.width, PREFETCH)
        elif self.pace:  # of tasks that have ended: one that has just begun says nothing
            target = CONCURRENCY * IN_FLIGHT_SECONDS / pace
            width = int(min(target, MAX_WINDOW, MAX_WINDOW_BYTES / max(size, 1)))
            width = max(width, CONCURRENCY)
            if width >= 2 * self.width:
                self.width = width
            elif 2 * width <= self.width and subscription.is_full():
                self.width = CONCURRENCY

    def hand_back(self, subscription: Subscription) -> None:
        """Return to the broker what waits behind long tasks: another consumer may be idle. A fixed
        window is patient while any task is quicker."""
        since, now = self.pool.full_since, time.monotonic()
        if not self.pool.is_broken and (
            since is None or (PREFETCH and now - since < STUCK_SECONDS)
        ):
            return
        if stuck := self.in_flight.take_stuck():
            log.info("handed back %d tasks that waited for a worker", len(stuck))
            self.width = min(self.width, CONCURRENCY)
            subscription.resize(self.width if since else 0)
            tags = [tag for entry in stuck for _, tag in entry.deliveries]
            subscription.settle(dict.fromkeys(tags, REQUEUE))


def stop_in_time(stop: threading.Event, in_flight: InFlight) -> None:
    """Stop the work even while the I/O thread waits for a broker that does not answer, and end the
    process if that takes too long: the body of a thread."""
    stop.wait()
    in_flight.stop()
    time.sleep(process.STOP_SECONDS + OVERTIME_SECONDS)
    log.error("not stopped after %g seconds: the broker does not answer", process.STOP_SECONDS)
    os._exit(1)


def main() -> None:
    """Consume until SIGTERM or SIGINT; then finish and report what runs."""
    process.start_logging()
    process.calm_garbage_collector()
    stop = threading.Event()
    process.stop_on_signals(stop)
    in_flight = InFlight(str(uuid.uuid4()), CONCURRENCY)
    pool = Pool(in_flight)
    watched = threading.Event()  # after the last failed task became a dead letter
    watcher = threading.Thread(
        target=dlq_watcher.Watcher(watched).run, name="dlq_watcher", daemon=True
    )
    reports = reporter.Reporter(in_flight, CONCURRENCY)
    workers = threading.Thread(target=pool.run, name="workers", daemon=True)
    workers.start()
    while not pool.started.wait(process.TURN_SECONDS) and not stop.is_set():
        pass
    if pool.refusal:
        print(pool.refusal, file=sys.stderr)
        sys.exit(2)
    watcher.start()
    threading.Thread(target=reports.run, name="reporter", daemon=True).start()
    threading.Thread(target=stop_in_time, args=(stop, in_flight), name="stop", daemon=True).start()
    log.info("consuming with up to %d workers, as %s", CONCURRENCY, in_flight.consumer)
    consumer = Consumer(stop, in_flight, pool)
    broker.keep_connected("consumer", stop, consumer.consume)
    while not consumer.is_over():  # the broker may have been away when the signal came
        time.sleep(REPORT_TURN_SECONDS)
    watched.set()
    watcher.join(max(0, consumer.deadline - time.monotonic()))
    workers.join(max(0, consumer.deadline - time.monotonic()))
    log.info("stopped")


if __name__ == "__main__":
    main()
