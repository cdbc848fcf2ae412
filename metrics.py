"""What this producer has counted since its start: for /metrics, and minute by minute for the
charts. Every thread may call it."""

import bisect
import itertools
import operator
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from plain_reports import Written
from rules import Row

# Upper bounds of seconds: ten a decade (the series R10 of ISO 3), from 1 ms to a day and more.
STEPS = (1, 1.25, 1.6, 2, 2.5, 3.15, 4, 5, 6.3, 8)
BOUNDS = [float(f"{step}e{power}") for power in range(-3, 5) for step in STEPS] + [100_000.0]
# What Prometheus gets of them, where each one is a time series.
SHOWN_BOUNDS = [each for each in BOUNDS if f"{each:e}"[:4] in ("1.00", "2.50", "5.00")]
REQUEST_BOUNDS = [each for each in SHOWN_BOUNDS if each <= 100]
KEPT_MINUTES = 60
ALIVE_SECONDS = 30  # a consumer that is silent for longer is not counted


@dataclass(slots=True)
class Histogram:
    """How many observations there were up to each bound, and beyond the last."""

    bounds: list[float]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0  # seconds

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.total += seconds


def no_counts() -> list[int]:
    """Return a zero for each of BOUNDS, and for what is beyond."""
    return [0] * (len(BOUNDS) + 1)


@dataclass(slots=True)
class Minute:
    """What one producer has counted in a minute; waits and runs by the index of their bound."""

    created: int = 0
    success: int = 0
    error: int = 0
    waits: list[int] = field(default_factory=no_counts)
    runs: list[int] = field(default_factory=no_counts)

    def add(self, other: "Minute") -> None:
        """Add what another producer, or another minute, has counted."""
        self.created += other.created
        self.success += other.success
        self.error += other.error
        self.waits = list(map(operator.add, self.waits, other.waits))
        self.runs = list(map(operator.add, self.runs, other.runs))


