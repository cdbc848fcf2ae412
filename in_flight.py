"""What a consumer has in flight: each task from its delivery to the end of its report. Here the
broker's I/O thread, the pool's thread and the reporter meet."""

import collections
import dataclasses
import functools
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import pika.exceptions

from task import ENDED, Message, Report

log = logging.getLogger("in_flight")

REPORT_SECONDS = 0.05  # between two reports while there is more to do
STUCK_SECONDS = 2  # unstarted for so long behind a busy worker: somebody else may be idle
CURRENT_SECONDS = 1.0  # a message that has waited for longer may have been cancelled
NAMED_SECONDS = 2  # in flight for so long: the heartbeat names it
RESERVED_SECONDS = 0.25  # an idle worker waits for the answer about a suspect
MAX_GROUP = 1000  # reports in one PUT
MAX_GROUP_BYTES = 1024 * 1024
ACK, DEAD_LETTER, REQUEUE = "ack", "dead-letter", "requeue"
HELD = "held"  # to be acked when the window is smaller: the row holds the task

WAITING, ASKING, ALLOWED, FED, DONE = "waiting", "asking", "allowed", "fed", "done"


class Answer(NamedTuple):
    """The producer's answer to a group: why some were refused, and which of the tasks that may
    start must be the only one of their kind here, by index."""

    refused: dict[int, str]
    alone: set[int]


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """A task in flight; copies of the same attempt share one, so that it runs once in a process.
    Times are of time.monotonic()."""

    message: Message
    size: int  # of the message, in bytes
    suspect: bool  # its last worker died with it, or somebody has had its message before
    deliveries: list[tuple[Any, int]]  # the subscription and the tag of each
    since: float
    state: str = WAITING
    current_until: float = 0.0  # afterwards the producer is asked before it starts
    asked_at: float = 0.0
    token: str = ""  # of a suspect's start; the same start asked for twice counts once
    cause: str = ""  # of the death of its last worker here
    started: float = 0.0  # 0: it has not begun
    held: bool = False  # by the row: the message is acked
    stopped: bool = False  # cancelled, or somebody else has it

    @property
    def key(self) -> tuple[str, int]:
        """What copies of the same attempt have in common."""
        return self.message.id, self.message.attempt

    def join(self, copy: "Entry") -> None:
        """Take over the delivery of a copy; the older message of the two is superfluous."""
        ours, other = self.message.sent or 0, copy.message.sent or 0
        old = self if ours < other else copy
        if ours != other:
            settle([(old, ACK)])
            old.deliveries = []
        if ours < other:
            self.message = copy.message
        self.deliveries += copy.deliveries
        if self.held:
            settle([(self, HELD)])

    def report(self, **fields: Any) -> Report:
        """Return a report of this attempt by this message."""
        return Report(
            self.message.id, attempt=self.message.attempt, sent=self.message.sent, **fields
        )


