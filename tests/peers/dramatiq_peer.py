"""Dramatiq on RabbitMQ, whose queues it makes classic and durable; it acks after the task.

Two processes of 8 threads, its defaults, and of its middleware only Retries, by which a task that
failed runs again: all six of them made it much slower. 2, 4 or 16 threads, and more messages in
advance, were slower too."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.middleware import Retries

from tests.peers import rows

broker = RabbitmqBroker(
    url=os.environ["RABBITMQ_URL"], confirm_delivery=True, middleware=[Retries()]
)
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name="peer.dramatiq")
def run(number: int, created: float) -> None:
    """Write the row."""
    rows.write(number, created)


@contextlib.asynccontextmanager
async def sender() -> AsyncIterator[Callable[[list[tuple[int, float]]], Awaitable[None]]]:
    """Publish each task and wait for the broker's confirm."""

    async def send(tasks: list[tuple[int, float]]) -> None:
        for task in tasks:
            run.send(*task)

    yield send
