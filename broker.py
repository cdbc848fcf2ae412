"""RabbitMQ as every script sees it: its address, the names and the topology, and how a connection
is kept and ended."""

import itertools
import logging
import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException

import process

log = logging.getLogger("broker")


def amqp_urls(value: str) -> list[str]:
    """Split and check a comma-separated list of AMQP URLs."""
    urls = [url.strip() for url in value.split(",")]
    try:
        for url in urls:
            if not url.startswith(("amqp://", "amqps://")):
                raise ValueError
            pika.URLParameters(url)
    except (ValueError, TypeError):  # pika's own text may hold the password
        raise ValueError("expected amqp://user:password@host:port/vhost, comma-separated") from None
    return urls


URLS = process.setting("RABBITMQ_URL", ["amqp://tasks:tasks@127.0.0.1:5672/%2F"], amqp_urls)

QUEUE = EXCHANGE = ROUTING_KEY = "tasks"
DEAD_LETTER_EXCHANGE = "tasks.dlx"
DEAD_LETTER_QUEUE = "tasks.dlq"
SUSPECT = "suspect"  # header of a message whose attempt a consumer has had before

# "Never" for a broker that counts deliveries or milliseconds. The row counts a task's deaths, and
# -1 means at once on RabbitMQ 3.10. https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling
NEVER = 2_000_000_000
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-delivery-limit": NEVER,
    "x-consumer-timeout": NEVER,
}
# At-least-once dead lettering needs all three, else the broker silently falls back to at-most-once.
# https://www.rabbitmq.com/docs/quorum-queues#activating-at-least-once-dead-lettering
TASKS_ARGUMENTS = QUEUE_ARGUMENTS | {
    "x-dead-letter-exchange": DEAD_LETTER_EXCHANGE,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}

HEARTBEAT_SECONDS = 10  # pika leaves a silent server after 15 to 30 s
# A connection that ends sooner is tried again less and less often. One that its broker has not
# broken would soon end again: there is an alarm, or the queue is silent, or the database is.
WORKED_SECONDS = 20
WORKED_UNTIL_BROKEN_SECONDS = 5
ANSWER_SECONDS = 10  # an election takes less; pika looks at the clock every 5 s, at the least
HEARTBEATS_BYTES = 200  # more than come in that time
# See Renewal.
RENEW_SECONDS = min(60, process.SENT_TIMEOUT_SECONDS / 10)
RENEW_UNUSED_SECONDS = 10 * RENEW_SECONDS
BLOCKED_SECONDS = 5  # how long a publisher waits, rows locked, while the broker has an alarm
LOST = (pika.exceptions.AMQPError, AMQPConnectorException, OSError)
BROKEN = (pika.exceptions.ConnectionClosedByBroker, pika.exceptions.StreamLostError)
# Where a process's connections begin in the list of hosts: each with another one, so that a node
# that freezes has not all of them.
FIRST_HOSTS = itertools.count(random.randrange(len(URLS)))


def declare(channel: BlockingChannel) -> None:
    """Make the exchanges and queues, dead letters first; 406 if they exist with other arguments."""
    channel.exchange_declare(DEAD_LETTER_EXCHANGE, "direct", durable=True)
    channel.queue_declare(DEAD_LETTER_QUEUE, durable=True, arguments=QUEUE_ARGUMENTS)
    channel.queue_bind(DEAD_LETTER_QUEUE, DEAD_LETTER_EXCHANGE, ROUTING_KEY)
    channel.exchange_declare(EXCHANGE, "direct", durable=True)
    channel.queue_declare(QUEUE, durable=True, arguments=TASKS_ARGUMENTS)
    channel.queue_bind(QUEUE, EXCHANGE, ROUTING_KEY)


def count_waiting(channel: BlockingChannel, queue: str) -> tuple[int, int]:
    """Return how many messages wait in a queue, and how many consumers it has. Messages at these do
    not count."""
    method = channel.queue_declare(queue, passive=True).method
    return method.message_count, method.consumer_count


def host_of(url: str) -> str:
    """Return the host and port of an AMQP URL: without its password, it may be logged."""
    parameters = pika.URLParameters(url)
    return f"{parameters.host}:{parameters.port}"


class Connection(pika.BlockingConnection):  # type: ignore[misc]
    """Ends itself when the broker leaves a call without its answer: a channel may hang, or wait for
    a queue that does, on a connection whose heartbeats come."""

    def _flush_output(self, *waiters: Callable[[], bool]) -> None:
        """Send and read until one of the waiters is true: once connected, pika waits only here."""
        deadline, heard = time.monotonic() + ANSWER_SECONDS, self._impl.bytes_received

        def give_up() -> bool:
            nonlocal deadline, heard
            now = time.monotonic()
            if self._impl.bytes_received > heard + HEARTBEATS_BYTES:  # the answer comes after those
                deadline, heard = now + ANSWER_SECONDS, self._impl.bytes_received
            elif now > deadline:
                deadline = math.inf
                error = pika.exceptions.AMQPError(f"no answer in {ANSWER_SECONDS} s")
                self._impl._terminate_stream(error)
            return False

        super()._flush_output(*waiters, give_up)


