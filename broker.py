"""What breaks if two processes disagree about it: the broker's address, its names, the topology,
the way a connection is kept, and the way a setting is read. Imported by every script."""

import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pika
import pika.exceptions
import pika.frame
import pika.spec
from pika.adapters.blocking_connection import BlockingChannel

log = logging.getLogger("broker")


def setting(name: str, default: Any, convert: Callable[[str], Any] = str) -> Any:
    """Read an environment variable; empty counts as unset, and nonsense ends the process with 2."""
    value = os.environ.get(name, "").strip()
    try:
        return convert(value) if value else default
    except ValueError as error:
        print(f"{name}={value!r} is not valid: {error}", file=sys.stderr)
        sys.exit(2)


def number(low: float, high: float, kind: type = int) -> Callable[[str], Any]:
    """Return a converter for numbers from low to high."""

    def convert(value: str) -> Any:
        try:
            result = kind(value)
        except ValueError:
            result = None
        if result is None or not low <= result <= high:
            raise ValueError(f"expected {kind.__name__} from {low} to {high}")
        return result

    return convert


def amqp_urls(value: str) -> list[str]:
    """Split and check a comma-separated list of AMQP URLs."""
    urls = [url.strip() for url in value.split(",")]
    for url in urls:
        if not url.startswith(("amqp://", "amqps://")):
            raise ValueError("expected amqp://user:password@host:port/vhost, comma-separated")
        pika.URLParameters(url)
    return urls


URLS = setting("RABBITMQ_URL", ["amqp://tasks:tasks@127.0.0.1:5672/%2F"], amqp_urls)
# A message waits at most half of this, and consumers touch what they hold every quarter, so that
# a row untouched for the whole of it has neither a message nor a living consumer. Half of it, in
# milliseconds, must fit the 32 bits of an expiration.
SENT_TIMEOUT_SECONDS = setting("SENT_TIMEOUT_SECONDS", 3600.0, number(1, 8 * 10**6, float))
LOG_LEVEL = setting("LOG_LEVEL", "INFO", str.upper)

QUEUE = EXCHANGE = ROUTING_KEY = "tasks"
DEAD_LETTER_EXCHANGE = "tasks.dlx"
DEAD_LETTER_QUEUE = "tasks.dlq"
SUSPECT = "suspect"  # header of a message whose attempt a consumer has held before

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

HEARTBEAT_SECONDS = 20
BLOCKED_SECONDS = 5  # how long a publisher waits, rows locked, while the broker has an alarm
FIRST_DELAY_SECONDS = 0.25
LAST_DELAY_SECONDS = 15
TURN_SECONDS = 0.25  # how long a loop may be deaf to stop
STOP_SECONDS = 50  # for what runs to end after SIGTERM; compose kills at 60


def declare(channel: BlockingChannel) -> None:
    """Make the exchanges and queues, dead letters first; 406 if they exist with other arguments."""
    channel.exchange_declare(DEAD_LETTER_EXCHANGE, "direct", durable=True)
    channel.queue_declare(DEAD_LETTER_QUEUE, durable=True, arguments=QUEUE_ARGUMENTS)
    channel.queue_bind(DEAD_LETTER_QUEUE, DEAD_LETTER_EXCHANGE, ROUTING_KEY)
    channel.exchange_declare(EXCHANGE, "direct", durable=True)
    channel.queue_declare(QUEUE, durable=True, arguments=TASKS_ARGUMENTS)
    channel.queue_bind(QUEUE, EXCHANGE, ROUTING_KEY)


def count_waiting(channel: BlockingChannel) -> int:
    """Return how many messages wait in the queue of tasks, those at consumers not counted."""
    return channel.queue_declare(QUEUE, passive=True).method.message_count


def publish(
    connection: pika.BlockingConnection,
    channel: BlockingChannel,
    messages: list[tuple[str, bytes, bool]],
    expiration_ms: int,
) -> None:
    """Put (message id, body, is a suspect) triples into the channel's open transaction, in one
    write to the socket.

    basic_publish() polls and sends three times a message, half of a dispatcher's time. The frames
    here are pika's own; only their way out, and the largest body a frame may have, is not public.
    """
    number, limit = channel.channel_number, connection._impl._body_max_length
    method = pika.spec.Basic.Publish(exchange=EXCHANGE, routing_key=ROUTING_KEY, mandatory=True)
    properties = pika.BasicProperties(
        content_type="application/json",
        delivery_mode=pika.DeliveryMode.Persistent.value,
        expiration=str(expiration_ms),
    )
    publish_frame = pika.frame.Method(number, method).marshal()
    frames = []
    for message_id, body, suspect in messages:
        properties.message_id = message_id
        properties.headers = {SUSPECT: True} if suspect else None
        frames += publish_frame, pika.frame.Header(number, len(body), properties).marshal()
        for start in range(0, len(body), limit):
            frames.append(pika.frame.Body(number, body[start : start + limit]).marshal())
    connection._impl._output_marshaled_frames([b"".join(frames)])


