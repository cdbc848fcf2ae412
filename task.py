"""A task's words, limits and rules, and the two forms in which it travels: the message and the
report. Pure functions without I/O; the allowed transitions and the rule of the attempt are here and
nowhere else."""

import json
import random
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import process

MAX_ATTEMPTS = process.setting("MAX_ATTEMPTS", 1, process.whole(1, 1000))
RETRY_SECONDS = process.setting("RETRY_SECONDS", 5.0, process.number(0, 3600))
MAX_RETRY_SECONDS = 3600
MAX_STARTS = 3
MAX_TEXT_BYTES = 1024 * 1024
MAX_OUTCOME_BYTES = 64 * 1024  # of a result or an error text
# A message expires after half of the time-out. A row that was sent or touched so much later than
# the message has another copy; the rest of the half is for clocks and slow queues.
LIVE_COPY_SECONDS = 0.45 * process.SENT_TIMEOUT_SECONDS

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
OPTIONAL_FIELDS = ("result", "error", "reason", "started")  # of a report, each a text
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


class Message(NamedTuple):
    """A task as it travels through the broker."""

    id: str
    text: str
    attempt: int

    def as_body(self) -> bytes:
        """Return the JSON that parse_message() reads."""
        fields = {"id": self.id, "text": self.text, "attempt": self.attempt}
        return json.dumps(fields, ensure_ascii=False).encode()


def parse_message(body: bytes) -> Message:
    """Return the task in a message; raise ValueError if it holds none of ours."""
    try:
        fields = json.loads(body)
        message = Message(parse_uuid(fields["id"]), fields["text"], fields["attempt"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"expected a JSON object with id, text and attempt: {error!r}") from None
    if (type(message.text), type(message.attempt)) != (str, int):
        raise ValueError("expected text as a string, attempt as an integer")
    return message


@dataclass(slots=True)
class Report:
    """What somebody says of a task: a consumer or watcher (with attempt), or an operator.

    Without a status it is a touch: it keeps a sent row from being rescued, may leave an error
    text, and with `started`, a token unique to that start, asks whether a suspect may run.
    """

    id: str
    status: str | None = None
    attempt: int | None = None
    result: str | None = None
    error: str | None = None
    reason: str | None = None
    started: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the object that parse_report() reads."""
        fields: dict[str, Any] = {"taskId": self.id}
        if self.status is not None:
            fields["taskStatus"] = self.status
        if self.attempt is not None:
            fields["attempt"] = self.attempt
        for name in OPTIONAL_FIELDS:
            if (value := getattr(self, name)) is not None:
                fields[name] = value
        return fields


@dataclass(slots=True)
class Row:
    """A locked row as the rules see it. age: seconds since it was sent or touched, negative if the
    database's clock was set back. delay: seconds until it is due; touched: a consumer has it."""

    id: str
    status: str
    attempt: int
    failures: int
    starts: int
    start_token: str | None
    delayed: bool
    age: float | None
    result: str | None = None
    error: str | None = None
    delay: float | None = None
    touched: bool = False
    changed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name; dataclasses.asdict() copies deeply, at ten times the price."""
        return {name: getattr(self, name) for name in self.__slots__}


class Refusal(NamedTuple):
    """Why a report was not applied, with the HTTP status that says the same."""

    code: int
    reason: str


def parse_uuid(value: Any) -> str:
    """Return a UUID in PostgreSQL's spelling; raise ValueError for anything else."""
    if not isinstance(value, str) or not UUID.fullmatch(value.strip()):
        raise ValueError(f"taskId: expected a UUID, got {shorten(value)}")
    return value.strip().lower()


def parse_status(value: Any) -> str:
    """Return the English code of a status given in either language, in any case."""
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


def parse_report(element: Any) -> Report:
    """Return the report in a JSON object; raise ValueError saying what was expected."""
    if not isinstance(element, dict):
        raise ValueError(f'expected an object with "taskId", got {shorten(element)}')
    report = Report(parse_uuid(element.get("taskId")))
    if element.get("taskStatus") is not None:
        report.status = parse_status(element["taskStatus"])
    report.attempt = element.get("attempt")
    if report.attempt is not None and type(report.attempt) is not int:
        raise ValueError(f"attempt: expected an integer, got {shorten(report.attempt)}")
    for name in OPTIONAL_FIELDS:
        if element.get(name) is not None:
            setattr(report, name, parse_text(element[name], name, MAX_OUTCOME_BYTES))
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
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def judge(row: Row, report: Report) -> Refusal | None:
    """Apply one report to a locked row, or say why not; the same report twice changes it once."""
    if report.attempt is not None and report.attempt != row.attempt:
        return Refusal(
            409, f"stale: attempt {report.attempt} is not the current attempt {row.attempt}"
        )
    if report.status is None:
        return touch(row, report)
    if report.status == "sent":
        return Refusal(409, f"{row.status} does not become sent: only the dispatcher sends")
    if report.status == row.status:
        return None
    if report.status == "success":
        change(row, "success")
        row.result = report.result
    elif report.status == "pending":
        run_again(row)
        row.failures = 0
    elif row.status == "success":
        return Refusal(409, "success does not become error; expected success or pending")
    elif report.attempt is None:  # a cancel: the running copy must not undo it
        change(row, "error")
        row.attempt += 1
        row.error = report.error or "cancelled"
    elif report.reason in (None, "rejected"):
        count_failure(row, report.error)
    elif row.status == "sent" and not has_live_copy(row, report):
        change(row, "pending")
    return None


def touch(row: Row, report: Report) -> Refusal | None:
    """Note that a consumer has the task; refuse if it need not run, or has killed too often."""
    if row.status in ENDED:
        return Refusal(409, f"finished: the task has ended in {row.status}")
    row.changed = row.touched = True
    row.error = report.error or row.error
    if report.started is not None and report.started != row.start_token:
        row.starts += 1
        row.start_token = report.started
        if row.starts >= MAX_STARTS:
            reason = f"killed its worker {MAX_STARTS} times"
            count_failure(row, reason)
            return Refusal(409, reason)
    return None


def count_failure(row: Row, error: str | None) -> None:
    """Count a failed attempt: back to pending after a pause while attempts are left, else error."""
    row.failures += 1
    row.error = error or row.error
    if row.failures >= MAX_ATTEMPTS:
        change(row, "error")
        return
    run_again(row)
    pause = RETRY_SECONDS * 2 ** min(row.failures - 1, 20)
    row.delay = min(pause * random.uniform(1, 1.25), MAX_RETRY_SECONDS)
    row.delayed = row.delay > 0


def has_live_copy(row: Row, report: Report) -> bool:
    """Tell whether a row was sent or touched after the message that expired was published: there
    is another message, or a consumer runs it. If that consumer died, the rescue finds out."""
    return report.reason == "expired" and row.age is not None and 0 <= row.age < LIVE_COPY_SECONDS


def run_again(row: Row) -> None:
    """Begin a new attempt; whatever is still under way for the old one is stale from here on."""
    change(row, "pending")
    row.attempt += 1
    row.starts = 0


def change(row: Row, status: str) -> None:
    """Set a status; a row that leaves pending waits for no time any more."""
    row.status = status
    row.delayed = False
    row.changed = True
