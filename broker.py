"""RabbitMQ as every script sees it: its address, the names and the topology, how a connection is
kept, and how a batch is published."""

import itertools
import logging
import math
import random
import struct
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import pika
import pika.exceptions
import pika.frame
import pika.spec
from pika.adapters.blocking_connection import BlockingChannel
from pika.adapters.utils.connection_workflow import AMQPConnectorException

import process
import task

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
WORKED_SECONDS = 5  # a connection that breaks sooner is tried again less and less often
CONFIRM_SECONDS = 10  # an election takes less; a channel that has lost its queue never answers
BLOCKED_SECONDS = 5  # how long a publisher waits, rows locked, while the broker has an alarm
# A frame of this size is legal on every connection. https://www.rabbitmq.com/amqp-0-9-1-protocol
FRAME_BODY_BYTES = pika.spec.FRAME_MIN_SIZE - pika.spec.FRAME_HEADER_SIZE - pika.spec.FRAME_END_SIZE
SIZE = struct.Struct(">Q")  # of a body, in the frame of its header
SIZE_AT = pika.spec.FRAME_HEADER_SIZE + 4
LOST = (pika.exceptions.AMQPError, AMQPConnectorException, OSError)
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


class Confirms:
    """The broker's answers to what one channel publishes.

    A transaction would be one answer to a batch, but RabbitMQ (3.10 to 4.3) says OK to its commit
    also when a quorum queue has refused the messages, as it does while it elects a leader or is
    full. https://www.rabbitmq.com/docs/confirms
    """

    def __init__(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        self.connection = connection
        self.channel = channel
        self.last = 0  # the broker counts messages from 1 on
        self.waiting: set[int] = set()  # messages without an answer
        self.refused = 0
        selected: list[Any] = []
        channel._impl.confirm_delivery(self.on_answer, selected.append)
        self.flush(lambda: bool(selected))

    def expect(self, count: int) -> None:
        """Note that so many messages are published now."""
        self.waiting.update(range(self.last + 1, self.last + count + 1))
        self.last += count

    def on_answer(self, frame: Any) -> None:
        """Take an ack or a nack, of one message or of all up to it."""
        number = frame.method.delivery_tag
        if frame.method.multiple:
            answered = {each for each in self.waiting if each <= number}
        else:
            answered = {number}
        self.waiting -= answered
        if isinstance(frame.method, pika.spec.Basic.Nack):
            self.refused += len(answered)

    def wait(self) -> None:
        """Wait until the broker has taken all that was published; raise if it has not."""
        self.flush(lambda: not self.waiting)
        if self.refused:
            raise pika.exceptions.AMQPError(f"the queue refused {self.refused} messages")

    def flush(self, is_done: Callable[[], bool]) -> None:
        """Send and read until is_done(); end the connection after CONFIRM_SECONDS, as its heartbeat
        does: to close it, the channel would have to answer."""
        impl = self.connection._impl
        late = pika.exceptions.AMQPError(f"not confirmed in {CONFIRM_SECONDS} s")
        timer = impl._adapter_call_later(CONFIRM_SECONDS, lambda: impl._terminate_stream(late))
        try:
            self.channel._flush_output(is_done)
        finally:
            impl._adapter_remove_timeout(timer)


def publish(
    connection: pika.BlockingConnection,
    channel: BlockingChannel,
    messages: list[tuple[str, bytes, bool]],
    expiration_ms: int,
) -> None:
    """Publish (message id, body, is a suspect) triples in one write to the socket.

    basic_publish() polls and sends three times a message, half of a dispatcher's time. The frames
    here are pika's own, those of a method and a header made once a batch; only their way out is not
    public.
    """
    number = channel.channel_number
    method = pika.spec.Basic.Publish(exchange=EXCHANGE, routing_key=ROUTING_KEY, mandatory=True)
    publish_frame = pika.frame.Method(number, method).marshal()
    headers = [header_parts(number, expiration_ms, suspect) for suspect in (False, True)]
    frames: list[bytes] = []
    for message_id, body, suspect in messages:
        before, between, after = headers[suspect]
        frames += publish_frame, before, SIZE.pack(len(body)), between, message_id.encode(), after
        for start in range(0, len(body), FRAME_BODY_BYTES):
            part = body[start : start + FRAME_BODY_BYTES]
            frames.append(pika.frame.Body(number, part).marshal())
    connection._impl._output_marshaled_frames([b"".join(frames)])


def header_parts(number: int, expiration_ms: int, suspect: bool) -> tuple[bytes, bytes, bytes]:
    """Return the frame of a header without the size of the body and the id of the message: what is
    before the size, between the two, and after the id."""
    properties = pika.BasicProperties(
        content_type="application/json",
        headers={SUSPECT: True} if suspect else None,
        delivery_mode=pika.DeliveryMode.Persistent.value,
        expiration=str(expiration_ms),
        message_id=task.NOBODY,
    )
    frame: bytes = pika.frame.Header(number, 0, properties).marshal()
    before_id, _, after = frame.partition(task.NOBODY.encode())
    return before_id[:SIZE_AT], before_id[SIZE_AT + SIZE.size :], after


def host_of(url: str) -> str:
    """Return the host and port of an AMQP URL: without its password, it may be logged."""
    parameters = pika.URLParameters(url)
    return f"{parameters.host}:{parameters.port}"


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
        return pika.BlockingConnection(parameters)
    except LOST as error:
        hosts = ", ".join(map(host_of, URLS))
        reason = process.printable(error)
        raise pika.exceptions.AMQPError(f"cannot connect to {hosts}: {reason}") from error


def keep_connected(
    role: str,
    stop: threading.Event,
    work: Callable[[pika.BlockingConnection, BlockingChannel], None],
    expected: tuple[type[BaseException], ...] = (),
    on_state: Callable[[str], None] = lambda state: None,
) -> None:
    """Connect, declare and call work(connection, channel) again and again until stop is set.

    Whatever work raises ends the connection, so the broker takes back what was not acked. AMQP
    errors and the expected ones are WARNINGs; others are logged with a stack trace, and retried
    too, each time from the next host on: a frozen one would take 15 seconds again. on_state() gets
    "ok" or what is wrong with the broker.
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
            on_state("ok")
            log.log(logging.INFO if backoff.failures else logging.DEBUG, "%s connected", name)
            work(connection, channel)
        except Exception as error:  # the top of a loop: a thread that ends quietly is worse
            first += 1
            if time.monotonic() - worked_since > WORKED_SECONDS:
                backoff.succeeded()  # this is a new outage
            if isinstance(error, LOST):
                on_state(process.printable(error))
            if not isinstance(error, LOST + expected):
                log.exception("%s failed", name)
            delay = backoff.failed(error)
            close(connection)
            stop.wait(delay)
        else:
            close(connection)


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
