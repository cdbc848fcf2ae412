"""The producer's housekeeper: a thread that releases due tasks, rescues lost ones and deletes old
ones, in small steps."""

import functools
import logging
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import leases
import minutes
import pool
import process
import task
from dispatcher import Arrivals
from metrics import Metrics

log = logging.getLogger("housekeeper")

RETENTION_DAYS = process.setting("RETENTION_DAYS", 0, process.whole(0, 36500))
TURN_SECONDS = 0.5
# Between two looks for lost tasks.
RESCUE_SECONDS = min(process.SENT_TIMEOUT_SECONDS, process.LEASE_SECONDS) / 20
# No rescue for so long after a start or an outage, of the database, the consumers' way to here, or
# a clock: the consumers could not renew their leases meanwhile, and do so within their back-off.
GRACE_SECONDS = min(60, process.SENT_TIMEOUT_SECONDS, process.LEASE_SECONDS / 2)
LATE_SECONDS = 5  # a turn that came so late was frozen; a clock that differs by so much was set
ROWS = 5000  # in one statement
BEGINNING = datetime.min.replace(tzinfo=UTC)
SWEEP_SECONDS = 60  # between two looks for old tasks when there are none
COUNTS_SECONDS = 5  # between two times that what was counted is written down
FORGET_SECONDS = 600  # between two looks for consumers that are gone for good

RELEASE_DUE_TASKS = """
UPDATE tasks
SET delayed = false
WHERE id = ANY(ARRAY(
    SELECT id FROM tasks
    WHERE delayed AND run_at <= now()
    ORDER BY run_at
    LIMIT %(limit)s
    FOR UPDATE SKIP LOCKED
))
RETURNING id
"""

# The oldest first, along the index of one status; from where the last batch ended, because its
# entries are there until vacuum has been there.
DELETE_ENDED_TASKS = """
WITH deleted AS (
    DELETE FROM tasks
    WHERE id = ANY(ARRAY(
        SELECT id FROM tasks
        WHERE status = %(status)s  -- psycopg2 puts it in, so that the index is found
            AND finished_at >= %(since)s
            AND finished_at < now() - make_interval(days => %(days)s)
        ORDER BY finished_at
        LIMIT %(limit)s
        FOR UPDATE SKIP LOCKED
    ))
    RETURNING finished_at
)
SELECT count(*), max(finished_at) FROM deleted
"""


def release_due(cursor: Any) -> list[str]:
    """Let delayed tasks whose time has come be picked; return their ids."""
    cursor.execute(RELEASE_DUE_TASKS, {"limit": ROWS})
    return [task_id for (task_id,) in cursor]


def sweep(
    cursor: Any, status: str, since: datetime, limit: int, days: int, seconds: float
) -> datetime | None:
    """Delete the oldest tasks of a status that ended over so many days ago, at most limit; return
    since when to go on, None if there are no more. Raise QueryCanceled if it takes too long."""
    cursor.execute(f"SET LOCAL statement_timeout = {int(seconds * 1000)}")
    bounds = {"status": status, "since": since, "limit": limit, "days": days}
    cursor.execute(DELETE_ENDED_TASKS, bounds)
    count, last = cursor.fetchone()
    return last if count == limit else None


