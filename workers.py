"""What a consumer has in hand: the tasks, the worker threads that run them and the reporter thread
that tells the producer. Only here do threads meet; the broker's I/O thread calls in."""

import collections
import dataclasses
import functools
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pika.exceptions

import broker
import dlq_watcher

log = logging.getLogger("workers")

REPORT_SECONDS = 0.05  # between two reports while there is more to do
TOUCH_SECONDS = broker.SENT_TIMEOUT_SECONDS / 4
STUCK_SECONDS = 2  # unstarted for so long behind a busy worker: somebody else may be idle
URGENT_SECONDS = 5  # so long a suspect may wait for a quiet moment where it is not handed back
MAX_GROUP = 1000  # reports in one PUT
MAX_GROUP_BYTES = 1024 * 1024
MAX_OUTCOME_BYTES = 64 * 1024
MAX_HANDED_BACK = 10_000  # remembered; forgotten all at once, which costs one more hand-back
ACK, DEAD_LETTER, REQUEUE = "ack", "dead-letter", "requeue"


@dataclasses.dataclass(slots=True, eq=False)
class Task:
    """A task in hand; copies of the same attempt share one, so that it runs once in a process."""

    id: str
    text: str
    attempt: int
    size: int
    suspect: bool = False  # held before: its last worker died with it, or only its ack was lost
    urgent: bool = False  # a suspect that was handed back once and must not be again
    deliveries: list[tuple[Any, int]] = dataclasses.field(default_factory=list)
    since: float = dataclasses.field(default_factory=time.monotonic)  # taken, then: started
    token: str = ""  # of a suspect's start; the same start asked twice counts once
    allowed: bool | None = None  # the producer's answer whether it may start

    def is_urgent(self, now: float) -> bool:
        """Tell whether a suspect has waited long enough to hold up the tasks beside it."""
        return self.urgent or now - self.since > URGENT_SECONDS


def storable(value: Any) -> str:
    """Return a result or error text as PostgreSQL can hold it, cut to MAX_OUTCOME_BYTES."""
    try:
        text = str(value)[:MAX_OUTCOME_BYTES].replace("\0", "\N{REPLACEMENT CHARACTER}")
    except Exception as error:  # the user's own __str__
        text = f"{type(value).__name__} without a text: {type(error).__name__}"
    return text.encode("utf-8", "replace")[:MAX_OUTCOME_BYTES].decode("utf-8", "ignore")


