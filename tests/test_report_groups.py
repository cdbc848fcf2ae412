"""Reports that wait for a writer share a transaction; one that cannot be written harms no other."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import pool
from report_groups import GROUP_BYTES, WRITERS, ReportGroups
from rules import Verdict
from task import Report
from tests.stack import until

pytestmark = pytest.mark.pure
CALLS = 10


class Table:
    """Stands for the database: notes each transaction, and ends one for each turn that it gets."""

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.transactions: list[list[str]] = []
        self.groups = ReportGroups(self.work)
        self.executor = ThreadPoolExecutor(WRITERS + CALLS)

    def work(self, reports: list[Report]) -> list[Verdict]:
        ids = [report.id for report in reports]
        self.transactions.append(ids)
        assert self.turns.acquire(timeout=20)
        if "bad" in ids:
            raise ValueError("bad")
        if "away" in ids:
            raise pool.Unavailable("away")
        return [Verdict(200, report.id) for report in reports]

    def call(self, *ids: str, text: str = "") -> object:
        """Report from a thread of its own; return the future verdicts."""
        before = len(self.groups.waiting) + self.groups.writing
        reports = [Report(id_, "success", 1, result=text) for id_ in ids]
        future = self.executor.submit(self.groups.apply, reports)
        until(lambda: len(self.groups.waiting) + self.groups.writing > before)
        return future

    def occupy(self) -> None:
        """Keep every writer busy."""
        for number in range(WRITERS):
            self.call(f"first-{number}")

    def end(self) -> None:
        """End one transaction, and when who waited has begun the next one, all others."""
        self.turns.release()
        until(lambda: len(self.transactions) > WRITERS)
        self.turns.release(100)


def test_what_waits_for_a_writer_is_one_transaction() -> None:
    table = Table()
    table.occupy()
    calls = [table.call(f"{number}-a", f"{number}-b") for number in range(CALLS)]
    table.end()
    for number, call in enumerate(calls):
        assert [each.reason for each in call.result(20)] == [f"{number}-a", f"{number}-b"]
    [together] = table.transactions[WRITERS:]
    assert together == [f"{number}-{half}" for number in range(CALLS) for half in "ab"]
    until(lambda: table.groups.writing == 0)


def test_a_report_that_cannot_be_written_fails_alone() -> None:
    table = Table()
    table.occupy()
    good, bad = table.call("good"), table.call("bad")
    table.end()
    assert [each.reason for each in good.result(20)] == ["good"]
    with pytest.raises(ValueError, match="bad"):
        bad.result(20)
    until(lambda: table.groups.writing == 0)


def test_without_a_database_every_call_of_a_group_says_so() -> None:
    table = Table()
    table.occupy()
    calls = [table.call("good"), table.call("away")]
    table.end()
    for call in calls:
        with pytest.raises(pool.Unavailable):
            call.result(20)


def test_a_group_is_bounded_by_bytes() -> None:
    table = Table()
    table.occupy()
    calls = [table.call(str(number), text="x" * (GROUP_BYTES // 2)) for number in range(3)]
    table.end()
    for call in calls:
        call.result(20)
    assert table.transactions[WRITERS] == ["0", "1"]
    assert sorted(map(len, table.transactions[WRITERS:])) == [1, 2]


def test_who_waits_while_the_database_is_away_is_told_with_the_first() -> None:
    table = Table()
    for _ in range(WRITERS):
        table.call("away")
    call = table.call("good")
    table.turns.release()
    with pytest.raises(pool.Unavailable):
        call.result(20)
    assert table.transactions == [["away"]] * WRITERS
    table.turns.release(100)
    until(lambda: table.groups.writing == 0)
