"""What a consumer has in flight, without a broker: what may start, is asked about, or goes back."""

import time

import pytest

import entry as entry_states
import in_flight
import outcomes
import waiting
from entry import Entry
from in_flight import InFlight
from outcomes import Answer
from task import Message, Report

pytestmark = pytest.mark.pure

ME = "11111111-0000-0000-0000-000000000000"


class Subscription:
    """A connection that remembers how its deliveries were settled."""

    def __init__(self) -> None:
        self.connection = self
        self.settled: dict[int, str] = {}

    def add_callback_threadsafe(self, call: object) -> None:
        call()

    def settle(self, tags: dict[int, str]) -> None:
        self.settled |= tags


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that in_flight.py sees, in seconds; tests set it."""
    now = [1000.0]
    monkeypatch.setattr(in_flight.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def broker() -> Subscription:
    """A connection that delivers."""
    return Subscription()


def entry(broker: Subscription, name: str, tag: int, **fields: object) -> Entry:
    """Return a task as it is delivered, sent just now."""
    sent = fields.pop("sent", int(time.time() * 1e6))
    message, now = Message(name, name, 1, sent), in_flight.time.monotonic()
    return Entry(message, 10, fields.get("suspect", False), [(broker, tag)], now)


def flight() -> InFlight:
    """Return an empty one that knows the database's clock."""
    flight = InFlight(ME, 1)
    flight.waiting.skew = 0.0
    return flight


def answered(flight: InFlight, refused: dict | None = None, alone: set = frozenset()) -> list:
    """Have what is to be reported answered; return the reports."""
    group = flight.collect(0.0, float("inf"))
    flight.accept(group, Answer(refused or {}, set(alone), set()))
    return [report for _, report in group]


def names(entries: list[Entry]) -> list[str]:
    return [each.message.id for each in entries]


def test_a_suspect_is_asked_about_for_an_idle_worker_and_is_held(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, "s", 1, suspect=True), entry(broker, "a", 2)])
    assert tasks.take(0, 0) == [] and not tasks.waiting.asking
    assert names(tasks.take(2, 2)) == ["a"]  # beside it, another starts at once
    [report] = answered(tasks)
    assert report.started and report.holder == ME and report.alone is True
    assert broker.settled == {1: entry_states.HELD}
    assert names(tasks.take(1, 1)) == ["s"]


def test_nothing_waits_for_a_suspect_whose_answer_does_not_come(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, "s", 1, suspect=True), entry(broker, "a", 2)])
    assert tasks.take(1, 1) == []
    clock[0] += 2 * waiting.RESERVED_SECONDS
    assert names(tasks.take(1, 1)) == ["a"]


def test_of_two_suspects_one_may_get_the_turn_to_run_alone(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, name, tag, suspect=True) for tag, name in enumerate("abc")])
    tasks.take(2, 2)
    assert [report.alone for report in answered(tasks, alone={0})] == [True, False]
    first = tasks.take(2, 2)[0]
    tasks.take(1, 1)
    assert [report.alone for report in answered(tasks)] == [False]
    tasks.finish([(first, Report("a", "success"))], 1.0)
    assert tasks.alone is None


def test_a_message_that_has_waited_is_asked_about_uncounted(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    old = int((time.time() - 5) * 1e6)
    tasks.admit([entry(broker, name, tag, sent=old) for tag, name in enumerate("ab")])
    assert tasks.take(1, 2) == []
    assert [report.started for report in answered(tasks, refused={0: "finished"})] == [None, None]
    assert broker.settled == {0: entry_states.ACK}
    assert names(tasks.take(1, 2)) == ["b"]


def test_what_was_checked_is_checked_again_when_it_waits_on(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, "a", 1, sent=1)])
    tasks.take(1, 1)
    answered(tasks)
    clock[0] += 2 * waiting.CURRENT_SECONDS
    assert tasks.take(1, 1) == [] and len(tasks.waiting.asking) == 1