class Hand:
    """Everything this process has in hand, shared by the I/O thread, the workers and the reporter.

    A task goes fresh or suspect -> running -> done -> settled; `held` has it all the way.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.work = threading.Condition(self.lock)  # workers wait here
        self.news = threading.Condition(self.lock)  # the reporter waits here
        self.held: dict[tuple[str, int], Task] = {}
        self.fresh: collections.deque[Task] = collections.deque()
        self.suspects: collections.deque[Task] = collections.deque()
        self.running: set[Task] = set()
        self.alone = False  # a suspect is running: nothing may start beside it
        self.starting: Task | None = None  # a suspect whose start waits for the producer's answer
        self.handed_back: set[tuple[str, int]] = set()  # suspects
        self.done: collections.deque[tuple[Task, dict]] = collections.deque()
        self.stopping = False
        self.finished, self.busy_seconds = 0, 0.0  # since the window was last adjusted

    def admit(self, tasks: list[Task]) -> None:
        """Take deliveries in; a copy of what is in hand already joins it."""
        with self.lock:
            for task in tasks:
                known = self.held.setdefault((task.id, task.attempt), task)
                if known is not task:
                    known.deliveries += task.deliveries
                elif task.suspect:
                    task.urgent = (task.id, task.attempt) in self.handed_back
                    self.suspects.append(task)
                else:
                    self.fresh.append(task)
            self.work.notify(len(tasks))

    def take(self) -> Task | None:
        """Wait for a task to start and return it; None when stopping."""
        with self.lock:
            while not self.stopping:
                task = self.next()
                if task is not None:
                    task.since = time.monotonic()
                    self.running.add(task)
                    self.alone = task.suspect
                    return task
                self.work.wait(STUCK_SECONDS)
            return None

    def next(self) -> Task | None:
        """Return what may start now: a suspect only alone, and then nothing beside it.

        Fresh tasks wait for a suspect's turn only while that can come soon; behind a long task the
        suspect goes back to the broker, and they go on. Back a second time, or after a long wait,
        it has its turn next.
        """
        if self.alone:
            return None
        if self.suspects and not self.running:
            return self.suspects.popleft()
        now = time.monotonic()
        soon = all(now - task.since < STUCK_SECONDS for task in self.running)
        if self.suspects and (soon or any(task.is_urgent(now) for task in self.suspects)):
            return None
        return self.fresh.popleft() if self.fresh else None

    def may_start(self, task: Task) -> bool:
        """Ask the producer, through the reporter, whether a suspect may run, and wait."""
        with self.lock:
            task.token = uuid.uuid4().hex
            self.starting = task
            self.news.notify()
            while task.allowed is None and not self.stopping:
                self.work.wait(STUCK_SECONDS)
            self.starting = None
            task.since = time.monotonic()
            if not task.allowed:  # not ours to run: settled by the reporter, or left to the broker
                self.running.discard(task)
                self.alone = False
                self.work.notify_all()
            return bool(task.allowed)

    def finish(self, task: Task, report: dict) -> None:
        """Hand a task's outcome to the reporter, at once if nothing waits behind it."""
        with self.lock:
            self.running.discard(task)
            self.finished += 1
            self.busy_seconds += time.monotonic() - task.since
            self.done.append((task, report))
            if len(self.done) == 1 or not self.fresh:
                self.news.notify()
            if task.suspect:
                self.alone = False
            if task.suspect or self.suspects:
                self.work.notify_all()

    def collect(self, last: float, touch_at: float) -> list[tuple[Task, dict]]:
        """Wait until something is to be reported and return it: outcomes, a start, or touches.

        Outcomes go out when nothing fresh waits or REPORT_SECONDS after the last report: one at a
        time when tasks are slow, hundreds together when they are fast.
        """
        with self.lock:
            while True:
                now = time.monotonic()
                report_at = last + REPORT_SECONDS if self.fresh and not self.stopping else now
                if now >= touch_at:
                    return [(task, self.touch(task)) for task in self.held.values()]
                if self.starting or (self.done and now >= report_at):
                    break
                self.news.wait((min(report_at, touch_at) if self.done else touch_at) - now)
            group, size = [], 0
            for task, report in itertools.islice(self.done, MAX_GROUP):
                size += sum(len(value) for value in report.values() if isinstance(value, str))
                if group and size > MAX_GROUP_BYTES:
                    break
                if "error" in report and not task.deliveries:  # the broker let it expire meanwhile
                    report["taskStatus"] = "error"
                group.append((task, report))
            if self.starting:
                group.append((self.starting, self.touch(self.starting)))
            return group

    def touch(self, task: Task) -> dict:
        """Return the report that keeps a task from being rescued; for a start, that asks for it."""
        report = {"taskId": task.id, "attempt": task.attempt}
        return report | {"started": task.token} if task is self.starting else report

    def accept(self, group: list[tuple[Task, dict]], refusals: dict[int, str]) -> None:
        """Act on the producer's answer to a group: allow starts, and settle what is over."""
        verdicts: list[tuple[Task, str]] = []
        with self.lock:
            for index, (task, report) in enumerate(group):
                refused = index in refusals
                if "taskStatus" in report or "error" in report:
                    self.done.popleft()
                    over = refused or "taskStatus" in report
                    verdicts.append((task, ACK if over else DEAD_LETTER))
                elif task is self.starting:
                    task.allowed = not refused
                    self.starting = None
                    self.work.notify_all()
                    if refused:
                        verdicts.append((task, ACK))
                elif refused and self.withdraw(task):
                    verdicts.append((task, ACK))
            for task, _ in verdicts:
                self.held.pop((task.id, task.attempt), None)
            settle(verdicts)  # before is_quiet() can be true, and the connection be closed

    def withdraw(self, task: Task) -> bool:
        """Take a task back that has not started; say whether that was so. The lock is held."""
        for waiting in (self.fresh, self.suspects):
            if task in waiting:
                waiting.remove(task)
                return True
        return False

    def take_stuck(self, workers: int, patient: bool) -> list[Task]:
        """Take back what waits too long while no worker is free for it, but for urgent suspects;
        the patient wait as long as some running task is no longer than that."""
        limit = time.monotonic() - STUCK_SECONDS
        with self.lock:
            if len(self.running) < workers and not self.suspects and not self.alone:
                return []
            if patient and any(task.since >= limit for task in self.running):
                return []
            waiting = (*self.suspects, *self.fresh)
            stuck = [task for task in waiting if task.since < limit and not task.urgent]
            if len(self.handed_back) > MAX_HANDED_BACK:
                self.handed_back.clear()
            for task in stuck:
                self.withdraw(task)
                del self.held[task.id, task.attempt]
                if task.suspect:
                    self.handed_back.add((task.id, task.attempt))
            return stuck

    def forget(self, link: Any) -> None:
        """Drop a dead link's deliveries; what has not started comes again over the next one."""
        with self.lock:
            for key, task in list(self.held.items()):
                task.deliveries = [each for each in task.deliveries if each[0] is not link]
                if not task.deliveries and self.withdraw(task):
                    del self.held[key]

    def measure(self) -> tuple[int, float, float, float]:
        """Return tasks finished since the last call, their seconds, the least elapsed seconds of
        a full set of running ones, and the mean bytes of a task in hand."""
        with self.lock:
            count, seconds = self.finished, self.busy_seconds
            self.finished, self.busy_seconds = 0, 0.0
            now = time.monotonic()
            elapsed = min((now - task.since for task in self.running), default=0.0)
            size = sum(task.size for task in self.held.values()) / max(len(self.held), 1)
            return count, seconds, elapsed, size

    def stop(self) -> None:
        """Let no worker start another task."""
        with self.lock:
            self.stopping = True
            self.work.notify_all()
            self.news.notify()

    def is_quiet(self) -> bool:
        """Tell whether nothing runs and nothing waits to be reported."""
        with self.lock:
            return not self.running and not self.done


