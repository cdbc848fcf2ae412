"""The HTTP server over raw sockets, with applications of the tests' own."""

import contextlib
import json
import logging
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import http_connection
import http_groups
import http_limits
import http_server
import http_threads
from http_message import Refused
from tests.stack import until

MIB = 1024 * 1024
CHUNKED = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


def echo(environ: dict, start_response: Callable) -> list[bytes]:
    """Answer method, path, query and body; /slow takes a while, /raise fails, /large is large, and
    /size answers the body's size alone."""
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"].startswith("/raise"):
        raise RuntimeError(f"told to fail: {body.decode()}")
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.5)
    if environ["PATH_INFO"] == "/large":
        return [bytes(8 * MIB)]
    if environ["PATH_INFO"] == "/size":
        assert int(environ["CONTENT_LENGTH"]) == len(body)
        assert "HTTP_TRANSFER_ENCODING" not in environ
        return [b"%d" % len(body)]
    line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ['QUERY_STRING']} "
    return [line.encode("latin-1"), body]


def refuse_all(environ: dict) -> Refused | None:
    """Allow nothing but /open."""
    if environ["PATH_INFO"] == "/open":
        return None
    return Refused("401 Unauthorized", "expected a token", ("WWW-Authenticate", "Bearer"))


@pytest.fixture
def start() -> Iterator[Callable[..., http_server.Server]]:
    """Start servers with options; what they have counted is given back at the end."""
    started: list[http_server.Server] = []

    def start(app: Callable = echo, **options: Any) -> http_server.Server:
        started.append(http_server.Server("127.0.0.1", 0, app, **options))
        started[-1].serve()
        return started[-1]

    yield start
    for server in started:
        transit_bytes = server.transit.size
        if not server.stopping.is_set():
            server.close(5)
        assert not server.connections and not server.idle
        assert server.transit.free == transit_bytes and not server.transit.transfers
        assert server.work.free == server.work.size


@pytest.fixture
def server(start: Callable[..., http_server.Server]) -> http_server.Server:
    return start()


