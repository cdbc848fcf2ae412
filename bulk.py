"""Retry and cancel of many tasks at once, in chunks with a transaction each. Nothing changes that
the caller did not mean: a row counts as it is when it is locked."""

import functools
import logging
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

import database
import pool
import process
import task
import task_list
from rules import Row
from task import Report

log = logging.getLogger("bulk")

CHUNK = 1000
COUNTED = 20_000  # of a chunk that is only counted
MAX_SECONDS = 10
EXPECTED = '{"taskIds": [...]} or {"status", "error", "before"}, not empty'
FIELDS = ("taskIds", "status", "error", "before", "dryRun", "cursor")

# By id alone: stale statistics could make another index look better. What is told is of the version
# that is locked; what somebody else has locked is left out.
SELECT_MEANT = """
SELECT id,
    ({condition})
        AND (%(error)s IS NULL
            OR left(error, char_length(%(error)s)) IS NOT DISTINCT FROM %(error)s)
        AND {time} < %(to)s
FROM tasks
WHERE id = ANY(%(ids)s::uuid[])
ORDER BY id
"""
FOR_UPDATE = "FOR UPDATE SKIP LOCKED"


class Action(NamedTuple):
    """What is done to many tasks: the status that they get, and those that they may have."""

    name: str
    status: str
    views: tuple[str, ...]


RETRY = Action("retry-tasks", "pending", ("error",))
CANCEL = Action("cancel-tasks", "error", ("pending", "delayed", "sent"))


class Request(NamedTuple):
    """What is still to be done: tasks by id, or by one filter after another from a place on."""

    ids: list[str]
    filters: list[task_list.Filter]
    place: task_list.Place | None
    dry_run: bool

    def cursor(self, action: Action, last_id: str) -> str:
        """Return where the next call goes on."""
        if self.ids:
            return last_id
        filter_ = self.filters[0]
        place = self.place or task_list.beginning(filter_, True)
        return task_list.encode(filter_, place, action.name)


class Answer(NamedTuple):
    """How many tasks were meant, how many of them changed, and where to go on if the time is up."""

    matched: int
    changed: int
    next: str | None


def parse(body: Any, action: Action, now: datetime) -> Request:
    """Return the request in a JSON object; raise ValueError saying what was expected. What ends, or
    is created, from now on is not meant."""
    if not isinstance(body, dict):
        raise ValueError(f"expected {EXPECTED}, got {task.shorten(body)}")
    if unknown := body.keys() - set(FIELDS):
        raise ValueError(f"expected only {', '.join(FIELDS)}, got {task.shorten(min(unknown))}")
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("error") == "":  # every error begins with that
        raise ValueError("error: expected at least one character")
    dry_run = task.parse_flag(given.get("dryRun", False), "dryRun")
    is_filter = bool(given.keys() & {"status", "error", "before"})
    if "taskIds" in given:
        if is_filter:
            raise ValueError(f"expected {EXPECTED}, got both")
        ids = parse_ids(given["taskIds"])
        if "cursor" in given:
            last = task.parse_uuid(given["cursor"], "cursor")
            ids = [each for each in ids if each > last]
        return Request(ids, [], None, dry_run)
    if not is_filter and "cursor" not in given:
        raise ValueError(f"expected {EXPECTED}")
    words = [given["status"]] if "status" in given else action.views
    before = task.parse_time(given.get("before"), "before") or now
    fields = [{"status": word, "error": given.get("error")} for word in words]
    filters = [task_list.parse_filter(each, action.views) for each in fields]
    if "cursor" in given:  # which holds the filter
        return Request([], *parse_cursor(given, action), dry_run)
    return Request([], [each._replace(to=min(before, now)) for each in filters], None, dry_run)


def parse_ids(value: Any) -> list[str]:
    """Return ids in order, each once."""
    if not isinstance(value, list) or not 1 <= len(value) <= task.MAX_NAMED:
        raise ValueError(f"taskIds: expected 1 to {task.MAX_NAMED} ids, got {task.shorten(value)}")
    return sorted({task.parse_uuid(each, "taskIds") for each in value})


