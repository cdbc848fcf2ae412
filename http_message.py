"""What a client sends, without a socket: the head of an HTTP/1.x request, and its body by
Content-Length or in chunks (RFC 9112)."""

import json
import re
from typing import Any, Protocol
from urllib.parse import unquote

MAX_HEAD_BYTES = 32 * 1024
MAX_BODY_BYTES = 16 * 1024 * 1024
MAX_CHUNK_HEAD_BYTES = 1024  # a chunk's size and its extensions
MAX_TRAILER_BYTES = 8 * 1024

REQUEST_LINE = re.compile(r"([A-Z]+) ([!-~\x80-\xff]+) HTTP/1\.([01])")
# A name with "_" would become the WSGI variable of the name with "-".
HEADER = re.compile(r"([!#$%&'*+\-.^`|~0-9A-Za-z]+):([\t -~\x80-\xff]*)")
CHUNK_HEAD = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[\t ]*;[\t -~\x80-\xff]*)?")


class Refused(Exception):
    """A request that is answered before the application sees it. The connection closes after it
    unless keep says that the whole request has been read."""

    def __init__(self, status: str, reason: str, *headers: tuple[str, str], keep: bool = False):
        super().__init__(reason)
        self.status = status
        self.headers = headers
        self.keep = keep


class Body(Protocol):
    """A body as its bytes arrive."""

    done: bool
    missing: int  # bytes, as far as that is known

    def decode(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the content in the data, and what it leaves unread; once done, that is the
        next request's."""


class SizedBody:
    """A body of a known size."""

    def __init__(self, size: int) -> None:
        self.missing = size
        self.done = size == 0

    def decode(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the content in the data, and the rest."""
        content, rest = data[: self.missing], data[self.missing :]
        self.missing -= len(content)
        self.done = self.missing == 0
        return content, rest


NO_BODY = SizedBody(0)


class ChunkedBody:
    """A body in chunks, each after a line with its size (RFC 9112, 7.1). Extensions and trailers
    are read and ignored."""

    def __init__(self) -> None:
        self.done = False
        self.size = 0  # of all chunks announced so far
        self.missing = 0  # of the current chunk
        self.in_trailers = False
        self.trailer_bytes = 0

    def decode(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the content in the data, and the rest: an incomplete line, or after the body."""
        pieces, start = [], 0
        while not self.done:
            if self.missing:
                piece = data[start : start + self.missing]
                pieces.append(piece)
                start += len(piece)
                self.missing -= len(piece)
                if self.missing:
                    break
            end = self.read_line(data, start)
            if end < 0:
                break
            start = end
        return b"".join(pieces), data[start:]

    def read_line(self, data: bytes, start: int) -> int:
        """Read the line at start; return where the next one starts, -1 if it is incomplete."""
        if self.in_trailers:
            return self.read_trailer(data, start)
        if self.size:  # the line break that ends the chunk before
            if not b"\r\n".startswith(data[start : start + 2]):
                raise malformed("a line break after a chunk")
            start += 2
        end = data.find(b"\r\n", start, start + MAX_CHUNK_HEAD_BYTES)
        if end < 0:
            if len(data) - start >= MAX_CHUNK_HEAD_BYTES or b"\n" in data[start:]:
                raise malformed("a chunk's size in a short line")
            return -1
        match = CHUNK_HEAD.fullmatch(data, start, end)
        if match is None:
            raise malformed("a chunk's size in hexadecimal")
        self.missing = int(match[1], 16)
        self.in_trailers = self.missing == 0
        self.size += self.missing
        if self.size > MAX_BODY_BYTES:
            raise too_large()
        return end + 2

    def read_trailer(self, data: bytes, start: int) -> int:
        """Read a line after the last chunk; an empty one ends the body."""
        end = data.find(b"\r\n", start)
        read = self.trailer_bytes + (end if end >= 0 else len(data)) - start
        if read > MAX_TRAILER_BYTES or (end < 0 and b"\n" in data[start:]):
            raise malformed("at most 8 KiB of trailers")
        if end < 0:
            return -1
        if end > start and HEADER.fullmatch(data[start:end].decode("latin-1")) is None:
            raise malformed("trailers of the form Name: value")
        self.trailer_bytes = read + 2
        self.done = end == start
        return end + 2


def malformed(expected: str) -> Refused:
    """Return the refusal of a chunked body that breaks the rules."""
    return Refused("400 Bad Request", f"Transfer-Encoding: chunked: expected {expected}")


def too_large() -> Refused:
    """Return the refusal of a body over the limit."""
    return Refused("413 Content Too Large", "expected a body of at most 16 MiB")


def refusal(reason: str) -> bytes:
    """Return the answer to a client for which there is no room now."""
    body = json.dumps({"error": reason}).encode()
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
    ) % (len(body), body)


def parse_head(head: str) -> dict[str, Any]:
    """Turn a request's head into WSGI variables; raise Refused if it is not HTTP/1.0 or 1.1."""
    first, *lines = head.split("\r\n")
    match = REQUEST_LINE.fullmatch(first)
    if match is None:
        raise Refused("400 Bad Request", "expected a request line such as GET /path HTTP/1.1")
    method, target, minor = match.groups()
    if target.startswith("http://"):  # absolute form, from a client that believes us a proxy
        target = "/" + target[7:].partition("/")[2]
    path, _, query = target.partition("?")
    environ = {
        "REQUEST_METHOD": method,
        "PATH_INFO": decode_path(path),
        "QUERY_STRING": query,
        "SERVER_PROTOCOL": f"HTTP/1.{minor}",
    }
    for line in lines:
        match = HEADER.fullmatch(line)
        if match is None:
            raise Refused(
                "400 Bad Request",
                "expected header lines of the form Name: value, without _ and control characters",
            )
        key = match[1].upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = f"HTTP_{key}"
        value = match[2].strip(" \t")
        if key in environ:
            value = repeated(key, environ[key], value)
        environ[key] = value
    return environ


def decode_path(path: str) -> str:
    """Return a path as WSGI has it, each byte a character; raise Refused if it is not UTF-8. Bottle
    drops bytes that are not, and would find a call where access.py has seen none."""
    if "%" in path:
        path = unquote(path, "latin-1")
    if not path.isascii():
        try:
            path.encode("latin-1").decode()
        except UnicodeDecodeError:
            raise Refused("400 Bad Request", "expected a path in percent-encoded UTF-8") from None
    return path


def repeated(key: str, first: str, second: str) -> str:
    """Return the value of a header that came twice (RFC 9110, 5.3)."""
    if key not in ("HTTP_HOST", "CONTENT_LENGTH", "CONTENT_TYPE"):
        return f"{first}, {second}"
    if first != second:  # two readers of one message could each believe another one
        name = key.removeprefix("HTTP_").replace("_", "-").title()
        raise Refused("400 Bad Request", f"expected one {name}")
    return first


def body_of(environ: dict[str, Any]) -> Body:
    """Return the body that follows a head, still to be read; raise Refused if it cannot be."""
    length = environ.get("CONTENT_LENGTH")
    if "HTTP_TRANSFER_ENCODING" in environ:
        return chunked_body(environ, length)
    if length is None:
        return NO_BODY
    if not (length.isascii() and length.isdigit()):
        raise Refused("400 Bad Request", "Content-Length: expected a number of bytes")
    size = int(length) if len(length) < 20 else MAX_BODY_BYTES + 1
    if size > MAX_BODY_BYTES:
        raise too_large()
    return SizedBody(size)


def chunked_body(environ: dict[str, Any], length: str | None) -> Body:
    """Return the body of a request with a Transfer-Encoding, which has to be `chunked` alone."""
    if length is not None or environ["SERVER_PROTOCOL"] == "HTTP/1.0":
        # A proxy before us may have gone by the other one (RFC 9112, 6.1).
        raise Refused(
            "400 Bad Request",
            "Transfer-Encoding: expected in HTTP/1.1 and without a Content-Length",
        )
    if environ["HTTP_TRANSFER_ENCODING"].lower() != "chunked":
        raise Refused("501 Not Implemented", "Transfer-Encoding: expected chunked")
    return ChunkedBody()


def keeps_connection(environ: dict[str, Any]) -> bool:
    """Tell whether the client keeps the connection."""
    connection = environ.get("HTTP_CONNECTION", "").lower()
    if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
        return "keep-alive" in connection
    return "close" not in connection


def expects_continue(environ: dict[str, Any]) -> bool:
    """Tell whether the client waits for 100 Continue; one of HTTP/1.0 does not know it."""
    if environ["SERVER_PROTOCOL"] == "HTTP/1.0":
        return False
    return bool(environ.get("HTTP_EXPECT", "").lower() == "100-continue")