class InFlight:
    """The entries of this process. An entry waits, is asked about if need be, is fed to a worker,
    done, and settled when its report is accepted."""

    def __init__(self, consumer: str, workers: int) -> None:
        self.consumer = consumer  # a UUID
        self.workers = workers  # at most
        self.fed = 0  # tasks that workers have
        self.news = False  # the reporter is to be woken
        self.lock = threading.Lock()
        self.reports = threading.Condition(self.lock)  # the reporter waits here
        self.wake: Callable[[], None] = lambda: None  # lets the pool look for work
        self.entries: dict[tuple[str, int], Entry] = {}
        self.fresh: collections.deque[Entry] = collections.deque()
        self.suspects: collections.deque[Entry] = collections.deque()
        self.asking: dict[Entry, None] = {}
        self.allowed: collections.deque[Entry] = collections.deque()  # suspects that may start
        self.done: collections.deque[tuple[Entry, Report]] = collections.deque()
        self.to_stop: list[Entry] = []  # which a worker has
        self.alone: Entry | None = None  # two of its workers have died with it
        self.skew: float | None = None  # seconds that the database's clock is ahead of ours
        self.stopping = False
        self.finished, self.busy_seconds = 0, 0.0  # since the window was last adjusted

    def admit(self, entries: list[Entry]) -> None:
        """Take deliveries in; a copy of what is in flight already joins it."""
        with self.lock:
            skew = 0.0 if self.skew is None else time.time() + self.skew - time.monotonic()
            for entry in entries:
                known = self.entries.setdefault(entry.key, entry)
                if known is not entry:
                    known.join(entry)
                elif entry.suspect:
                    self.suspects.append(entry)
                else:
                    if skew and entry.message.sent:
                        # If the database's clock was set back, we do not know: it is asked about.
                        until = entry.message.sent / 1e6 - skew + CURRENT_SECONDS
                        entry.current_until = until if until < entry.since + 2 else 0.0
                    self.fresh.append(entry)
        self.wake()

    def take(self, idle: int, room: int) -> list[Entry]:
        """Return what may be fed now: to `idle` workers, and of fresh tasks up to `room` lines.

        A suspect is asked about when a worker is idle for it, and is never fed behind another task.
        The worker waits only a moment for the answer: then fresh tasks go on.
        """
        with self.lock:
            now = time.monotonic()
            taken: list[Entry] = []
            if self.stopping:
                return taken
            while self.allowed and len(taken) < idle:
                taken.append(self.allowed.popleft())
            idle, room = idle - len(taken), room - len(taken)
            checks = room + self.workers  # also of what may start next: no worker waits for that
            for entry in self.asking:
                if not entry.suspect:
                    checks -= 1
                elif now - entry.asked_at < RESERVED_SECONDS:
                    idle, room = idle - 1, room - 1
            while self.suspects and idle > 0:
                self.ask(self.suspects.popleft(), now)
                idle, room = idle - 1, room - 1
            while self.fresh:
                is_current = self.fresh[0].current_until >= now
                if (room if is_current else checks) <= 0:
                    break
                entry = self.fresh.popleft()
                if is_current:
                    taken.append(entry)
                    room -= 1
                else:
                    self.ask(entry, now)
                    checks -= 1
            for entry in taken:
                entry.state = FED
            self.fed += len(taken)
            return taken

    def has_more(self) -> bool:
        """Tell whether tasks wait that will soon be done. The lock is held."""
        return bool(self.fresh) or self.fed > self.workers

    def ask(self, entry: Entry, now: float) -> None:
        """Have the reporter ask whether a task may start. The lock is held."""
        entry.state, entry.asked_at = ASKING, now
        if entry.suspect and not entry.token:
            entry.token = uuid.uuid4().hex
        self.asking[entry] = None
        self.news = True

    def waiting(self) -> tuple[int, bool]:
        """Return how many tasks wait for a worker, and whether a suspect is among them."""
        suspects = len(self.suspects) + len(self.allowed)
        return len(self.fresh) + len(self.asking) + suspects, suspects > 0

    def finish(self, ended: list[tuple[Entry, Report]], seconds: float) -> None:
        """Take outcomes for the reporter, at once if nothing waits behind them; a worker was busy
        with them for so many seconds."""
        with self.lock:
            for entry, _ in ended:
                entry.state = DONE
                self.leave(entry)
            self.done += ended
            self.fed -= len(ended)
            self.finished += len(ended)
            self.busy_seconds += seconds
            self.news = self.news or len(self.done) == len(ended) or not self.has_more()

    def announce(self) -> None:
        """Let the reporter go on, after what has ended was followed by asks for what comes next:
        one PUT takes both."""
        if self.news:
            with self.lock:
                self.news = False
                self.reports.notify()

    def leave(self, entry: Entry) -> None:
        """Free the turn to run alone. The lock is held."""
        if entry is self.alone:
            self.alone = None

    def give_back(self, entries: list[Entry]) -> None:
        """Take tasks back that a worker was fed and has not begun, in their order."""
        with self.lock:
            self.fed -= len(entries)
            for entry in reversed(entries):
                entry.state, entry.started = WAITING, 0.0
                if entry.stopped or not (entry.held or entry.deliveries):
                    self.drop([(entry, ACK)])
                elif entry.held and self.stopping:
                    self.release(entry)
                elif entry.held:
                    entry.state = ALLOWED
                    self.allowed.appendleft(entry)
                else:
                    self.fresh.appendleft(entry)

    def died(self, entry: Entry, cause: str) -> None:
        """Take a task whose worker ended with it, by itself or because it was told to stop."""
        with self.lock:
            self.fed -= 1
            self.leave(entry)
            if entry.stopped:
                self.drop([(entry, ACK)])
            elif self.stopping:
                self.release(entry)
            else:
                entry.suspect, entry.cause, entry.token = True, cause, ""
                entry.state, entry.started, entry.since = WAITING, 0.0, time.monotonic()
                self.suspects.append(entry)

    def release(self, entry: Entry) -> None:
        """Give a task back to the table, its start uncounted. The lock is held."""
        entry.state = DONE
        self.done.append((entry, entry.report(release=0.0, started=entry.token or None)))
        self.reports.notify()

    def drop(self, verdicts: list[tuple[Entry, str]]) -> None:
        """Settle what is over. The lock is held."""
        for entry, _ in verdicts:
            self.entries.pop(entry.key, None)
            self.leave(entry)
        settle(verdicts)

    def collect(self, last: float, beat_at: float) -> list[tuple[Entry, Report]]:
        """Wait until something is to be reported and return it, outcomes and asks; nothing when a
        heartbeat is due.

        Outcomes go out when no others come soon, or REPORT_SECONDS after the last report: one at a
        time when tasks are slow, hundreds together when they are fast.
        """
        with self.lock:
            while True:
                now = time.monotonic()
                soon = self.has_more() and not self.stopping
                report_at = last + REPORT_SECONDS if soon else now
                if now >= beat_at:
                    return []
                if self.asking or (self.done and now >= report_at):
                    return [*self.outcomes(), *self.asks()]
                self.reports.wait((min(report_at, beat_at) if self.done else beat_at) - now)

    def outcomes(self) -> list[tuple[Entry, Report]]:
        """Return the first outcomes, as they are to be reported now. The lock is held."""
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
            group.append((entry, report))
        return group

    def asks(self) -> list[tuple[Entry, Report]]:
        """Return what asks whether tasks may start. The lock is held."""
        group: list[tuple[Entry, Report]] = []
        alone = self.alone is None  # the turn is free; one suspect of a group may get it
        for entry in itertools.islice(self.asking, MAX_GROUP):
            report = entry.report(holder=self.consumer)
            if entry.suspect:
                report.started, report.error, report.alone = entry.token, entry.cause or None, alone
                alone = False
            group.append((entry, report))
        return group

    def accept(self, group: list[tuple[Entry, Report]], answer: Answer) -> None:
        """Act on the producer's answer to a group: let tasks start, and settle what is over.

        A failure's text is reported without a status first; then its message becomes a dead letter,
        and the watcher reports the error. If this process dies between, the row has the text.
        """
        verdicts: list[tuple[Entry, str]] = []
        with self.lock:
            checked: list[Entry] = []
            for index, (entry, report) in enumerate(group):
                refused = index in answer.refused
                if self.done and self.done[0][1] is report:
                    self.done.popleft()
                    is_over = refused or report.release is not None or report.status in ENDED
                    verdicts.append((entry, ACK if is_over else DEAD_LETTER))
                elif entry in self.asking:
                    if refused and report.sent != entry.message.sent:
                        continue  # a newer copy came meanwhile: ask about that
                    del self.asking[entry]
                    if refused or (report.started is None and not entry.deliveries):
                        verdicts.append((entry, ACK))
                    elif report.started is None:
                        checked.append(entry)
                    else:
                        self.allow(entry, index in answer.alone)
            for entry in reversed(checked):
                entry.state = WAITING
                entry.current_until = time.monotonic() + CURRENT_SECONDS
                self.fresh.appendleft(entry)
            self.drop(verdicts)  # before is_quiet() can be true, and the connection be closed
        self.wake()

    def allow(self, entry: Entry, alone: bool) -> None:
        """Let a suspect start: its row holds it from now on. The lock is held."""
        entry.state, entry.held = ALLOWED, True
        settle([(entry, HELD)])
        if self.stopping:
            self.release(entry)
            return
        self.allowed.append(entry)
        if alone:
            self.alone = entry

    def named(self) -> list[dict[str, Any]]:
        """Return what the heartbeat says is in flight."""
        with self.lock:
            now = time.monotonic()
            return [
                {
                    "taskId": entry.message.id,
                    "attempt": entry.message.attempt,
                    "seconds": round(now - (entry.started or entry.since), 3),
                    "state": "running" if entry.state == FED and entry.started else entry.state,
                }
                for entry in self.entries.values()
                if entry.held or now - entry.since > NAMED_SECONDS
            ]

    def heard(self, answer: dict[str, Any], skew: float) -> None:
        """Act on the answer to a heartbeat: ack what the row holds, stop what is not ours."""
        with self.lock:
            self.skew = skew
            for named in answer["held"]:
                entry = self.entries.get((named["taskId"], named["attempt"]))
                if entry is not None and entry.state == FED and not entry.held:
                    entry.held = True
                    settle([(entry, HELD)])
            for named in answer["stop"]:
                entry = self.entries.get((named["taskId"], named["attempt"]))
                if entry is not None and not entry.stopped:
                    log.info("task %s is not ours to run any more", entry.message.id)
                    entry.stopped = True
                    if entry.state == FED:
                        self.to_stop.append(entry)
                    elif self.withdraw(entry):
                        self.drop([(entry, ACK)])
        self.wake()

    def take_stops(self) -> list[Entry]:
        """Return, once, what a worker has and is not to run."""
        with self.lock:
            stops, self.to_stop = self.to_stop, []
            return [entry for entry in stops if entry.state == FED]

    def withdraw(self, entry: Entry) -> bool:
        """Take a task back that no worker has; say whether that was so. The lock is held."""
        for waiting in (self.fresh, self.suspects, self.allowed):
            if entry in waiting:
                waiting.remove(entry)
                return True
        return False

    def take_stuck(self) -> list[Entry]:
        """Take back what waits too long for a worker: another consumer may have an idle one."""
        limit = time.monotonic() - STUCK_SECONDS
        with self.lock:
            stuck = [each for each in (*self.suspects, *self.fresh) if each.since < limit]
            for entry in stuck:
                self.withdraw(entry)
                del self.entries[entry.key]
            return stuck

    def forget(self, subscription: Any) -> None:
        """Drop a dead connection's deliveries; what has not started comes again over the next."""
        with self.lock:
            for key, entry in list(self.entries.items()):
                kept = [each for each in entry.deliveries if each[0] is not subscription]
                entry.deliveries = kept
                if not kept and not entry.held and self.withdraw(entry):
                    del self.entries[key]

    def held_count(self) -> int:
        """Return how many workers are busy, or soon to be, with tasks that have no message."""
        with self.lock:
            entries = self.entries.values()
            return sum(entry.held and entry.state in (ALLOWED, FED) for entry in entries)

    def measure(self) -> tuple[int, float, float]:
        """Return tasks finished since the last call, their seconds, and the mean bytes of a task
        in flight."""
        with self.lock:
            count, seconds = self.finished, self.busy_seconds
            self.finished, self.busy_seconds = 0, 0.0
            size = sum(entry.size for entry in self.entries.values()) / max(len(self.entries), 1)
            return count, seconds, size

    def stop(self) -> None:
        """Let no task start any more; give back to the table what was allowed to."""
        with self.lock:
            self.stopping = True
            while self.allowed:
                self.release(self.allowed.popleft())
            self.reports.notify()
        self.wake()

    def is_quiet(self) -> bool:
        """Tell whether nothing runs, and nothing waits for an answer."""
        with self.lock:
            fed = any(entry.state == FED for entry in self.entries.values())
            return not (fed or self.done or self.asking)


def settle(verdicts: list[tuple[Entry, str]]) -> None:
    """Have each subscription settle these tasks' deliveries in its own thread. Those of a dead one
    are dropped: the broker sends the message again, and the producer says that it is over."""
    tags_of: dict[Any, dict[int, str]] = {}
    for entry, verdict in verdicts:
        for subscription, tag in entry.deliveries:
            tags_of.setdefault(subscription, {})[tag] = verdict
        if verdict == HELD:
            entry.deliveries = []
    for subscription, tags in tags_of.items():
        try:
            call = functools.partial(subscription.settle, tags)
            subscription.connection.add_callback_threadsafe(call)
        except pika.exceptions.AMQPError as error:
            log.debug("%d acks dropped with their connection: %s", len(tags), error)
