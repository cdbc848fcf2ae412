"""PgQueuer on PostgreSQL alone; its log keeps the ended jobs.

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
    if os.environ.get("PEER_POOL"):
        pool = await asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=4, max_size=4)
        app = pgqueuer.PgQueuer.from_asyncpg_pool(pool)
    else:
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
