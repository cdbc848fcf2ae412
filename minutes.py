"""The table of minutes: what every producer has counted, for charts without Prometheus. Only the
producer imports this, and every function runs inside the transaction of the cursor that it gets."""

import bisect
import collections
import json
from datetime import UTC, datetime
from typing import Any

from metrics import BOUNDS, Minute, no_counts, quantile
from task import as_iso

UPSERT_MINUTES = """
INSERT INTO minutes (minute, producer, created, success, error, waits, runs)
SELECT to_timestamp(60 * minute), %(producer)s::uuid, created, success, error, waits, runs
FROM json_to_recordset(%(rows)s) AS new (
    minute int, created int, success int, error int, waits jsonb, runs jsonb
)
ON CONFLICT (minute, producer) DO UPDATE
SET created = excluded.created,
    success = excluded.success,
    error = excluded.error,
    waits = excluded.waits,
    runs = excluded.runs
"""

SELECT_MINUTES = """
SELECT minute, created, success, error, waits, runs
FROM minutes
WHERE minute > now() - make_interval(mins => %(count)s) AND producer <> %(producer)s::uuid
"""

DELETE_OLD_MINUTES = "DELETE FROM minutes WHERE minute < now() - interval '7 days'"


def write(cursor: Any, producer: str, minutes: dict[int, Minute]) -> None:
    """Write what a producer has counted; the same again changes nothing."""
    rows = [
        {
            "minute": number,
            "created": minute.created,
            "success": minute.success,
            "error": minute.error,
            "waits": by_bound(minute.waits),
            "runs": by_bound(minute.runs),
        }
        for number, minute in minutes.items()
    ]
    cursor.execute(UPSERT_MINUTES, {"producer": producer, "rows": json.dumps(rows)})


def forget(cursor: Any) -> None:
    """Delete minutes older than a week."""
    cursor.execute(DELETE_OLD_MINUTES)


def read(cursor: Any, count: int, but: str) -> dict[int, Minute]:
    """Return what all producers but one have counted in the last minutes, by minutes since 1970."""
    cursor.execute(SELECT_MINUTES, {"count": count, "producer": but})
    minutes: dict[int, Minute] = collections.defaultdict(Minute)
    for time, created, success, error, waits, runs in cursor:
        minute = Minute(created, success, error, by_index(waits), by_index(runs))
        minutes[int(time.timestamp() // 60)].add(minute)
    return minutes


def by_bound(counts: list[int]) -> dict[str, int]:
    """Return counts as a row has them: by their bounds, so that others are understood too."""
    bounds = [*map(str, BOUNDS), "inf"]
    return {bound: count for bound, count in zip(bounds, counts, strict=True) if count}


def by_index(counts: dict[str, int]) -> list[int]:
    """Return the counts of a row as a list."""
    indexed = no_counts()
    for bound, count in counts.items():
        indexed[bisect.bisect_left(BOUNDS, float(bound))] += count
    return indexed


def window(minutes: dict[int, Minute], now: float, count: int) -> dict[str, Any]:
    """Return numbers, rates and quantiles of the last minutes; now in seconds since 1970."""
    last, total = int(now // 60), Minute()
    for number in range(last - count + 1, last + 1):
        if number in minutes:
            total.add(minutes[number])
    seconds = 60 * (count - 1) + max(now % 60, 1)  # the last minute is not over
    sums = {"created": total.created, "success": total.success, "error": total.error}
    return {
        **sums,
        **{f"{name}Rate": round(value / seconds, 3) for name, value in sums.items()},
        "wait": {f"p{share}": quantile(total.waits, share / 100) for share in (50, 95)},
        "run": {f"p{share}": quantile(total.runs, share / 100) for share in (50, 95)},
    }


def chart(minutes: dict[int, Minute], now: float, count: int) -> list[dict[str, Any]]:
    """Return the last minutes one by one, the oldest first."""
    last = int(now // 60)
    return [
        {
            "minute": as_iso(datetime.fromtimestamp(60 * number, UTC)),
            "created": minute.created,
            "success": minute.success,
            "error": minute.error,
            "waitP95": quantile(minute.waits, 0.95),
            "runP95": quantile(minute.runs, 0.95),
        }
        for number in range(last - count + 1, last + 1)
        for minute in [minutes.get(number, Minute())]
    ]
