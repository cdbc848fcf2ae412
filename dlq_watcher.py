"""The watcher of the dead letters: takes what has arrived in the dead-letter queue, reports it to
the producer as errors in one PUT, then acks. A thread of every consumer, and a script of its own.

Run it with `python dlq_watcher.py`. Exit codes: 0 stopped, 1 crash, 2 bad configuration."""

import json
import logging
import threading
import time
from typing import Any

import pika
import requests
from pika.adapters.blocking_connection import BlockingChannel

import broker

log = logging.getLogger("dlq_watcher")


def http_url(value: str) -> str:
    """Check an address of HTTP."""
    if not value.startswith(("http://", "https://")):
        raise ValueError("expected http://host:port")
    return value.rstrip("/")


PRODUCER_URL = broker.setting("PRODUCER_URL", "http://127.0.0.1:8080", http_url)
API_TOKEN = broker.setting("API_TOKEN", "")

# The producer's own words for a report that it will never take. Anything else, a 404 of some other
# server too, passes by itself or when an operator has mended something: nothing is lost by waiting.
FINAL_STATUSES = {400, 409, 413}
CONNECT_SECONDS = 3
REPLY_SECONDS = 30  # longer than the producer may take, or the same report goes out twice
PREFETCH = 500
LAST_LETTERS_SECONDS = 2
LOGGED_BYTES = 80


class Unavailable(Exception):
    """The producer cannot take reports now; the same PUT may be repeated."""


class Reports:
    """The way of reports to the producer: one kept HTTP connection. One thread only."""

    def __init__(self) -> None:
        self.session = requests.Session()
        self.session.trust_env = False  # proxies of the environment are not for the producer
        headers = {"Content-Type": "application/json"}
        if API_TOKEN:
            headers["Authorization"] = f"Bearer {API_TOKEN}"
        # Prepared once: preparing costs as much as sending.
        put = requests.Request("PUT", f"{PRODUCER_URL}/api/v1/update-task-status", headers)
        self.request = self.session.prepare_request(put)

    def put(self, reports: list[dict]) -> dict[int, str]:
        """PUT reports as one array; return why some were refused, by index. Raise Unavailable.

        A refused array is split until the refused element stands alone, so that one bad report
        holds up no other; its refusal, if it is the producer's, is final.
        """
        self.request.prepare_body(json.dumps(reports).encode(), None)
        try:
            answer = self.session.send(self.request, timeout=(CONNECT_SECONDS, REPLY_SECONDS))
            if answer.status_code == 200:
                return {each["index"]: each["reason"] for each in answer.json()["rejected"]}
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise Unavailable(f"{PRODUCER_URL}: {error}") from error
        status, reason = answer.status_code, answer.text[:200]
        if status not in FINAL_STATUSES or not reason.startswith('{"error":'):
            raise Unavailable(f"{PRODUCER_URL} answered {status}: {reason}")
        if len(reports) == 1:
            return {0: f"{status}: {reason}"}
        half = len(reports) // 2
        first, second = self.put(reports[:half]), self.put(reports[half:])
        return first | {half + index: why for index, why in second.items()}


class Backoff:
    """The pauses between the tries of one report; says once that the producer is away."""

    def __init__(self) -> None:
        self.tries = 0

    def failed(self, error: Unavailable) -> float:
        """Return the seconds to wait before the next try."""
        delay = broker.back_off(self.tries)
        level = logging.DEBUG if self.tries else logging.WARNING
        log.log(level, "report held back, next try in %.1f s: %s", delay, error)
        self.tries += 1
        return delay

    def succeeded(self) -> None:
        """Say that the producer is back, if it was away."""
        if self.tries:
            log.info("producer takes reports again")
        self.tries = 0


def parse_dead_letter(properties: pika.BasicProperties, body: bytes) -> dict[str, Any] | None:
    """Return the report that a dead letter stands for; None if it names no task of ours."""
    try:
        message = json.loads(body)
        task_id, attempt = message["id"], message["attempt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if not isinstance(task_id, str) or type(attempt) is not int:
        return None
    try:
        reason = str(properties.headers["x-death"][0]["reason"])
    except (KeyError, TypeError, IndexError):  # put there by somebody else than the broker
        reason = "rejected"
    return {"taskId": task_id, "attempt": attempt, "taskStatus": "error", "reason": reason}


class Watcher:
    """Drains the dead-letter queue, over one broker connection and one HTTP session."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop
        self.reports = Reports()
        self.letters: list[tuple[int, dict | None]] = []
        self.cancelled = False

    def run(self) -> None:
        """Watch until stop is set, through every outage of broker and producer."""
        broker.keep_connected(broker.host_name("dlq_watcher"), self.stop, self.watch)

    def watch(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        """Report and ack what arrives over one connection; raise when the broker takes it away."""
        self.letters, self.cancelled = [], False
        channel.add_on_cancel_callback(self.on_cancel)
        channel.basic_qos(prefetch_count=PREFETCH)
        channel.basic_consume(broker.DEAD_LETTER_QUEUE, self.on_letter)
        backoff = Backoff()
        stop_at = None  # of time.monotonic(), the latest; sooner when no letter comes any more
        while stop_at is None or time.monotonic() < stop_at:
            if stop_at is None and self.stop.is_set():
                stop_at = time.monotonic() + LAST_LETTERS_SECONDS
            connection.process_data_events(0 if self.letters else broker.TURN_SECONDS)
            broker.check(channel, self.cancelled)
            if not self.letters:
                if stop_at is not None:
                    return
                continue
            try:
                count = self.report()
                backoff.succeeded()
                channel.basic_ack(self.letters[count - 1][0], multiple=True)
                del self.letters[:count]
            except Unavailable as error:
                if stop_at is not None:
                    return  # the letters go back to their queue
                self.pause(connection, backoff.failed(error))

    def report(self) -> int:
        """PUT what has arrived as one group; return how many letters are done with."""
        letters = self.letters[:]
        reports = [report for _, report in letters if report is not None]
        if reports:
            for index, reason in self.reports.put(reports).items():
                log.info("dead letter of %s is void: %s", reports[index]["taskId"], reason)
            log.info("reported %d dead letters", len(reports))
        return len(letters)

    def pause(self, connection: pika.BlockingConnection, seconds: float) -> None:
        """Wait while the connection keeps its heartbeat."""
        deadline = time.monotonic() + seconds
        while not self.stop.is_set() and (left := deadline - time.monotonic()) > 0:
            connection.process_data_events(min(left, broker.TURN_SECONDS))

    def on_letter(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """Take a delivery; it is acked when its report is accepted, or there is none to make."""
        report = parse_dead_letter(properties, body)
        if report is None:
            log.warning("dropped a dead letter without a task: %r", body[:LOGGED_BYTES])
        self.letters.append((method.delivery_tag, report))

    def on_cancel(self, _: Any) -> None:
        """Note that the broker has ended the subscription: the queue is gone."""
        self.cancelled = True


def main() -> None:
    """Watch until SIGTERM or SIGINT."""
    broker.start_logging()
    stop = threading.Event()
    broker.stop_on_signals(stop)
    Watcher(stop).run()
    log.info("stopped")


if __name__ == "__main__":
    main()