def host_of(url: str) -> str:
    """Return the host and port of an AMQP URL: without its password, it may be logged."""
    parameters = pika.URLParameters(url)
    return f"{parameters.host}:{parameters.port}"


def connect(name: str) -> pika.BlockingConnection:
    """Connect to the first host that answers, in random order, under a name the broker shows."""
    parameters = [pika.URLParameters(url) for url in random.sample(URLS, len(URLS))]
    for each in parameters:
        each.client_properties = {"connection_name": name}
        each.heartbeat = HEARTBEAT_SECONDS if each.heartbeat is None else each.heartbeat
        each.blocked_connection_timeout = each.blocked_connection_timeout or BLOCKED_SECONDS
        each.connection_attempts = 1  # keep_connected() repeats, and can be stopped
        each.tcp_options = {"TCP_KEEPIDLE": 30, "TCP_USER_TIMEOUT": 30_000}
    return pika.BlockingConnection(parameters)


def back_off(failures: int) -> float:
    """Return the seconds to wait after so many failures in a row before the next one."""
    return min(FIRST_DELAY_SECONDS * 2 ** min(failures, 10), LAST_DELAY_SECONDS)


def keep_connected(
    name: str,
    stop: threading.Event,
    work: Callable[[pika.BlockingConnection, BlockingChannel], None],
    expected: tuple[type[BaseException], ...] = (),
    tell: Callable[[str], None] = lambda state: None,
) -> None:
    """Connect, declare and call work(connection, channel) again and again until stop is set.

    Whatever work raises ends the connection, so the broker takes back what was not acked. AMQP
    errors and the expected ones are one WARNING an outage; others a stack trace, and a retry too.
    tell() hears "ok" or what is wrong with the broker.
    """
    lost = (pika.exceptions.AMQPError, OSError)
    failures = 0
    while not stop.is_set():
        began = time.monotonic()
        connection = None
        try:
            connection = connect(name)
            channel = connection.channel()
            declare(channel)
            tell("ok")
            log.log(logging.INFO if failures else logging.DEBUG, "%s connected", name)
            work(connection, channel)
        except Exception as error:  # the top of a loop: a thread that ends quietly is worse
            if time.monotonic() - began > LAST_DELAY_SECONDS:
                failures = 0  # it worked for a while: a new outage
            delay = back_off(failures) * random.uniform(0.5, 1)
            failures += 1
            reason = str(error).strip() or type(error).__name__
            if connection is None:
                reason = f"cannot connect to {', '.join(map(host_of, URLS))}: {reason}"
            if isinstance(error, lost):
                tell(reason)
            if not isinstance(error, lost + expected):
                log.exception("%s failed, next try in %.1f s", name, delay)
            else:
                level = logging.WARNING if failures == 1 else logging.DEBUG
                log.log(level, "%s lost a server, next try in %.1f s: %s", name, delay, reason)
            close(connection)
            stop.wait(delay)
        else:
            failures = 0
            close(connection)


def check(channel: BlockingChannel, cancelled: bool) -> None:
    """Raise if the broker closed the channel or ended a subscription: pika does neither by itself
    in process_data_events()."""
    if cancelled or not channel.is_open:
        what = "the subscription" if cancelled else "the channel"
        raise pika.exceptions.AMQPError(f"the broker ended {what}")


def close(connection: pika.BlockingConnection | None) -> None:
    """Close a connection that may be broken already."""
    try:
        if connection is not None and connection.is_open:
            connection.close()
    except (pika.exceptions.AMQPError, OSError) as error:
        log.debug("closing failed: %s", error)


def start_logging() -> None:
    """Log to stderr, without what pika and urllib3 say: it is logged here once, and shorter."""
    try:
        logging.basicConfig(
            level=LOG_LEVEL,
            format="%(asctime)s %(levelname)s %(name)s [%(threadName)s] %(message)s",
        )
    except ValueError:
        print(f"LOG_LEVEL={LOG_LEVEL!r} is not valid: expected DEBUG, INFO, …", file=sys.stderr)
        sys.exit(2)
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3").setLevel(logging.ERROR)


def stop_on_signals(stop: threading.Event) -> None:
    """Set stop at the first SIGTERM or SIGINT; the second ends the process at once, with 1."""

    def handle(*_: object) -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def host_name(role: str) -> str:
    """Return the name a process goes by at the broker and in logs: role@host:pid."""
    return f"{role}@{socket.gethostname()}:{os.getpid()}"
