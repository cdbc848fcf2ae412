"""Dramatiq on RabbitMQ."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.middleware import Retries

from tests.peers import rows

MIDDLEWARE = {"none": [], "retries": [Retries()], "all": None}[os.environ.get("PEER_MW", "retries")]
broker = RabbitmqBroker(
    url=os.environ["RABBITMQ_URL"], confirm_delivery=True, middleware=MIDDLEWARE
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
