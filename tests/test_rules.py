"""The transitions of the design, one by one, without a server."""

import pytest

import rules
import task as forms
from rules import ACCEPTED, ALONE, Row
from task import NOBODY, Report

pytestmark = pytest.mark.pure

HERE, THERE = "11111111-0000-0000-0000-000000000000", "22222222-0000-0000-0000-000000000000"


def row(status: str, **fields: object) -> Row:
    """Return a row as LOCK_TASKS reads it."""
    values = {"attempt": 1, "failures": 0, "starts": 0, "start_token": None, "delayed": False}
    return Row("id", status, **(values | {"sent": 7, "holder": None, "lease": 60.0} | fields))


def ask(token: str, **fields: object) -> Report:
    """Return what a consumer asks about a suspect."""
    return Report("id", attempt=1, started=token, **({"sent": 7, "holder": HERE} | fields))


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
        task = row(before, holder=THERE)
        verdict = rules.judge(task, Report("id", asked, attempt=attempt))
        assert verdict.code == (409 if after is None else 200)
        assert task.status == (after or before)
        assert task.changed == (after not in (None, before))
        assert (task.holder is None) == task.changed  # nobody holds what has ended or waits


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
        assert rules.judge(task, report) == ACCEPTED
        assert task.attempt == attempt, report


def test_a_failed_attempt_is_retried_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_ATTEMPTS", 20)
    task = row("sent")
    delays = []
    for attempt in range(1, 20):
        task.status = "sent"
        assert rules.judge(task, Report("id", "error", attempt=attempt, error="why")) == ACCEPTED
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
    assert rules.judge(task, ask("a")) == ACCEPTED
    assert rules.judge(task, ask("a")) == ACCEPTED  # its answer was lost
    assert (task.starts, task.holder, task.lease) == (1, HERE, 120)
    assert rules.judge(task, ask("b")) == ALONE
    assert task.starts == 2
    verdict = rules.judge(task, ask("c", error="SIGSEGV"))
    assert verdict.reason == task.error == "killed its worker 3 times, the last time by SIGSEGV"
    assert (task.status, task.starts) == ("error", 3)


def test_whose_turn_to_run_alone_is_not_free_is_released_uncounted() -> None:
    task = row("sent", starts=1, start_token="a")
    verdict = rules.judge(task, ask("b", alone=False))
    assert (verdict.code, task.status, task.starts, task.attempt) == (409, "pending", 1, 1)
    assert (task.delayed, task.delay) == (True, rules.ALONE_SECONDS)
    fresh = row("sent")
    assert rules.judge(fresh, ask("a", alone=False)) == ACCEPTED


def test_what_another_consumer_holds_does_not_start_here() -> None:
    for report in (ask("a"), Report("id", attempt=1, sent=7), ask("a", release=0.0)):
        task = row("sent", holder=THERE)
        assert rules.judge(task, report).reason.startswith("held")
        assert not task.changed
    for holder, lease in ((THERE, -1.0), (NOBODY, 60.0), (HERE, 60.0)):
        task = row("sent", holder=holder, lease=lease)
        assert rules.judge(task, ask("a")) == ACCEPTED
        assert task.holder == HERE


def test_a_failure_or_death_elsewhere_takes_no_row_from_its_holder() -> None:
    for report in (
        ask("a", error="SIGSEGV"),
        Report("id", "error", attempt=1, sent=7, holder=HERE, error="timed out"),
    ):
        task = row("sent", holder=THERE, starts=1)
        assert rules.judge(task, report).reason.startswith("held")
        assert not task.changed
    ours = row("sent", holder=HERE)
    rules.judge(ours, Report("id", "error", attempt=1, sent=6, holder=HERE, error="why"))
    assert (ours.status, ours.error) == ("error", "why")