def test_a_newer_copy_takes_the_place_of_an_older_one(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, "a", 1, sent=1)])
    tasks.take(1, 1)
    group = tasks.collect(0.0, float("inf"))
    tasks.admit([entry(broker, "a", 2, sent=2)])  # while the older one is asked about
    tasks.admit([entry(broker, "a", 3, sent=1)])
    assert broker.settled == {1: entry_states.ACK, 3: entry_states.ACK}
    tasks.accept(group, Answer({0: "stale"}, set(), set()))
    [report] = answered(tasks)
    assert report.sent == 2
    assert names(tasks.take(1, 1)) == ["a"]


@pytest.mark.parametrize("during", [False, True])
def test_a_failure_is_reported_for_a_newer_copy_that_came_before_its_answer(
    during: bool, broker: Subscription
) -> None:
    tasks = flight()
    old, new = entry(broker, "a", 1), entry(broker, "a", 2, sent=int(time.time() * 1e6) + 10)
    tasks.admit([old])
    [fed] = tasks.take(1, 1)
    tasks.finish([(fed, fed.report(error="broken"))], 1.0)
    if during:  # of the PUT, which is refused: the row knows the newer message
        group = tasks.collect(0.0, float("inf"))
        tasks.admit([new])
        tasks.accept(group, Answer({0: "stale"}, set(), set()))
    else:
        tasks.admit([new])
    assert broker.settled == {1: entry_states.ACK}
    [report] = answered(tasks)
    assert report.sent == new.message.sent
    assert broker.settled == {1: entry_states.ACK, 2: entry_states.DEAD_LETTER}
    assert not tasks.entries and tasks.is_quiet()


def test_a_failure_goes_by_its_dead_letter_or_by_the_row_and_counts_once(
    clock: list[float], broker: Subscription
) -> None:
    for held, status, verdict in ((False, None, entry_states.DEAD_LETTER), (True, "error", None)):
        tasks, broker.settled = flight(), {}
        tasks.admit([entry(broker, "a", 1)])
        [task] = tasks.take(1, 1)
        if held:
            tasks.heard([("a", 1)], [], 0.0)
            assert broker.settled == {1: entry_states.HELD}
            broker.settled = {}
        tasks.finish([(task, task.report(error="why"))], 1.0)
        tasks.heard([("a", 1)], [], 0.0)  # a late answer is ignored
        [report] = answered(tasks)
        assert (report.status, report.error) == (status, "why")
        assert broker.settled.get(1) == verdict


def test_what_a_worker_has_not_begun_comes_back_in_order(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, name, tag) for tag, name in enumerate("abcd")])
    fed = tasks.take(1, 3)
    tasks.give_back(fed[1:])
    assert names(tasks.take(1, 4)) == ["b", "c", "d"]


def test_a_task_that_is_stopped_is_dropped_wherever_it_is(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, name, tag) for tag, name in enumerate("abc")])
    running, ahead = tasks.take(1, 2)
    tasks.heard([], [(name, 1) for name in "abc"], 0.0)
    assert broker.settled == {2: entry_states.ACK}  # it waited
    assert tasks.take_stops() == [running, ahead]
    tasks.give_back([ahead])
    tasks.died(running, "SIGTERM")
    assert broker.settled == dict.fromkeys(range(3), entry_states.ACK)
    assert tasks.entries == {} and tasks.is_quiet()


def test_a_stop_releases_what_runs_and_what_was_allowed(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, "s", 1, suspect=True), entry(broker, "a", 2)])
    [running] = tasks.take(2, 2)
    [asked] = answered(tasks)
    tasks.stop()
    tasks.died(running, "SIGKILL")
    reports = {report.id: report for report in answered(tasks)}
    assert {name: report.release for name, report in reports.items()} == {"s": 0.0, "a": 0.0}
    assert reports["s"].started == asked.started
    assert broker.settled == {1: entry_states.HELD, 2: entry_states.ACK}
    assert tasks.is_quiet()


