"""The transitions of the design, one by one, without a server."""

import pytest

import task as rules
from task import Report, Row

pytestmark = pytest.mark.pure


def row(status: str, **fields: object) -> Row:
    """Return a row as LOCK_TASKS reads it."""
    values = {"attempt": 1, "failures": 0, "starts": 0, "start_token": None, "delayed": False}
    return Row("id", status, **(values | {"age": 10.0} | fields))


@pytest.mark.parametrize(
    ("before", "asked", "after"),
    [
        ("pending", "success", "success"),
        ("pending", "error", "error"),
        ("pending", "pending", "pending"),
        ("sent", "success", "success"),
        ("sent", "error", "error"),
        ("sent", "pending", "pending"),
        ("error", "pending", "pending"),
        ("error", "success", "success"),
        ("error", "error", "error"),
        ("success", "pending", "pending"),
        ("success", "success", "success"),
        ("success", "error", None),
        ("pending", "sent", None),
        ("sent", "sent", None),
        ("error", "sent", None),
        ("success", "sent", None),
    ],
)
def test_every_transition_of_the_table(before: str, asked: str, after: str | None) -> None:
    for attempt in (None, 1):
        task = row(before)
        refusal = rules.judge(task, Report("id", asked, attempt=attempt))
        assert (task.status if refusal is None else None) == after
        assert refusal is None or refusal.code == 409
        assert task.changed == (after not in (None, before))


def test_what_ends_an_attempt_raises_it() -> None:
    for before, report, attempt in (
        ("error", Report("id", "pending"), 2),
        ("success", Report("id", "pending"), 2),
        ("sent", Report("id", "pending"), 2),
        ("sent", Report("id", "error"), 2),
        ("sent", Report("id", "error", attempt=1, reason="rejected"), 1),
        ("sent", Report("id", "error", attempt=1, reason="maxlen"), 1),
        ("sent", Report("id", "success", attempt=1), 1),
    ):
        task = row(before)
        assert rules.judge(task, report) is None
        assert task.attempt == attempt, report


def test_a_failed_attempt_is_retried_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_ATTEMPTS", 20)
    task = row("sent")
    delays = []
    for attempt in range(1, 20):
        task.status = "sent"
        assert rules.judge(task, Report("id", "error", attempt=attempt, error="why")) is None
        assert (task.status, task.attempt, task.delayed) == ("pending", attempt + 1, True)
        delays.append(task.delay)
    for failures, delay in enumerate(delays, 1):
        least = min(rules.RETRY_SECONDS * 2 ** (failures - 1), rules.MAX_RETRY_SECONDS)
        assert least <= delay <= min(1.25 * least, rules.MAX_RETRY_SECONDS)
    task.status = "sent"
    rules.judge(task, Report("id", "error", attempt=20))
    assert (task.status, task.failures, task.error) == ("error", 20, "why")


def test_the_third_counted_start_fails_the_attempt() -> None:
    task = row("sent")
    assert rules.judge(task, Report("id", attempt=1, started="a")) is None
    assert rules.judge(task, Report("id", attempt=1, started="a")) is None
    assert rules.judge(task, Report("id", attempt=1, started="b")) is None
    assert task.starts == 2 and task.touched
    refusal = rules.judge(task, Report("id", attempt=1, started="c"))
    assert refusal.reason == task.error == "killed its worker 3 times"
    assert task.status == "error"


def test_an_expired_message_of_a_row_touched_since_changes_nothing() -> None:
    report = Report("id", "error", attempt=1, reason="expired")
    fresh, old = row("sent", age=5.0), row("sent", age=1e9)
    assert rules.judge(fresh, report) is None and fresh.status == "sent"
    assert rules.judge(old, report) is None and old.status == "pending"
    assert (old.attempt, old.failures) == (1, 0)
    ahead = row("sent", age=-86400.0)  # the clock was set back a day since
    assert rules.judge(ahead, report) is None and ahead.status == "pending"


def test_a_touch_of_an_ended_task_is_refused() -> None:
    for status in ("success", "error"):
        refusal = rules.judge(row(status), Report("id", attempt=1))
        assert refusal.reason.startswith("finished")


@pytest.mark.parametrize(
    "element",
    [
        None, 5, [], {}, {"taskId": 5}, {"taskId": "x" * 36},
        {"taskId": "0" * 8 + "-0000-0000-0000-" + "0" * 12},
        {"taskId": "00000000-0000-0000-0000-000000000000", "attempt": True},
        {"taskId": "00000000-0000-0000-0000-000000000000", "attempt": "1"},
        {"taskId": "00000000-0000-0000-0000-000000000000", "attempt": 1, "result": 5},
        {"taskId": "00000000-0000-0000-0000-000000000000", "attempt": 1, "error": "\ud800"},
        {"taskId": "00000000-0000-0000-0000-000000000000", "attempt": 1, "error": "x" * 65537},
        {"taskId": "00000000-0000-0000-0000-000000000000", "taskStatus": ["success"]},
    ],
)  # fmt: skip
def test_a_malformed_report_says_what_was_expected(element: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        rules.parse_report(element)
