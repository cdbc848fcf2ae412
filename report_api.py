"""The calls that change tasks which are there: reports of consumers and operators, and the
consumers' heartbeat."""

import logging
from typing import Any

import bottle

import api
import database
import leases
import plain_reports
import pool
import process
import rules
import task
from dispatcher import Arrivals
from metrics import Metrics
from report_groups import ReportGroups

log = logging.getLogger("reports")

MAX_ELEMENTS = 10_000  # of an array in one call


class ReportApi:
    """The calls and what they need of the producer."""

    def __init__(self, connections: pool.Pool, arrivals: Arrivals, counted: Metrics) -> None:
        self.connections = connections
        self.arrivals = arrivals
        self.metrics = counted
        self.groups = ReportGroups(self.write)

    def add_routes(self, app: bottle.Bottle) -> None:
        """Serve the calls."""
        app.put("/api/v1/update-task-status", callback=self.update_task_status)
        app.put("/api/v1/consumer-heartbeat", callback=self.consumer_heartbeat)

    def update_task_status(self) -> bytes:
        """Apply a report and answer the task, or an array of reports and answer which were
        refused."""
        body = api.read_update()
        if isinstance(body, list):
            return self.update_many(body)
        try:
            report = task.parse_report(body)
        except ValueError as error:
            api.refuse(400, str(error))
        [verdict] = self.apply([report])
        if verdict.code != 200:
            api.refuse(verdict.code, verdict.reason)
        return api.answer(self.select_task(report.id))

    def select_task(self, task_id: str) -> dict[str, Any]:
        """Return a task with its history, or end the request with a 404."""
        tasks = self.connections.statement(lambda cursor: database.select_tasks(cursor, [task_id]))
        if task_id not in tasks:
            api.refuse(404, f"no task has the id {task_id}")
        return tasks[task_id]

    def update_many(self, elements: list[Any]) -> bytes:
        """Apply each report for itself: one that is wrong is rejected, the others count. Of the
        starts that were asked for, `alone` has those that may run beside no other of their kind.
        With `?skipLocked=true`, `locked` has those that are to be repeated: somebody else holds the
        row."""
        if len(elements) > MAX_ELEMENTS:
            api.refuse(413, f"expected at most {MAX_ELEMENTS} reports, got {len(elements)}")
        reports, reasons = parse_each(elements)
        query = api.read_form(bottle.request.query_string)
        if "host" in query:
            for report in reports.values():
                report.host = report.host or query["host"]
        skip_locked = query.get("skipLocked") == "true"
        verdicts = dict(zip(reports, self.apply(list(reports.values()), skip_locked), strict=True))
        lists: dict[str, list[int]] = {
            name: [index for index, verdict in verdicts.items() if verdict == of]
            for name, of in (("alone", rules.ALONE), ("locked", rules.LOCKED))
        }
        for index, verdict in verdicts.items():
            if verdict.code not in (200, rules.LOCKED.code):
                reasons[index] = verdict.reason
        rejected = [
            {"index": index, "taskId": id_of(elements[index]), "reason": reasons[index]}
            for index in sorted(reasons)
        ]
        updated = len(elements) - len(rejected) - len(lists["locked"])
        counts: dict[str, Any] = {"updated": updated, "rejected": rejected}
        return api.answer(counts | {name: value for name, value in lists.items() if value})

    def apply(self, reports: list[task.Report], skip_locked: bool = False) -> list[rules.Verdict]:
        """Apply reports, each for itself; return their verdicts. With skip_locked, a row that is
        locked for long holds up no other, and other calls' reports may come along."""
        if skip_locked and are_fenced(reports):
            return self.groups.apply(reports)
        return self.write(reports, skip_locked)

    def write(self, reports: list[task.Report], skip_locked: bool = True) -> list[rules.Verdict]:
        """Write what needs no look at its row, and judge the rest."""
        written: set[str] = set()
        is_locked = False  # so much is known
        try:
            for kind, plain in plain_reports.by_kind(reports).items():
                written |= self.write_plain(kind, plain)
        except pool.Unavailable as error:
            is_locked = skip_locked and pool.is_about_a_lock(error)
            if not is_locked:
                raise
        rest = [report for report in reports if report.id not in written]
        try:
            verdicts = iter(self.judge(rest, is_locked))
        except pool.Unavailable as error:
            if is_locked or not (skip_locked and pool.is_about_a_lock(error)):
                raise
            verdicts = iter(self.judge(rest, skip_locked=True))
        return [rules.ACCEPTED if each.id in written else next(verdicts) for each in reports]

    def write_plain(self, kind: plain_reports.Kind, reports: list[task.Report]) -> set[str]:
        """Write reports of a kind by one statement; return the ids of those that it has found."""
        rows = self.connections.statement(lambda cursor: plain_reports.write(cursor, kind, reports))
        self.metrics.note_plain(kind.status, rows)
        return {row.id for row in rows}

    def judge(self, reports: list[task.Report], skip_locked: bool) -> list[rules.Verdict]:
        """Apply reports by the rules, in one transaction; with skip_locked, wait for no row."""
        if not reports:
            return []
        verdicts, changed = self.connections.transaction(
            lambda cursor: database.apply_reports(cursor, reports, skip_locked), are_fenced(reports)
        )
        self.note_changed(changed)
        return verdicts

    def note_changed(self, rows: list[rules.Row]) -> None:
        """Count what has changed, and let the dispatcher know what may be picked."""
        if rows:
            self.metrics.note_changed(rows)
            self.arrivals.add(
                [row.id for row in rows if row.status == "pending" and not row.delayed]
            )

    def consumer_heartbeat(self) -> bytes:
        """Note what a consumer runs; answer what its rows hold for it, and what it is to stop."""
        try:
            heartbeat = leases.parse_heartbeat(api.read_json())
        except ValueError as error:
            api.refuse(400, str(error))
        # The leases first and by themselves: the note must not keep them from being renewed.
        answer = self.connections.statement(
            lambda cursor: leases.answer_heartbeat(cursor, heartbeat)
        )
        try:
            self.connections.statement(lambda cursor: leases.note_consumer(cursor, heartbeat))
        except pool.Unavailable as error:
            log.warning("heartbeat of %s not noted: %s", heartbeat.host, process.printable(error))
        return api.answer(answer)


def parse_each(elements: list[Any]) -> tuple[dict[int, task.Report], dict[int, str]]:
    """Return the reports of an array, and why some elements are none, both by index."""
    reports: dict[int, task.Report] = {}
    reasons: dict[int, str] = {}
    for index, element in enumerate(elements):
        try:
            reports[index] = task.parse_report(element)
        except ValueError as error:
            reasons[index] = str(error)
    return reports, reasons


def are_fenced(reports: list[task.Report]) -> bool:
    """Tell whether reports may be repeated: else a second try after a COMMIT of unknown outcome
    could undo a newer change."""
    return all(report.attempt is not None for report in reports)


def id_of(element: Any) -> str | None:
    """Return what a rejected element called its id, as far as it had one that JSON can carry."""
    value = element.get("taskId") if isinstance(element, dict) else None
    if value is None or (isinstance(value, str) and task.UUID.fullmatch(value)):
        return value
    return task.shorten(value)
