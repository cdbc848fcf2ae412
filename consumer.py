"""The consumer: takes tasks from RabbitMQ, has worker threads run them, reports success to the
producer by REST and sends failures to the dead letters. A DLQ watcher runs in it as a thread.

Run it with `python consumer.py`. Exit codes: 0 stopped, 1 crash, 2 bad configuration."""

import logging
import pathlib
import threading
import time
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel

import broker
import dlq_watcher
import process
import reporter
import task
import worker_pool
from in_flight import ACK, DEAD_LETTER, REQUEUE, Entry, InFlight
from worker_pool import CONCURRENCY

log = logging.getLogger("consumer")


def prefetch(value: str) -> int:
    """Return the number of a fixed window, 0 for auto."""
    return 0 if value == "auto" else process.whole(1, 65535)(value)


PREFETCH = process.setting("PREFETCH", 0, prefetch)
HEALTH_FILE = process.setting("HEALTH_FILE", None, pathlib.Path)

IN_FLIGHT_SECONDS = 0.1  # of work, which PREFETCH=auto aims at
MAX_WINDOW = 300
MAX_WINDOW_BYTES = 16 * 1024 * 1024
ADJUST_SECONDS = 0.1
HEALTH_SECONDS = 10
REPORT_TURN_SECONDS = 0.02


