"""The producer's dispatcher: equal threads that feed random pending tasks to RabbitMQ."""

import contextlib
import logging
import math
import threading
import time
from typing import Any

import pika
import pika.exceptions
import psycopg2.errors
from pika.adapters.blocking_connection import BlockingChannel

import broker
import claims
import pool
import process
import publishing
import task

log = logging.getLogger("dispatcher")

QUEUE_LIMIT = process.setting("QUEUE_LIMIT", 2000, process.whole(1, 10**7))
THREADS = 2  # one publishes while the other claims
BATCH = 500
BATCH_BYTES = 4 * 1024 * 1024
EXPIRATION_MS = int(process.SENT_TIMEOUT_SECONDS * 1000 / 2)
WALK_SECONDS = 1.0  # between two walks of the index while there is no backlog
LAST_WALKS_SECONDS = 0.05  # the same, when a backlog has just ended
SLOW_WALK_SECONDS = 0.2
MAX_WALK_PAUSE_SECONDS = 10
MIN_SPAN = 1 / 256
FULL_SECONDS = 0.02
ROOM_SECONDS = 0.25  # how old the measured length of the queue may be
STALLED_SECONDS = 10
STUCK_SECONDS = 2  # longer than the turn of a thread whose servers answer


class Arrivals:
    """Tasks that have just become pending, and when to look for others in the index.

    While there is no backlog a task is claimed by its id. A walk of the index reads the entries of
    every task that an old snapshot keeps from being vacuumed: it comes once a second, for what this
    process has not heard of, and at once while there is a backlog.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.ids: list[str] = []
        self.sending = False  # a thread is at the ids that it took
        self.overflowed = False  # there were too many ids since the last walk began
        self.backlog = True  # perhaps: the first walk tells
        self.walk_at = 0.0  # of time.monotonic()
        self.full_at = 0.0  # the same: the last walk that left a backlog
        self.span = 1.0  # the part of the ring of picks that a walk covers

    def add(self, ids: list[str]) -> None:
        """Note tasks whose COMMIT is done. More than a batch is a backlog."""
        if not ids:
            return
        with self.changed:
            self.ids += ids
            if len(self.ids) > BATCH:
                self.ids.clear()
                self.backlog = self.overflowed = True
            self.changed.notify()

    def look(self) -> None:
        """Have the index walked at once."""
        with self.changed:
            self.backlog, self.walk_at = True, 0.0
            self.changed.notify_all()

    def take(self) -> list[str] | None:
        """Wait for work, at most WALK_SECONDS; return ids to claim, or None if a walk is due."""
        with self.changed:
            deadline = time.monotonic() + WALK_SECONDS
            while not (self.backlog or self.may_send() or time.monotonic() >= self.walk_at):
                if time.monotonic() >= deadline:
                    return []
                self.changed.wait(min(self.walk_at, deadline) - time.monotonic())
            if self.may_send() and not self.backlog:  # nothing goes before the backlog
                ids, self.ids, self.sending = self.ids, [], True
                return ids
            self.walk_at = math.inf  # until this walk has ended
            self.overflowed = False
            return None

    def may_send(self) -> bool:
        """Tell whether ids may be claimed: by one thread at a time, so that those which come
        meanwhile become one batch. If it is stuck, the walks find them."""
        return bool(self.ids) and not self.sending

    def sent(self, full: bool) -> None:
        """Note that the ids of take() are done with; full: some may be left, for a walk to find."""
        with self.changed:
            self.sending = False
            self.backlog = self.backlog or full
            self.changed.notify()

    def walked(self, full: bool, seconds: float) -> None:
        """Note how a walk went: whether it left a backlog, and how long it took. A slow one was
        among dead entries: the next ones cover less of the ring, and come less often."""
        with self.changed:
            now = time.monotonic()
            self.backlog = full or self.overflowed  # the walk may not have seen those
            self.full_at = now if full else self.full_at
            pause = max(WALK_SECONDS, min(9 * seconds, MAX_WALK_PAUSE_SECONDS))
            if now - self.full_at < WALK_SECONDS:
                pause = LAST_WALKS_SECONDS  # the other threads had locked some of the last ones
            if not full and seconds > SLOW_WALK_SECONDS:
                self.span = max(self.span / 2, MIN_SPAN)
            elif not full and self.span < 1 and seconds < SLOW_WALK_SECONDS / 4:
                self.span, pause = min(self.span * 2, 1.0), 0.0
            self.walk_at = now + pause
            self.changed.notify_all()


class Dispatcher:
    """Feeds pending tasks to the broker from THREADS threads, each over connections of its own.

    The broker confirms first and the database commits last: whatever fails between the two, the
    rows are pending again and the messages that are out are copies of the same attempt.
    """

    def __init__(self, stop: threading.Event, arrivals: Arrivals) -> None:
        self.stop = stop
        self.arrivals = arrivals
        self.states = ["not connected yet"] * THREADS
        self.room = [0] * THREADS  # messages that each thread may send before it measures again
        self.flows = False  # tasks wait in the table, and somebody takes them from the queue
        self.turns = [0.0] * THREADS  # of time.monotonic(), when each thread's last turn began
        self.measured: tuple[float, dict[str, int]] = 0.0, {}  # when, and what waited in the queues
        self.letters: tuple[float, int] = 0.0, 0  # when, and how many dead letters waited

    @property
    def turned_at(self) -> float:
        """When the last turn of any thread began, of time.monotonic(); 0: never."""
        return max(self.turns)

    @property
    def broker_state(self) -> str:
        """What /readyz says of the broker: "ok" if any thread is connected."""
        return "ok" if "ok" in self.states else self.states[0]

    def state(self, paused: bool = False) -> str:
        """Return "ok", or what is wrong with the dispatch."""
        if time.monotonic() - self.turned_at > STALLED_SECONDS:
            return f"no turn for {STALLED_SECONDS} seconds"
        return "paused" if paused else "ok"

    def turn_time(self) -> float:
        """Return when the last turn without an error began, in seconds since 1970; 0: never."""
        return time.time() - (time.monotonic() - self.turned_at) if self.turned_at else 0.0

    def depths(self) -> dict[str, int] | None:
        """Return how many messages wait in each queue; None if that is not known now."""
        measured_at, depths = self.measured
        return depths if time.monotonic() - measured_at < STALLED_SECONDS else None

    def run(self, number: int) -> None:
        """Dispatch until stop is set, through every outage: the body of thread `number`."""

        def on_lost(reason: str) -> None:
            self.states[number] = reason

        def work(connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
            self.room[number] = 0
            confirms = publishing.Confirms(connection, channel)
            confirms.probe()
            self.states[number] = "ok"
            with contextlib.closing(pool.connect()) as session:
                Publisher(self, number, confirms, session).run()

        role = f"producer-{number + 1}"
        broker.keep_connected(role, self.stop, work, pool.UNAVAILABLE, on_lost)

    def measure_room(self, channel: BlockingChannel, number: int) -> None:
        """Allow a thread a batch if the queue has room, what the others may send included. While
        nobody takes tasks, one batch waits in the broker and the rest in the table: else each would
        expire, become a dead letter and be sent again. What a stuck thread may send does not count:
        the others would wait for its node of a cluster, whose queues are counted as empty and
        without consumers until their record names another leader."""
        self.room[number] = BATCH  # said before the others' is read: never do both miss it
        since = time.monotonic() - STUCK_SECONDS
        others = sum(
            room
            for other, room in enumerate(self.room)
            if other != number and self.turns[other] > since
        )
        tasks, consumers = broker.count_waiting(channel, broker.QUEUE)
        now = time.monotonic()
        if not consumers or now - self.letters[0] > ROOM_SECONDS:
            self.letters = now, broker.count_waiting(channel, broker.DEAD_LETTER_QUEUE)[0]
        waiting = tasks + self.letters[1]
        self.measured = now, {broker.QUEUE: tasks, broker.DEAD_LETTER_QUEUE: self.letters[1]}
        self.flows = consumers > 0 and self.arrivals.backlog
        if not consumers:
            self.room[number] = max(0, BATCH - waiting - others)
        elif waiting + others >= QUEUE_LIMIT:
            self.room[number] = 0


class Publisher:
    """One thread's dispatch over one broker and one database connection."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        number: int,
        confirms: publishing.Confirms,
        session: Any,
    ) -> None:
        self.dispatcher = dispatcher
        self.number = number
        self.confirms = confirms
        self.connection, self.channel = confirms.connection, confirms.channel
        self.session = session
        self.returned: list[Any] = []
        self.text_bytes = 0.0  # mean of the last batch
        self.measured_at = 0.0

    def run(self) -> None:
        """Dispatch batch after batch until stop is set; any error ends it."""
        stop, room, arrivals = self.dispatcher.stop, self.dispatcher.room, self.dispatcher.arrivals
        self.channel.add_on_return_callback(lambda *parts: self.returned.append(parts))
        while not stop.is_set():
            self.dispatcher.turns[self.number] = time.monotonic()
            age = time.monotonic() - self.measured_at
            if room[self.number] < BATCH / 2 or age > ROOM_SECONDS:
                self.dispatcher.measure_room(self.channel, self.number)
                self.measured_at = time.monotonic()
            if room[self.number] <= 0:
                stop.wait(FULL_SECONDS if self.dispatcher.flows else ROOM_SECONDS)
                continue
            ids = arrivals.take()
            if ids is None:
                self.walk()
            elif ids:
                full = True  # unless it ends well
                try:
                    full = self.send(ids)
                finally:
                    arrivals.sent(full)

    def walk(self) -> None:
        """Send a batch of random pending tasks from the index."""
        arrivals, limit = self.dispatcher.arrivals, self.dispatcher.room[self.number]
        if self.text_bytes:  # what a batch of such texts cannot take need not be locked
            limit = min(limit, max(1, math.ceil(BATCH_BYTES / self.text_bytes)))
        began, full = time.monotonic(), True  # true unless it ends well: others look again
        try:
            full = self.send(None, limit)
        except psycopg2.errors.QueryCanceled:  # too many dead entries for one statement
            full = False
        finally:
            arrivals.walked(full, time.monotonic() - began)

    def send(self, ids: list[str] | None, limit: int = BATCH) -> bool:
        """Claim tasks, by id or from the index, publish and commit them; return whether more may
        wait. Any error leaves them pending."""
        began = time.monotonic()
        with self.session, self.session.cursor() as cursor:  # COMMIT, or ROLLBACK on any exception
            if ids is None:
                span = self.dispatcher.arrivals.span
                claimed = claims.claim_random_tasks(cursor, limit, BATCH_BYTES, span)
            else:
                claimed = claims.claim_tasks_by_id(cursor, ids, BATCH_BYTES)
            size = self.publish(claimed) if claimed else 0
        if not claimed:
            return False
        self.text_bytes = size / len(claimed)
        room = self.dispatcher.room[self.number] - len(claimed)
        self.dispatcher.room[self.number] = max(0, room)
        log.info("dispatched %d tasks in %.3f s", len(claimed), time.monotonic() - began)
        return size >= BATCH_BYTES or (ids is None and len(claimed) > limit / 2)

    def publish(self, claimed: list[claims.Claimed]) -> int:
        """Publish tasks until the broker has them all; return their bytes."""
        messages = [(each.id, task.Message(*each[:-1]).as_body(), each.suspect) for each in claimed]
        self.confirms.expect(len(messages))
        publishing.publish(self.connection, self.channel, messages, EXPIRATION_MS)
        self.confirms.wait()
        self.connection.process_data_events()  # only here does pika report what came back
        if self.returned:
            raise pika.exceptions.AMQPError(f"{len(self.returned)} messages had no queue")
        return sum(len(each.text.encode()) for each in claimed)
