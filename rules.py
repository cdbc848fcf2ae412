"""The rules of the table: what a report does to a row. Pure functions without I/O; the allowed
transitions, the rule of the attempt and that of the holder are here and nowhere else."""

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import process
from task import ENDED, NOBODY, TIMED_OUT, Report

MAX_ATTEMPTS = process.setting("MAX_ATTEMPTS", 1, process.whole(1, 1000))
RETRY_SECONDS = process.setting("RETRY_SECONDS", 5.0, process.number(0, 3600))
MAX_RETRY_SECONDS = 3600
MAX_STARTS = 3
ALONE_SECONDS = 10  # until a task whose turn to run alone was not free is tried again


@dataclass(slots=True)
class Row:
    """A locked row as the rules see it. sent: as in the message; lease: seconds until it
    ends; due_at: since when it may run, in seconds since 1970; timed_out: its error says so, which
    a failed run leaves before its dead letter comes; delay: seconds until it is due.
    outcome: what the history is to say of the attempt, if that is over without success."""

    id: str
    status: str
    attempt: int
    failures: int
    starts: int
    start_token: str | None
    delayed: bool
    sent: int | None
    holder: str | None
    lease: float | None
    due_at: float = 0.0
    timed_out: bool | None = None
    result: str | None = None
    error: str | None = None
    delay: float | None = None
    outcome: str | None = None
    started_at: float | None = None
    seconds: float | None = None
    host: str | None = None
    changed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return what is to be written, by name; what is None is left out."""
        fields = {name: getattr(self, name) for name in WRITTEN}
        return {name: value for name, value in fields.items() if value is not None}

    def is_held(self) -> bool:
        """Tell whether a consumer runs the task without a message."""
        return self.holder not in (None, NOBODY) and (self.lease or 0) > 0


WRITTEN = (
    "id", "status", "attempt", "failures", "starts", "start_token", "delayed",
    "holder", "lease", "result", "error", "delay", "outcome", "started_at", "seconds", "host",
)  # fmt: skip


class Verdict(NamedTuple):
    """What became of a report: a code of HTTP, and the reason if it was refused."""

    code: int
    reason: str = ""


ACCEPTED = Verdict(200)
LOCKED = Verdict(503, "locked: another transaction holds the row")
HELD = Verdict(409, "held: another consumer runs the task")
ALONE = Verdict(200, "alone")  # the task may start, beside no other that has killed workers


def judge(row: Row, report: Report) -> Verdict:
    """Apply one report to a locked row, or say why not; the same report twice changes it once."""
    if report.attempt is not None and report.attempt != row.attempt:
        return Verdict(
            409, f"stale: attempt {report.attempt} is not the current attempt {row.attempt}"
        )
    if report.status is None:
        return judge_running(row, report)
    if report.status == "sent":
        return Verdict(409, f"{row.status} does not become sent: only the dispatcher sends")
    if report.status == row.status:
        return ACCEPTED
    if report.status == "success":
        change(row, "success")
        row.result = report.result
        note_run(row, report)
    elif report.status == "pending":
        run_again(row)
        row.failures, row.delay, row.outcome = 0, 0.0, "retried"
    elif row.status == "success":
        return Verdict(409, "success does not become error; expected success or pending")
    elif report.attempt is None:  # a cancel: the running copy must not undo it
        change(row, "error")
        row.attempt += 1
        row.error = report.error or "cancelled"
        row.outcome = "cancelled"
    elif report.reason is None:
        if report.holder not in (None, row.holder) and (row.is_held() or is_old_copy(row, report)):
            return HELD
        note_run(row, report)
        count_failure(row, report.error)
    else:
        return judge_dead_letter(row, report)
    return ACCEPTED


def judge_dead_letter(row: Row, report: Report) -> Verdict:
    """Apply what became of a message: its run has failed, or the broker let it expire."""
    if row.status in ENDED:
        return ACCEPTED
    if is_old_copy(row, report):
        return Verdict(409, "stale: a newer message of this attempt is out")
    if report.reason == "rejected":
        count_failure(row, report.error)
    elif row.status == "sent" and not row.is_held() and not has_newer_message(row, report):
        row.status, row.changed = "pending", True  # the holder before stays: it asks
    return ACCEPTED


def judge_running(row: Row, report: Report) -> Verdict:
    """Answer a consumer that has a message, or the row, of a task that has not ended."""
    if row.status in ENDED:
        return Verdict(409, f"finished: the task has ended in {row.status}")
    if report.holder is None or report.holder != row.holder:
        if is_old_copy(row, report):
            return Verdict(409, "stale: a newer message of this attempt is out")
        if row.is_held() and (report.started is not None or not report.error):
            return HELD
    if report.release is not None:
        give_back(row, report, report.release)
        return ACCEPTED
    if report.error:
        row.error = report.error
        row.changed = True
        note_run(row, report)
    if report.started is not None:
        return start(row, report)
    if row.status == "sent" and not row.is_held():
        keep_sent(row)
    return ACCEPTED


def is_old_copy(row: Row, report: Report) -> bool:
    """Tell whether a report is about another message than the row's last one."""
    return report.sent is not None and report.sent != row.sent