def settle(verdicts: list[tuple[Task, str]]) -> None:
    """Have each link's own thread settle these tasks' deliveries. What is bound for a dead link is
    dropped: its broker sends the message again, and the producer then says that it is over."""
    by_link: dict[Any, dict[int, str]] = {}
    for task, verdict in verdicts:
        for link, tag in task.deliveries:
            by_link.setdefault(link, {})[tag] = verdict
    for link, tags in by_link.items():
        try:
            link.connection.add_callback_threadsafe(functools.partial(link.settle, tags))
        except pika.exceptions.AMQPError as error:
            log.debug("%d acks dropped with their connection: %s", len(tags), error)


def work(hand: Hand, process: Callable[[str], Any]) -> None:
    """Run tasks one after another until the hand is stopping: the body of a worker thread."""
    while (task := hand.take()) is not None:
        if task.suspect and not hand.may_start(task):
            continue
        report = {"taskId": task.id, "attempt": task.attempt}
        try:
            result = process(task.text)
            report["taskStatus"] = "success"
            if result is not None:
                report["result"] = storable(result)
        except BaseException as error:  # SystemExit too: a worker that ends would be missed
            log.warning("task %s failed: %s: %s", task.id, type(error).__name__, storable(error))
            report.pop("taskStatus", None)
            report["error"] = storable(f"{type(error).__name__}: {storable(error)}")
        hand.finish(task, report)


def report_outcomes(hand: Hand) -> None:
    """Make every PUT of this process, one after another: the body of the reporter thread.

    Only after the producer has accepted a report is its message settled; while the producer is
    away everything is held, for ever if need be.
    """
    outlet = dlq_watcher.Reports()
    backoff = dlq_watcher.Backoff()
    last, touch_at = 0.0, time.monotonic() + TOUCH_SECONDS
    while True:
        group = hand.collect(last, touch_at)
        last = time.monotonic()
        try:
            refusals = outlet.put([report for _, report in group]) if group else {}
            backoff.succeeded()
            if last >= touch_at:
                touch_at = last + TOUCH_SECONDS
            for index, reason in refusals.items():
                log.info("task %s is not ours to end: %s", group[index][0].id, reason)
            hand.accept(group, refusals)
        except dlq_watcher.Unavailable as error:
            time.sleep(backoff.failed(error))
        except Exception:  # the top of a loop: without a reporter nothing would ever be acked
            log.exception("reporting failed, next try in %s s", broker.LAST_DELAY_SECONDS)
            time.sleep(broker.LAST_DELAY_SECONDS)
