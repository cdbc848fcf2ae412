"""Procrastinate on PostgreSQL alone; its table keeps the ended jobs.

Two processes with uvloop, 10 jobs at once in each, on 10 connections. Each job is fetched by a
statement of its own, one after the other: 4 or 30 at once are no faster.

A worker: `python -m tests.peers.procrastinate_peer`."""

import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable

import procrastinate
import uvloop

CONCURRENCY = 10
app = procrastinate.App(
    connector=procrastinate.PsycopgConnector(
        conninfo=os.environ["DATABASE_URL"], min_size=CONCURRENCY, max_size=CONCURRENCY
    )
)


@app.task(name="run")
async def run(number: int) -> None:
    """Do nothing: the row is the job's own."""


@contextlib.asynccontextmanager
async def sender() -> AsyncIterator[Callable[[list[tuple[int, float]]], Awaitable[None]]]:
    """Make the tables, once; create the jobs in one statement."""

    async def send(tasks: list[tuple[int, float]]) -> None:
        await run.batch_defer_async(*({"number": number} for number, _ in tasks))

    async with app.open_async():
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        yield send


async def work() -> None:
    """Run jobs until a signal."""
    async with app.open_async():
        await app.run_worker_async(concurrency=CONCURRENCY)


if __name__ == "__main__":
    uvloop.run(work())
