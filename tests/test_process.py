"""What every script does alike: the back-off and the log of an outage, without a server."""

import logging

import pytest

import process

pytestmark = pytest.mark.pure


def test_an_outage_is_a_warning_at_first_and_then_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [1000.0]
    monkeypatch.setattr(process.time, "monotonic", lambda: now[0])
    backoff = process.Backoff(logging.getLogger("outage"), "lost it")
    with caplog.at_level(logging.INFO, "outage"):
        for _ in range(150):  # seconds
            backoff.failed("why")
            now[0] += 1
        backoff.succeeded()
        backoff.succeeded()
        backoff.failed("again")
    assert [record.levelname for record in caplog.records] == [
        "WARNING", "WARNING", "WARNING", "INFO", "WARNING",
    ]  # fmt: skip


def test_pauses_double_up_to_a_limit_and_differ() -> None:
    backoffs = [process.Backoff(logging.getLogger("quiet"), "x") for _ in range(20)]
    for tries in range(12):
        delays = {backoff.failed("why") for backoff in backoffs}
        least = min(process.FIRST_DELAY_SECONDS * 2**tries, process.LAST_DELAY_SECONDS)
        assert all(least / 2 <= delay <= least for delay in delays)
        assert len(delays) > 10


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (ValueError("two\nlines\x1b[31m"), "two\\nlines\\x1b[31m"),
        (ValueError("ошибка"), "ошибка"),
        (ValueError(), "ValueError"),
        ("x" * 300, "x" * 200 + "…"),
        (b"\xff", "b'\\xff'"),
    ],
)
def test_what_is_logged_is_one_line_escaped_and_cut(value: object, shown: str) -> None:
    assert process.printable(value) == shown
