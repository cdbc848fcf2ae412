"""A fleet under measurement: many consumers at one producer or several, what they take of the
machine, and who gets how much of the work."""

import collections
import contextlib
import itertools
import math
import pathlib
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import requests

from native import servers
from tests import load
from tests.measured import Measured, Side
from tests.stack import until
from tests.worker_parts import family, megabytes

Results = dict[str, float]

READY_SECONDS = 300  # until all consumers are there, on two cores
FULL_RATE = 0.9  # of what it was before an outage
LOOK_SECONDS = 0.1
CREATES, CREATE_RATE = 400, 50
REQUESTS = re.compile(r'http_request_duration_seconds_count\{.*?route="([^"]+)".*?\} (\d+)')
SPAN = """
SELECT count(*), extract(epoch FROM max(finished_at) - min(finished_at))::float8
FROM (
    SELECT finished_at, row_number() OVER (ORDER BY finished_at) AS number
    FROM tasks WHERE finished_at IS NOT NULL
) AS ends
WHERE number BETWEEN %s AND %s
"""


def seconds_of(pids: Iterable[int]) -> dict[int, float]:
    """Return the processor time of each process that is there."""
    seconds = {}
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            seconds[pid] = (int(fields[11]) + int(fields[12])) / 100
    return seconds


def established(port: int) -> int:
    """Return how many connections a server has at a loopback port."""
    lines = pathlib.Path("/proc/net/tcp").read_text().splitlines()[1:]
    local = f":{port:04X}"
    return sum(line.split()[1].endswith(local) and line.split()[3] == "01" for line in lines)


def opened() -> int:
    """Return how often anybody on this machine has tried to connect by TCP."""
    names, values = (
        line.split()
        for line in pathlib.Path("/proc/net/snmp").read_text().splitlines()
        if line.startswith("Tcp:")
    )
    return int(values[names.index("ActiveOpens")])


class Watch(threading.Thread):
    """Looks again and again at the tries to connect, and at the connections to some ports."""

    def __init__(self, ports: list[int]) -> None:
        super().__init__(daemon=True)
        self.ports = ports
        self.done = threading.Event()
        self.looks: list[tuple[float, int, int]] = []  # time.time(), tries so far, connections

    def run(self) -> None:
        while not self.done.wait(LOOK_SECONDS):
            self.looks.append((time.time(), opened(), sum(map(established, self.ports))))

    def most_tries(self) -> int:
        """Return the most tries to connect in any second."""
        size = round(1 / LOOK_SECONDS)
        tries = [look[1] for look in self.looks]
        pairs = zip(tries, tries[size:], strict=False)
        return max((after - before for before, after in pairs), default=0)

    def reached(self, count: int, since: float) -> float:
        """Return when there were so many connections again, after a time; both of time.time()."""
        return next((at for at, _, open_ in self.looks if at > since and open_ >= count), math.inf)


