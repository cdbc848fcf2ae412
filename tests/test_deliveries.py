"""The decoder of deliveries finds what pika would find, however the bytes come."""

import types
from typing import Any

import pika
import pika.frame
import pika.spec
import pytest

import deliveries
import dlq_watcher
import publishing

pytestmark = pytest.mark.pure

TAG = "ctag1.0123456789abcdef"


def frames(number: int, body: bytes, headers: dict[str, Any] | None = None) -> list[bytes]:
    """Return the frames of a delivery, as pika makes them."""
    method = pika.spec.Basic.Deliver(TAG, number, number % 2 == 0, "tasks", "tasks")
    properties = pika.BasicProperties("application/json", delivery_mode=2, headers=headers)
    size = publishing.FRAME_BODY_BYTES
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return [
        pika.frame.Method(1, method).marshal(),
        pika.frame.Header(1, len(body), properties).marshal(),
        *(pika.frame.Body(1, part).marshal() for part in parts),
    ]


class Connection:
    """Stands for pika's: notes the frames that are left to it, and the deliveries."""

    def __init__(self) -> None:
        self._impl: Any = self
        self._frame_buffer = b""
        self.bytes_received = 0
        self._on_data_available: Any = None
        self.left: list[Any] = []
        self.taken: list[tuple[Any, ...]] = []
        self.properties: list[Any] = []
        deliveries.Decoder(self, types.SimpleNamespace(_impl=self))  # type: ignore[arg-type]

    def _read_frame(self) -> Any:
        return pika.frame.decode_frame(self._frame_buffer)

    def _process_frame(self, frame: Any) -> None:
        self.left.append(frame)

    def _on_deliver(self, frame: Any, header: Any, body: bytes) -> None:
        method, headers = frame.method, header.properties.headers
        self.properties.append(header.properties)
        number, again = method.delivery_tag, method.redelivered
        self.taken.append((method.consumer_tag, number, again, headers, body))

    def feed(self, data: bytes, size: int) -> None:
        for start in range(0, len(data), size):
            self._on_data_available(data[start : start + size])


@pytest.mark.parametrize("size", [1, 7, 4096, 10**6])
def test_deliveries_are_found_in_any_pieces_and_all_else_is_left_to_pika(size: int) -> None:
    bodies = [b"", b"x", b"\xce" * 300, b"y" * 9000, b"\x01\x00\x01" * 40]
    headers = [None, {"suspect": True}, None, {"x-death": [{"reason": "rejected"}]}, None]
    heartbeat = pika.frame.Heartbeat().marshal()
    data = heartbeat
    for number, (body, header) in enumerate(zip(bodies, headers, strict=True)):
        data += b"".join(frames(number, body, header)) + heartbeat
    connection = Connection()
    connection.feed(data, size)
    expected = zip(range(5), headers, bodies, strict=True)
    assert connection.taken == [
        (TAG, number, number % 2 == 0, header, body) for number, header, body in expected
    ]
    assert [type(frame) for frame in connection.left] == [pika.frame.Heartbeat] * 6
    assert connection._frame_buffer == b""
    assert connection.bytes_received == len(data)  # else pika takes the connection for a dead one


def test_a_delivery_with_something_else_between_its_frames_is_left_to_pika() -> None:
    method, header, body = frames(1, b"x")
    connection = Connection()
    connection.feed(method + pika.frame.Heartbeat().marshal() + header + body, 10**6)
    assert connection.taken == []
    kinds = [pika.frame.Method, pika.frame.Heartbeat, pika.frame.Header, pika.frame.Body]
    assert [type(frame) for frame in connection.left] == kinds


@pytest.mark.parametrize("size", [4096, 10**6])
def test_a_long_body_is_left_to_pika_even_if_it_begins_like_a_delivery(size: int) -> None:
    begins = pika.frame.Method(1, pika.spec.Basic.Deliver(TAG, 1, False, "", "")).marshal()[7:-1]
    long = begins + b"x" * deliveries.MAX_BODY_BYTES
    connection = Connection()
    connection.feed(b"".join(frames(1, long)) + b"".join(frames(2, begins)), size)
    assert [number for _, number, *_ in connection.taken] == [2]
    bodies = [frame.fragment for frame in connection.left if isinstance(frame, pika.frame.Body)]
    assert b"".join(bodies) == long
    assert connection._frame_buffer == b""


def test_a_delivery_without_its_end_is_refused_as_pika_does() -> None:
    method, header, body = frames(1, b"x")
    connection = Connection()
    with pytest.raises(pika.exceptions.InvalidFrameError):
        connection.feed(method + header + body[:-1] + b"\0", 10**6)
    assert connection.taken == []


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"x-death": [{"count": 1, "reason": "rejected", "queue": "tasks"}]}, "rejected"),
        ({"x-death": [{"reason": "expired"}], "x-first-death-reason": "expired"}, "expired"),
        ({"x-death": [{"reason": "expired"}, {"reason": "rejected"}]}, "expired"),
        ({"x-death": [{"reason": "rejected"}, {"reason": "expired"}]}, "rejected"),
        ({"a": {"reason": "rejected"}, "x-death": [{"reason": "maxlen"}]}, "maxlen"),
        ({"suspect": True}, "rejected"),
        ({"x-death": []}, "rejected"),
        (None, "rejected"),
    ],
)
def test_the_last_reason_of_a_dead_letter_is_found(headers: Any, reason: str) -> None:
    connection = Connection()
    connection.feed(b"".join(frames(1, b"x", headers)), 10**6)
    [properties] = connection.properties
    assert dlq_watcher.reason_of(properties) == reason
    assert dlq_watcher.reason_of(pika.BasicProperties(headers=headers)) == reason


def test_what_is_published_has_the_frames_that_pika_would_make() -> None:
    written: list[bytes] = []
    impl = types.SimpleNamespace(_output_marshaled_frames=written.extend)
    connection, channel = types.SimpleNamespace(_impl=impl), types.SimpleNamespace(channel_number=1)
    ids = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(4)]
    size = publishing.FRAME_BODY_BYTES
    bodies = [b"", b"x", b"y" * size, b"z" * (size + 1)]
    messages = [
        (id_, body, number % 2 == 1)
        for number, (id_, body) in enumerate(zip(ids, bodies, strict=True))
    ]
    publishing.publish(connection, channel, messages, 1800)  # type: ignore[arg-type]
    expected = b""
    for id_, body, suspect in messages:
        method = pika.spec.Basic.Publish(exchange="tasks", routing_key="tasks", mandatory=True)
        properties = pika.BasicProperties(
            content_type="application/json",
            headers={"suspect": True} if suspect else None,
            delivery_mode=2,
            message_id=id_,
            expiration="1800",
        )
        expected += pika.frame.Method(1, method).marshal()
        expected += pika.frame.Header(1, len(body), properties).marshal()
        for start in range(0, len(body), size):
            expected += pika.frame.Body(1, body[start : start + size]).marshal()
    assert b"".join(written) == expected
