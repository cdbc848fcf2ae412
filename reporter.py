"""A consumer's reports to the producer: the HTTP client, and the thread that sends outcomes."""

import json
import logging
import time
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import requests

import process
from in_flight import TOUCH_SECONDS, InFlight
from task import Report

log = logging.getLogger("reporter")


def http_url(value: str) -> str:
    """Check an address of HTTP."""
    if not value.startswith(("http://", "https://")):
        raise ValueError("expected http://host:port")
    return value.rstrip("/")


PRODUCER_URL = process.setting("PRODUCER_URL", "http://127.0.0.1:8080", http_url)
PRODUCER = urlsplit(PRODUCER_URL).netloc.rpartition("@")[2]  # as it may be logged

# The producer's own words for a report that it will never take. Anything else, a 404 of some other
# server too, passes by itself or when an operator has mended something: nothing is lost by waiting.
FINAL_STATUSES = {400, 409, 413}
CONNECT_SECONDS = 3
REPLY_SECONDS = 30  # longer than the producer may take, or the same report goes out twice


class Unavailable(Exception):
    """The producer cannot take reports now; the same PUT may be repeated."""


class Client:
    """The way of reports to the producer: one kept HTTP connection. One thread only."""

    def __init__(self) -> None:
        self.session = requests.Session()
        self.session.trust_env = False  # proxies of the environment are not for the producer
        headers = {"Content-Type": "application/json"}
        if process.API_TOKEN:
            headers["Authorization"] = f"Bearer {process.API_TOKEN}"
        # Prepared once: preparing costs as much as sending.
        put = requests.Request("PUT", f"{PRODUCER_URL}/api/v1/update-task-status", headers)
        self.request = self.session.prepare_request(put)

    def put(self, reports: list[Report]) -> dict[int, str]:
        """PUT reports as one array; return why some were refused, by index. Raise Unavailable.

        A refused array, or one that is too large for a server on the way, is split until the
        element that is meant stands alone, so that one bad report holds up no other.
        """
        objects = [report.as_json() for report in reports]
        self.request.prepare_body(json.dumps(objects, ensure_ascii=False).encode(), None)
        try:
            answer = self.session.send(self.request, timeout=(CONNECT_SECONDS, REPLY_SECONDS))
            if answer.status_code == 200:
                return {each["index"]: each["reason"] for each in answer.json()["rejected"]}
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"{PRODUCER}: {error}") from error
        status, reason = answer.status_code, answer.text[:200]
        final = status in FINAL_STATUSES and reason.startswith('{"error":')
        if not final and status != 413:
            raise Unavailable(f"{PRODUCER} answered {status}: {reason}")
        if len(reports) > 1:
            half = len(reports) // 2
            first, second = self.put(reports[:half]), self.put(reports[half:])
            return first | {half + index: why for index, why in second.items()}
        return {0: f"{status}: {reason}"} if final else self.put([cut(reports[0])])


def cut(report: Report) -> Report:
    """Return a report with half of its text, for a server that refuses it as too large. Raise
    Unavailable if the text is not what is too large."""
    texts = {"result": report.result, "error": report.error}
    halves: dict[str, Any] = {name: text and text[: len(text) // 2] for name, text in texts.items()}
    if not any(texts.values()):
        raise Unavailable(f"{PRODUCER} answered 413 to a report without a text")
    log.warning("the text of task %s is cut in half: 413 from %s", report.id, PRODUCER)
    return replace(report, **halves)


def report_outcomes(in_flight: InFlight) -> None:
    """Make every PUT of the consumer, one after another: the body of the reporter thread.

    Only after the producer has accepted a report is its message settled; while the producer is
    away everything stays in flight, for ever if need be.
    """
    client = Client()
    # A producer that is back rescues nothing until everybody could touch what is in flight.
    most = min(process.LAST_DELAY_SECONDS, TOUCH_SECONDS)
    backoff = process.Backoff(log, "reports wait for the producer", most)
    last, touch_at = 0.0, time.monotonic() + TOUCH_SECONDS
    while True:
        group = in_flight.collect(last, touch_at)
        last = time.monotonic()
        try:
            refusals = client.put([report for _, report in group]) if group else {}
            backoff.succeeded()
            if last >= touch_at:
                touch_at = last + TOUCH_SECONDS
            for index, reason in refusals.items():
                log.info("task %s is not ours to end: %s", group[index][1].id, reason)
            in_flight.accept(group, refusals)
        except Unavailable as error:
            time.sleep(backoff.failed(error))
        except Exception as error:  # the top of a loop: without a reporter nothing would be acked
            log.exception("reporting failed")
            time.sleep(backoff.failed(error))
