"""The consumer: takes tasks from RabbitMQ, runs them on worker threads, reports success to the
producer by REST and sends failures to the dead letters. A DLQ watcher runs in it as a thread.

Run it with `python consumer.py`. Exit codes: 0 stopped, 1 crash, 2 bad configuration."""

import importlib
import json
import logging
import os
import pathlib
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel

import broker
import dlq_watcher
import workers

log = logging.getLogger("consumer")

CONCURRENCY = broker.setting("CONCURRENCY", 1, broker.number(1, 1000))
PROCESSING_SECONDS = broker.setting("PROCESSING_SECONDS", 0.1, broker.number(0, 10**6, float))
FAILURE_RATE = broker.setting("FAILURE_RATE", 0.1, broker.number(0, 1, float))
HANDLER = broker.setting("HANDLER", "")
PREFETCH = broker.setting(
    "PREFETCH", 0, lambda value: 0 if value == "auto" else broker.number(1, 65535)(value)
)
HEALTH_FILE = broker.setting("HEALTH_FILE", None, pathlib.Path)

IN_HAND_SECONDS = 0.1  # of work, which PREFETCH=auto aims at
MAX_WINDOW = 300
MAX_WINDOW_BYTES = 16 * 1024 * 1024
ADJUST_SECONDS = 0.1
HEALTH_SECONDS = 10
REPORT_TURN_SECONDS = 0.02


def imitate(text: str) -> str | None:
    """Imitate work: sleep PROCESSING_SECONDS, fail at FAILURE_RATE."""
    time.sleep(PROCESSING_SECONDS)
    if random.random() < FAILURE_RATE:
        raise RuntimeError("imitated failure")
    return None


def load_handler(name: str) -> Callable[[str], Any]:
    """Return the function that HANDLER names as module:function, or the imitation."""
    if not name:
        return imitate
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        handler = getattr(importlib.import_module(module), function)
        if not callable(handler):
            raise TypeError(f"{function} is not a function")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        print(f"HANDLER={name!r} is not valid: expected module:function: {error}", file=sys.stderr)
        sys.exit(2)
    return handler


