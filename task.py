"""A task's words and limits, and the two forms in which it travels: the message and the report.
Pure functions without I/O."""

import json
import json.encoder
import os
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import process

MAX_TEXT_BYTES = 1024 * 1024
MAX_OUTCOME_BYTES = 64 * 1024  # of a result or an error text
MAX_TIMEOUT_SECONDS = 10**7
MAX_TIME = 253_402_300_800  # the year 10000 in seconds since 1970
MAX_WORD_BYTES = 255  # of a host, a version, a state
MAX_NAMED = 10_000  # tasks in one heartbeat
HOLD_SECONDS = min(30, process.SENT_TIMEOUT_SECONDS / 4)  # a run of so long is held by its row
# The holder of a row whose message is out again, and that somebody held before.
NOBODY = "00000000-0000-0000-0000-000000000000"
TIMED_OUT = "timed out after "  # how the error of a run begins that took too long

ENDED = ("success", "error")
WORDS = {
    "pending": "pending",
    "sent": "sent",
    "error": "error",
    "success": "success",
    "ожидает обработки": "pending",
    "отправлено на обработку": "sent",
    "ошибка": "error",
    "успешно": "success",
}
UUID = re.compile("-".join(f"[0-9a-fA-F]{{{digits}}}" for digits in (8, 4, 4, 4, 12)))
quote = json.encoder.encode_basestring  # the encoder's own part for strings, in C


class Message(NamedTuple):
    """A task as it travels through the broker. sent: the row's sent_at in microseconds since 1970,
    which tells copies of an attempt apart; None in a message of version 1.1."""

    id: str
    text: str
    attempt: int
    sent: int | None = None
    timeout: float | None = None  # seconds

    def as_body(self) -> bytes:
        """Return the JSON that parse_message() reads."""
        body = f'{{"id": "{self.id}", "text": {quote(self.text)}, "attempt": {self.attempt}'
        if self.sent is not None:
            body += f', "sent": {self.sent}'
        if self.timeout is not None:
            body += f', "timeoutSeconds": {self.timeout!r}'
        return f"{body}}}".encode()


def parse_message(body: bytes) -> Message:
    """Return the task in a message; raise ValueError if it holds none of ours."""
    try:
        fields = json.loads(body.decode())  # bytes would cost a look for UTF-16
        task_id, text, attempt = parse_uuid(fields["id"]), fields["text"], fields["attempt"]
        sent, timeout = fields.get("sent"), fields.get("timeoutSeconds")
        if timeout is not None:
            timeout = parse_timeout(timeout)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"expected a JSON object with id, text and attempt: {error!r}") from None
    if (type(text), type(attempt)) != (str, int) or type(sent) not in (int, type(None)):
        raise ValueError("expected text as a string, attempt and sent as integers")
    return Message(task_id, text, attempt, sent, timeout)


@dataclass(slots=True)
class Report:
    """What somebody says of a task: a consumer or watcher (with attempt), or an operator.

    Without a status it asks whether a task may start, and may leave an error text. With `started`,
    a token unique to that start, the start is counted and the holder holds the row. With `release`
    the holder gives the task back, to be picked after so many seconds.
    """

    id: str
    status: str | None = None
    attempt: int | None = None
    result: str | None = None
    error: str | None = None
    reason: str | None = None
    started: str | None = None
    sent: int | None = None  # of the message
    holder: str | None = None  # the consumer that speaks
    alone: bool | None = None  # it has a turn for a task that must run alone; None: yes
    release: float | None = None  # seconds
    # Of the run that has ended: when it began, in seconds since 1970, how long it took, and where.
    started_at: float | None = None
    seconds: float | None = None
    host: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the object that parse_report() reads."""
        fields: dict[str, Any] = {"taskId": self.id}
        if self.status is not None:
            fields["taskStatus"] = self.status
        if self.attempt is not None:
            fields["attempt"] = self.attempt
        if self.result is not None:
            fields["result"] = self.result
        if self.started_at is not None:
            fields["startedAt"] = self.started_at
            fields["seconds"] = self.seconds
        if self.status != "success":  # which says no more, and is the most frequent by far
            for name in REPORT_FIELDS.keys() - fields.keys() - {"startedAt"}:
                if (value := getattr(self, name)) is not None:
                    fields[name] = value
        return fields


def parse_uuid(value: Any, name: str = "taskId") -> str:
    """Return a UUID in PostgreSQL's spelling; raise ValueError for anything else."""
    if not isinstance(value, str) or not UUID.fullmatch(value.strip()):
        raise ValueError(f"{name}: expected a UUID, got {shorten(value)}")
    return value.strip().lower()


def new_id() -> str:
    """Return a UUID of version 7 (RFC 9562): its first bits are the time, so that the ids of tasks
    which are made together are neighbours in the index."""
    bits = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
    bits = bits & ~(0xF000 << 64) | 0x7000 << 64
    bits = bits & ~(0xC000 << 48) | 0x8000 << 48
    return str(uuid.UUID(int=bits))


def as_iso(time_: datetime | None) -> str | None:
    """Return a time as ISO 8601 in UTC."""
    return None if time_ is None else time_.astimezone(UTC).isoformat().replace("+00:00", "Z")


def parse_time(value: Any, name: str) -> datetime | None:
    """Return an ISO 8601 time, taken as UTC if it names no offset; raise ValueError otherwise."""
    if value is None:
        return None
    try:
        time_ = datetime.fromisoformat(value)
        return (time_ if time_.tzinfo else time_.replace(tzinfo=UTC)).astimezone(UTC)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"{name}: expected ISO 8601 such as 2030-01-31T12:00:00Z, got {shorten(value)}"
        ) from None


