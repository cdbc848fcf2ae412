"""What has ended in a consumer and is not reported yet. Without a lock: InFlight calls it under its
own."""

import collections
import itertools
import time
from typing import NamedTuple

from entry import ACK, DEAD_LETTER, DONE, Entry
from task import ENDED, Report

MAX_GROUP = 1000  # reports in one PUT
MAX_GROUP_BYTES = 1024 * 1024
LOCKED_SECONDS = 5  # until a report of a row that somebody has locked is repeated


class Answer(NamedTuple):
    """The producer's answer to a group, by index: why some were refused, which of the tasks that
    may start must be the only one of their kind here, and which rows somebody else has locked."""

    refused: dict[int, str]
    alone: set[int]
    locked: set[int]


class Outcomes:
    """Reports in the order in which their tasks ended, and those that are put off."""

    def __init__(self, consumer: str) -> None:
        self.consumer = consumer  # a UUID
        self.done: collections.deque[tuple[Entry, Report]] = collections.deque()
        self.later: list[tuple[float, Entry, Report]] = []

    def __bool__(self) -> bool:
        return bool(self.done or self.later)

    def group(self) -> list[tuple[Entry, Report]]:
        """Return the first outcomes, as they are to be reported now."""
        group: list[tuple[Entry, Report]] = []
        size = 0
        for entry, report in itertools.islice(self.done, MAX_GROUP):
            size += len(report.result or "") + len(report.error or "")
            if group and size > MAX_GROUP_BYTES:
                break
            if report.status != "success":
                report.holder = self.consumer
                if report.release is None:
                    # A failure goes by its dead letter, if there is a message to make it of.
                    by_letter = entry.deliveries and not entry.held
                    report.status = None if by_letter else "error"
            report.sent = entry.message.sent  # of the newest copy in hand
            group.append((entry, report))
        return group

    def take_first(self, report: Report) -> bool:
        """Take the first outcome off if it is this one; return whether it was."""
        if not self.done or self.done[0][1] is not report:
            return False
        self.done.popleft()
        return True

    def settle(self, entry: Entry, report: Report, refused: bool) -> list[tuple[Entry, str]]:
        """Return what becomes of the messages of an outcome that was answered. If it was refused
        and a newer copy came meanwhile, it is reported again: acked now, the row would stay sent.
        """
        if refused and report.sent != entry.message.sent:
            self.done.append((entry, report))
            return []
        is_over = refused or report.release is not None or report.status in ENDED
        return [(entry, ACK if is_over else DEAD_LETTER)]

    def put_off(self, entry: Entry, report: Report) -> None:
        """Report an outcome, or ask, later: somebody has locked the row."""
        if entry.state != DONE or self.take_first(report):
            self.later.append((time.monotonic() + LOCKED_SECONDS, entry, report))

    def bring_back(self, now: float, at_once: bool) -> list[Entry]:
        """Put outcomes whose time has come among the others; return what is to be asked again."""
        due = [each for each in self.later if at_once or now >= each[0]]
        self.later = [each for each in self.later if each not in due]
        self.done += [(entry, report) for _, entry, report in due if entry.state == DONE]
        return [entry for _, entry, _ in due if entry.state != DONE]
