"""What every script does alike as a process: settings from the environment, logging, signals and
the one back-off. Knows neither the broker nor the database."""

import gc
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

Value = TypeVar("Value")

TURN_SECONDS = 0.25  # how long a loop may take to notice that it is to stop
VERSION = "1.3.0"
FIRST_DELAY_SECONDS = 0.25
LAST_DELAY_SECONDS = 15
REPEAT_LOG_SECONDS = 60  # an outage is logged when it begins and then so often
MAX_LOGGED_CHARACTERS = 200


def setting(name: str, default: Value, convert: Callable[[str], Value]) -> Value:
    """Read an environment variable. An empty one counts as unset; a bad value ends the process
    with 2. The value of a URL or token is not printed: it may hold a password."""
    value = os.environ.get(name, "").strip()
    try:
        return convert(value) if value else default
    except ValueError as error:
        shown = name if name.endswith(("_URL", "_TOKEN")) else f"{name}={value!r}"
        print(f"{shown} is not valid: {error}", file=sys.stderr)
        sys.exit(2)


def whole(low: int, high: int) -> Callable[[str], int]:
    """Return a converter for whole numbers from low to high."""

    def convert(value: str) -> int:
        if not value.lstrip("-").isdecimal() or not low <= int(value) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(value)

    return convert


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a converter for numbers from low to high."""

    def convert(value: str) -> float:
        try:
            result = float(value)
        except ValueError:
            result = float("nan")
        if not low <= result <= high:
            raise ValueError(f"expected a number from {low} to {high}")
        return result

    return convert


API_TOKEN = setting("API_TOKEN", "", str)
READ_TOKEN = setting("READ_TOKEN", "", str)
LOG_LEVEL = setting("LOG_LEVEL", "INFO", str.upper)
# For what runs to end after SIGTERM; Compose kills ten seconds later.
STOP_SECONDS = setting("STOP_SECONDS", 50.0, number(1, 10**6))
# A message waits at most half of this, and a task is held by its row after a quarter. So a row that
# was sent so long ago, and that nobody holds, has neither a message nor a consumer.
# Half of it, in milliseconds, must fit the 32 bits of a message's expiration.
SENT_TIMEOUT_SECONDS = setting("SENT_TIMEOUT_SECONDS", 3600.0, number(1, 8 * 10**6))
# A consumer holds the row of a long task for so long, and renews that by its heartbeat.
LEASE_SECONDS = setting("LEASE_SECONDS", 120.0, number(1, 8 * 10**6))
HEARTBEAT_SECONDS = min(5, SENT_TIMEOUT_SECONDS / 8, LEASE_SECONDS / 8)


def printable(value: object) -> str:
    """Return an error or text as it may stand in one line of a log: escaped and cut."""
    text = str(value).strip() or type(value).__name__
    text = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:1000])
    return text if len(text) <= MAX_LOGGED_CHARACTERS else text[:MAX_LOGGED_CHARACTERS] + "…"


def calm_garbage_collector() -> None:
    """Look for cycles of garbage less often, and not among what the imports have made: that took a
    twelfth of the time of instant tasks. What is in no cycle is freed at once as ever."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def start_logging() -> None:
    """Log to stderr, without pika: the scripts log the same errors, and shorter."""
    try:
        logging.basicConfig(
            level=LOG_LEVEL,
            format="%(asctime)s %(levelname)s %(name)s [%(threadName)s] %(message)s",
        )
    except ValueError:
        print(f"LOG_LEVEL={LOG_LEVEL!r} is not valid: expected DEBUG, INFO, …", file=sys.stderr)
        sys.exit(2)
    logging.getLogger("pika").setLevel(logging.CRITICAL)


def stop_on_signals(stop: threading.Event) -> None:
    """Set stop at the first SIGTERM or SIGINT; the second ends the process at once, with 1."""

    def handle(*_: Any) -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def name_of(role: str) -> str:
    """Return the name of a connection at the broker and in logs: role@host:pid."""
    return f"{role}@{socket.gethostname()}:{os.getpid()}"


class Backoff:
    """The pauses between the tries of one thing. They double up to a limit, with jitter, so that
    many processes do not come back at the same moment."""

    def __init__(self, log: logging.Logger, what: str, most: float = LAST_DELAY_SECONDS) -> None:
        self.log = log
        self.what = what
        self.most = most  # seconds
        self.failures = 0
        self.logged_at = 0.0  # of time.monotonic()

    def failed(self, reason: object) -> float:
        """Log why and return the seconds to wait."""
        delay: float = min(FIRST_DELAY_SECONDS * 2 ** min(self.failures, 10), self.most)
        delay *= random.uniform(0.5, 1)
        message = f"{self.what}, next try in {delay:.1f} s: %s"
        self.log.log(self.level(), message, printable(reason))
        return delay

    def level(self) -> int:
        """Count a failure; return WARNING for the first and then one a minute, DEBUG between."""
        now = time.monotonic()
        loud = not self.failures or now - self.logged_at >= REPEAT_LOG_SECONDS
        self.failures += 1
        self.logged_at = now if loud else self.logged_at
        return logging.WARNING if loud else logging.DEBUG

    def succeeded(self) -> None:
        """Log that it works again, if it had failed."""
        if self.failures:
            self.log.info("%s: over after %d tries", self.what, self.failures)
        self.failures = 0