def parse_status(value: Any) -> str:
    """Return the English code of a status given in either language, in any case."""
    if value in ENDED:  # as consumers write it
        return str(value)
    word = " ".join(value.split()).lower() if isinstance(value, str) else ""
    if word not in WORDS:
        known = ", ".join(WORDS)
        raise ValueError(f"taskStatus: expected one of {known}, got {shorten(value)}")
    return WORDS[word]


def parse_text(value: Any, name: str, limit: int) -> str:
    """Return a string that PostgreSQL can hold: no NUL, no lone surrogate, at most limit bytes."""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a string, got {shorten(value)}")
    if "\0" in value:
        raise ValueError(f"{name}: expected no NUL characters, PostgreSQL cannot hold them")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected Unicode text without lone surrogates") from None
    if size > limit:
        raise ValueError(f"{name}: expected at most {limit} bytes of UTF-8, got {size}")
    return value


def parse_timeout(value: Any) -> float | None:
    """Return seconds that a run may take, None for no limit; raise ValueError otherwise."""
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 < value <= MAX_TIMEOUT_SECONDS:
        expected = f"expected a number of seconds above 0, up to {MAX_TIMEOUT_SECONDS}"
        raise ValueError(f"timeoutSeconds: {expected}, got {shorten(value)}")
    return float(value)


def parse_outcome(value: Any, name: str) -> str:
    """Return a text of a report."""
    return parse_text(value, name, MAX_OUTCOME_BYTES)


def parse_integer(value: Any, name: str) -> int:
    """Return an integer; 1.0 is one too, as JSON Schema says."""
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not int:
        raise ValueError(f"{name}: expected an integer, got {shorten(value)}")
    return value


def parse_sent(value: Any, name: str) -> int:
    """Return what a message says of its row's sent_at, in microseconds since 1970."""
    if abs(sent := parse_integer(value, name)) >= 2**63:
        raise ValueError(f"{name}: expected microseconds since 1970, got {shorten(value)}")
    return sent


def parse_flag(value: Any, name: str) -> bool:
    """Return true or false."""
    if type(value) is not bool:
        raise ValueError(f"{name}: expected true or false, got {shorten(value)}")
    return value


def parse_seconds(value: Any, name: str) -> float:
    """Return a number of seconds that is not negative."""
    if type(value) not in (int, float) or not 0 <= value <= MAX_TIMEOUT_SECONDS:
        raise ValueError(f"{name}: expected seconds from 0 on, got {shorten(value)}")
    return float(value)


def parse_consumer(value: Any, name: str) -> str:
    """Return the UUID of a consumer."""
    if (consumer := parse_uuid(value, name)) == NOBODY:
        raise ValueError(f"{name}: expected a consumer's UUID, got {NOBODY}")
    return consumer


def parse_started_at(value: Any, name: str) -> float:
    """Return a time, ISO 8601 or in seconds since 1970, as the latter; raise ValueError."""
    if type(value) in (int, float) and 0 <= value < MAX_TIME:
        return float(value)
    if (time_ := parse_time(value, name)) is None:
        raise ValueError(f"{name}: expected a time")
    return time_.timestamp()


def parse_word(value: Any, name: str) -> str:
    """Return a short text, such as the name of a host."""
    return parse_text(value, name, MAX_WORD_BYTES)


REPORT_FIELDS: dict[str, Callable[[Any, str], Any]] = {  # the optional ones
    "result": parse_outcome,
    "error": parse_outcome,
    "reason": parse_outcome,
    "started": parse_outcome,
    "sent": parse_sent,
    "holder": parse_consumer,
    "alone": parse_flag,
    "release": parse_seconds,
    "startedAt": parse_started_at,
    "seconds": parse_seconds,
    "host": parse_word,
}
ATTRIBUTES = {name: name for name in REPORT_FIELDS} | {"startedAt": "started_at"}


def parse_report(element: Any) -> Report:
    """Return the report in a JSON object; raise ValueError saying what was expected."""
    if not isinstance(element, dict):
        raise ValueError(f'expected an object with "taskId", got {shorten(element)}')
    report = Report(parse_uuid(element.get("taskId")))
    if element.get("taskStatus") is not None:
        report.status = parse_status(element["taskStatus"])
    if (attempt := element.get("attempt")) is not None:
        report.attempt = parse_integer(attempt, "attempt")
    for name, value in element.items():
        if value is not None and name in REPORT_FIELDS:
            setattr(report, ATTRIBUTES[name], REPORT_FIELDS[name](value, name))
    if report.status is None and report.attempt is None:
        raise ValueError("taskStatus: expected a status, or the attempt of a task in flight")
    return report


def storable(value: Any) -> str:
    """Return a result or error text as PostgreSQL can hold it, cut to MAX_OUTCOME_BYTES."""
    try:
        text = str(value)[:MAX_OUTCOME_BYTES].replace("\0", "\N{REPLACEMENT CHARACTER}")
    except Exception as error:  # the user's own __str__
        text = f"{type(value).__name__} without a text: {type(error).__name__}"
    return text.encode("utf-8", "replace")[:MAX_OUTCOME_BYTES].decode("utf-8", "ignore")


def shorten(value: Any) -> str:
    """Return a value as it may stand in an error message."""
    try:
        text = ascii(value)
    except RecursionError:  # json.loads() has just taken it, a call less deep
        text = "what is nested too deeply"
    return text if len(text) <= 80 else text[:77] + "..."
