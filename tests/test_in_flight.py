"""What a consumer has in flight, without a broker: who may start beside whom, what goes back."""

import pytest

import in_flight
from in_flight import Entry, InFlight
from task import Message, Report

pytestmark = pytest.mark.pure


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that in_flight.py sees, in seconds; tests set it."""
    now = [1000.0]
    monkeypatch.setattr(in_flight.time, "monotonic", lambda: now[0])
    return now


def task(name: str, now: float, suspect: bool = False) -> Entry:
    """Return a task as it is delivered."""
    return Entry(Message(name, name, 1), 10, suspect=suspect, since=now)


def start(flight: InFlight, clock: list[float], *names: str) -> list[Entry]:
    """Let these tasks be taken and run."""
    flight.admit([task(name, clock[0]) for name in names])
    return [flight.take() for _ in names]


def test_a_suspect_waits_for_a_quiet_moment_and_runs_alone(clock: list[float]) -> None:
    flight = InFlight()
    [running] = start(flight, clock, "a")
    flight.admit([task("suspect", clock[0], suspect=True), task("b", clock[0])])
    assert flight.next() is None  # its turn comes soon
    flight.finish(running, Report("a", "success"))
    suspect = flight.take()
    assert suspect.message.id == "suspect"
    assert flight.next() is None
    flight.finish(suspect, Report("suspect", "success"))
    assert flight.next().message.id == "b"


def test_fresh_tasks_behind_a_long_suspect_go_back(clock: list[float]) -> None:
    flight = InFlight()
    flight.admit([task("suspect", clock[0], suspect=True), task("b", clock[0])])
    assert flight.take().suspect
    clock[0] += 1.5 * in_flight.STUCK_SECONDS
    assert [each.message.id for each in flight.take_stuck(4, patient=False)] == ["b"]


def test_a_suspect_that_was_handed_back_has_its_turn_next(clock: list[float]) -> None:
    flight = InFlight()
    first, second = start(flight, clock, "a", "b")
    flight.admit([task("suspect", clock[0], suspect=True)])
    clock[0] += 1.5 * in_flight.STUCK_SECONDS
    flight.admit([task("c", clock[0])])
    assert [each.message.id for each in flight.take_stuck(3, patient=False)] == ["suspect"]
    assert flight.next().message.id == "c"  # meanwhile the others go on
    flight.admit([task("suspect", clock[0], suspect=True), task("d", clock[0])])
    clock[0] += 1.5 * in_flight.STUCK_SECONDS
    assert [each.message.id for each in flight.take_stuck(3, patient=False)] == ["d"]
    flight.admit([task("e", clock[0])])
    assert flight.next() is None  # nothing starts before it, however long the others take
    for each in (first, second):
        flight.finish(each, Report(each.message.id, "success"))
    assert flight.take().message.id == "suspect"


def test_with_a_fixed_prefetch_only_what_waits_behind_long_tasks_goes_back(
    clock: list[float],
) -> None:
    flight = InFlight()
    [running] = start(flight, clock, "a")
    flight.admit([task("b", clock[0])])
    clock[0] += 1.5 * in_flight.STUCK_SECONDS
    running.since = clock[0] - 0.1
    assert flight.take_stuck(1, patient=True) == []
    running.since = clock[0] - 1.5 * in_flight.STUCK_SECONDS
    assert [each.message.id for each in flight.take_stuck(1, patient=True)] == ["b"]
