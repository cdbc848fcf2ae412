"""What a consumer has in flight: each task from its delivery to the end of its report. Here the
broker's I/O thread, the workers and the reporter meet."""

import collections
import dataclasses
import functools
import itertools
import logging
import threading
import time
import uuid
from typing import Any

import pika.exceptions

import process
from task import ENDED, Message, Report

log = logging.getLogger("in_flight")

REPORT_SECONDS = 0.05  # between two reports while there is more to do
TOUCH_SECONDS = process.SENT_TIMEOUT_SECONDS / 4
STUCK_SECONDS = 2  # unstarted for so long behind a busy worker: somebody else may be idle
URGENT_SECONDS = 5  # so long a suspect may wait for a quiet moment where it is not handed back
MAX_GROUP = 1000  # reports in one PUT
MAX_GROUP_BYTES = 1024 * 1024
MAX_HANDED_BACK = 10_000  # remembered; forgotten all at once, which costs one more hand-back
ACK, DEAD_LETTER, REQUEUE = "ack", "dead-letter", "requeue"


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A task in flight; copies of the same attempt share one, so that it runs once in a process."""

    message: Message
    size: int  # of the message, in bytes
    suspect: bool = False  # delivered before: its last worker died with it, or its ack was lost
    urgent: bool = False  # a suspect that was handed back once and must not be again
    deliveries: list[tuple[Any, int]] = dataclasses.field(default_factory=list)
    since: float = dataclasses.field(default_factory=time.monotonic)  # taken, then: started
    token: str = ""  # of a suspect's start; the same start asked twice counts once
    allowed: bool | None = None  # the producer's answer whether it may start
    key: tuple[str, int] = ("", 0)  # what copies of the same attempt have in common

    def __post_init__(self) -> None:
        self.key = self.message.id, self.message.attempt

    def is_urgent(self, now: float) -> bool:
        """Tell whether a suspect has waited long enough to go before the tasks beside it."""
        return self.urgent or now - self.since > URGENT_SECONDS


class InFlight:
    """The entries of this process: fresh or suspect, then running, then done, then settled."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)  # workers wait here
        self.reports = threading.Condition(self.lock)  # the reporter waits here
        self.entries: dict[tuple[str, int], Entry] = {}
        self.fresh: collections.deque[Entry] = collections.deque()
        self.suspects: collections.deque[Entry] = collections.deque()
        self.running: set[Entry] = set()
        self.alone = False  # a suspect is running: nothing may start beside it
        self.starting: Entry | None = None  # a suspect whose start waits for the producer's answer
        self.handed_back: set[tuple[str, int]] = set()  # suspects
        self.done: collections.deque[tuple[Entry, Report]] = collections.deque()
        self.stopping = False
        self.finished, self.busy_seconds = 0, 0.0  # since the window was last adjusted

    def admit(self, entries: list[Entry]) -> None:
        """Take deliveries in; a copy of what is in flight already joins it."""
        with self.lock:
            for entry in entries:
                known = self.entries.setdefault(entry.key, entry)
                if known is not entry:
                    known.deliveries += entry.deliveries
                elif entry.suspect:
                    entry.urgent = entry.key in self.handed_back
                    self.suspects.append(entry)
                else:
                    self.fresh.append(entry)
            self.work.notify(len(entries))

    def take(self) -> Entry | None:
        """Wait for a task to start and return it; None when stopping."""
        with self.lock:
            while not self.stopping:
                entry = self.next()
                if entry is not None:
                    entry.since = time.monotonic()
                    self.running.add(entry)
                    self.alone = entry.suspect
                    return entry
                self.work.wait(STUCK_SECONDS)
            return None

    def next(self) -> Entry | None:
        """Return what may start now: a suspect only alone, and then nothing beside it.

        Fresh tasks wait for a suspect's turn only while that can come soon; behind a long task the
        suspect goes back to the broker, and they go on. Back a second time, or after a long wait,
        it has its turn next.
        """
        if self.alone:
            return None
        if self.suspects and not self.running:
            return self.suspects.popleft()
        now = time.monotonic()
        soon = all(now - entry.since < STUCK_SECONDS for entry in self.running)
        if self.suspects and (soon or any(entry.is_urgent(now) for entry in self.suspects)):
            return None
        return self.fresh.popleft() if self.fresh else None

    def may_start(self, entry: Entry) -> bool:
        """Ask the producer, through the reporter, whether a suspect may run, and wait."""
        with self.lock:
            entry.token = uuid.uuid4().hex
            self.starting = entry
            self.reports.notify()
            while entry.allowed is None and not self.stopping:
                self.work.wait(STUCK_SECONDS)
            self.starting = None
            entry.since = time.monotonic()
            if not entry.allowed:  # not ours to run: settled by the reporter, or left to the broker
                self.running.discard(entry)
                self.alone = False
                self.work.notify_all()
            return bool(entry.allowed)

    def finish(self, entry: Entry, report: Report) -> None:
        """Take a task's outcome for the reporter, at once if nothing waits behind it."""
        with self.lock:
            self.running.discard(entry)
            self.finished += 1
            self.busy_seconds += time.monotonic() - entry.since
            self.done.append((entry, report))
            if len(self.done) == 1 or not self.fresh:
                self.reports.notify()
            if entry.suspect:
                self.alone = False
            if entry.suspect or self.suspects:
                self.work.notify_all()

    def collect(self, last: float, touch_at: float) -> list[tuple[Entry, Report]]:
        """Wait until something is to be reported and return it: outcomes, a start, or touches.

        Outcomes go out when nothing fresh waits or REPORT_SECONDS after the last report: one at a
        time when tasks are slow, hundreds together when they are fast.
        """
        with self.lock:
            while True:
                now = time.monotonic()
                report_at = last + REPORT_SECONDS if self.fresh and not self.stopping else now
                if now >= touch_at:
                    return [(entry, self.touch(entry)) for entry in self.entries.values()]
                if self.starting or (self.done and now >= report_at):
                    break
                self.reports.wait((min(report_at, touch_at) if self.done else touch_at) - now)
            group: list[tuple[Entry, Report]] = []
            size = 0
            for entry, report in itertools.islice(self.done, MAX_GROUP):
                size += len(report.result or "") + len(report.error or "")
                if group and size > MAX_GROUP_BYTES:
                    break
                if report.status is None and not entry.deliveries:
                    report.status = "error"  # the broker let its message expire meanwhile
                group.append((entry, report))
            if self.starting:
                group.append((self.starting, self.touch(self.starting)))
            return group

    def touch(self, entry: Entry) -> Report:
        """Return the report that keeps a task from being rescued; for a start, that asks for it."""
        report = Report(entry.message.id, attempt=entry.message.attempt)
        report.started = entry.token if entry is self.starting else None
        return report

    def accept(self, group: list[tuple[Entry, Report]], refusals: dict[int, str]) -> None:
        """Act on the producer's answer to a group: allow starts, and settle what is over.

        A failure's text is reported without a status first; then its message becomes a dead letter,
        and the watcher reports the error. If this process dies between, the row has the text.
        """
        verdicts: list[tuple[Entry, str]] = []
        with self.lock:
            for index, (entry, report) in enumerate(group):
                refused = index in refusals
                if self.done and self.done[0][1] is report:
                    self.done.popleft()
                    over = refused or report.status in ENDED
                    verdicts.append((entry, ACK if over else DEAD_LETTER))
                elif entry is self.starting:
                    entry.allowed = not refused
                    self.starting = None
                    self.work.notify_all()
                    if refused:
                        verdicts.append((entry, ACK))
                elif refused and self.withdraw(entry):
                    verdicts.append((entry, ACK))
            for entry, _ in verdicts:
                self.entries.pop(entry.key, None)
            settle(verdicts)  # before is_quiet() can be true, and the connection be closed

    def withdraw(self, entry: Entry) -> bool:
        """Take a task back that has not started; say whether that was so. The lock is held."""
        for waiting in (self.fresh, self.suspects):
            if entry in waiting:
                waiting.remove(entry)
                return True
        return False

    def take_stuck(self, workers: int, patient: bool) -> list[Entry]:
        """Take back what waits too long while no worker is free for it, but for urgent suspects.
        If patient, take nothing while any running task is younger than that."""
        limit = time.monotonic() - STUCK_SECONDS
        with self.lock:
            if len(self.running) < workers and not self.suspects and not self.alone:
                return []
            if patient and any(entry.since >= limit for entry in self.running):
                return []
            waiting = (*self.suspects, *self.fresh)
            stuck = [entry for entry in waiting if entry.since < limit and not entry.urgent]
            if len(self.handed_back) > MAX_HANDED_BACK:
                self.handed_back.clear()
            for entry in stuck:
                self.withdraw(entry)
                del self.entries[entry.key]
                if entry.suspect:
                    self.handed_back.add(entry.key)
            return stuck

    def forget(self, subscription: Any) -> None:
        """Drop a dead connection's deliveries; what has not started comes again over the next."""
        with self.lock:
            for key, entry in list(self.entries.items()):
                kept = [each for each in entry.deliveries if each[0] is not subscription]
                entry.deliveries = kept
                if not kept and self.withdraw(entry):
                    del self.entries[key]

    def measure(self) -> tuple[int, float, float, float]:
        """Return tasks finished since the last call, their seconds, the least elapsed seconds of
        a full set of running ones, and the mean bytes of a task in flight."""
        with self.lock:
            count, seconds = self.finished, self.busy_seconds
            self.finished, self.busy_seconds = 0, 0.0
            now = time.monotonic()
            elapsed = min((now - entry.since for entry in self.running), default=0.0)
            size = sum(entry.size for entry in self.entries.values()) / max(len(self.entries), 1)
            return count, seconds, elapsed, size

    def stop(self) -> None:
        """Let no worker start another task."""
        with self.lock:
            self.stopping = True
            self.work.notify_all()
            self.reports.notify()

    def is_quiet(self) -> bool:
        """Tell whether nothing runs and nothing waits to be reported."""
        with self.lock:
            return not self.running and not self.done


def settle(verdicts: list[tuple[Entry, str]]) -> None:
    """Have each subscription settle these tasks' deliveries in its own thread. Those of a dead one
    are dropped: the broker sends the message again, and the producer says that it is over."""
    tags_of: dict[Any, dict[int, str]] = {}
    for entry, verdict in verdicts:
        for subscription, tag in entry.deliveries:
            tags_of.setdefault(subscription, {})[tag] = verdict
    for subscription, tags in tags_of.items():
        try:
            call = functools.partial(subscription.settle, tags)
            subscription.connection.add_callback_threadsafe(call)
        except pika.exceptions.AMQPError as error:
            log.debug("%d acks dropped with their connection: %s", len(tags), error)
