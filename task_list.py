"""Pages of the table: which tasks a filter means, in the order of the index that serves it. Only
the producer imports this, and every function runs in the transaction of the cursor it gets."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import task

MAX_READ = 20_000  # rows in one statement
MAX_CUT = 200  # characters of a text in a list
FIRST, LAST = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)
FIRST_ID, LAST_ID = task.NOBODY, task.NOBODY.replace("0", "f")


class View(NamedTuple):
    """The tasks of one status as they are listed. key: what their index is ordered by; time: what
    from and to bound; ends: the values that come before and after every key."""

    condition: str
    key: str
    time: str
    newest_first: bool
    parse: Callable[[Any], Any]
    ends: tuple[Any, Any]


def parse_key_time(value: Any) -> datetime:
    """Return the time in a cursor; raise ValueError."""
    time_ = task.parse_time(value, "cursor")
    if time_ is None:
        raise ValueError("cursor: expected a time")
    return time_


TIMES = (parse_key_time, (FIRST, LAST))
VIEWS = {
    "pending": View(
        "status = 'pending' AND NOT delayed", "pick", "created_at", False, float, (-1.0, 2.0)
    ),
    "delayed": View("delayed", "run_at", "created_at", False, *TIMES),
    "sent": View(
        "status = 'sent'", "id", "created_at", False, task.parse_uuid, (FIRST_ID, LAST_ID)
    ),
    "success": View("status = 'success'", "finished_at", "finished_at", True, *TIMES),
    "error": View("status = 'error'", "finished_at", "finished_at", True, *TIMES),
}
WORDS = task.WORDS | {"delayed": "delayed", "отложено": "delayed"}

COLUMNS = f"""
    id, left(text, {MAX_CUT}), status, attempt, left(result, {MAX_CUT}), left(error, {MAX_CUT}),
    timeout_seconds, run_at, created_at, sent_at, started_at, finished_at, seconds, host
"""

# The error's prefix by left(), which reads no more of a long text than it needs.
LOOKED_AT = """
    left(error, char_length(%(error)s)) AS start_of_error, {time} AS time_of_status, {columns}
"""
MATCHES = """
    (%(error)s IS NULL OR start_of_error = %(error)s)
    AND time_of_status >= %(from)s AND time_of_status < %(to)s
LIMIT %(limit)s
"""

READ = """
SELECT {columns}, {key} AS key
FROM tasks
WHERE {condition} AND {key} >= %(low)s AND {key} <= %(high)s
    AND ({key}, id) {beyond} (%(key)s, %(id)s::uuid)
ORDER BY {key} {direction}, id {direction}
LIMIT %(most)s
"""


class Filter(NamedTuple):
    """Which tasks are meant: one status, an error that begins with a text, and a half-open range
    of the time that the status has."""

    status: str
    error: str | None = None
    from_: datetime = FIRST
    to: datetime = LAST


class Place(NamedTuple):
    """Where a page ended: the last row's key and id."""

    key: Any
    id: str


def parse_word(value: Any, allowed: tuple[str, ...]) -> str:
    """Return a status of a list; raise ValueError saying what was expected."""
    word = WORDS.get(" ".join(value.split()).lower()) if isinstance(value, str) else None
    if word not in allowed:
        known = ", ".join(allowed)
        raise ValueError(f"status: expected one of {known}, got {task.shorten(value)}")
    assert word is not None
    return word


def parse_filter(fields: dict[str, Any], allowed: tuple[str, ...] = tuple(VIEWS)) -> Filter:
    """Return the filter in a query or body; raise ValueError saying what was expected."""
    error = fields.get("error")
    if error is not None:
        error = task.parse_outcome(error, "error") or None
    bounds = [task.parse_time(fields.get(name), name) for name in ("from", "to")]
    status = parse_word(fields.get("status"), allowed)
    return Filter(status, error, bounds[0] or FIRST, bounds[1] or LAST)


def encode(filter_: Filter, place: Place) -> str:
    """Return a cursor: the filter, and where to go on."""
    times = [None if each in (FIRST, LAST) else each.isoformat() for each in filter_[2:]]
    key = place.key.isoformat() if isinstance(place.key, datetime) else place.key
    fields = [filter_.status, filter_.error, *times, key, place.id]
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")


def decode(cursor: Any) -> tuple[Filter, Place]:
    """Return what encode() has put into a cursor; raise ValueError for anything else."""
    try:
        padded = cursor.encode() + b"=" * (-len(cursor) % 4)
        status, error, from_, to, key, task_id = json.loads(base64.urlsafe_b64decode(padded))
        filter_ = parse_filter({"status": status, "error": error, "from": from_, "to": to})
        place = Place(VIEWS[filter_.status].parse(key), task.parse_uuid(task_id))
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(
            f"cursor: expected the `next` of an earlier answer, got {task.shorten(cursor)}"
        ) from None
    return filter_, place


def statement(view: View, columns: str, forward: bool) -> str:
    """Return the SQL that reads on from a place, at most %(most)s rows."""
    return READ.format(
        columns=columns,
        key=view.key,
        condition=view.condition,
        beyond=">" if forward else "<",
        direction="ASC" if forward else "DESC",
    )


def beginning(filter_: Filter, forward: bool) -> Place:
    """Return the place before the first row, or after the last one."""
    key = VIEWS[filter_.status].ends[not forward]
    return Place(key, FIRST_ID if forward else LAST_ID)


def find(
    cursor: Any,
    filter_: Filter,
    place: Place | None,
    limit: int,
    columns: str = "id",
    forward: bool | None = None,
) -> tuple[list[tuple[Any, ...]], Place | None]:
    """Return the next rows that a filter means, at most limit of them, each with the row's key as
    the last column; and the place to go on from, None at the end. Reads at most MAX_READ rows."""
    view = VIEWS[filter_.status]
    forward = not view.newest_first if forward is None else forward
    bounded = view.key == view.time  # then the index itself begins and ends there
    low, high = (filter_.from_, filter_.to) if bounded else view.ends
    place = place or beginning(filter_, forward)
    arguments = {
        "error": filter_.error, "from": filter_.from_, "to": filter_.to, "low": low, "high": high,
        "key": place.key, "id": place.id, "limit": limit + 1, "most": MAX_READ,
    }  # fmt: skip
    inner = statement(view, LOOKED_AT.format(time=view.time, columns=columns), forward)
    cursor.execute(f"SELECT * FROM ({inner}) AS looked_at WHERE {MATCHES}", arguments)
    rows = [row[2:] for row in cursor]
    if len(rows) > limit:
        rows = rows[:limit]
        return rows, Place(rows[-1][-1], rows[-1][0])
    inner = statement(view, "id", forward)
    cursor.execute(f"SELECT * FROM ({inner}) AS looked_at OFFSET {MAX_READ - 1}", arguments)
    last = cursor.fetchone()
    return rows, None if last is None else Place(last[1], last[0])
