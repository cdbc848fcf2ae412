"""Celery on RabbitMQ: a durable classic queue, messages acked after the row.

Two workers with a pool of 8 threads each, whose commits share an fsync. Weaker were one worker with
two processes (prefork, half as fast), the solo pool, and a quorum queue. No result backend: the
task's own row costs less. Gossip, mingle, heartbeats, remote control and rate limits are off."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import celery

from tests.peers import rows

app = celery.Celery("tests.peers.celery_peer", broker=os.environ["RABBITMQ_URL"])
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue="peer.celery",
    worker_prefetch_multiplier=64,
    worker_disable_rate_limits=True,
    worker_enable_remote_control=False,
    broker_transport_options={"confirm_publish": True},
)


@app.task
def run(number: int, created: float) -> None:
    """Write the row."""
    rows.write(number, created)


@contextlib.asynccontextmanager
async def sender() -> AsyncIterator[Callable[[list[tuple[int, float]]], Awaitable[None]]]:
    """Publish each task and wait for the broker's confirm."""

    async def send(tasks: list[tuple[int, float]]) -> None:
        for task in tasks:
            run.apply_async(task, producer=producer)

    with app.producer_pool.acquire() as producer:
        yield send
