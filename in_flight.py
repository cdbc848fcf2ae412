"""What a consumer has in flight: each task from its delivery to the end of its report. Here the
broker's I/O thread, the pool's thread and the reporter meet."""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from entry import ACK, ALLOWED, DONE, FED, HELD, Entry, Key, settle
from outcomes import Answer, Outcomes
from task import MAX_NAMED, Report
from waiting import Waiting

log = logging.getLogger("in_flight")

STUCK_SECONDS = 2  # unstarted for so long behind a busy worker: somebody else may be idle
NAMED_SECONDS = 2  # in flight for so long: the heartbeat names it


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
        self.entries: dict[Key, Entry] = {}
        self.waiting = Waiting(workers)
        self.outcomes = Outcomes(consumer)
        self.to_stop: list[Entry] = []  # which a worker has
        self.alone: Entry | None = None  # two of its workers have died with it
        self.stopping = False
        self.finished, self.busy_seconds = 0, 0.0  # since the window was last adjusted

    def admit(self, entries: list[Entry]) -> None:
        """Take deliveries in; a copy of what is in flight already joins it."""
        with self.lock:
            for entry in entries:
                known = self.entries.setdefault(entry.key, entry)
                if known is entry:
                    self.waiting.add(entry)
                    continue
                was_suspect = known.suspect
                known.join(entry)
                if known.suspect != was_suspect and self.waiting.withdraw(known):
                    self.waiting.add(known)
        self.wake()

    def take(self, idle: int, room: int) -> list[Entry]:
        """Return what may be fed now, see Waiting.take(); have the reporter ask about others."""
        with self.lock:
            asked = len(self.waiting.asking)
            taken = [] if self.stopping else self.waiting.take(idle, room)
            for entry in taken:
                entry.state = FED
            self.fed += len(taken)
            self.news = self.news or len(self.waiting.asking) > asked
            return taken

    def has_more(self) -> bool:
        """Tell whether tasks wait that will soon be done. The lock is held."""
        return bool(self.waiting.fresh) or self.fed > self.workers

    def finish(self, ended: list[tuple[Entry, Report]], seconds: float) -> None:
        """Take outcomes for the reporter, at once if nothing waits behind them; a worker was busy
        with them for so many seconds."""
        with self.lock:
            pace = seconds / len(ended)
            began = time.time() - seconds + (self.waiting.skew or 0.0)  # by the database's clock
            for index, (entry, report) in enumerate(ended):
                report.started_at, report.seconds = began + index * pace, pace
                entry.state = DONE
                self.leave(entry)
            self.outcomes.done += ended
            self.fed -= len(ended)
            self.finished += len(ended)
            self.busy_seconds += seconds
            self.news = self.news or len(self.outcomes.done) == len(ended) or not self.has_more()

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
                entry.started = 0.0
                if entry.stopped or not (entry.held or entry.deliveries):
                    self.drop([(entry, ACK)])
                elif entry.held and self.stopping:
                    self.release(entry)
                else:
                    self.waiting.put_back(entry)

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
                entry.started, entry.since = 0.0, time.monotonic()
                self.waiting.add(entry)

    def release(self, entry: Entry) -> None:
        """Give a task back to the table, its start uncounted. The lock is held."""
        entry.state = DONE
        report = entry.report(release=0.0, started=entry.token or None)
        self.outcomes.done.append((entry, report))
        self.reports.notify()

    def drop(self, verdicts: list[tuple[Entry, str]]) -> None:
        """Settle what is over. The lock is held."""
        for entry, _ in verdicts:
            self.entries.pop(entry.key, None)
            self.leave(entry)
        settle(verdicts)

    def collect(self, soon_at: float, beat_at: float) -> list[tuple[Entry, Report]]:
        """Wait until something is to be reported and return it, outcomes and asks; nothing when a
        heartbeat is due.

        Outcomes go out when no others come soon, or at soon_at: one at a time when tasks are slow,
        hundreds together when they are fast.
        """
        with self.lock:
            while True:
                now = time.monotonic()
                for entry in self.outcomes.bring_back(now, self.stopping):
                    self.waiting.asking[entry] = None
                soon = self.has_more() and not self.stopping
                report_at = soon_at if soon else now
                if now >= beat_at:
                    return []
                done = bool(self.outcomes.done)
                if self.waiting.asking or (done and now >= report_at):
                    return [
                        *self.outcomes.group(),
                        *self.waiting.asks(self.consumer, self.alone is None),
                    ]
                self.reports.wait((min(report_at, beat_at) if done else beat_at) - now)

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
                if index in answer.locked:
                    self.waiting.asking.pop(entry, None)
                    self.outcomes.put_off(entry, report)
                elif self.outcomes.take_first(report):
                    verdicts += self.outcomes.settle(entry, report, refused)
                elif entry in self.waiting.asking:
                    newer = report.sent != entry.message.sent
                    if newer and (refused or entry.suspect != (report.started is not None)):
                        continue  # another copy came meanwhile: ask about that
                    del self.waiting.asking[entry]
                    if refused or (report.started is None and not entry.deliveries):
                        verdicts.append((entry, ACK))
                    elif report.started is None:
                        checked.append(entry)
                    else:
                        self.allow(entry, index in answer.alone)
            self.waiting.confirm(checked)
            self.drop(verdicts)  # before is_quiet() can be true, and the connection be closed
        self.wake()

    def allow(self, entry: Entry, alone: bool) -> None:
        """Let a suspect start: its row holds it from now on. The lock is held."""
        entry.held = True
        settle([(entry, HELD)])
        if self.stopping:
            self.release(entry)
            return
        self.waiting.allow(entry)
        if alone:
            self.alone = entry

    def named(self) -> list[dict[str, Any]]:
        """Return what the heartbeat says is in flight."""
        with self.lock:
            now = time.monotonic()
            entries = [
                entry
                for entry in self.entries.values()
                if entry.held or now - entry.since > NAMED_SECONDS
            ]
            entries.sort(key=lambda entry: not entry.held)
            return [entry.named(now) for entry in entries[:MAX_NAMED]]

    def heard(self, held: list[Key], stop: list[Key], skew: float) -> None:
        """Act on the answer to a heartbeat: ack what the row holds, stop what is not ours."""
        with self.lock:
            self.waiting.skew = skew
            for key in held:
                entry = self.entries.get(key)
                if entry is not None and entry.state == FED and not entry.held:
                    entry.held = True
                    settle([(entry, HELD)])
            for key in stop:
                entry = self.entries.get(key)
                if entry is not None and not entry.stopped:
                    log.info("task %s is not ours to run any more", entry.message.id)
                    entry.stopped = True
                    if entry.state == FED:
                        self.to_stop.append(entry)
                    elif self.waiting.withdraw(entry):
                        self.drop([(entry, ACK)])
        self.wake()

    def take_stops(self) -> list[Entry]:
        """Return, once, what a worker has and is not to run."""
        with self.lock:
            stops, self.to_stop = self.to_stop, []
            return [entry for entry in stops if entry.state == FED]

    def take_stuck(self) -> list[Entry]:
        """Take back what waits too long for a worker: another consumer may have an idle one. What
        has no message any more is released."""
        limit = time.monotonic() - STUCK_SECONDS
        with self.lock:
            stuck = [each for each in self.waiting.all() if each.since < limit]
            for entry in stuck:
                self.waiting.withdraw(entry)
                self.leave(entry)
                if entry.held:
                    self.release(entry)
                else:
                    del self.entries[entry.key]
            return [entry for entry in stuck if not entry.held]

    def forget(self, subscription: Any) -> None:
        """Drop a dead connection's deliveries; what has not started comes again over the next."""
        with self.lock:
            for key, entry in list(self.entries.items()):
                kept = [each for each in entry.deliveries if each[0] is not subscription]
                entry.deliveries = kept
                if not kept and not entry.held and self.waiting.withdraw(entry):
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
            for entry in self.waiting.all():
                if entry.held:
                    self.waiting.withdraw(entry)
                    self.release(entry)
            self.reports.notify()
        self.wake()

    def is_quiet(self) -> bool:
        """Tell whether nothing runs, and nothing waits for an answer."""
        with self.lock:
            fed = any(entry.state == FED for entry in self.entries.values())
            return not (fed or self.outcomes or self.waiting.asking)
