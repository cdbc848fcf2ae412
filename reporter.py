"""A consumer's reports to the producer: the HTTP client, and the thread that sends outcomes, asks
whether suspects may start, and keeps the heartbeat."""

import base64
import contextlib
import http.client
import json
import logging
import select
import socket
import time
from dataclasses import replace
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import process
from entry import Entry, Key
from in_flight import InFlight
from outcomes import Answer
from task import Report

log = logging.getLogger("reporter")


def http_url(value: str) -> str:
    """Check an address of HTTP."""
    try:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname or url.port == 0:
            raise ValueError
    except ValueError:  # its own text may hold the password
        raise ValueError("expected http://host:port") from None
    return value.rstrip("/")


PRODUCER_URL = process.setting("PRODUCER_URL", "http://127.0.0.1:8080", http_url)
PRODUCER = urlsplit(PRODUCER_URL).netloc.rpartition("@")[2]  # as it may be logged

# The producer's own words for a report that it will never take. Anything else, a 404 of some other
# server too, passes by itself or when an operator has mended something: nothing is lost by waiting.
FINAL_STATUSES = {400, 409, 413}
FIRST_SECONDS = (
    0.25  # between two tries of the first heartbeat: until then every task is asked about
)
# While more is to come, a report begins so many lengths of the last one after that has begun: a few
# milliseconds while the servers are idle, more while they are busy.
REPORT_TIMES = 4
MAX_REPORT_SECONDS = 0.05
CONNECT_SECONDS = 3
REPLY_SECONDS = 30  # longer than the producer may take, or the same report goes out twice
# Of a call that got no answer, or none that can be read.
BROKEN = (OSError, http.client.HTTPException, ValueError, KeyError, TypeError)


class Unavailable(Exception):
    """The producer cannot take reports now; the same PUT may be repeated."""


class Client:
    """The way of reports to the producer: one kept HTTP connection. One thread only."""

    def __init__(self) -> None:
        url = urlsplit(PRODUCER_URL)
        secure = url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self.connection = kind(
            url.hostname or "", url.port or (443 if secure else 80), timeout=CONNECT_SECONDS
        )
        self.headers = {"Content-Type": "application/json"}
        if process.API_TOKEN:
            self.headers["Authorization"] = f"Bearer {process.API_TOKEN}"
        elif url.username:
            words = f"{unquote(url.username)}:{unquote(url.password or '')}"
            self.headers["Authorization"] = f"Basic {base64.b64encode(words.encode()).decode()}"
        host = quote(socket.gethostname())
        self.updates = f"{url.path}/api/v1/update-task-status?skipLocked=true&host={host}"
        self.heartbeats = f"{url.path}/api/v1/consumer-heartbeat"

    def send(self, call: str, value: Any) -> tuple[int, str]:
        """PUT a value as JSON; return the status and the text of the answer. Raise OSError or
        HTTPException."""
        body = json.dumps(value, ensure_ascii=False).encode()
        try:
            if self.is_over():
                self.connect()
            # Who refuses a body before its end has said why.
            with contextlib.suppress(BrokenPipeError):
                self.connection.request("PUT", call, body, self.headers)
            answer = self.connection.getresponse()
            return answer.status, answer.read().decode("utf-8", "replace")
        except BaseException:
            self.connection.close()  # an answer that comes late is not the next call's
            raise

    def connect(self) -> None:
        """Connect anew."""
        self.connection.close()
        self.connection.connect()
        self.connection.sock.settimeout(REPLY_SECONDS)

    def is_over(self) -> bool:
        """Tell whether there is no connection, or the producer has closed it meanwhile."""
        if self.connection.sock is None:
            return True
        poller = select.poll()
        poller.register(self.connection.sock, select.POLLIN)
        return bool(poller.poll(0))

    def put(self, reports: list[Report]) -> Answer:
        """PUT reports as one array; return the producer's answer. Raise Unavailable.

        A refused array, or one that is too large for a server on the way, is split until the
        element that is meant stands alone, so that one bad report holds up no other.
        """
        try:
            status, text = self.send(self.updates, [report.as_json() for report in reports])
            if status == 200:
                body = json.loads(text)
                refused = {each["index"]: each["reason"] for each in body["rejected"]}
                return Answer(refused, *(set(body.get(name, ())) for name in ("alone", "locked")))
        except BROKEN as error:
            raise Unavailable(f"{PRODUCER}: {error!r}") from error
        reason = text[:200]
        final = status in FINAL_STATUSES and reason.startswith('{"error":')
        if not final and status != 413:
            raise Unavailable(f"{PRODUCER} answered {status}: {reason}")
        if len(reports) > 1:
            half = len(reports) // 2
            first, second = self.put(reports[:half]), self.put(reports[half:])
            refused = {half + index: why for index, why in second.refused.items()}
            alone, locked = ({half + index for index in each} for each in second[1:])
            return Answer(first.refused | refused, first.alone | alone, first.locked | locked)
        if final:
            return Answer({0: f"{status}: {reason}"}, set(), set())
        return self.put([cut(reports[0])])

    def beat(self, heartbeat: dict[str, Any]) -> tuple[float, list[Key], list[Key]]:
        """PUT a heartbeat; return the database's time, what is held and what is to be stopped.
        Raise Unavailable."""
        try:
            status, text = self.send(self.heartbeats, heartbeat)
            if status == 200:
                body = json.loads(text)
                held, stop = (
                    [(each["taskId"], each["attempt"]) for each in body[name]]
                    for name in ("held", "stop")
                )
                return float(body["now"]), held, stop
        except BROKEN as error:
            raise Unavailable(f"{PRODUCER}: {error!r}") from error
        raise Unavailable(f"{PRODUCER} answered {status}: {text[:200]}")