class Metrics:
    """The counts. One lock, held for microseconds, once for a group of tasks."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.lock = threading.Lock()
        self.created = self.retries = self.rescued = self.timed_out = 0
        self.ended = {"success": 0, "error": 0}
        self.waits, self.runs = Histogram(BOUNDS), Histogram(BOUNDS)
        self.requests: dict[tuple[str, str], Histogram] = {}
        self.minutes: dict[int, Minute] = {}  # by minutes since 1970
        self.unwritten: set[int] = set()

    def minute(self) -> Minute:
        """Return the current minute, changed from now on. The lock is held."""
        now = int(self.clock() // 60)
        minute = self.minutes.get(now)
        if minute is None:
            minute = self.minutes[now] = Minute()
            for old in [each for each in self.minutes if each <= now - KEPT_MINUTES]:
                del self.minutes[old]
                self.unwritten.discard(old)
        self.unwritten.add(now)
        return minute

    def note_created(self, count: int) -> None:
        """Count tasks whose COMMIT is done."""
        with self.lock:
            self.created += count
            self.minute().created += count

    def note_changed(self, rows: Iterable[Row]) -> None:
        """Count what reports have done to rows."""
        with self.lock:
            minute = self.minute()
            for row in rows:
                if row.status == "success":
                    self.ended["success"] += 1
                    minute.success += 1
                elif row.status == "error":
                    self.ended["error"] += 1
                    minute.error += 1
                elif row.outcome in ("failed", "timed out"):
                    self.retries += 1
                self.timed_out += row.outcome == "timed out"
                if row.started_at is not None and row.seconds is not None:
                    self.note_run(minute, max(0.0, row.started_at - row.due_at), row.seconds)

    def note_plain(self, status: str, rows: list[Written]) -> None:
        """Count rows that have a status now and were written without a look at them."""
        with self.lock:
            minute = self.minute()
            if status in self.ended:
                self.ended[status] += len(rows)
                minute.success += len(rows) * (status == "success")
                minute.error += len(rows) * (status == "error")
            for _, wait, seconds, timed_out in rows:
                self.timed_out += timed_out
                if wait is not None and seconds is not None:
                    self.note_run(minute, max(0.0, wait), seconds)

    def note_run(self, minute: Minute, wait: float, run: float) -> None:
        """Count how long a task has waited and run, both in seconds. The lock is held."""
        index = bisect.bisect_left(BOUNDS, wait)
        self.waits.counts[index] += 1
        self.waits.total += wait
        minute.waits[index] += 1
        index = bisect.bisect_left(BOUNDS, run)
        self.runs.counts[index] += 1
        self.runs.total += run
        minute.runs[index] += 1

    def note_rescued(self, count: int) -> None:
        """Count rescued tasks."""
        with self.lock:
            self.rescued += count

    def note_request(self, route: str, code: str, seconds: float) -> None:
        """Count an answered request."""
        with self.lock:
            histogram = self.requests.get((route, code))
            if histogram is None:
                histogram = self.requests[route, code] = Histogram(REQUEST_BOUNDS)
            histogram.observe(seconds)

    def take_unwritten(self) -> dict[int, Minute]:
        """Return the minutes that have changed since the last call."""
        with self.lock:
            minutes = {each: self.minutes[each] for each in self.unwritten}
            self.unwritten = set()
            return minutes

    def put_back(self, minutes: Iterable[int]) -> None:
        """Note that these minutes are not written after all."""
        with self.lock:
            self.unwritten.update(each for each in minutes if each in self.minutes)


class Requests:
    """A WSGI application that counts another one's answers by route and code."""

    def __init__(self, app: Callable[..., Any], metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        """Call the application."""
        began, code = environ.get("tasks.began") or time.perf_counter(), "500"

        def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal code
            code = status[:3]
            return start_response(status, headers, exc_info)

        try:
            return self.app(environ, start)
        finally:
            route = environ.get("bottle.route")
            seconds = time.perf_counter() - began
            self.metrics.note_request(route.rule if route else "none", code, seconds)


def quantile(counts: list[int], share: float) -> float | None:
    """Return about the seconds that this share of the tasks did not exceed; None without any."""
    total = sum(counts)
    if not total:
        return None
    wanted, below = share * total, 0
    for bound, low, count in zip(BOUNDS, [0.0, *BOUNDS], counts, strict=False):
        if count and below + count >= wanted:
            return low + (bound - low) * (wanted - below) / count
        below += count
    return BOUNDS[-1]


def escape(value: str) -> str:
    """Return a label's value as the text format wants it."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def sample(name: str, value: float, **labels: str) -> str:
    """Return one line of the text format."""
    pairs = ",".join(f'{key}="{escape(text)}"' for key, text in labels.items())
    return f"{name}{{{pairs}}} {value:.17g}" if pairs else f"{name} {value:.17g}"


def family(name: str, kind: str, help_: str, lines: Iterable[str]) -> list[str]:
    """Return one metric with its samples."""
    return [f"# HELP {name} {help_}", f"# TYPE {name} {kind}", *lines]


def histogram_lines(
    name: str, histogram: Histogram, shown: list[float], **labels: str
) -> list[str]:
    """Return a histogram's samples: counts up to each bound that is shown, sum and count."""
    cumulated = list(itertools.accumulate(histogram.counts))
    lines = [
        sample(f"{name}_bucket", count, **labels, le=f"{bound:g}")
        for bound, count in zip(histogram.bounds, cumulated, strict=False)
        if bound in shown
    ]
    lines.append(sample(f"{name}_bucket", cumulated[-1], **labels, le="+Inf"))
    lines.append(sample(f"{name}_sum", histogram.total, **labels))
    return [*lines, sample(f"{name}_count", cumulated[-1], **labels)]


def render(metrics: Metrics) -> list[str]:
    """Return this producer's counts in Prometheus' text format, line by line.
    https://prometheus.io/docs/instrumenting/exposition_formats/"""
    with metrics.lock:
        counters = [
            ("tasks_created_total", "Tasks created.", metrics.created),
            ("tasks_retries_total", "Failed attempts that are tried again.", metrics.retries),
            ("tasks_rescued_total", "Tasks that were sent and lost.", metrics.rescued),
            ("tasks_timed_out_total", "Runs that took too long.", metrics.timed_out),
        ]
        lines = [
            line
            for name, help_, value in counters
            for line in family(name, "counter", help_, [sample(name, value)])
        ]
        name = "tasks_ended_total"
        ended = [sample(name, value, status=status) for status, value in metrics.ended.items()]
        lines += family(name, "counter", "Tasks that have ended.", ended)
        for name, help_, histogram in (
            ("tasks_wait_seconds", "From due to the start of the run.", metrics.waits),
            ("tasks_run_seconds", "Length of the runs.", metrics.runs),
        ):
            shown = histogram_lines(name, histogram, SHOWN_BOUNDS)
            lines += family(name, "histogram", help_, shown)
        name = "http_request_duration_seconds"
        requests = [
            line
            for (route, code), histogram in sorted(metrics.requests.items())
            for line in histogram_lines(name, histogram, REQUEST_BOUNDS, route=route, code=code)
        ]
        return lines + family(name, "histogram", "Answers by route.", requests)


def render_gauges(stats: dict[str, Any], turned_at: float) -> list[str]:
    """Return the gauges of the whole service in Prometheus' text format; turned_at: of the
    dispatcher's last turn, in seconds since 1970."""
    consumers, age = stats["consumers"], stats["pendingAge"]
    alive = [each for each in consumers or () if each["silentSeconds"] <= ALIVE_SECONDS]
    workers = {name: sum(each[name] for each in alive) for name in ("concurrency", "busy")}
    gauges = [  # name, help, value, whether it is known
        ("oldest_pending_seconds", "Age of the oldest of a thousand pending.",
         (age and age["oldest"]) or 0, age is not None),
        ("consumers", "Consumers.", len(alive), consumers is not None),
        ("workers", "Worker processes, at most.", workers["concurrency"], consumers is not None),
        ("workers_busy", "Workers with a task.", workers["busy"], consumers is not None),
        ("dispatch_paused", "1 while dispatch is paused.", stats["paused"],
         stats["paused"] is not None),
        ("dispatcher_last_turn_timestamp_seconds", "Of this producer.", turned_at, True),
    ]  # fmt: skip
    current = [
        sample(
            "tasks_current", int(str(count).removesuffix("+")) + ("+" in str(count)), status=name
        )
        for name, count in stats["counts"].items()
        if count is not None
    ]
    depths = [
        sample("tasks_broker_messages", depth, queue=name)
        for name, depth in (stats["queues"] or {}).items()
    ]
    lines = family("tasks_current", "gauge", "Tasks by status, 10001 for more than 10000.", current)
    lines += family("tasks_broker_messages", "gauge", "Messages that wait in a queue.", depths)
    for name, help_, value, is_known in gauges:
        samples = [sample(f"tasks_{name}", value)] if is_known else []
        lines += family(f"tasks_{name}", "gauge", help_, samples)
    build = sample("tasks_build_info", 1, version=stats["version"])
    return lines + family("tasks_build_info", "gauge", "Of this producer.", [build])