def test_what_waits_behind_long_tasks_goes_back(clock: list[float], broker: Subscription) -> None:
    tasks = flight()
    tasks.admit([entry(broker, "a", 1), entry(broker, "b", 2)])
    tasks.take(1, 1)
    clock[0] += 1.5 * in_flight.STUCK_SECONDS
    tasks.admit([entry(broker, "c", 3)])
    assert names(tasks.take_stuck()) == ["b"]


def test_a_lost_connection_takes_along_what_has_not_begun(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, name, tag) for tag, name in enumerate("ab")])
    [running] = tasks.take(1, 1)
    tasks.forget(broker)
    assert list(tasks.entries.values()) == [running]
    tasks.finish([(running, running.report(error="why"))], 1.0)
    [report] = answered(tasks)
    assert report.status == "error"  # there is no message to make a dead letter of


def test_a_suspect_that_was_allowed_waits_for_no_long_task(
    clock: list[float], broker: Subscription
) -> None:
    """Its message is acked: it is released, and the start is not counted."""
    tasks = flight()
    tasks.admit([entry(broker, "s", 1, suspect=True)])
    tasks.take(1, 1)
    [asked] = answered(tasks, alone={0})
    clock[0] += 1.5 * in_flight.STUCK_SECONDS
    assert tasks.take_stuck() == []
    [report] = answered(tasks)
    assert (report.release, report.started) == (0.0, asked.started)
    assert tasks.alone is None and tasks.is_quiet()


def test_a_held_task_whose_worker_died_is_released_and_never_dropped(
    clock: list[float], broker: Subscription
) -> None:
    for act in (InFlight.stop, InFlight.take_stuck):
        tasks = flight()
        tasks.admit([entry(broker, "a", 1)])
        [running] = tasks.take(1, 1)
        tasks.heard([("a", 1)], [], 0.0)
        tasks.died(running, "SIGSEGV")
        clock[0] += 1.5 * in_flight.STUCK_SECONDS
        act(tasks)
        [report] = answered(tasks)
        assert (report.release, report.started) == (0.0, None)  # the death stays counted
        assert tasks.is_quiet()


def test_a_newer_copy_that_is_a_suspect_makes_the_task_one(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, "a", 1, sent=1)])
    tasks.admit([entry(broker, "a", 2, sent=2, suspect=True)])
    assert tasks.take(1, 1) == []
    assert answered(tasks)[0].started
    asked = flight()
    asked.admit([entry(broker, "b", 3, sent=1)])
    asked.take(1, 1)  # asked about as a fresh one
    group = asked.collect(0.0, float("inf"))
    asked.admit([entry(broker, "b", 4, sent=2, suspect=True)])
    asked.accept(group, Answer({}, set(), set()))
    assert answered(asked)[0].started  # and again as a suspect


def test_a_locked_row_puts_off_its_own_report_only(
    clock: list[float], broker: Subscription
) -> None:
    tasks = flight()
    tasks.admit([entry(broker, name, tag) for tag, name in enumerate("ab")])
    first, second = tasks.take(2, 2)
    ended = [(first, Report("a", "success")), (second, Report("b", "success"))]
    tasks.finish(ended, 1.0)
    tasks.accept(tasks.collect(0.0, float("inf")), Answer({}, set(), {0}))
    assert broker.settled == {1: entry_states.ACK} and not tasks.is_quiet()
    clock[0] += 2 * outcomes.LOCKED_SECONDS
    assert [report.id for report in answered(tasks)] == ["a"]
    assert tasks.is_quiet()


def test_the_heartbeat_names_held_tasks_first_and_no_more_than_it_may(
    clock: list[float], broker: Subscription, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_flight, "MAX_NAMED", 2)
    tasks = flight()
    tasks.admit([entry(broker, name, tag) for tag, name in enumerate("abcd")])
    taken = tasks.take(4, 4)
    clock[0] += 2 * in_flight.NAMED_SECONDS
    taken[3].started = clock[0] + 1  # by the pool's thread, a moment later
    tasks.heard([("d", 1)], [], 0.0)
    named = tasks.named()
    assert [each["taskId"] for each in named] == ["d", "a"]
    assert named[0]["seconds"] == 0