class Client:
    """A raw connection that reads one answer at a time."""

    def __init__(self, server: http_server.Server) -> None:
        self.socket = socket.create_connection(server.server_address[:2], 20)
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the next answer; status 0 when closed."""
        line = self.file.readline()
        if not line:
            return 0, {}, b""
        headers = {}
        while (header := self.file.readline().strip()) != b"":
            name, _, value = header.decode().partition(": ")
            headers[name.lower()] = value
        body = self.file.read(int(headers.get("content-length", 0)))
        return int(line.split()[1]), headers, body


@pytest.fixture
def client(server: http_server.Server) -> Iterator[Client]:
    client = Client(server)
    yield client
    client.socket.close()


def test_many_requests_share_a_connection_and_pipelined_ones_are_answered(client: Client) -> None:
    client.send(b"GET /a?x=1 HTTP/1.1\r\nHost: h\r\n\r\nPOST /b HTTP/1.1\r\nContent-Length: 2\r\n")
    assert client.read()[2] == b"GET /a x=1 "
    client.send(b"\r\nhiPUT /%D1%8F HTTP/1.1\r\n\r\n")
    assert client.read()[2] == b"POST /b  hi"
    assert client.read()[2] == b"PUT /\xd1\x8f  "


def test_a_body_may_come_byte_by_byte(client: Client) -> None:
    for byte in b"POST /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello":
        client.send(bytes([byte]))
    assert client.read()[2] == b"POST /a  hello"


def test_http_1_0_and_connection_close_end_the_connection(server: http_server.Server) -> None:
    for head in (b"GET / HTTP/1.0\r\n\r\n", b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n"):
        client = Client(server)
        client.send(head)
        status, headers, _ = client.read()
        assert (status, headers["connection"]) == (200, "close")
        assert client.read()[0] == 0


def test_expect_100_continue_is_answered_before_the_body(client: Client) -> None:
    client.send(b"POST / HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    assert client.read()[0] == 100
    client.send(b"hi")
    assert client.read()[2] == b"POST /  hi"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nNo colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nName : value\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"GET / HTTP/1.1\r\nContent_Length: 5\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\rc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\nc\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\0c\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\x1bc\r\n\r\n", 400),
        (b"GET /\0 HTTP/1.1\r\n\r\n", 400),
        (b"GET /a\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET /a%C3 HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA:" + b" " * 30_000 + b"\n\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (CHUNKED[:-2] + b"Content-Length: 5\r\n\r\n0\r\n\r\n", 400),
        (CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (CHUNKED + b"x\r\n", 400),
        (CHUNKED + b"-1\r\n", 400),
        (CHUNKED + b"0x5\r\n", 400),
        (CHUNKED + b"5 \r\nhello\r\n", 400),
        (CHUNKED + b"5\nhello\r\n", 400),
        (CHUNKED + b"5\r\nhello!\r\n", 400),
        (CHUNKED + b"5\r\nhello\n0\r\n\r\n", 400),
        (CHUNKED + b"5;a=\x01\r\nhello\r\n", 400),
        (CHUNKED + b"5;" + b"a" * 2000, 400),
        (CHUNKED + b"0\r\nno colon\r\n\r\n", 400),
        (CHUNKED + b"0\r\n" + b"a: b\r\n" * 2000, 400),
        (CHUNKED + b"1000001\r\n", 413),
        (CHUNKED + b"ffffffffffffffff\r\n", 413),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 40_000 + b"\r\n\r\n", 431),
    ],
)
def test_what_cannot_be_read_is_refused_in_json_and_closed(
    client: Client, request_: bytes, status: int
) -> None:
    began = time.monotonic()
    client.send(request_)
    answered, headers, body = client.read()
    assert (answered, headers["connection"]) == (status, "close")
    assert time.monotonic() - began < 1
    assert b'"error"' in body
    assert client.read()[0] == 0


def test_an_application_that_raises_is_a_500_and_the_connection_goes_on(client: Client) -> None:
    client.send(b"GET /raise HTTP/1.1\r\n\r\nGET /a HTTP/1.1\r\n\r\n")
    assert client.read()[0] == 500
    assert client.read()[0] == 200


def test_head_has_no_body(client: Client) -> None:
    client.send(b"HEAD /a HTTP/1.1\r\n\r\n")
    assert client.file.readline().startswith(b"HTTP/1.1 200")
    while client.file.readline() != b"\r\n":
        pass
    client.send(b"GET /b HTTP/1.1\r\n\r\n")
    assert client.read()[2] == b"GET /b  "


def test_too_slow_a_head_is_closed(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEAD_SECONDS", 0.3)
    client.send(b"GET / HT")
    assert client.read()[0] == 0


def upload(server: http_server.Server, size: int, sent: int) -> Client:
    """Return a client that has sent so many bytes of a body."""
    client = Client(server)
    client.send(b"POST /size HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % size)
    client.socket.settimeout(5)
    with contextlib.suppress(TimeoutError, OSError):  # the server waits for room, or has closed
        client.send(bytes(sent))
    client.socket.settimeout(20)
    return client


def post(server: http_server.Server, size: int, path: bytes = b"/size") -> tuple[int, float]:
    """Return the status of a request with a large body, and the seconds that it took."""
    began = time.monotonic()
    client = Client(server)
    client.send(b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (path, size) + bytes(size))
    status = client.read()[0]
    client.socket.close()
    return status, time.monotonic() - began


@contextlib.contextmanager
def trickle(clients: list[Client], seconds: float = 0.1) -> Iterator[None]:
    """Let each client send a byte every so often."""
    stop = threading.Event()

    def send() -> None:
        while not stop.wait(seconds):
            for client in clients:
                with contextlib.suppress(OSError):  # the server has closed it
                    client.socket.send(b"x", socket.MSG_DONTWAIT)

    thread = threading.Thread(target=send, name="trickle")
    thread.start()
    yield
    stop.set()
    thread.join()
    for client in clients:
        client.socket.close()


@pytest.fixture
def many_files() -> None:
    """Let this process open both ends of a thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), hard), hard))