def has_newer_message(row: Row, report: Report) -> bool:
    """Tell whether a message of version 1.1, which expired after half of the time-out, is not the
    row's last one."""
    young = 0.55 * process.SENT_TIMEOUT_SECONDS
    return report.sent is None and row.lease is not None and row.lease > young


def start(row: Row, report: Report) -> Verdict:
    """Count the start of a suspect and have its row hold it; the third one fails the attempt."""
    if report.started != row.start_token:
        if row.starts + 1 >= MAX_STARTS:
            row.starts += 1
            cause = f", the last time by {report.error}" if report.error else ""
            count_failure(row, f"killed its worker {MAX_STARTS} times{cause}")
            return Verdict(409, row.error or "")
        if row.starts + 1 == MAX_STARTS - 1 and report.alone is False:
            give_back(row, report, ALONE_SECONDS)
            return Verdict(409, f"released: its turn to run alone comes in {ALONE_SECONDS} s")
        row.starts += 1
        row.start_token = report.started
    row.status, row.delayed, row.changed = "sent", False, True
    if report.holder is not None:
        row.holder, row.lease = report.holder, process.LEASE_SECONDS
        row.host, row.started_at = report.host, report.started_at
    return ALONE if row.starts == MAX_STARTS - 1 else ACCEPTED


def give_back(row: Row, report: Report, seconds: float) -> None:
    """Let the same attempt be picked again after some seconds; a start of it does not count."""
    change(row, "pending")
    row.delay = seconds or None
    row.delayed = seconds > 0
    if report.started is not None and report.started == row.start_token:
        row.starts, row.start_token = row.starts - 1, None


def keep_sent(row: Row) -> None:
    """Give a sent row that is in flight at a consumer of version 1.1 the whole time-out again."""
    if row.lease is None or row.lease < process.SENT_TIMEOUT_SECONDS / 2:
        row.lease, row.changed = process.SENT_TIMEOUT_SECONDS, True


def count_failure(row: Row, error: str | None) -> None:
    """Count a failed attempt: back to pending after a pause while attempts are left, else error."""
    row.failures += 1
    row.error = error or row.error
    timed_out = row.timed_out if row.error is None else row.error.startswith(TIMED_OUT)
    row.outcome = "timed out" if timed_out else "failed"
    if row.failures >= MAX_ATTEMPTS:
        change(row, "error")
        return
    run_again(row)
    pause = RETRY_SECONDS * 2 ** min(row.failures - 1, 20)
    row.delay = min(pause * random.uniform(1, 1.25), MAX_RETRY_SECONDS)
    row.delayed = row.delay > 0


def note_run(row: Row, report: Report) -> None:
    """Keep what a report says of the run that has ended."""
    row.started_at, row.seconds, row.host = report.started_at, report.seconds, report.host


def run_again(row: Row) -> None:
    """Begin a new attempt; whatever is still under way for the old one is stale from here on."""
    change(row, "pending")
    row.attempt += 1
    row.starts = 0


def change(row: Row, status: str) -> None:
    """Set a status. Nobody holds the row any more, and it waits for no time."""
    row.status = status
    row.delayed = False
    row.holder = None
    row.changed = True
