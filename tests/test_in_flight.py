"""What a consumer has in hand, without a broker: who may start beside whom, and what goes back."""

import pytest

import workers
from workers import Hand, Task


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that workers.py sees, in seconds; tests set it."""
    now = [1000.0]
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    return now


def task(name: str, now: float, suspect: bool = False) -> Task:
    """Return a task as it is delivered."""
    return Task(name, name, 1, 10, suspect=suspect, since=now)


def start(hand: Hand, clock: list[float], *names: str) -> list[Task]:
    """Let these tasks be taken and run."""
    hand.admit([task(name, clock[0]) for name in names])
    return [hand.take() for _ in names]


def test_a_suspect_waits_for_a_quiet_moment_and_runs_alone(clock: list[float]) -> None:
    hand = Hand()
    [running] = start(hand, clock, "a")
    hand.admit([task("suspect", clock[0], suspect=True), task("b", clock[0])])
    assert hand.next() is None  # its turn comes soon
    hand.finish(running, {"taskId": "a", "taskStatus": "success"})
    suspect = hand.take()
    assert suspect.id == "suspect"
    assert hand.next() is None
    hand.finish(suspect, {"taskId": "suspect", "taskStatus": "success"})
    assert hand.next().id == "b"


def test_fresh_tasks_behind_a_long_suspect_go_back(clock: list[float]) -> None:
    hand = Hand()
    hand.admit([task("suspect", clock[0], suspect=True), task("b", clock[0])])
    assert hand.take().suspect
    clock[0] += 1.5 * workers.STUCK_SECONDS
    assert [each.id for each in hand.take_stuck(4, patient=False)] == ["b"]


def test_a_suspect_that_was_handed_back_has_its_turn_next(clock: list[float]) -> None:
    hand = Hand()
    first, second = start(hand, clock, "a", "b")
    hand.admit([task("suspect", clock[0], suspect=True)])
    clock[0] += 1.5 * workers.STUCK_SECONDS
    hand.admit([task("c", clock[0])])
    assert [each.id for each in hand.take_stuck(3, patient=False)] == ["suspect"]
    assert hand.next().id == "c"  # meanwhile the others go on
    hand.admit([task("suspect", clock[0], suspect=True), task("d", clock[0])])
    clock[0] += 1.5 * workers.STUCK_SECONDS
    assert [each.id for each in hand.take_stuck(3, patient=False)] == ["d"]
    hand.admit([task("e", clock[0])])
    assert hand.next() is None  # nothing starts before it, however long the others take
    for each in (first, second):
        hand.finish(each, {"taskId": each.id, "taskStatus": "success"})
    assert hand.take().id == "suspect"


def test_with_a_fixed_prefetch_only_what_waits_behind_long_tasks_goes_back(
    clock: list[float],
) -> None:
    hand = Hand()
    [running] = start(hand, clock, "a")
    hand.admit([task("b", clock[0])])
    clock[0] += 1.5 * workers.STUCK_SECONDS
    running.since = clock[0] - 0.1
    assert hand.take_stuck(1, patient=True) == []
    running.since = clock[0] - 1.5 * workers.STUCK_SECONDS
    assert [each.id for each in hand.take_stuck(1, patient=True)] == ["b"]