class Link:
    """One broker connection's channel: its unsettled deliveries and windows. I/O thread only."""

    def __init__(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        self.connection = connection
        self.channel = channel
        self.arrived: list[workers.Task] = []
        self.open: dict[int, None] = {}  # delivery tags, ascending
        self.subscriptions: list[str] = []
        self.window = 0
        self.cancelled = False
        channel.add_on_cancel_callback(self.on_cancel)

    def on_cancel(self, _: Any) -> None:
        """Note that the broker has ended the subscription: the queue is gone, or its leader."""
        self.cancelled = True

    def widen(self, count: int) -> None:
        """Let the broker send count more unsettled messages, by one more subscription."""
        self.channel.basic_qos(prefetch_count=count)
        self.subscriptions.append(self.channel.basic_consume(broker.QUEUE, self.on_message))
        self.window += count
        log.debug("window is now %d", self.window)

    def narrow(self, count: int) -> None:
        """Go back to the first subscription, of count messages. What comes meanwhile, pika sends
        back as redelivered, so this is for a full window, or for when that does not matter."""
        while len(self.subscriptions) > 1:
            self.channel.basic_cancel(self.subscriptions.pop())
        self.window = count
        log.debug("window is now %d", self.window)

    def on_message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """Take a delivery; what is not a task of ours goes to the dead letters."""
        self.open[method.delivery_tag] = None
        try:
            message = json.loads(body)
            task = workers.Task(message["id"], message["text"], message["attempt"], len(body))
            if (type(task.id), type(task.text), type(task.attempt)) != (str, str, int):
                raise TypeError("expected id and text as strings, attempt as an integer")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("dead-lettered a message that is no task (%s): %r", error, body[:80])
            self.settle({method.delivery_tag: workers.DEAD_LETTER})
            return
        task.suspect = method.redelivered or broker.SUSPECT in (properties.headers or {})
        task.deliveries.append((self, method.delivery_tag))
        self.arrived.append(task)

    def settle(self, verdicts: dict[int, str]) -> None:
        """Ack, dead-letter or requeue deliveries, each run of equals at the front by one frame."""
        last = None
        for tag in list(self.open):
            verdict = verdicts.get(tag)
            if last is not None and verdict != last[1]:
                self.send(*last, multiple=True)
            if verdict is None:
                break
            last = tag, verdict
            del self.open[tag], verdicts[tag]
        else:
            if last is not None:
                self.send(*last, multiple=True)
        for tag, verdict in verdicts.items():
            if tag in self.open:
                del self.open[tag]
                self.send(tag, verdict, multiple=False)

    def send(self, tag: int, verdict: str, multiple: bool) -> None:
        """Send one ack or nack; with multiple it covers every unsettled tag up to this one."""
        if verdict == workers.ACK:
            self.channel.basic_ack(tag, multiple)
        else:
            self.channel.basic_nack(tag, multiple, requeue=verdict == workers.REQUEUE)


class Consumer:
    """The broker's I/O thread: it alone touches the connection, and it never runs a task."""

    def __init__(self, stop: threading.Event, hand: workers.Hand) -> None:
        self.stop = stop
        self.hand = hand
        self.pace = 0.0  # seconds a task takes a worker, a moving average
        self.adjust_at = 0.0
        self.healthy_at = 0.0
        self.deadline = 0.0  # of time.monotonic(), for what runs to end

    def consume(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        """Take deliveries over one connection until stop; raise when the broker takes it away."""
        link = Link(connection, channel)
        try:
            link.widen(PREFETCH or CONCURRENCY)
            while not self.stop.is_set():
                self.turn(link, broker.TURN_SECONDS)
            for subscription in link.subscriptions:
                channel.basic_cancel(subscription)
            while not self.is_over():
                self.turn(link, REPORT_TURN_SECONDS)
            connection.process_data_events()  # the last acks; the broker returns the rest
        finally:
            self.hand.forget(link)

    def is_over(self) -> bool:
        """Let nothing start any more; tell whether all is reported, or the time for it is up."""
        self.deadline = self.deadline or time.monotonic() + broker.STOP_SECONDS
        self.hand.stop()
        return self.hand.is_quiet() or time.monotonic() > self.deadline

    def turn(self, link: Link, seconds: float) -> None:
        """Let the connection work for a moment; take in what came; keep the window right."""
        link.connection.process_data_events(seconds)
        broker.check(link.channel, link.cancelled)
        if link.arrived:
            self.hand.admit(link.arrived)
            link.arrived = []
        now = time.monotonic()
        if now >= self.adjust_at and not self.stop.is_set():
            self.adjust_at = now + ADJUST_SECONDS
            if not PREFETCH:
                self.adjust(link)
            self.hand_back(link)
        if HEALTH_FILE and now >= self.healthy_at:
            self.healthy_at = now + HEALTH_SECONDS
            HEALTH_FILE.touch()

    def adjust(self, link: Link) -> None:
        """Keep about IN_HAND_SECONDS of work in hand, moved only for a factor of two or more.

        A wider window is one more subscription; a narrower one cancels the extra ones while the
        window is full: then no message can be on its way, and none comes back as redelivered.
        """
        count, seconds, elapsed, size = self.hand.measure()
        if count:
            self.pace = (self.pace + seconds / count) / 2 if self.pace else seconds / count
        pace = max(self.pace, elapsed)
        if pace:
            target = CONCURRENCY * IN_HAND_SECONDS / pace
            target = int(min(target, MAX_WINDOW, MAX_WINDOW_BYTES / max(size, 1)))
            target = max(target, CONCURRENCY)
            if target >= 2 * link.window:
                link.widen(target - link.window)
            elif 2 * target <= link.window and len(link.open) >= link.window:
                link.narrow(CONCURRENCY)

    def hand_back(self, link: Link) -> None:
        """Return to the broker what waits behind long tasks: another consumer may be idle."""
        if stuck := self.hand.take_stuck(CONCURRENCY, patient=PREFETCH > 0):
            log.info("handed back %d tasks that waited behind long ones", len(stuck))
            link.narrow(PREFETCH or CONCURRENCY)
            tags = [tag for task in stuck for _, tag in task.deliveries]
            link.settle(dict.fromkeys(tags, workers.REQUEUE))


def main() -> None:
    """Consume until SIGTERM or SIGINT; then finish and report what runs."""
    broker.start_logging()
    process = load_handler(HANDLER)
    stop = threading.Event()
    broker.stop_on_signals(stop)
    hand = workers.Hand()
    watched = threading.Event()  # after the last failed task became a dead letter
    watcher = threading.Thread(
        target=dlq_watcher.Watcher(watched).run, name="dlq_watcher", daemon=True
    )
    watcher.start()
    threading.Thread(
        target=workers.report_outcomes, args=(hand,), name="reporter", daemon=True
    ).start()
    for number in range(CONCURRENCY):
        threading.Thread(
            target=workers.work, args=(hand, process), name=f"worker-{number}", daemon=True
        ).start()
    log.info("consuming with %d workers", CONCURRENCY)
    consumer = Consumer(stop, hand)
    broker.keep_connected(broker.host_name("consumer"), stop, consumer.consume)
    while not consumer.is_over():  # the broker may have been away when the signal came
        time.sleep(REPORT_TURN_SECONDS)
    watched.set()
    watcher.join(max(0, consumer.deadline - time.monotonic()))
    log.info("stopped")


if __name__ == "__main__":
    main()
