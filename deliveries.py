"""Decodes deliveries for pika, which spends half of a consumer's time on that: it makes three
frames of each, and an object of every part. What becomes of a delivery stays pika's."""

import struct
from typing import Any

import pika
import pika.spec
from pika.adapters.blocking_connection import BlockingChannel

# https://www.rabbitmq.com/amqp-0-9-1-protocol: a frame is its type, its channel, its size, so many
# bytes, and an end. A delivery is the frames of a method, of a header, and of parts of the body.
FRAME = struct.Struct(">BHL")
FRAME_BYTES = FRAME.size + pika.spec.FRAME_END_SIZE
METHOD = struct.pack(">L", pika.spec.Basic.Deliver.INDEX)
# A longer body is pika's, frame by frame: here it would be copied with each piece that comes.
MAX_BODY_BYTES = 32 * 1024
TAG = struct.Struct(">QB")  # of the delivery, and whether that is a repetition
CONTENT = struct.Struct(">4xQH")  # the size of the body, and which properties there are
PROPERTIES_AT = 12  # in a header frame's bytes
NO_PROPERTIES = pika.BasicProperties()


class Properties:
    """The properties of a message with headers. They are decoded when somebody asks: of a dead
    letter that takes ten times as long as all else of its delivery."""

    __slots__ = ("encoded",)

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded

    @property
    def headers(self) -> Any:
        """The headers, by name."""
        return pika.BasicProperties().decode(self.encoded).headers


class Delivery:
    """What callbacks get as method and as properties; of these, none unless there are headers."""

    __slots__ = ("consumer_tag", "delivery_tag", "properties", "redelivered")

    def __init__(
        self, consumer_tag: str, delivery_tag: int, redelivered: bool, properties: Any
    ) -> None:
        self.consumer_tag = consumer_tag
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self.properties = properties

    @property
    def method(self) -> "Delivery":
        """What pika looks for in the frame of a method."""
        return self


class Decoder:
    """Stands between the socket of a connection and pika, for its one channel."""

    def __init__(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        self.impl = connection._impl
        self.channel = channel._impl
        self.impl._on_data_available = self.on_data

    def on_data(self, data: bytes) -> None:
        """Take bytes from the socket; what is not complete waits for more of them."""
        buffer, at = self.impl._frame_buffer + data, 0
        while at < len(buffer):
            is_method = buffer[at] == pika.spec.FRAME_METHOD  # a body may begin like one
            is_delivery = is_method and buffer.startswith(METHOD, at + FRAME.size)
            end = self.deliver(buffer, at) if is_delivery else None
            if end is None:
                end = self.leave_to_pika(buffer, at)
            if end == at:
                break
            at = end
        self.impl._frame_buffer = buffer[at:]
        # With no byte more in 15 s, pika would give the connection up.
        self.impl.bytes_received += len(data)

    def leave_to_pika(self, buffer: bytes, at: int) -> int:
        """Let pika process a frame; return where it ends, or `at` if it is not complete."""
        self.impl._frame_buffer = buffer[at:]
        size, frame = self.impl._read_frame()
        if frame is not None:
            self.impl._process_frame(frame)
        end: int = at + size
        return end

    def deliver(self, buffer: bytes, at: int) -> int | None:
        """Hand a delivery to pika's channel; return where it ends, `at` if it is not complete, and
        None if it is long or broken, or something else is between its frames."""
        end: int
        try:
            _, _, size = FRAME.unpack_from(buffer, at)
            tag_at = at + FRAME.size + len(METHOD)
            header_at = at + size + FRAME_BYTES
            header_kind, _, header_size = FRAME.unpack_from(buffer, header_at)
            left, flags = CONTENT.unpack_from(buffer, header_at + FRAME.size)
            end = header_at + header_size + FRAME_BYTES
            if header_kind != pika.spec.FRAME_HEADER or left > MAX_BODY_BYTES:
                return None
            parts = []
            while left > 0:
                kind, _, size = FRAME.unpack_from(buffer, end)
                if kind != pika.spec.FRAME_BODY:
                    return None
                parts.append(buffer[end + FRAME.size : end + FRAME.size + size])
                left -= size
                end += size + FRAME_BYTES
            if buffer[end - 1] != pika.spec.FRAME_END:
                return None
        except (struct.error, IndexError):
            return at
        properties: Any = NO_PROPERTIES
        if flags & pika.BasicProperties.FLAG_HEADERS:
            content_at = header_at + FRAME.size
            properties = Properties(buffer[content_at + PROPERTIES_AT : content_at + header_size])
        tag_end = tag_at + 1 + buffer[tag_at]
        consumer_tag = buffer[tag_at + 1 : tag_end].decode()
        tag, redelivered = TAG.unpack_from(buffer, tag_end)
        delivery = Delivery(consumer_tag, tag, bool(redelivered), properties)
        self.channel._on_deliver(delivery, delivery, b"".join(parts))
        return end
