"""What is written without a look at the row is what judge() would have made of it."""

import contextlib
import itertools
from typing import Any

import psycopg2
import pytest

import database
import plain_reports
import pool
import rules
from native import servers
from plain_reports import ERROR, FAILURE, SUCCESS
from task import NOBODY, TIMED_OUT, Report
from tests.stack import Stack

HERE, THERE = "11111111-0000-0000-0000-000000000000", "22222222-0000-0000-0000-000000000000"
SENT = 1_700_000_000_123_457  # microseconds
FULL = [{"attempt": number} for number in range(20)]

INSERT = """
INSERT INTO tasks
    (id, text, status, attempt, sent_at, holder, lease_until, failures, error, history, seconds)
SELECT gen_random_uuid(), 'x', %s::task_status, %s, to_timestamp(%s / 1e6), %s::uuid,
    now() + make_interval(secs => %s), %s, %s, %s::jsonb, 7
FROM generate_series(1, 2)
RETURNING id
"""
SELECT = """
SELECT id, status, attempt, failures, starts, start_token, delayed, result, error, sent_at, holder,
    host, started_at, seconds, finished_at IS NULL,
    round(date_part('epoch', lease_until - now()) / 100),
    (SELECT jsonb_agg(element - 'at') FROM jsonb_array_elements(history) AS element)
FROM tasks
"""

ROWS = list(
    itertools.product(
        ("pending", "sent", "error", "success"),
        (1, 2),
        (None, SENT, SENT + 1),
        (None, HERE, THERE, NOBODY),
        (None, -5, 700, 3600),  # seconds of the lease
        (0, 2),
        ((None, None), ("KeyError: 'x'", "[]"), (f"{TIMED_OUT}5 s", str(FULL).replace("'", '"'))),
    )
)
RUN = {"started_at": 1.7e9, "seconds": 0.25, "host": "h"}
TEXT = {"holder": HERE, "error": 'a "quoted" \\ text', **RUN}
LETTER = {"status": "error", "reason": "rejected", "host": "of the watcher"}
REPORTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "success": (SUCCESS, {"status": "success", "result": "r", "sent": SENT, **RUN}),
    "success of 1.1": (SUCCESS, {"status": "success"}),
    "text": (ERROR, {"sent": SENT, **TEXT}),
    "text of no run": (ERROR, {"sent": SENT, "error": "why"}),
    "text of 1.1": (None, TEXT),
    "empty text": (None, {"sent": SENT, **TEXT, "error": ""}),
    "text of a start": (None, {"sent": SENT, **TEXT, "started": "token"}),
    "text of a release": (None, {"sent": SENT, **TEXT, "release": 0.0}),
    "failure": (FAILURE, {"sent": SENT, **LETTER}),
    "failure of 1.1": (None, LETTER),
    "failure with a text": (None, {"sent": SENT, **LETTER, "error": "why"}),
    "expired": (None, {"sent": SENT, **LETTER, "reason": "expired"}),
    "error of the holder": (None, {"sent": SENT, **TEXT, "status": "error"}),
}


@pytest.mark.parametrize("attempts", [1, 3])
@pytest.mark.parametrize("name", REPORTS)
def test_what_is_written_unseen_is_what_the_rules_say(
    name: str, attempts: int, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "MAX_ATTEMPTS", attempts)
    monkeypatch.setitem(plain_reports.BOUNDS, "last_failure", attempts - 1)
    kind, fields = REPORTS[name]
    stack.sql((servers.HERE / "schema.sql").read_text())
    url = stack.database_url
    options = {"options": pool.SERVER_OPTIONS, "connection_factory": pool.Connection}
    with contextlib.closing(psycopg2.connect(url, **options)) as session:
        cursor = session.cursor()
        pairs: list[tuple[str, str]] = []
        for *values, (error, history) in ROWS:
            cursor.execute(INSERT, [*values, error, history])
            (unseen,), (judged,) = cursor
            pairs.append((unseen, judged))
        session.commit()
        reports = {id_: Report(id_, attempt=1, **fields) for pair in pairs for id_ in pair}
        plain = plain_reports.by_kind([reports[unseen] for unseen, _ in pairs])
        assert list(plain) == [kind] * (kind is not None)
        written = {
            row.id: row for each in plain for row in plain_reports.write(cursor, each, plain[each])
        }
        session.commit()
        assert 0 < len(written) < len(pairs) if kind else not written
        rest = [report for id_, report in reports.items() if id_ not in written]
        verdicts = {
            report.id: verdict
            for report, verdict in zip(rest, database.apply_reports(cursor, rest)[0], strict=True)
        }
        session.commit()
        cursor.execute(SELECT)
        after = {id_: values for id_, *values in cursor}
    for row, (unseen, judged) in zip(ROWS, pairs, strict=True):
        assert verdicts.get(unseen, rules.ACCEPTED) == verdicts[judged], row
        assert after[unseen] == after[judged], row
        if unseen in written:
            assert after[unseen][0] == kind.status
            timed_out = kind is FAILURE and str(row[-1][0]).startswith(TIMED_OUT)
            assert written[unseen].timed_out == timed_out
            assert written[unseen].seconds == (None if kind is FAILURE else reports[unseen].seconds)


def test_two_reports_about_one_task_are_judged_in_their_order() -> None:
    first, second = Report(HERE, error="why", attempt=1, sent=1), Report(HERE, "success", attempt=1)
    assert plain_reports.by_kind([first, second, Report(THERE, "success", attempt=1)]) == {}
    other = Report(THERE, "success", attempt=2**31)  # no row has this
    assert plain_reports.by_kind([first, other]) == {ERROR: [first]}
