"""A task in flight: its message, its deliveries, and the state it is in."""

import dataclasses
import functools
import logging
from typing import Any

import pika.exceptions

from task import Message, Report

log = logging.getLogger("in_flight")

ACK, DEAD_LETTER, REQUEUE = "ack", "dead-letter", "requeue"
HELD = "held"  # to be acked when the window is smaller: the row holds the task

Key = tuple[str, int]  # of an attempt: the task's id and its number

WAITING, ASKING, ALLOWED, FED, DONE = "waiting", "asking", "allowed", "fed", "done"


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
    def key(self) -> Key:
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
            self.suspect = self.suspect or (copy.suspect and self.state in (WAITING, ASKING))
        self.deliveries += copy.deliveries
        if self.held:
            settle([(self, HELD)])

    def named(self, now: float) -> dict[str, Any]:
        """Return what the heartbeat says of it."""
        return {
            "taskId": self.message.id,
            "attempt": self.message.attempt,
            "sent": self.message.sent,
            "seconds": round(max(0.0, now - (self.started or self.since)), 3),
            "state": "running" if self.state == FED and self.started else self.state,
        }

    def report(self, **fields: Any) -> Report:
        """Return a report of this attempt by this message."""
        return Report(
            self.message.id, attempt=self.message.attempt, sent=self.message.sent, **fields
        )


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