def test_an_unauthorised_body_is_refused_unread(start: Callable[..., http_server.Server]) -> None:
    server = start(authorize=refuse_all)
    began = time.monotonic()
    for head in (b"Content-Length: 16777216\r\n\r\nx", b"Transfer-Encoding: chunked\r\n\r\n"):
        client = Client(server)
        client.send(b"POST /a HTTP/1.1\r\n" + head)
        status, headers, body = client.read()
        assert (status, headers["connection"]) == (401, "close")
        assert json.loads(body) == {"error": "expected a token"}
        assert client.read()[0] == 0
    assert time.monotonic() - began < 1


def test_an_unauthorised_request_without_a_body_keeps_the_connection(
    start: Callable[..., http_server.Server],
) -> None:
    client = Client(start(authorize=refuse_all))
    client.send(b"GET /a HTTP/1.1\r\n\r\nGET /open HTTP/1.1\r\n\r\n")
    status, headers, _ = client.read()
    assert (status, headers["connection"]) == (401, "keep-alive")
    assert headers["www-authenticate"] == "Bearer"
    assert client.read()[2] == b"GET /open  "


def test_a_refusal_reaches_a_client_that_sends_on(start: Callable[..., http_server.Server]) -> None:
    client = Client(start(authorize=refuse_all))
    client.send(b"POST /a HTTP/1.1\r\nContent-Length: 16777216\r\n\r\n" + bytes(16 * MIB))
    assert client.read()[0] == 401


@pytest.mark.parametrize(("count", "sent"), [(4, 16 * MIB - 100), (8, 15 * MIB), (500, 200_000)])
def test_slow_uploads_keep_no_other_waiting(
    server: http_server.Server, many_files: None, count: int, sent: int
) -> None:
    with ThreadPoolExecutor(32) as pool:
        slow = list(pool.map(lambda _: upload(server, 16 * MIB, sent), range(count)))
    with trickle(slow):
        time.sleep(1.5)
        for _ in range(3):
            status, seconds = post(server, 1_500_000)
            assert (status, seconds < 15) == (200, True), seconds


def test_a_slow_upload_in_the_way_is_told_to_come_again(
    start: Callable[..., http_server.Server],
) -> None:
    server = start()
    server.transit = http_limits.Transit(17 * MIB)
    slow = upload(server, 16 * MIB, 2 * MIB)
    time.sleep(1.2)
    assert post(server, 16 * MIB - 1)[0] == 200
    status, headers, body = slow.read()
    assert (status, headers["retry-after"]) == (503, "1"), body


def test_a_slow_upload_in_nobodys_way_is_read_to_its_end(server: http_server.Server) -> None:
    slow = upload(server, 2 * MIB, 2 * MIB - 20)
    with trickle([slow]):
        assert slow.read()[2] == b"%d" % (2 * MIB)


def test_uploads_that_do_not_fit_together_wait_for_each_other(
    start: Callable[..., http_server.Server],
) -> None:
    server = start()
    server.transit = http_limits.Transit(20 * MIB)
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda _: post(server, 1_500_000), range(40)))
    assert Counter(status for status, _ in answers) == {200: 40}


