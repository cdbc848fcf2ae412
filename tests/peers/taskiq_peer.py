"""Taskiq on RabbitMQ by taskiq-aio-pika: a durable classic queue, messages acked after the row.

Two processes with uvloop, 100 tasks at once in each, 10 connections of asyncpg, without pydantic's
look at the arguments (--no-parse). A quorum queue, and 20 connections, were slower."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import taskiq
import taskiq_aio_pika

INSERT = (
    "INSERT INTO peer_rows (number, created_at) VALUES ($1, to_timestamp($2))"
    " ON CONFLICT DO NOTHING"
)

broker = taskiq_aio_pika.AioPikaBroker(os.environ["RABBITMQ_URL"], qos=1000).with_queue(
    taskiq_aio_pika.Queue(
        name="peer.taskiq",
        type=taskiq_aio_pika.QueueType.CLASSIC,
    )
)
POOL = 10


@broker.on_event(taskiq.TaskiqEvents.WORKER_STARTUP)
async def open_pool(state: taskiq.TaskiqState) -> None:
    """Open the worker's connections."""
    state.pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=POOL, max_size=POOL)


@broker.task
async def run(number: int, created: float) -> None:
    """Write the row."""
    await broker.state.pool.execute(INSERT, number, created)


@contextlib.asynccontextmanager
async def sender() -> AsyncIterator[Callable[[list[tuple[int, float]]], Awaitable[None]]]:
    """Publish the tasks at once and wait for the broker's confirms."""

    async def send(tasks: list[tuple[int, float]]) -> None:
        await asyncio.gather(*(run.kiq(*task) for task in tasks))

    await broker.startup()
    yield send
    await broker.shutdown()