def parse_cursor(
    fields: dict[str, Any], action: Action
) -> tuple[list[task_list.Filter], task_list.Place]:
    """Return the filters that are left, and where to go on in the first. What else is given has to
    be what the cursor was made with."""
    filter_, place = task_list.decode(fields["cursor"], action.name)
    before = task.parse_time(fields.get("before"), "before") or filter_.to
    given = task_list.parse_filter({"status": filter_.status} | fields, action.views)
    if given[:2] != (filter_.status, filter_.error if "error" in fields else None):
        raise ValueError("cursor: expected status and error as in the call that it is from")
    if before < filter_.to:
        raise ValueError("cursor: expected before as in the call that it is from")
    rest = action.views[action.views.index(filter_.status) + 1 :]
    others = () if "status" in fields else rest
    return [filter_, *(filter_._replace(status=each) for each in others)], place


def run(
    request: Request,
    action: Action,
    connections: pool.Pool,
    on_changed: Callable[[list[Row]], None],
) -> Answer:
    """Change what is meant, or only count it, for MAX_SECONDS at most. on_changed gets the rows of
    each chunk. Raise Unavailable if nothing could be done."""
    deadline = time.monotonic() + MAX_SECONDS
    matched = changed = steps = 0
    last_id = ""
    while request.ids or request.filters:
        if steps and time.monotonic() >= deadline:
            return Answer(matched, changed, request.cursor(action, last_id))
        try:
            work = functools.partial(step, request=request, action=action)
            meant, rows, rest = connections.transaction(work)
        except pool.Unavailable as error:
            if not steps:
                raise
            log.warning("%s stopped half-way: %s", action.name, process.printable(error))
            return Answer(matched, changed, request.cursor(action, last_id))
        on_changed(rows)
        matched, changed, steps = matched + meant, changed + len(rows), steps + 1
        last_id = request.ids[:CHUNK][-1] if request.ids else ""
        request = rest
    return Answer(matched, changed, None)


def step(cursor: Any, request: Request, action: Action) -> tuple[int, list[Row], Request]:
    """Do one chunk; return how many tasks were meant, the rows that changed, and what is left."""
    filter_, place = None, None
    if request.ids:
        ids = request.ids[:CHUNK]
        rest = request._replace(ids=request.ids[CHUNK:])
    else:
        filter_, limit = request.filters[0], COUNTED if request.dry_run else CHUNK
        found, place = task_list.find(cursor, filter_, request.place, limit, forward=True)
        ids = [row[0] for row in found]
        filters = request.filters if place else request.filters[1:]
        rest = request._replace(filters=filters, place=place)
        if request.dry_run:
            return len(ids), [], rest
    meant = ids if filter_ else select_meant(cursor, action, filter_, ids, lock=False)
    if request.dry_run or not meant:
        return len(meant), [], rest
    reports = [
        Report(task_id, action.status)
        for task_id in select_meant(cursor, action, filter_, ids, lock=True)
    ]
    _, rows = database.apply_reports(cursor, reports)
    return len(meant), rows, rest


def select_meant(
    cursor: Any, action: Action, filter_: task_list.Filter | None, ids: list[str], lock: bool
) -> list[str]:
    """Return those of these ids whose rows are as the caller means them."""
    names = action.views if filter_ is None else (filter_.status,)
    views = [task_list.VIEWS[name] for name in names]
    condition = " OR ".join(f"({view.condition})" for view in views)
    time_ = "created_at" if filter_ is None else views[0].time
    statement = SELECT_MEANT.format(condition=condition, time=time_) + FOR_UPDATE * lock
    bounds = {"error": filter_ and filter_.error, "to": filter_.to if filter_ else task_list.LAST}
    cursor.execute(statement, bounds | {"ids": pool.array(ids)})
    return [task_id for task_id, is_meant in cursor if is_meant]
