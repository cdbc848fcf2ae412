"""Group commit for reports: while WRITERS groups are being written, the reports that arrive wait
and become the next one. So the reports of hundreds of consumers take few connections."""

import threading
from collections import deque
from collections.abc import Callable

import pool
from rules import Verdict
from task import Report

WRITERS = 4  # of the pool's connections; the others are for heartbeats and all other calls
GROUP_REPORTS = 2000
GROUP_BYTES = 4 * 1024 * 1024


class Call:
    """One request's reports; its gate is a lock that is held until somebody opens it."""

    __slots__ = ("gate", "is_alone", "outcome", "reports", "size")

    def __init__(self, reports: list[Report]) -> None:
        self.reports = reports
        self.size = sum(len(each.result or "") + len(each.error or "") for each in reports)
        self.gate = threading.Lock()
        self.gate.acquire()
        self.outcome: list[Verdict] | pool.Unavailable | None = None
        self.is_alone = False  # its group could not be written: each tries for itself


class ReportGroups:
    """Applies reports that may be repeated and skip locked rows: it does not matter with whose they
    share a transaction.

    A caller that finds a writer free writes at once. Who comes later waits, and the first of those
    writes for the rest.
    """

    def __init__(self, work: Callable[[list[Report]], list[Verdict]]) -> None:
        self.work = work  # applies the reports of a group
        self.lock = threading.Lock()
        self.waiting: deque[Call] = deque()
        self.writing = 0

    def apply(self, reports: list[Report]) -> list[Verdict]:
        """Return a verdict for each report, committed. Raise Unavailable, or what work() raises for
        these reports alone."""
        call = Call(reports)
        with self.lock:
            leads = self.writing < WRITERS
            if leads:
                self.writing += 1
            else:
                self.waiting.append(call)
        if not leads:
            call.gate.acquire()  # opened with an outcome, or without one to take over the lead
        if call.outcome is None and not call.is_alone:
            self.write(call)
        if call.is_alone:
            return self.work(reports)
        if isinstance(call.outcome, pool.Unavailable):
            raise call.outcome
        assert call.outcome is not None
        return call.outcome

    def write(self, call: Call) -> None:
        """Write a call's reports and those that fit of what waits; then hand on the lead."""
        group = self.take_group(call)
        try:
            verdicts = iter(self.work([each for member in group for each in member.reports]))
            for member in group:
                member.outcome = [next(verdicts) for _ in member.reports]
        except pool.Unavailable as error:
            with self.lock:  # who waits would only wait as long for the same, past its own time-out
                group += self.waiting
                self.waiting.clear()
            for member in group:
                member.outcome = error
        except Exception:
            for member in group:
                member.is_alone = True
        self.hand_on(group)

    def take_group(self, call: Call) -> list[Call]:
        """Return a call and those of the waiting that fit beside it."""
        group, count, size = [call], len(call.reports), call.size
        with self.lock:
            while self.waiting:
                count += len(self.waiting[0].reports)
                size += self.waiting[0].size
                if count > GROUP_REPORTS or size > GROUP_BYTES:
                    break
                group.append(self.waiting.popleft())
        return group

    def hand_on(self, group: list[Call]) -> None:
        """Let the first of those that wait lead, and the members of a group return."""
        with self.lock:
            leader = [self.waiting.popleft()] if self.waiting else []
            self.writing -= not leader
        for call in (*leader, *group[1:]):
            call.gate.release()
