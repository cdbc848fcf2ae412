"""What waits for a worker in a consumer: which tasks may start, and which are asked about first.
Without a lock: InFlight calls it under its own."""

import collections
import itertools
import time
import uuid

from entry import ALLOWED, ASKING, WAITING, Entry
from outcomes import MAX_GROUP
from task import Report

CURRENT_SECONDS = 1.0  # a message that has waited for longer may have been cancelled
RESERVED_SECONDS = 0.25  # an idle worker waits for the answer about a suspect


class Waiting:
    """Fresh tasks, which start at once, and suspects, which ask. A fresh one whose message is old
    is asked about too, uncounted: it may have been cancelled."""

    def __init__(self, workers: int) -> None:
        self.workers = workers  # at most
        self.fresh: collections.deque[Entry] = collections.deque()
        self.suspects: collections.deque[Entry] = collections.deque()
        self.asking: dict[Entry, None] = {}
        self.allowed: collections.deque[Entry] = collections.deque()  # suspects that may start
        self.skew: float | None = None  # seconds that the database's clock is ahead of ours

    def add(self, entry: Entry) -> None:
        """Take in what was delivered, or what has lost its worker."""
        entry.state = WAITING
        if entry.suspect:
            self.suspects.append(entry)
            return
        if self.skew is not None and entry.message.sent:
            skew = time.time() + self.skew - time.monotonic()
            until = entry.message.sent / 1e6 - skew + CURRENT_SECONDS
            # If the database's clock was set back, nobody knows: it is asked about.
            entry.current_until = until if until < entry.since + 2 * CURRENT_SECONDS else 0.0
        self.fresh.append(entry)

    def put_back(self, entry: Entry) -> None:
        """Take in what was to start and has not, before all others."""
        if entry.held:
            entry.state, entry.since = ALLOWED, time.monotonic()
            self.allowed.appendleft(entry)
        else:
            entry.state = WAITING
            self.fresh.appendleft(entry)

    def allow(self, entry: Entry) -> None:
        """Let a suspect start."""
        entry.state, entry.since = ALLOWED, time.monotonic()
        self.allowed.append(entry)

    def confirm(self, entries: list[Entry]) -> None:
        """Let fresh tasks start within CURRENT_SECONDS, before all others."""
        for entry in reversed(entries):
            entry.current_until = time.monotonic() + CURRENT_SECONDS
            self.put_back(entry)

    def take(self, idle: int, room: int) -> list[Entry]:
        """Return what may be fed now: to `idle` workers, and of fresh tasks up to `room` lines.

        A suspect is asked about when a worker is idle for it, and is never fed behind another task.
        The worker waits only a moment for the answer: then fresh tasks go on.
        """
        now = time.monotonic()
        taken: list[Entry] = []
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
        return taken

    def ask(self, entry: Entry, now: float) -> None:
        """Let the reporter ask whether a task may start."""
        entry.state, entry.asked_at = ASKING, now
        self.asking[entry] = None

    def asks(self, consumer: str, alone: bool) -> list[tuple[Entry, Report]]:
        """Return what asks whether tasks may start; alone: the turn for one that must run alone is
        free. One suspect of a group may get it."""
        group: list[tuple[Entry, Report]] = []
        for entry in itertools.islice(self.asking, MAX_GROUP):
            report = entry.report(holder=consumer)
            if entry.suspect:
                entry.token = entry.token or uuid.uuid4().hex
                report.started, report.error, report.alone = entry.token, entry.cause or None, alone
                report.started_at = time.time() + (self.skew or 0.0)
                alone = False
            group.append((entry, report))
        return group

    def count(self) -> tuple[int, bool]:
        """Return how many tasks wait, and whether one of them needs a worker of its own."""
        suspects = len(self.suspects) + len(self.allowed)
        return len(self.fresh) + len(self.asking) + suspects, suspects > 0

    def all(self) -> list[Entry]:
        """Return what waits and is not being asked about."""
        return [*self.allowed, *self.suspects, *self.fresh]

    def withdraw(self, entry: Entry) -> bool:
        """Take a task out; say whether it was there, and nobody asks about it."""
        for queue in (self.fresh, self.suspects, self.allowed):
            if entry in queue:
                queue.remove(entry)
                return True
        return False