def cut(report: Report) -> Report:
    """Return a report with half of its text, for a server that refuses it as too large. Raise
    Unavailable if the text is not what is too large."""
    texts = {"result": report.result, "error": report.error}
    halves: dict[str, Any] = {name: text and text[: len(text) // 2] for name, text in texts.items()}
    if not any(texts.values()):
        raise Unavailable(f"{PRODUCER} answered 413 to a report without a text")
    log.warning("the text of task %s is cut in half: 413 from %s", report.id, PRODUCER)
    return replace(report, **halves)


class Reporter:
    """Makes every PUT of the consumer, one after another, so that no answer meets another."""

    def __init__(self, in_flight: InFlight, concurrency: int) -> None:
        self.in_flight = in_flight
        self.client = Client()
        self.about: dict[str, Any] = {
            "consumer": in_flight.consumer,
            "host": socket.gethostname(),
            "concurrency": concurrency,
            "version": process.VERSION,
        }
        # Everybody is back before a producer that was away begins to rescue.
        most = min(process.LAST_DELAY_SECONDS, process.HEARTBEAT_SECONDS * 2)
        self.backoff = process.Backoff(log, "reports wait for the producer", most)
        self.beats = process.Backoff(log, "the producer takes no heartbeat")

    def run(self) -> None:
        """Report until the process ends: the body of a thread.

        Only after the producer has accepted a report is its message settled; while the producer is
        away everything stays in flight, for ever if need be.
        """
        soon_at = beat_at = 0.0
        while True:
            group = self.in_flight.collect(soon_at, beat_at)
            began = time.monotonic()
            try:
                if began >= beat_at:
                    is_first = self.in_flight.waiting.skew is None
                    beat_at = began + (FIRST_SECONDS if is_first else process.HEARTBEAT_SECONDS)
                    self.beat()
                else:
                    self.report(group)
                    self.backoff.succeeded()
                    took = time.monotonic() - began
                    soon_at = began + min(REPORT_TIMES * took, MAX_REPORT_SECONDS)
            except Unavailable as error:
                time.sleep(self.backoff.failed(error))
            except Exception as error:  # the top of a loop: without it nothing would be acked
                log.exception("reporting failed")
                time.sleep(self.backoff.failed(error))

    def report(self, group: list[tuple[Entry, Report]]) -> None:
        """PUT a group of outcomes and asks, and act on the answer."""
        answer = self.client.put([report for _, report in group])
        for index, reason in answer.refused.items():
            log.info("task %s is not ours to run or end: %s", group[index][1].id, reason)
        self.in_flight.accept(group, answer)

    def beat(self) -> None:
        """Say what is in flight. If that fails, outcomes are still reported: a producer of version
        1.1 knows no heartbeat."""
        began = time.time()
        try:
            tasks = self.in_flight.named()
            busy = min(self.in_flight.fed, self.about["concurrency"])
            now, held, stop = self.client.beat(self.about | {"busy": busy, "tasks": tasks})
            self.beats.succeeded()
            self.in_flight.heard(held, stop, now - (began + time.time()) / 2)
        except Unavailable as error:
            log.log(self.beats.level(), "heartbeat failed: %s", process.printable(error))
