"""Celery on RabbitMQ."""

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
    task_default_queue_type=os.environ.get("PEER_QUEUE", "quorum"),
    task_create_missing_queue_type=os.environ.get("PEER_QUEUE", "quorum"),
    worker_prefetch_multiplier=int(os.environ.get("PEER_PREFETCH", "64")),
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
