"""How the dispatcher publishes a batch: in one write to the socket, and confirmed by the broker."""

import struct
from typing import Any

import pika
import pika.exceptions
import pika.frame
import pika.spec
from pika.adapters.blocking_connection import BlockingChannel

import broker
import task

# A frame of this size is legal on every connection. https://www.rabbitmq.com/amqp-0-9-1-protocol
FRAME_BODY_BYTES = pika.spec.FRAME_MIN_SIZE - pika.spec.FRAME_HEADER_SIZE - pika.spec.FRAME_END_SIZE
SIZE = struct.Struct(">Q")  # of a body, in the frame of its header
SIZE_AT = pika.spec.FRAME_HEADER_SIZE + 4


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
        channel._flush_output(lambda: bool(selected))

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
        """Wait until the broker has taken all that was published; raise if it has not, or does not
        answer: a channel that has lost its queue never does."""
        self.channel._flush_output(lambda: not self.waiting)
        if self.refused:
            raise pika.exceptions.AMQPError(f"the queue refused {self.refused} messages")

    def probe(self) -> None:
        """Publish a message to nobody. While the broker has an alarm it reads no more, but keeps
        what it got and may publish it later: let that be this, before anything else."""
        self.expect(1)
        self.channel.basic_publish("", "tasks.probe", b"")
        self.wait()


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
    method = pika.spec.Basic.Publish(0, broker.EXCHANGE, broker.ROUTING_KEY, mandatory=True)
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
        headers={broker.SUSPECT: True} if suspect else None,
        delivery_mode=pika.DeliveryMode.Persistent.value,
        expiration=str(expiration_ms),
        message_id=task.NOBODY,
    )
    frame: bytes = pika.frame.Header(number, 0, properties).marshal()
    before_id, _, after = frame.partition(task.NOBODY.encode())
    return before_id[:SIZE_AT], before_id[SIZE_AT + SIZE.size :], after