def connect(name: str, first: int) -> pika.BlockingConnection:
    """Connect to the first host that answers, from host number `first` on, round and round, under a
    name the broker shows."""
    first %= len(URLS)
    parameters = [pika.URLParameters(url) for url in URLS[first:] + URLS[:first]]
    for each in parameters:
        each.client_properties = {"connection_name": name}
        each.heartbeat = HEARTBEAT_SECONDS if each.heartbeat is None else each.heartbeat
        each.blocked_connection_timeout = each.blocked_connection_timeout or BLOCKED_SECONDS
        each.connection_attempts = 1  # keep_connected() repeats, and can be stopped
        each.tcp_options = {"TCP_KEEPIDLE": 30, "TCP_USER_TIMEOUT": 30_000}
    try:
        return Connection(parameters)
    except LOST as error:
        hosts = ", ".join(map(host_of, URLS))
        reason = process.printable(error)
        raise pika.exceptions.AMQPError(f"cannot connect to {hosts}: {reason}") from error


def keep_connected(
    role: str,
    stop: threading.Event,
    work: Callable[[pika.BlockingConnection, BlockingChannel], None],
    expected: tuple[type[BaseException], ...] = (),
    on_lost: Callable[[str], None] = lambda reason: None,
) -> None:
    """Connect, declare and call work(connection, channel) again and again until stop is set.

    Whatever work raises ends the connection, so the broker takes back what was not acked. AMQP
    errors and the expected ones are WARNINGs; others are logged with a stack trace, and retried
    too. If work returns, the connection is renewed at once. Each begins at the next host: a frozen
    one would take 15 seconds again. on_lost() gets what is wrong with the broker.
    """
    name, first = process.name_of(role), next(FIRST_HOSTS)
    backoff = process.Backoff(log, f"{name} lost a server")
    while not stop.is_set():
        worked_since = math.inf
        connection = None
        try:
            connection = connect(name, first)
            channel = connection.channel()
            declare(channel)
            worked_since = time.monotonic()
            log.log(logging.INFO if backoff.failures else logging.DEBUG, "%s connected", name)
            work(connection, channel)
        except Exception as error:  # the top of a loop: a thread that ends quietly is worse
            is_broken = isinstance(error, BROKEN)
            enough = WORKED_UNTIL_BROKEN_SECONDS if is_broken else WORKED_SECONDS
            if time.monotonic() - worked_since > enough:
                backoff.succeeded()  # this is a new outage
            if isinstance(error, LOST):
                on_lost(process.printable(error))
            if not isinstance(error, LOST + expected):
                log.exception("%s failed", name)
            delay = backoff.failed(error)
            close(connection)
            stop.wait(delay)
        else:
            close(connection)
        first += 1


class Renewal:
    """When a connection with a subscription is to be renewed.

    An ack, a nack or a delivery that RabbitMQ loses while a quorum queue changes its leader stays
    with the subscription, and takes its room, until the connection ends.
    https://github.com/rabbitmq/rabbitmq-server/issues/15473
    """

    def __init__(self) -> None:
        now = time.monotonic()
        self.used = False  # a message has come
        self.used_at = now + RENEW_SECONDS * random.uniform(1, 2)  # not all consumers together
        self.unused_at = now + RENEW_UNUSED_SECONDS * random.uniform(1, 2)

    def is_due(self) -> bool:
        """Tell whether a subscription without messages should begin anew."""
        return time.monotonic() > (self.used_at if self.used else self.unused_at)


def raise_when_cancelled(channel: BlockingChannel) -> None:
    """Let pump() raise when the broker ends a subscription: the queue is gone, or its leader."""

    def on_cancel(_: Any) -> NoReturn:
        raise pika.exceptions.AMQPError("the broker ended the subscription")

    channel.add_on_cancel_callback(on_cancel)


def pump(connection: pika.BlockingConnection, channel: BlockingChannel, seconds: float) -> None:
    """Let the connection work for a moment; raise if the broker has closed the channel, which
    process_data_events() does not say."""
    connection.process_data_events(seconds)
    if not channel.is_open:
        raise pika.exceptions.AMQPError("the broker ended the channel")


def close(connection: pika.BlockingConnection | None) -> None:
    """Close a connection that may be broken already."""
    try:
        if connection is not None and connection.is_open:
            connection.close()
    except LOST as error:
        log.debug("closing failed: %s", error)