class Fleet:
    """Consumers of `workers` workers each, spread evenly over the producers."""

    def __init__(self, bench: Measured, producers: int, workers: int) -> None:
        self.bench = bench
        self.workers = workers
        self.ports = [bench.port, *(servers.free_port() for _ in range(producers - 1))]
        self.producers = [self.start_producer(port) for port in self.ports]
        self.consumers: list[servers.Service] = []

    def start_producer(self, port: int) -> servers.Service:
        """Start a producer and wait until it is ready."""
        service = self.bench.start("producer", HTTP_PORT=port)
        until(lambda: servers.is_ready("127.0.0.1", port), what="a producer is ready")
        return service

    def grow(self, count: int) -> None:
        """Start consumers until there are so many, and all are known and subscribed."""
        for number in range(len(self.consumers), count):
            port = self.ports[number % len(self.ports)]
            self.consumers.append(
                self.bench.start(
                    "consumer",
                    HANDLER="handlers:tally",
                    CONCURRENCY=self.workers,
                    PRODUCER_URL=f"http://127.0.0.1:{port}",
                )
            )
        known = "SELECT count(*) FROM consumers WHERE seen_at > now() - interval '1 minute'"
        until(
            lambda: self.bench.sql(known)[0][0] >= count, READY_SECONDS, f"{count} known", pause=0.5
        )
        until(lambda: self.subscriptions() >= count, READY_SECONDS, f"{count} subscribed")

    def subscriptions(self) -> int:
        """Return how many subscriptions the queue has."""
        with self.bench.channel() as channel:
            return channel.queue_declare("tasks", passive=True).method.consumer_count

    def pids(self) -> dict[str, list[int]]:
        """Return the processes of each part of the service."""
        return {
            "producers": [each.pid for each in self.producers],
            "PostgreSQL": family(self.bench.postgres.pid),
            "RabbitMQ": family(self.bench.rabbit.pid),
            "consumers": [each.pid for each in self.consumers],
            "workers": [pid for each in self.consumers for pid in family(each.pid)[1:]],
        }

    def spent(self) -> dict[str, dict[int, float]]:
        """Return the processor time of each part of the service so far."""
        return {name: seconds_of(pids) for name, pids in self.pids().items()}

    def requests(self) -> int:
        """Return how many requests the producers have answered, /metrics aside."""
        total = 0
        for port in self.ports:
            text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
            total += sum(
                int(count) for route, count in REQUESTS.findall(text) if route != "/metrics"
            )
        return total

    @contextlib.contextmanager
    def costs(self, into: Results, name: str, per: Callable[[float], float]) -> Iterator[None]:
        """Add to a result what a block takes, divided by per(its seconds): requests, and
        microseconds of processor of each part."""
        calls, before, began = self.requests(), self.spent(), time.monotonic()
        yield
        share = per(time.monotonic() - began)
        after = self.spent()
        into[f"{name}, requests"] = (self.requests() - calls) / share
        for part, values in after.items():
            taken = sum(value - before[part].get(pid, 0) for pid, value in values.items())
            into[f"{name}, {part} us"] = 1e6 * taken / share

    def runs(self) -> dict[int, int]:
        """Return how many runs each worker process has counted."""
        paths = self.bench.counts_folder.iterdir()
        return {int(path.name): int.from_bytes(path.read_bytes(), "little") for path in paths}

    def shares(self, before: dict[int, int]) -> Results:
        """Return the least, the middle and the most that a consumer has run since, as multiples of
        an even share."""
        runs = collections.Counter(self.runs())
        runs.subtract(before)
        counts = [sum(runs[pid] for pid in family(each.pid)) for each in self.consumers]
        mean = statistics.mean(counts) or 1
        shares = {"least": min(counts), "median": statistics.median(counts), "most": max(counts)}
        return {name: count / mean for name, count in shares.items()}

    def fill(self, text: str, count: int) -> None:
        """Put tasks into the table, past the API, while the dispatch is paused."""
        self.pause()
        self.bench.sql(
            "INSERT INTO tasks (text) SELECT %s FROM generate_series(1, %s)", text, count
        )
        self.bench.sql("VACUUM ANALYZE tasks")

    def pause(self) -> None:
        """Let nothing be dispatched."""
        self.bench.sql("INSERT INTO pause DEFAULT VALUES ON CONFLICT DO NOTHING")

    def resume(self) -> None:
        """Let the dispatch go on."""
        self.bench.sql("DELETE FROM pause")

    def wait_sent(self) -> None:
        """Wait until what was sent has ended."""
        sent = "SELECT count(*) FROM tasks WHERE status = 'sent'"
        until(lambda: self.bench.sql(sent) == [(0,)], READY_SECONDS, "what was sent ends", 0.5)

    def work(self, text: str, count: int) -> Results:
        """Run so many waiting tasks, to a success or, if the text is no number, to an error; return
        tasks/s without the first and last tenth, what a task takes, and the shares."""
        self.fill(text, count)
        runs, results = self.runs(), Results()
        with self.costs(results, "a task", lambda seconds: count):
            self.resume()
            self.bench.wait_ended(timeout=READY_SECONDS)
        [(ended, seconds)] = self.bench.sql(SPAN, count // 10, count - count // 10)
        results["tasks/s"] = (ended - 1) / seconds
        results |= {f"share, {name}": value for name, value in self.shares(runs).items()}
        self.bench.sql("TRUNCATE tasks")
        return results

    def offer(self, text: str, rate: float, seconds: float) -> Results:
        """Create tasks at a rate; return the shares, and how long a task took beside its run."""
        runs, array = self.runs(), max(1, round(rate / 20))
        began = time.monotonic()
        for number in range(round(rate * seconds / array)):
            time.sleep(max(0.0, began + number * array / rate - time.monotonic()))
            self.bench.create(*[text] * array)
        self.bench.wait_ended()
        took = "extract(epoch FROM finished_at - created_at)::float8 - text::float8"
        [(p50, p99)] = self.bench.sql(
            f"SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY {took}),"
            f" percentile_cont(0.99) WITHIN GROUP (ORDER BY {took}) FROM tasks"
        )
        self.bench.sql("TRUNCATE tasks")
        results = {"p50 ms": 1000 * p50, "p99 ms": 1000 * p99}
        return results | {f"share, {name}": value for name, value in self.shares(runs).items()}

    def ends(self, since: float, until_: float) -> list[float]:
        """Return when tasks ended between two times, all of time.time()."""
        query = (
            "SELECT extract(epoch FROM finished_at)::float8 FROM tasks WHERE status = 'success'"
            " AND finished_at BETWEEN to_timestamp(%s) AND to_timestamp(%s) ORDER BY finished_at"
        )
        return [at for (at,) in self.bench.sql(query, since, until_)]

    def warnings(self) -> int:
        """Return how many lines the consumers have logged of what is wrong with the service."""
        lines = (line for each in self.consumers for line in each.log.read_text().splitlines())
        return sum("] task " not in line for line in lines)

    def creates(self, text: str) -> Results:
        """Return what a create takes for a single client, at CREATE_RATE, beside all else."""
        seconds = []
        for _ in range(CREATES):
            began = time.perf_counter()
            answer = self.bench.session.post(
                f"{self.bench.url}/api/v1/create-task", json={"text": text}, timeout=30
            )
            seconds.append(time.perf_counter() - began)
            assert answer.status_code == 201, answer.text
            time.sleep(max(0.0, 1 / CREATE_RATE - seconds[-1]))
        p50, p99 = load.percentiles(seconds)
        return {"create p50 ms": p50, "create p99 ms": p99}

    def memory(self) -> Results:
        """Return the megabytes of each part of the service."""
        return {f"{name} MB": megabytes(pids) for name, pids in self.pids().items()}


def back_after(ends: list[float], rate: float, since: float) -> float:
    """Return how many seconds after `since` the ends were at FULL_RATE of a rate again, for three
    seconds on end."""
    wanted = round(FULL_RATE * rate * 3)
    later = [at for at in ends if at >= since]
    for first, last in zip(later, itertools.islice(later, wanted, None), strict=False):
        if last - first <= 3:
            return first - since
    return math.inf


@contextlib.contextmanager
def fleet(side: Side, producers: int, workers: int) -> Iterator[Fleet]:
    """Yield a fleet without consumers yet."""
    with side.bench() as bench:
        yield Fleet(bench, producers, workers)
