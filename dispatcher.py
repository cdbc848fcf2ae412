"""The producer's background threads: the dispatcher that feeds random pending tasks to RabbitMQ,
and the housekeeper that releases due tasks, rescues lost ones and deletes old ones."""

import contextlib
import functools
import json
import logging
import random
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
FULL_SECONDS = 0.02
LOOK_SECONDS = 0.25  # how old the queue's length may be while only a few tasks are sent
HOUSEKEEPING_SECONDS = 0.5


class Dispatcher:
    """Claims random pending tasks and feeds them to the broker, in a thread of its own.

    The broker commits first and the database last: whatever fails between the two, the rows are
    pending again and the message, if it is out, is a copy of the same attempt.
    """

    def __init__(self, stop: threading.Event, wake: threading.Event) -> None:
        self.stop = stop
        self.wake = wake  # something may be pending: no need to wait
        self.broker_state = "not connected yet"
        self.turned_at = 0.0  # of time.monotonic(), the last turn without an error
        self.returned = 0  # messages the broker could not route

    def run(self) -> None:
        """Dispatch until stop is set, through every outage of broker and database."""
        name = broker.host_name("producer")
        broker.keep_connected(name, self.stop, self.dispatch, database.UNAVAILABLE, self.tell)

    def tell(self, state: str) -> None:
        """Keep what /readyz says of the broker."""
        self.broker_state = state

    def dispatch(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        """Dispatch batch after batch over one broker and one database connection."""
        channel.tx_select()
        channel.add_on_return_callback(self.count_return)
        with contextlib.closing(database.connect()) as session:
            allowed, looked_at, pivot = 0, 0.0, 0.0
            while not self.stop.is_set():
                self.wake.clear()  # before the claim: a task that comes meanwhile sets it again
                if allowed < BATCH / 2 or time.monotonic() - looked_at > LOOK_SECONDS:
                    looked_at = time.monotonic()
                    allowed = BATCH if broker.count_waiting(channel) < QUEUE_LIMIT else 0
                self.turned_at = time.monotonic()
                if not allowed:
                    self.stop.wait(FULL_SECONDS)
                    continue
                sent = self.send_batch(connection, channel, session, allowed, pivot)
                # The next of a backlog are met at a random place; to take all needs no pivot.
                pivot = random.random() if sent == allowed else 0.0
                allowed -= sent
                if sent == 0:
                    self.wake.wait(IDLE_SECONDS)

    def send_batch(
        self, connection: Any, channel: BlockingChannel, session: Any, limit: int, pivot: float
    ) -> int:
        """Claim, publish and commit one batch; return its size. Any error leaves it pending."""
        began = time.monotonic()
        with session, session.cursor() as cursor:  # COMMIT at the end, ROLLBACK on any exception
            tasks = database.claim_tasks(cursor, limit, BATCH_BYTES, pivot)
            if tasks:
                self.returned = 0
                messages = [message(*task) for task in tasks]
                broker.publish(connection, channel, messages, EXPIRATION_MS)
                channel.tx_commit()
                connection.process_data_events()  # only here does pika call count_return
                if self.returned:
                    raise pika.exceptions.AMQPError(f"{self.returned} messages had no queue")
        if tasks:
            log.info("dispatched %d tasks in %.3f s", len(tasks), time.monotonic() - began)
        return len(tasks)

    def count_return(self, *_: Any) -> None:
        """Note a message that came back; its batch must not be committed."""
        self.returned += 1


def message(task_id: str, text: str, attempt: int) -> tuple[str, bytes]:
    """Return a task as a message's id and body."""
    body = {"id": task_id, "text": text, "attempt": attempt}
    return task_id, json.dumps(body, ensure_ascii=False).encode()


def keep_house(pool: database.Pool, stop: threading.Event, wake: threading.Event) -> None:
    """Release due tasks, rescue lost ones and delete old ones, in small steps until stop is set."""
    rescue_at = 0.0
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
        except Exception:  # the top of a loop: nothing else would release or rescue
            log.exception("housekeeping failed, next try in %s s", HOUSEKEEPING_SECONDS)
