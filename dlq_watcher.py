"""The watcher of the dead letters: takes what has arrived in the dead-letter queue, reports it to
the producer as errors in one PUT, then acks. A thread of every consumer, and a script of its own.

Run it with `python dlq_watcher.py`. Exit codes: 0 stopped, 1 crash, 2 bad configuration."""

import logging
import random
import threading
import time
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel

import broker
import deliveries
import process
import reporter
import task

log = logging.getLogger("dlq_watcher")

PREFETCH = 500
LAST_LETTERS_SECONDS = 2
GROUP_SECONDS = 0.05  # from one report to the next: a call takes as long as a hundred letters
# As AMQP encodes a header: its name, the mark of a long string, and that.
REASON = b"\x06reasonS"
REJECTED = REASON + b"\0\0\0\x08rejected"


def report_of(properties: Any, body: bytes) -> task.Report | None:
    """Return the report that a dead letter stands for; None if it holds no task of ours."""
    try:
        message = task.parse_message(body)
    except ValueError as error:
        shown = process.printable(body[:80])
        log.warning("dropped a dead letter without a task (%s): %s", error, shown)
        return None
    reason = reason_of(properties)
    return task.Report(message.id, "error", message.attempt, reason=reason, sent=message.sent)


def reason_of(properties: Any) -> str:
    """Return why the broker has dead-lettered a message, the last time."""
    if is_rejected(properties):
        return "rejected"
    try:
        return str(properties.headers["x-death"][0]["reason"])
    except (KeyError, TypeError, IndexError):  # put there by somebody else than the broker
        return "rejected"


def is_rejected(properties: Any) -> bool:
    """Tell whether encoded headers name one reason and it is this: so it is of nearly all letters,
    and to decode them takes longer than all else of a letter."""
    encoded = getattr(properties, "encoded", b"")  # pika's own properties have none
    return REJECTED in encoded and encoded.count(REASON) == 1


class Watcher:
    """Drains the dead-letter queue, over one broker connection and one HTTP session."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.client = reporter.Client()
        self.letters: list[tuple[int, task.Report | None]] = []
        self.renewal = broker.Renewal()

    def run(self) -> None:
        """Watch until stop is set, through every outage of broker and producer."""
        broker.keep_connected("dlq_watcher", self.stop, self.watch)

    def watch(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        """Report and ack what arrives over one connection, until stop or until it should be
        renewed; raise when the broker takes it away."""
        self.letters, self.renewal = [], broker.Renewal()
        broker.raise_when_cancelled(channel)
        deliveries.Decoder(connection, channel)
        channel.basic_qos(prefetch_count=PREFETCH)
        # The letters go to one watcher while it has room. In turn, each of many would get one and
        # report it alone. https://www.rabbitmq.com/docs/consumer-priority
        priority = {"x-priority": random.randrange(2**31)}
        channel.basic_consume(broker.DEAD_LETTER_QUEUE, self.on_letter, arguments=priority)
        backoff = process.Backoff(log, "dead letters wait for the producer")
        stop_at = None  # of time.monotonic(), the latest; sooner when no letter comes any more
        report_at = 0.0
        while stop_at is None or time.monotonic() < stop_at:
            if not self.letters and self.renewal.is_due():
                return
            if stop_at is None and self.stop.is_set():
                stop_at = time.monotonic() + LAST_LETTERS_SECONDS
            broker.pump(connection, channel, 0 if self.letters else process.TURN_SECONDS)
            if not self.letters:
                if stop_at is not None:
                    return
                continue
            if (early := report_at - time.monotonic()) > 0 and stop_at is None:
                self.stop.wait(early)  # without looking: each look takes as long as ten letters
                broker.pump(connection, channel, 0)
            report_at = time.monotonic() + GROUP_SECONDS
            try:
                count, locked = self.report()
                backoff.succeeded()
                for tag in locked:  # a row that somebody has locked: the letter comes again
                    channel.basic_nack(tag, requeue=True)
                # A tag that is settled already would end the channel.
                done = [tag for tag, _ in self.letters[:count] if tag not in locked]
                if done:
                    channel.basic_ack(done[-1], multiple=True)
                del self.letters[:count]
            except reporter.Unavailable as error:
                delay = backoff.failed(error)
                if stop_at is not None:
                    return  # the letters go back to their queue
                self.pause(connection, channel, delay)

    def report(self) -> tuple[int, set[int]]:
        """PUT what has arrived as one group; return how many letters are done with, and the tags of
        those among them that are not."""
        letters = self.letters[:]
        tags = [tag for tag, report in letters if report is not None]
        reports = [report for _, report in letters if report is not None]
        if not reports:
            return len(letters), set()
        answer = self.client.put(reports)
        for index, reason in answer.refused.items():
            log.info("dead letter of %s is void: %s", reports[index].id, reason)
        log.info("reported %d dead letters", len(reports))
        return len(letters), {tags[index] for index in answer.locked}

    def pause(
        self, connection: pika.BlockingConnection, channel: BlockingChannel, seconds: float
    ) -> None:
        """Wait while the connection keeps its heartbeat."""
        deadline = time.monotonic() + seconds
        while not self.stop.is_set() and (left := deadline - time.monotonic()) > 0:
            broker.pump(connection, channel, min(left, process.TURN_SECONDS))

    def on_letter(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """Take a delivery; it is acked when its report is accepted, or there is none to make."""
        self.renewal.used = True
        self.letters.append((method.delivery_tag, report_of(properties, body)))


def main() -> None:
    """Watch until SIGTERM or SIGINT."""
    process.start_logging()
    stop = threading.Event()
    process.stop_on_signals(stop)
    Watcher(stop).run()
    log.info("stopped")


if __name__ == "__main__":
    main()