def test_a_release_counts_no_start_and_keeps_the_attempt() -> None:
    task = row("sent")
    rules.judge(task, ask("a"))
    assert rules.judge(task, ask("a", release=0.0)) == ACCEPTED
    assert (task.status, task.attempt, task.starts) == ("pending", 1, 0)
    assert (task.holder, task.delayed) == (None, False)
    unheld = row("sent")
    assert rules.judge(unheld, Report("id", attempt=1, sent=7, release=0.0)) == ACCEPTED
    assert unheld.status == "pending"


def test_an_older_copy_changes_nothing() -> None:
    for report in (
        ask("a", sent=6),
        Report("id", attempt=1, sent=6),
        Report("id", attempt=1, sent=6, release=0.0),
        Report("id", "error", attempt=1, sent=6, reason="rejected"),
        Report("id", "error", attempt=1, sent=6, reason="expired"),
    ):
        task = row("sent")
        assert rules.judge(task, report).reason.startswith("stale")
        assert not task.changed


def test_an_expired_message_is_sent_again_unless_somebody_holds_its_task() -> None:
    expired = Report("id", "error", attempt=1, sent=7, reason="expired")
    lost, held = row("sent"), row("sent", holder=HERE)
    assert rules.judge(lost, expired) == ACCEPTED
    assert (lost.status, lost.attempt, lost.failures) == ("pending", 1, 0)
    assert rules.judge(held, expired) == ACCEPTED and held.status == "sent"
    suspect = row("sent", holder=NOBODY)
    assert rules.judge(suspect, expired) == ACCEPTED
    assert (suspect.status, suspect.holder) == ("pending", NOBODY)
    of_1_1 = Report("id", "error", attempt=1, reason="expired")
    for lease, status in ((0.9, "sent"), (0.5, "pending"), (None, "pending")):
        task = row("sent", lease=lease and lease * rules.process.SENT_TIMEOUT_SECONDS)
        assert rules.judge(task, of_1_1) == ACCEPTED and task.status == status


def test_a_failure_of_a_message_of_1_1_counts_once() -> None:
    task = row("sent")
    letter = Report("id", "error", attempt=1, reason="rejected")
    assert rules.judge(task, Report("id", attempt=1, error="why")) == ACCEPTED
    assert rules.judge(task, letter) == rules.judge(task, letter) == ACCEPTED
    assert (task.status, task.failures, task.error) == ("error", 1, "why")


def test_nothing_starts_of_an_ended_task() -> None:
    for status in ("success", "error"):
        for report in (Report("id", attempt=1), ask("a"), ask("a", release=0.0)):
            assert rules.judge(row(status), report).reason.startswith("finished")


@pytest.mark.parametrize(
    "element",
    [
        None, 5, [], {}, {"taskId": 5}, {"taskId": "x" * 36},
        {"taskId": "0" * 8 + "-0000-0000-0000-" + "0" * 12},
        *({"taskId": NOBODY, "attempt": 1} | wrong for wrong in (
            {"attempt": True}, {"attempt": "1"}, {"result": 5}, {"error": "\ud800"},
            {"error": "x" * 65537}, {"taskStatus": ["success"]}, {"sent": "1"}, {"sent": True},
            {"alone": 1}, {"release": -1}, {"release": float("nan")}, {"holder": "me"},
            {"holder": NOBODY},
        )),
    ],
)  # fmt: skip
def test_a_malformed_report_says_what_was_expected(element: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        forms.parse_report(element)


@pytest.mark.parametrize("value", [0, -1, True, "5", float("nan"), float("inf"), 1e9])
def test_a_malformed_time_limit_says_what_was_expected(value: object) -> None:
    with pytest.raises(ValueError, match="timeoutSeconds: expected"):
        forms.parse_timeout(value)


def test_a_message_comes_back_as_it_was() -> None:
    for message in (
        forms.Message(HERE, "любой\n", 2, 1234567890123456, 2.5),
        forms.Message(HERE, '"\\ \x01\u2028\U0001f600 {}', 3, 0, 1e-07),
        forms.Message(HERE, "of version 1.1", 1),
    ):
        assert forms.parse_message(message.as_body()) == message
