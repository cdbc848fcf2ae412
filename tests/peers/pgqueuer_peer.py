"""PgQueuer on PostgreSQL alone; its log keeps the ended jobs, a statement for each batch.

Two processes with uvloop, one connection of asyncpg in each; a pool was no faster. Started by its
API: its command `pgq run` fails with typer 0.29 ('str' object has no attribute 'name').

A worker: `python -m tests.peers.pgqueuer_peer BATCH`."""

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pgqueuer
import uvloop
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries


async def work(batch: int) -> None:
    """Run jobs on one connection, so many at once, until a signal."""
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    app = pgqueuer.PgQueuer.from_asyncpg_connection(connection)

    @app.entrypoint("run")
    async def run(job: pgqueuer.Job) -> None:
        """Do nothing: the row is the job's own."""

    await app.run(batch_size=batch)


@contextlib.asynccontextmanager
async def sender() -> AsyncIterator[Callable[[list[tuple[int, float]]], Awaitable[None]]]:
    """Make the tables, once, all of them logged; create the jobs in one statement."""
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    queries = Queries(AsyncpgDriver(connection))

    async def send(tasks: list[tuple[int, float]]) -> None:
        payloads: list[bytes | None] = [b"%d" % number for number, _ in tasks]
        await queries.enqueue(["run"] * len(tasks), payloads, [0] * len(tasks))

    if not await queries.has_table("pgqueuer"):
        await queries.install()
    yield send
    await connection.close()


if __name__ == "__main__":
    uvloop.run(work(int(sys.argv[1])))
