"""How the dispatcher claims tasks: a random sample of all that waits, or some by their ids. Only
the producer imports this, and every function runs in the transaction of the cursor it gets."""

import math
import random
from typing import Any, NamedTuple

import pool
import process
import task
from database import SENT

ARCS = 16  # of a claim: enough that one batch is spread evenly, and no slower than one
LEASE_OF_A_MESSAGE = {"seconds": process.SENT_TIMEOUT_SECONDS, "nobody": task.NOBODY}

# What a claim of either kind does with its candidates, in the order of their turns. It bounds a
# batch by bytes too: a task may hold a megabyte.
SEND_CANDIDATES = f"""
measured AS (
    SELECT
        id,
        row_number() OVER in_turn AS position,
        sum(bytes) OVER in_turn - bytes AS bytes_before
    FROM candidate
    WINDOW in_turn AS (ORDER BY turn, id)
)
UPDATE tasks
SET status = 'sent',
    sent_at = now(),
    holder = CASE WHEN holder IS NOT NULL THEN %(nobody)s::uuid END,
    lease_until = now() + make_interval(secs => %(seconds)s::float8)
FROM measured
WHERE tasks.id = measured.id AND position <= %(limit)s::bigint AND bytes_before < %(bytes)s::bigint
RETURNING
    tasks.id,
    tasks.text,
    tasks.attempt,
    {SENT},
    timeout_seconds,
    holder IS NOT NULL OR starts > 0
"""

NOT_PAUSED = "NOT EXISTS (SELECT FROM pause)"

# A sample of all that waits, in one trip: of each arc of the ring of picks the first rows upward.
# The arcs take turns, so that a cut by rows or bytes favours none. Rows locked elsewhere are
# skipped, so that several dispatchers share the work and none waits.
CLAIM_RANDOM_TASKS = f"""
WITH found AS MATERIALIZED (
    SELECT waiting.*
    FROM unnest(%(lows)s::float8[], %(highs)s::float8[]) AS arc (low, high),
        LATERAL (
            SELECT id, octet_length(text) AS bytes, pick + (pick < %(first)s)::int AS place
            FROM tasks
            WHERE status = 'pending' AND NOT delayed AND pick >= arc.low AND pick < arc.high
                AND {NOT_PAUSED}
            ORDER BY pick
            LIMIT %(share)s
            FOR UPDATE SKIP LOCKED
        ) AS waiting
), candidate AS (
    SELECT id, bytes, row_number() OVER (
        PARTITION BY floor((place - %(first)s) * %(arcs)s) ORDER BY place
    ) AS turn
    FROM found
), {SEND_CANDIDATES}"""

# IS TRUE hides the condition of tasks_pending, whose dead entries would be walked.
CLAIM_TASKS_BY_ID = pool.Prepared(
    "claim_tasks_by_id",
    f"""
WITH candidate AS MATERIALIZED (
    SELECT id, octet_length(text) AS bytes, 0 AS turn
    FROM tasks
    WHERE id = ANY(%(ids)s::uuid[]) AND (status = 'pending' AND NOT delayed) IS TRUE
        AND {NOT_PAUSED}
    ORDER BY id
    FOR UPDATE SKIP LOCKED
), {SEND_CANDIDATES}""",
)


class Claimed(NamedTuple):
    """A task that a claim has marked as sent, with what goes into its message. suspect: somebody
    has held or started this attempt before."""

    id: str
    text: str
    attempt: int
    sent: int  # microseconds since 1970
    timeout: float | None
    suspect: bool


def claim_random_tasks(cursor: Any, limit: int, size: int, span: float = 1.0) -> list[Claimed]:
    """Mark random pending tasks as sent, at most limit and size bytes (the last may reach over).

    A span below 1 looks at that part of the ring only, in arcs spread over all of it.
    """
    arcs, first = min(ARCS, limit), random.random()
    lows = [(first + index / arcs) % 1 for index in range(arcs)]
    highs = [min(low + span / arcs, 1.0) for low in lows]
    beyond = max(lows) + span / arcs - 1  # the arc that crosses 1 goes on at 0
    bounds = {"first": first, "arcs": arcs, "lows": [*lows, 0.0], "highs": [*highs, beyond]}
    sizes = {"share": math.ceil(limit / arcs), "limit": limit, "bytes": size}
    cursor.execute(CLAIM_RANDOM_TASKS, bounds | sizes | LEASE_OF_A_MESSAGE)
    return [Claimed(*row) for row in cursor]


def claim_tasks_by_id(cursor: Any, ids: list[str], size: int) -> list[Claimed]:
    """Mark those of these tasks that are pending as sent, at most size bytes."""
    sizes = {"ids": pool.array(ids), "limit": len(ids), "bytes": size}
    CLAIM_TASKS_BY_ID.execute(cursor, sizes | LEASE_OF_A_MESSAGE)
    return [Claimed(*row) for row in cursor]