class Subscription:
    """One connection's deliveries and windows. Only the I/O thread calls it, other threads by
    add_callback_threadsafe()."""

    def __init__(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        self.connection = connection
        self.channel = channel
        self.arrived: list[Entry] = []
        self.unsettled: dict[int, None] = {}  # delivery tags, ascending
        self.consumer_tags: list[str] = []
        self.window = 0
        broker.raise_when_cancelled(channel)

    def widen(self, count: int) -> None:
        """Let the broker send count more unsettled messages, by one more consumer tag."""
        self.channel.basic_qos(prefetch_count=count)
        self.consumer_tags.append(self.channel.basic_consume(broker.QUEUE, self.on_message))
        self.window += count
        log.debug("window is now %d", self.window)

    def narrow(self, count: int) -> None:
        """Go back to the first consumer tag, of count messages. What comes meanwhile, pika sends
        back as redelivered, so this is for a full window, or for when that does not matter."""
        while len(self.consumer_tags) > 1:
            self.channel.basic_cancel(self.consumer_tags.pop())
        self.window = count
        log.debug("window is now %d", self.window)

    def on_message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """Take a delivery; what is not a task of ours goes to the dead letters."""
        self.unsettled[method.delivery_tag] = None
        try:
            message = task.parse_message(body)
        except ValueError as error:
            shown = process.printable(body[:80])
            log.warning("dead-lettered a message that is no task (%s): %s", error, shown)
            self.settle({method.delivery_tag: DEAD_LETTER})
            return
        suspect = method.redelivered or broker.SUSPECT in (properties.headers or {})
        entry = Entry(message, len(body), suspect)
        entry.deliveries.append((self, method.delivery_tag))
        self.arrived.append(entry)

    def settle(self, verdicts: dict[int, str]) -> None:
        """Ack, dead-letter or requeue deliveries, each run of equals at the front by one frame."""
        last = None
        for tag in list(self.unsettled):
            verdict = verdicts.get(tag)
            if last is not None and verdict != last[1]:
                self.send(*last, multiple=True)
            if verdict is None:
                break
            last = tag, verdict
            del self.unsettled[tag], verdicts[tag]
        else:
            if last is not None:
                self.send(*last, multiple=True)
        for tag, verdict in verdicts.items():
            if tag in self.unsettled:
                del self.unsettled[tag]
                self.send(tag, verdict, multiple=False)

    def send(self, tag: int, verdict: str, multiple: bool) -> None:
        """Send one ack or nack; with multiple it covers every unsettled tag up to this one."""
        if verdict == ACK:
            self.channel.basic_ack(tag, multiple)
        else:
            self.channel.basic_nack(tag, multiple, requeue=verdict == REQUEUE)


class Consumer:
    """The broker's I/O thread: it alone touches the connection, and it never runs a task."""

    def __init__(self, stop: threading.Event, in_flight: InFlight) -> None:
        self.stop = stop
        self.in_flight = in_flight
        self.pace = 0.0  # seconds a task takes a worker, a moving average
        self.adjust_at = 0.0
        self.healthy_at = 0.0
        self.deadline = 0.0  # of time.monotonic(), for what runs to end

    def consume(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        """Take deliveries over one connection until stop; raise when the broker takes it away."""
        subscription = Subscription(connection, channel)
        try:
            subscription.widen(PREFETCH or CONCURRENCY)
            while not self.stop.is_set():
                self.turn(subscription, process.TURN_SECONDS)
            for consumer_tag in subscription.consumer_tags:
                channel.basic_cancel(consumer_tag)
            while not self.is_over():
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
        if now >= self.adjust_at and not self.stop.is_set():
            self.adjust_at = now + ADJUST_SECONDS
            if not PREFETCH:
                self.adjust(subscription)
            self.hand_back(subscription)
        if HEALTH_FILE and now >= self.healthy_at:
            self.healthy_at = now + HEALTH_SECONDS
            HEALTH_FILE.touch()

    def adjust(self, subscription: Subscription) -> None:
        """Keep about IN_FLIGHT_SECONDS of work in flight, moved only for a factor of two or more.

        A wider window is one more consumer tag; a narrower one cancels the extra ones while the
        window is full: then no message can be on its way, and none comes back as redelivered.
        """
        count, seconds, elapsed, size = self.in_flight.measure()
        if count:
            self.pace = (self.pace + seconds / count) / 2 if self.pace else seconds / count
        pace = max(self.pace, elapsed)
        if pace:
            target = CONCURRENCY * IN_FLIGHT_SECONDS / pace
            count = int(min(target, MAX_WINDOW, MAX_WINDOW_BYTES / max(size, 1)))
            count = max(count, CONCURRENCY)
            if count >= 2 * subscription.window:
                subscription.widen(count - subscription.window)
            elif (
                2 * count <= subscription.window
                and len(subscription.unsettled) >= subscription.window
            ):
                subscription.narrow(CONCURRENCY)

    def hand_back(self, subscription: Subscription) -> None:
        """Return to the broker what waits behind long tasks: another consumer may be idle."""
        if stuck := self.in_flight.take_stuck(CONCURRENCY, patient=PREFETCH > 0):
            log.info("handed back %d tasks that waited behind long ones", len(stuck))
            subscription.narrow(PREFETCH or CONCURRENCY)
            tags = [tag for entry in stuck for _, tag in entry.deliveries]
            subscription.settle(dict.fromkeys(tags, REQUEUE))


def main() -> None:
    """Consume until SIGTERM or SIGINT; then finish and report what runs."""
    process.start_logging()
    handler = worker_pool.load_handler()
    stop = threading.Event()
    process.stop_on_signals(stop)
    in_flight = InFlight()
    watched = threading.Event()  # after the last failed task became a dead letter
    watcher = threading.Thread(
        target=dlq_watcher.Watcher(watched).run, name="dlq_watcher", daemon=True
    )
    watcher.start()
    threading.Thread(
        target=reporter.report_outcomes, args=(in_flight,), name="reporter", daemon=True
    ).start()
    worker_pool.start(in_flight, handler)
    log.info("consuming with %d workers", CONCURRENCY)
    consumer = Consumer(stop, in_flight)
    broker.keep_connected("consumer", stop, consumer.consume)
    while not consumer.is_over():  # the broker may have been away when the signal came
        time.sleep(REPORT_TURN_SECONDS)
    watched.set()
    watcher.join(max(0, consumer.deadline - time.monotonic()))
    log.info("stopped")


if __name__ == "__main__":
    main()
