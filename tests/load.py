"""What the service is measured beside and with: the bare pika pipe, the load of single creates, and
create-task on FastAPI."""

import collections
import contextlib
import json
import math
import multiprocessing
import pathlib
import re
import selectors
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

import pika
import requests

from native import servers
from tests.stack import until

PIPE_QUEUE = "bench.pipe"
PIPE_BODY = b"x" * 180
PIPE_BATCH = 500
PIPE_CHANNELS = 16  # of 2, 4 and 8, and of transactions, none was faster
PIPE_PREFETCH = 1000
PIPE_ACKS = 100
TEXT = "x" * 100
CLIENTS = 16


def connect(url: str) -> pika.BlockingConnection:
    """Return a connection to the broker."""
    return pika.BlockingConnection(pika.URLParameters(url))


def pipe_publish(url: str, count: int, clock: Any) -> None:
    """Publish by callbacks, pika's fastest way, in batches on many channels: each sends its next
    batch when the broker has confirmed the last. A process of its own."""
    properties = pika.BasicProperties(delivery_mode=2)
    sizes = [PIPE_BATCH] * (count // PIPE_BATCH) + [count % PIPE_BATCH]
    under_way = PIPE_CHANNELS

    def open_channels(connection: pika.SelectConnection) -> None:
        for _ in range(PIPE_CHANNELS):
            connection.channel(on_open_callback=Batches)

    class Batches:
        """Those of one channel."""

        def __init__(self, channel: Any) -> None:
            self.channel = channel
            self.last = 0
            self.waiting: set[int] = set()
            channel.confirm_delivery(self.answered, self.begin)

        def begin(self, _: Any) -> None:
            clock[0] = clock[0] or time.monotonic()
            self.publish()

        def answered(self, frame: Any) -> None:
            assert isinstance(frame.method, pika.spec.Basic.Ack), frame
            number = frame.method.delivery_tag
            if frame.method.multiple:
                self.waiting = {each for each in self.waiting if each > number}
            self.waiting.discard(number)
            if not self.waiting:
                self.publish()

        def publish(self) -> None:
            nonlocal under_way
            if not any(sizes):
                under_way -= 1
                if under_way == 0:
                    self.channel.connection.close()
                return
            size = sizes.pop(0)
            self.waiting.update(range(self.last + 1, self.last + size + 1))
            self.last += size
            for _ in range(size):
                self.channel.basic_publish("", PIPE_QUEUE, PIPE_BODY, properties)

    parameters = pika.URLParameters(url)
    connection = pika.SelectConnection(parameters, on_open_callback=open_channels)
    connection.add_on_close_callback(lambda *_: connection.ioloop.stop())
    connection.ioloop.start()


def pipe_publish_blocking(url: str, count: int, clock: Any) -> None:
    """Publish in AMQP transactions by a BlockingConnection: less than half as fast."""
    channel = connect(url).channel()
    channel.tx_select()
    properties = pika.BasicProperties(delivery_mode=2)
    clock[0] = time.monotonic()
    for sent in range(1, count + 1):
        channel.basic_publish("", PIPE_QUEUE, PIPE_BODY, properties)
        if sent % PIPE_BATCH == 0 or sent == count:
            channel.tx_commit()


def pipe_consume(url: str, count: int, clock: Any, total: Any) -> None:
    """Take messages by callback and ack them in groups, the last ones when no more come: a process
    of its own, until all consumers together have taken so many."""
    connection = connect(url)
    channel = connection.channel()
    channel.basic_qos(prefetch_count=PIPE_PREFETCH)
    unacked = 0

    def take(*_: Any) -> None:
        nonlocal unacked
        unacked += 1
        if unacked == PIPE_ACKS:
            ack()

    def ack() -> None:
        nonlocal unacked
        channel.basic_ack(0, multiple=True)
        with total.get_lock():
            total.value += unacked
        clock[1] = time.monotonic()
        unacked = 0

    channel.basic_consume(PIPE_QUEUE, take)
    while total.value < count:
        before = unacked
        connection.process_data_events(0.01)
        if unacked and unacked == before:
            ack()
    connection.close()


def bare_pipe(url: str, count: int, publish: Callable[..., None] = pipe_publish) -> float:
    """Return messages/s of pika alone, from the first publish to the last ack: a quorum queue, one
    publisher, two consumers."""
    with contextlib.closing(connect(url)) as connection:
        channel = connection.channel()
        channel.queue_delete(PIPE_QUEUE)
        channel.queue_declare(PIPE_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
        clock, total = multiprocessing.Array("d", 2), multiprocessing.Value("i", 0)
        consume = {"target": pipe_consume, "args": (url, count, clock, total)}
        consumers = [multiprocessing.Process(**consume) for _ in range(2)]
        for process in consumers:
            process.start()
        declared = lambda: channel.queue_declare(PIPE_QUEUE, passive=True).method  # noqa: E731
        until(lambda: declared().consumer_count == 2, what="two consumers of the pipe")
        publisher = multiprocessing.Process(target=publish, args=(url, count, clock))
        publisher.start()
        for process in (publisher, *consumers):
            process.join()
        channel.queue_delete(PIPE_QUEUE)
    assert total.value == count, f"{total.value} of {count} messages came through the pipe"
    return count / (clock[1] - clock[0])


def create_load(
    url: str, count: int, rate: float = math.inf, text: str = TEXT
) -> tuple[float, list[float]]:
    """Create tasks one by one over kept connections, at most so many a second; return requests/s
    and their seconds.

    One thread and prepared bytes, so that the machine's two cores go to the server, not to this.
    """
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"text": text}).encode()
    head = (
        f"POST /api/v1/create-task HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    )
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    selector = selectors.DefaultSelector()
    free: collections.deque[list[Any]] = collections.deque()  # socket, time of the request, answer
    for _ in range(CLIENTS):
        client = socket.create_connection((host, int(port)))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        free.append([client, 0.0, b""])
        selector.register(client, selectors.EVENT_READ, free[-1])
    seconds: list[float] = []
    began, sent = time.perf_counter(), 0
    while len(seconds) < count:
        wait = None
        while free and sent < count:
            wait = began + sent / rate - time.perf_counter()
            if wait > 0:
                break
            wait, each = None, free.popleft()
            each[1:] = time.perf_counter(), b""
            each[0].sendall(request)
            sent += 1
        for key, _ in selector.select(wait):
            key.data[2] += key.fileobj.recv(65536)
            top, _, rest = key.data[2].partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", top, re.IGNORECASE)
            if length is None or len(rest) < int(length[1]):
                continue
            assert top.startswith(b"HTTP/1.1 201"), top
            seconds.append(time.perf_counter() - key.data[1])
            free.append(key.data)
    return len(seconds) / (time.perf_counter() - began), seconds


def load_process(queue: Any, *arguments: Any) -> None:
    """Run create_load in a process of its own."""
    queue.put(create_load(*arguments))


def create_aside(url: str, count: int, *options: Any) -> tuple[float, list[float]]:
    """Return what create_load measures in a process of its own."""
    queue: Any = multiprocessing.Queue()
    process = multiprocessing.Process(target=load_process, args=(queue, url, count, *options))
    process.start()
    result: tuple[float, list[float]] = queue.get()
    process.join()
    return result


def measure_creates(url: str, count: int, name: str) -> dict[str, float]:
    """Return rate and latencies of single creates against a URL, after a warm-up."""
    create_aside(url, count // 10)
    rate, seconds = create_aside(url, count)
    p50, p99 = percentiles(seconds)
    return {f"{name}/s": rate, f"{name} p50 ms": p50, f"{name} p99 ms": p99}


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Return the 50th and 99th percentile in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return cuts[49] * 1000, cuts[98] * 1000


def creates(url: str, session: Any = requests) -> bool:
    """Create a task at a URL; tell whether that was answered with 201."""
    with contextlib.suppress(requests.RequestException):
        answer = session.post(f"{url}/api/v1/create-task", json={"text": TEXT}, timeout=10)
        return answer.status_code == 201
    return False


def create_peer(python: str, database_url: str, folder: pathlib.Path, count: int) -> dict:
    """Return what single creates measure on FastAPI with uvicorn[standard] and asyncpg, in the same
    table: uvloop and httptools, no access log, a pool of as many connections as clients."""
    port = servers.free_port()
    url = f"http://127.0.0.1:{port}"
    peer = servers.Process(folder / "peer.log")
    app = ["tests.peers.fastapi_peer:app", "--port", str(port)]
    fast = ["--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    env = {"DATABASE_URL": database_url, "PATH": "/usr/bin:/bin"}
    peer.spawn(peer.tied([python, "-m", "uvicorn", *app, *fast]), env)
    try:
        until(lambda: creates(url), what=f"the peer takes tasks, see {peer.log}")
        return measure_creates(url, count, "FastAPI create")
    finally:
        peer.stop()