def test_an_upload_without_room_in_time_is_a_503(
    start: Callable[..., http_server.Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits, "WAIT_SECONDS", 0.3)
    server = start()
    server.transit = http_limits.Transit(17 * MIB)
    eldest = upload(server, 16 * MIB, 2 * MIB)
    until(lambda: server.transit.free < 16 * MIB)
    status, headers, _ = upload(server, 8 * MIB, MIB).read()
    assert (status, headers["retry-after"]) == (503, "1")
    eldest.socket.close()


def test_large_bodies_take_turns_in_the_application(
    start: Callable[..., http_server.Server],
) -> None:
    lock, inside, most = threading.Lock(), 0, 0

    def app(environ: dict, start_response: Callable) -> list[bytes]:
        nonlocal inside, most
        size = int(environ["CONTENT_LENGTH"])
        with lock:
            inside += size
            most = max(most, inside)
        time.sleep(0.02)
        with lock:
            inside -= size
        return echo(environ, start_response)

    server = start(app)
    with ThreadPoolExecutor(30) as pool:
        statuses = [pool.submit(post, server, 3 * MIB) for _ in range(29)]
        statuses.append(pool.submit(post, server, 15 * MIB))
        assert {future.result()[0] for future in statuses} == {200}
    assert most == 15 * MIB


def test_a_large_body_without_a_turn_in_time_is_a_503_and_a_small_one_needs_none(
    start: Callable[..., http_server.Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_limits, "WORK_WAIT_SECONDS", 0.1)
    server = start()
    server.work = http_limits.Work(MIB)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server, MIB, b"/slow")
        until(lambda: server.work.free == 0)
        client = upload(server, MIB, MIB)
        status, headers, _ = client.read()
        assert (status, headers["retry-after"]) == (503, "1")
        assert post(server, 10)[0] == 200
        client.send(b"GET /a HTTP/1.1\r\n\r\n")  # its body was read
        assert client.read()[0] == 200
        assert first.result()[0] == 200


def test_clients_that_do_not_read_keep_no_other_waiting(server: http_server.Server) -> None:
    deaf = [Client(server) for _ in range(9)]
    for client in deaf:
        client.send(b"GET /large HTTP/1.1\r\n\r\n")
    until(lambda: server.transit.free < 0)
    time.sleep(1.2)
    status, seconds = post(server, 1_500_000)
    assert (status, seconds < 15) == (200, True), seconds
    for client in deaf:
        client.socket.close()


def test_a_large_answer_is_read_slowly_if_it_is_in_nobodys_way(client: Client) -> None:
    client.send(b"GET /large HTTP/1.1\r\n\r\n")
    time.sleep(1.2)
    assert len(client.read()[2]) == 8 * MIB


def test_a_large_body_is_out_of_memory_before_its_answer(
    start: Callable[..., http_server.Server],
) -> None:
    environs = []

    def app(environ: dict, start_response: Callable) -> list[bytes]:
        environs.append(environ)  # as Bottle does
        return echo(environ, start_response)

    assert post(start(app), MIB)[0] == 200
    assert "wsgi.input" not in environs[0]


@pytest.mark.parametrize("pieces", [1, 7, 100_000])
def test_a_chunked_body_is_read_in_any_pieces(client: Client, pieces: int) -> None:
    request_ = (
        CHUNKED[:-2].replace(b"chunked", b"Chunked")
        + b"Expect: 100-continue\r\n\r\n"
        + b'5\r\nhello\r\n006;a="b"\r\n world\r\n0;last\r\nDigest: x\r\n\r\n'
        + b"GET /b HTTP/1.1\r\n\r\n"
    )
    for first in range(0, len(request_), pieces):
        client.send(request_[first : first + pieces])
    answer = client.read()
    if answer[0] == 100:
        answer = client.read()
    assert answer[2] == b"POST /a  hello world"
    assert client.read()[2] == b"GET /b  "


def test_expect_100_continue_is_answered_before_a_chunked_body(client: Client) -> None:
    client.send(CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n")
    assert client.read()[0] == 100
    client.send(b"2\r\nhi\r\n0\r\n\r\n")
    assert client.read()[2] == b"POST /a  hi"


def test_a_chunked_body_of_16_mib_is_an_ordinary_one_and_a_byte_more_is_refused(
    server: http_server.Server,
) -> None:
    for more, status, answer in ((b"", 200, b"16777216"), (b"1\r\nx\r\n", 413, None)):
        client = Client(server)
        client.send(CHUNKED.replace(b"/a", b"/size"))
        for _ in range(16):
            client.send(b"100000\r\n" + bytes(MIB) + b"\r\n")
        client.send(more + b"0\r\n\r\n")
        answered, _, body = client.read()
        assert (answered, answer or body) == (status, body)


def test_the_longest_idle_connection_makes_room_for_a_new_one(
    start: Callable[..., http_server.Server],
) -> None:
    server = start(max_connections=3)
    busy, kept, unused = Client(server), Client(server), Client(server)
    kept.send(b"GET /a HTTP/1.1\r\n\r\n")
    assert kept.read()[0] == 200
    busy.send(b"POST /slow HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
    idle = {client.socket.getsockname() for client in (kept, unused)}
    until(lambda: {each.address for each in tuple(server.idle)} == idle)
    new = [Client(server), Client(server)]  # both stay open
    for each in new:
        each.send(b"GET /b HTTP/1.1\r\n\r\n")
        assert each.read()[2] == b"GET /b  "
    assert unused.read()[0] == 0
    assert kept.read()[0] == 0
    busy.send(b"hi")
    assert busy.read()[2] == b"POST /slow  hi"


def test_520_idle_connections_and_slow_heads_keep_nobody_out(
    server: http_server.Server, many_files: None
) -> None:
    waiting = [Client(server) for _ in range(520)]
    for client in waiting[::2]:
        client.send(b"GET / HT")
    for _ in range(20):
        status, seconds = post(server, 10)
        assert (status, seconds < 15) == (200, True), seconds
    for client in waiting:
        client.socket.close()


def test_what_an_evicted_connection_has_sent_is_answered(
    start: Callable[..., http_server.Server],
) -> None:
    server = start()
    client = Client(server)
    until(lambda: server.idle)
    connection = next(iter(server.idle))
    client.send(b"GET /a HTTP/1.1\r\n\r\n")
    connection.end_soon()
    assert client.read()[2] == b"GET /a  "
    assert client.read()[0] == 0


def test_connections_over_the_cap_get_a_503_if_none_is_idle(
    start: Callable[..., http_server.Server],
) -> None:
    server = start(max_connections=1)
    first = Client(server)
    first.send(b"GET /slow HTTP/1.1\r\n\r\n")
    until(lambda: server.connections and not server.idle)
    status, headers, _ = Client(server).read()
    assert (status, headers["retry-after"]) == (503, "1")
    assert first.read()[0] == 200


def test_a_refused_client_that_sends_on_does_not_keep_its_place(
    start: Callable[..., http_server.Server],
) -> None:
    server = start(authorize=refuse_all, max_connections=1)
    refused = Client(server)
    refused.send(b"POST /a HTTP/1.1\r\nContent-Length: 99\r\n\r\n")
    assert refused.read()[0] == 401
    until(lambda: server.idle)
    new = Client(server)
    new.send(b"GET /open HTTP/1.1\r\n\r\n")
    assert new.read()[0] == 200


def test_the_log_holds_no_lines_of_a_clients_own(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "http")
    body = b"a\x1b[1mb\nERROR forged " + b"x" * 100_000
    head = b"POST /raise%%0Aforged HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
    client.send(head % len(body) + body)
    assert client.read()[0] == 500
    assert any("told to fail: a\\x1b[1mb" in record.getMessage() for record in caplog.records)
    for record in caplog.records:
        assert len(record.getMessage()) < 500 and record.exc_info is None
        assert "\n" not in record.getMessage() and "\x1b" not in record.getMessage()


def test_closing_answers_what_is_under_way_and_ends_the_rest(
    server: http_server.Server,
) -> None:
    slow, idle, body = Client(server), Client(server), Client(server)
    slow.send(b"GET /slow HTTP/1.1\r\n\r\n")
    body.send(b"POST /a HTTP/1.1\r\nContent-Length: 2\r\n\r\nh")
    until(lambda: len(server.connections) == 3 and len(server.idle) == 1)
    closing = threading.Thread(target=server.close, args=(5,))
    closing.start()
    assert idle.read()[0] == 0
    body.send(b"i")
    assert body.read()[2] == b"POST /a  hi"
    status, headers, _ = slow.read()
    assert (status, headers["connection"]) == (200, "close")
    closing.join(1)
    assert not closing.is_alive()


class Together:
    """A group: answers its size to each of its requests for /group; one for /group/alone is left to
    the application, /group/large gets a large answer, and with /group/raise all fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()

    def takes(self, environ: dict) -> bool:
        if environ["PATH_INFO"] == "/takes":
            raise RuntimeError("told to fail")
        return environ["PATH_INFO"].startswith("/group")

    def answer(self, environs: list[dict]) -> list[Any]:
        self.gate.wait(10)
        bodies = [environ["wsgi.input"].getvalue() for environ in environs]
        answers: list[Any] = []
        for environ, body in zip(environs, bodies, strict=True):
            path = environ["PATH_INFO"]
            if path == "/group/raise":
                raise RuntimeError("told to fail")
            content = b"%d %s" % (len(environs), body)
            if path == "/group/large":
                content = bytes(int(body))
            answer = "200 OK", [("Content-Length", str(len(content)))], content
            answers.append(None if path == "/group/alone" else answer)
        return answers


def request(path: bytes, body: bytes) -> bytes:
    return b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (path, len(body), body)


def test_requests_that_come_together_are_answered_as_a_group(
    start: Callable[..., http_server.Server],
) -> None:
    group = Together()
    server = start(group=group)
    group.gate.clear()
    first = []
    for number in range(1, http_groups.WRITERS + 1):
        first.append(Client(server))
        first[-1].send(request(b"/group", b"first"))
        until(lambda number=number: len(server.connections) == number)
        until(lambda: server.groups.gathered.empty() and not server.idle)
    rest = [Client(server) for _ in range(3)]
    for client, path in zip(rest, (b"/group", b"/group/alone", b"/group"), strict=True):
        client.send(request(path, b"body")[:-1])
        client.send(b"y")
    until(lambda: not server.groups.gathered.empty() and not server.idle)
    group.gate.set()
    assert {client.read()[2] for client in first} == {b"1 first"}
    sizes = [client.read()[2] for client in rest]
    assert sizes[1] == b"POST /group/alone  body"
    assert {sizes[0], sizes[2]} <= {b"1 body", b"2 body", b"3 body"}
    for client in rest:  # each connection goes on
        client.send(request(b"/a", b""))
        assert client.read()[2] == b"POST /a  "


def test_of_a_group_that_fails_each_is_tried_alone(
    start: Callable[..., http_server.Server],
) -> None:
    client = Client(start(group=Together()))
    for _ in range(http_groups.WRITERS + 1):
        client.send(request(b"/group/raise", b"a"))
        assert client.read()[2] == b"POST /group/raise  a"
    client.send(request(b"/group", b"a"))
    assert client.read()[2] == b"1 a"


def test_what_nobody_expected_ends_one_connection_and_no_other(
    start: Callable[..., http_server.Server],
) -> None:
    server = start(group=Together())
    clients = [Client(server) for _ in range(8)]
    for number, client in enumerate(clients):
        client.send(request(b"/takes" if number % 2 else b"/a", b"hi"))
    for number, client in enumerate(clients):
        assert client.read()[0] == (0 if number % 2 else 200)


@pytest.mark.parametrize("size", [60_000, 8 * MIB])
def test_a_client_that_does_not_read_holds_up_no_group(
    start: Callable[..., http_server.Server], size: int
) -> None:
    server = start(group=Together())
    deaf = [Client(server) for _ in range(2 * http_groups.WRITERS)]
    for _ in range(100):  # more than the buffers of the kernel hold
        for client in deaf:
            client.send(request(b"/group/large", b"%d" % size))
    time.sleep(0.5)
    for _ in range(2 * http_groups.WRITERS):
        began = time.monotonic()
        client = Client(server)
        client.send(request(b"/group", b"a"))
        assert client.read()[2].endswith(b" a")
        assert time.monotonic() - began < 5
    for client in deaf:
        client.socket.close()


def count_threads() -> int:
    """Return how many threads there are for single requests."""
    return sum(thread.name.startswith("http-") for thread in threading.enumerate())


def test_only_requests_at_work_have_a_thread_and_none_waits_for_another(
    start: Callable[..., http_server.Server],
) -> None:
    server = start()
    before = count_threads()
    waiting = [Client(server) for _ in range(200)]
    for client in waiting[::2]:
        client.send(b"POST /slow HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
    until(lambda: len(server.idle) == 100)
    assert count_threads() == before
    began = time.monotonic()
    for client in waiting[::2]:
        client.send(b"hi")
    assert {client.read()[2] for client in waiting[::2]} == {b"POST /slow  hi"}
    assert time.monotonic() - began < 10  # one after another they would take 50 s
    until(lambda: count_threads() <= before + http_threads.KEPT)
    for client in waiting:
        client.socket.close()
