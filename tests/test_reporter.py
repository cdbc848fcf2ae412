"""The consumer's HTTP client, beside producers and proxies that do as they may."""

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import process
import reporter
from task import Report
from tests.stack import until

pytestmark = pytest.mark.pure

REPORT = Report("d5474d4e-0069-4601-98d4-742e54cc4fe3", "success", 1, result="результат")


class Door(http.server.ThreadingHTTPServer):
    """A producer that takes every report; what it was asked, and over how many connections."""

    def __init__(self, stays_open: bool) -> None:
        outer = self
        self.asked: list[tuple[str, str | None, Any]] = []
        self.connections = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer.connections += 1

            def do_PUT(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, self.headers["Authorization"], body))
                content = b'{"updated": 1, "rejected": []}'
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                self.close_connection = not stays_open

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@contextlib.contextmanager
def opened(stays_open: bool) -> Iterator[Door]:
    """Yield a producer that keeps connections, or closes each after an answer without saying so."""
    with Door(stays_open) as door:
        thread = threading.Thread(target=door.serve_forever, args=(0.05,))
        thread.start()
        yield door
        door.shutdown()
        thread.join()


@pytest.mark.parametrize("stays_open", [True, False])
def test_a_connection_is_kept_until_the_producer_closes_it(
    stays_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(stays_open) as door:
        monkeypatch.setattr(reporter, "PRODUCER_URL", f"http://127.0.0.1:{door.server_port}")
        client = reporter.Client()
        for _ in range(3):
            assert client.put([REPORT]).refused == {}
            assert stays_open or until(client.is_over)
        client.connection.close()
        assert door.connections == (1 if stays_open else 3)
        assert [body for _, _, body in door.asked] == [[REPORT.as_json()]] * 3


@pytest.mark.parametrize(
    ("token", "user", "authorization"),
    [("", "", None), ("secret", "a:b@", "Bearer secret"), ("", "a:%40@", "Basic YTpA")],
)
def test_a_producer_may_be_behind_a_path_and_a_password(
    token: str, user: str, authorization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(True) as door:
        url = f"http://{user}127.0.0.1:{door.server_port}/a/path"
        monkeypatch.setattr(reporter, "PRODUCER_URL", url)
        monkeypatch.setattr(process, "API_TOKEN", token)
        client = reporter.Client()
        client.put([REPORT])
        client.connection.close()
        [(path, authorized, _)] = door.asked
        assert path.startswith("/a/path/api/v1/update-task-status?skipLocked=true&host=")
        assert authorized == authorization


def test_without_a_producer_a_report_waits_and_is_sent_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with opened(True) as door:
        monkeypatch.setattr(reporter, "PRODUCER_URL", f"http://127.0.0.1:{door.server_port}")
        client = reporter.Client()
        monkeypatch.setattr(client.connection, "port", 1)
        with pytest.raises(reporter.Unavailable, match="refused"):
            client.put([REPORT])
        monkeypatch.setattr(client.connection, "port", door.server_port)
        client.put([REPORT])
        client.connection.close()
        assert len(door.asked) == 1
