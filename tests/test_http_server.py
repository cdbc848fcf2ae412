"""The HTTP server over raw sockets, with applications of the tests' own."""

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import http_server
from tests.stack import until


def echo(environ: dict, start_response: Callable) -> list[bytes]:
    """Answer method, path, query and body; /slow takes a while, /raise fails."""
    if environ["PATH_INFO"] == "/raise":
        raise RuntimeError("told to fail")
    if environ["PATH_INFO"] == "/slow":
        time.sleep(0.5)
    body = environ["wsgi.input"].read()
    line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {environ['QUERY_STRING']} "
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [line.encode("latin-1"), body]


@pytest.fixture
def server() -> Iterator[http_server.Server]:
    server = http_server.Server("127.0.0.1", 0, echo)
    server.serve()
    yield server
    if not server.stopping.is_set():
        server.close(1)


class Client:
    """A raw connection that reads one answer at a time."""

    def __init__(self, server: http_server.Server) -> None:
        self.socket = socket.create_connection(server.server_address[:2], 10)
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
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 40_000 + b"\r\n\r\n", 431),
    ],
)
def test_what_cannot_be_read_is_refused_in_json_and_closed(
    client: Client, request_: bytes, status: int
) -> None:
    client.send(request_)
    answered, headers, body = client.read()
    assert (answered, headers["connection"]) == (status, "close")
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
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.3)
    client.send(b"GET / HT")
    assert client.read()[0] == 0


def test_connections_over_the_cap_get_a_503(
    server: http_server.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.places = threading.BoundedSemaphore(1)
    first = Client(server)
    first.send(b"GET / HTTP/1.1\r\n\r\n")
    assert first.read()[0] == 200
    second = Client(server)
    status, headers, _ = second.read()
    assert (status, headers["retry-after"]) == (503, "1")


def test_closing_answers_what_is_under_way(server: http_server.Server) -> None:
    client = Client(server)
    client.send(b"GET /slow HTTP/1.1\r\n\r\n")
    until(lambda: server.busy)
    server.close(5)
    status, headers, _ = client.read()
    assert (status, headers["connection"]) == (200, "close")