class Housekeeper:
    """Keeps the table in order until stop is set; `arrivals` hears of what becomes pending."""

    def __init__(
        self,
        connections: pool.Pool,
        stop: threading.Event,
        arrivals: Arrivals,
        counted: Metrics,
        producer: str,
    ) -> None:
        self.metrics = counted
        self.producer = producer  # a UUID
        self.connections = connections
        self.stop = stop
        self.arrivals = arrivals
        self.rescue_at = time.monotonic() + GRACE_SECONDS
        self.forget_at = 0.0
        self.clocks = time.monotonic(), 0.0  # when the last turn began; the database's time then
        self.sweep_at = 0.0 if RETENTION_DAYS else math.inf
        self.sweep_since = dict.fromkeys(task.ENDED, BEGINNING)
        self.sweep_rows = ROWS  # the next batch
        self.counts_at = 0.0
        self.silence = process.Backoff(log, "no heartbeat of a consumer")

    def run(self) -> None:
        """Work in turns until stop is set: the body of a thread."""
        turns = process.Backoff(log, "housekeeping failed")
        sweeps = process.Backoff(log, "old tasks are not deleted")
        writes = process.Backoff(log, "what was counted is not written down")
        while not self.stop.wait(TURN_SECONDS):
            delay = self.attempt(self.turn, turns)
            if delay:
                self.postpone_rescue()
                self.stop.wait(delay)
                continue
            # If these fail, nothing else waits for them.
            now = time.monotonic()
            if now >= self.sweep_at:
                self.sweep_when_due(now, sweeps)
            if now >= self.counts_at:
                self.counts_at = now + COUNTS_SECONDS + self.attempt(self.write_counts, writes)
        self.attempt(self.write_counts, writes)

    def attempt(self, work: Callable[[], None], backoff: process.Backoff) -> float:
        """Do work; return the seconds to wait after a failure, 0 if it went well."""
        try:
            work()
            backoff.succeeded()
            return 0.0
        except pool.Unavailable as error:
            return backoff.failed(error)
        except Exception as error:  # the top of a loop: nothing else would release or rescue
            log.exception("housekeeping failed")
            return backoff.failed(error)

    def turn(self) -> None:
        """Release and rescue what is due, each in a transaction of its own."""
        as_of = self.read_clocks()
        self.arrivals.add(self.connections.transaction(release_due))
        if time.monotonic() >= self.forget_at:
            self.forget_at = time.monotonic() + FORGET_SECONDS
            self.connections.transaction(leases.forget_consumers)
            self.connections.transaction(minutes.forget)
        if time.monotonic() >= self.rescue_at:
            work = functools.partial(leases.rescue_lost, as_of=as_of)
            rescued = self.connections.transaction(work)
            if rescued:
                log.warning("rescued %d tasks that were sent and lost", len(rescued))
                self.metrics.note_rescued(len(rescued))
            self.arrivals.add(rescued)
            # A full batch leaves others behind.
            full = len(rescued) == leases.RESCUED_ROWS
            self.rescue_at = time.monotonic() + (0 if full else RESCUE_SECONDS)

    def read_clocks(self) -> float:
        """Return the database's time at the last turn; put the rescue off if a clock has jumped or
        stood still since, or no consumer has been heard of."""
        now, silence = self.connections.statement(leases.read_clock)
        (before, now_before), self.clocks = self.clocks, (time.monotonic(), now)
        elapsed = self.clocks[0] - before
        late = elapsed > TURN_SECONDS + LATE_SECONDS
        jumped = abs(now - now_before - elapsed) > LATE_SECONDS
        if late or jumped or silence > GRACE_SECONDS:
            self.postpone_rescue()
        if silence <= GRACE_SECONDS:
            self.silence.succeeded()
        elif now_before:
            log.log(self.silence.level(), "no heartbeat of a consumer: leases are left alone")
        return now_before

    def postpone_rescue(self) -> None:
        """Give the consumers time to renew their leases."""
        self.rescue_at = max(self.rescue_at, time.monotonic() + GRACE_SECONDS)

    def write_counts(self) -> None:
        """Write down what this producer has counted since the last time."""
        unwritten = self.metrics.take_unwritten()
        if not unwritten:
            return
        work = functools.partial(minutes.write, producer=self.producer, minutes=unwritten)
        try:
            self.connections.transaction(work)
        except Exception:
            self.metrics.put_back(unwritten)
            raise

    def sweep_when_due(self, now: float, backoff: process.Backoff) -> None:
        """Sweep; again at the next turn if something is left, else later. After a failure, not
        before its delay."""
        self.sweep_at = now
        delay = self.attempt(self.sweep, backoff)
        self.sweep_at = max(self.sweep_at, now + delay)

    def sweep(self) -> None:
        """Delete some old tasks of each status."""
        full = False
        for status, since in self.sweep_since.items():
            work = functools.partial(
                sweep,
                status=status,
                since=since,
                limit=self.sweep_rows,
                days=RETENTION_DAYS,
                seconds=LATE_SECONDS / 4,  # both together, or the turns would look late
            )
            try:
                end = self.connections.transaction(work)
            except Exception:
                self.sweep_rows = max(1, self.sweep_rows // 2)  # perhaps they took too long
                raise
            full = full or end is not None
            self.sweep_since[status] = end or BEGINNING
        self.sweep_rows = min(2 * self.sweep_rows, ROWS)
        if not full:
            self.sweep_at += SWEEP_SECONDS
