"""The producer's background threads: the dispatcher that feeds random pending tasks to RabbitMQ,
and the housekeeper that releases due tasks, rescues lost ones and deletes old ones."""

import contextlib
import functools
import json
import logging
import math
import threading
import time
from typing import Any

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel

import broker
import database

log = logging.getLogger("dispatcher")

QUEUE_LIMIT = broker.setting("QUEUE_LIMIT", 2000, broker.number(1, 10**7))
RETENTION_DAYS = broker.setting("RETENTION_DAYS", 0, broker.number(0, 36500))
BATCH = 500
BATCH_BYTES = 4 * 1024 * 1024
EXPIRATION_MS = int(broker.SENT_TIMEOUT_SECONDS * 1000 / 2)
IDLE_SECONDS = 1
ASSIST_SECONDS = 0.5  # between two turns of the second lane
FULL_SECONDS = 0.02
LOOK_SECONDS = 0.25  # how old the queue's length may be while only a few tasks are sent
HOUSEKEEPING_SECONDS = 0.5
GRACE_SECONDS = min(broker.SENT_TIMEOUT_SECONDS, 60)  # a consumer's back-off and its time-outs


class Dispatcher:
    """Claims random pending tasks and feeds them to the broker: one lane always, and a second one,
    with connections of its own, while there is a backlog: it claims while the first publishes.

    The broker commits first and the database last: whatever fails between the two, the rows are
    pending again and the message, if it is out, is a copy of the same attempt.
    """

    def __init__(self, stop: threading.Event, wake: threading.Event) -> None:
        self.stop = stop
        self.wake = wake  # something may be pending: no need to wait
        self.backlog = threading.Event()  # more is pending than the first lane has just taken
        self.broker_state = "not connected yet"
        self.turned_at = 0.0  # of time.monotonic(), the last turn without an error
        self.allowed = [0, 0]  # messages that each lane may still send without another look

    def run(self) -> None:
        """Dispatch until stop is set, through every outage of broker and database."""
        name = broker.host_name("producer")
        broker.keep_connected(name, self.stop, self.dispatch, database.UNAVAILABLE, self.tell)

    def tell(self, state: str) -> None:
        """Keep what /readyz says of the broker."""
        self.broker_state = state

    def assist(self) -> None:
        """Be the second lane whenever there is a backlog: the body of a thread.

        What ends it is no news: the first lane meets the same outage, and logs it.
        """
        while not self.stop.wait(ASSIST_SECONDS):
            connection = None
            try:
                if self.backlog.wait(IDLE_SECONDS):
                    connection = broker.connect(broker.host_name("producer-2"))
                    self.dispatch(connection, connection.channel(), lane=1)
            except Exception as error:  # the top of a loop
                log.debug("second lane ended: %r", error)
            finally:
                self.allowed[1] = 0
                broker.close(connection)

    def dispatch(
        self, connection: pika.BlockingConnection, channel: BlockingChannel, lane: int = 0
    ) -> None:
        """Dispatch batch after batch over one broker and one database connection, the second lane
        only until the backlog or the room in the queue is used up."""
        returned: list[Any] = []
        channel.tx_select()
        channel.add_on_return_callback(lambda *parts: returned.append(parts))
        # While the broker has an alarm it reads no more, but keeps what it got and may publish it
        # later: let that be a message to nobody, and claim only when it has answered.
        channel.basic_publish("", "tasks.probe", b"")
        channel.tx_commit()
        with contextlib.closing(database.connect()) as session:
            looked_at, size = 0.0, 0.0  # size: mean bytes of a text in the last batch
            while not self.stop.is_set():
                if lane == 0:
                    self.wake.clear()  # before the claim: a task that comes meanwhile sets it again
                    self.turned_at = time.monotonic()
                if self.allowed[lane] < BATCH / 2 or time.monotonic() - looked_at > LOOK_SECONDS:
                    looked_at = time.monotonic()
                    self.look(channel, lane)
                allowed = self.allowed[lane]
                limit = min(allowed, max(1, math.ceil(BATCH_BYTES / size))) if size else allowed
                sent = []
                if limit:
                    sent = self.send_batch(connection, channel, returned, session, limit)
                total = sum(len(text.encode()) for _, text, _, _ in sent)
                more = bool(sent) and (len(sent) == limit or total >= BATCH_BYTES)
                size = total / len(sent) if sent else size
                if lane == 0:
                    (self.backlog.set if more else self.backlog.clear)()
                elif not more:
                    return
                self.allowed[lane] -= len(sent)
                if not allowed:
                    self.stop.wait(FULL_SECONDS)
                elif not sent:
                    self.wake.wait(IDLE_SECONDS)

    def look(self, channel: BlockingChannel, lane: int) -> None:
        """Allow a lane one batch if the queue has room, what the other lane may send included."""
        self.allowed[lane] = BATCH  # said before the other's is read: never do both miss it
        waiting = self.allowed[1 - lane] + broker.count_waiting(channel)
        if waiting >= QUEUE_LIMIT:
            self.allowed[lane] = 0

    def send_batch(
        self,
        connection: pika.BlockingConnection,
        channel: BlockingChannel,
        returned: list[Any],
        session: Any,
        limit: int,
    ) -> list[tuple]:
        """Claim, publish and commit one batch; return its rows. Any error leaves it pending."""
        began = time.monotonic()
        with session, session.cursor() as cursor:  # COMMIT at the end, ROLLBACK on any exception
            tasks = database.claim_tasks(cursor, limit, BATCH_BYTES)
            if tasks:
                messages = [message(*task) for task in tasks]
                broker.publish(connection, channel, messages, EXPIRATION_MS)
                channel.tx_commit()
                connection.process_data_events()  # only here does pika report what came back
                if returned:
                    raise pika.exceptions.AMQPError(f"{len(returned)} messages had no queue")
        if tasks:
            log.info("dispatched %d tasks in %.3f s", len(tasks), time.monotonic() - began)
        return tasks


def message(task_id: str, text: str, attempt: int, suspect: bool) -> tuple[str, bytes, bool]:
    """Return a task as a message's id and body, and whether its next start must be asked for."""
    body = {"id": task_id, "text": text, "attempt": attempt}
    return task_id, json.dumps(body, ensure_ascii=False).encode(), suspect


def keep_house(pool: database.Pool, stop: threading.Event, wake: threading.Event) -> None:
    """Release due tasks, rescue lost ones and delete old ones, in small steps until stop is set.

    Nothing is rescued in the first GRACE_SECONDS after a start or an outage of the database: who
    holds a task could not touch it meanwhile, and does so now.
    """
    rescue_at = time.monotonic() + GRACE_SECONDS
    page = 0
    while not stop.wait(HOUSEKEEPING_SECONDS):
        try:
            moved = pool.transaction(database.release_due)
            if time.monotonic() >= rescue_at:
                rescued = pool.transaction(database.rescue_lost)
                if rescued:
                    log.warning("rescued %d tasks that were sent and lost", rescued)
                moved += rescued
                rescue_at = time.monotonic() + broker.SENT_TIMEOUT_SECONDS / 20
            if moved:
                wake.set()
            if RETENTION_DAYS:
                work = functools.partial(database.sweep, page=page, days=RETENTION_DAYS)
                page = pool.transaction(work)
        except database.Unavailable as error:
            log.debug("housekeeping waits for the database: %s", error)
            rescue_at = time.monotonic() + GRACE_SECONDS
        except Exception:  # the top of a loop: nothing else would release or rescue
            log.exception("housekeeping failed, next try in %s s", HOUSEKEEPING_SECONDS)
