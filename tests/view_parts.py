"""The part of the benchmark that looks at large tables: what each of the operator's calls takes,
and the drain beside open consoles."""

import contextlib
import http.client
import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg2

from tests import load
from tests.measured import Measured, Side
from tests.worker_parts import family, processor_seconds

Results = dict[str, float]

ROWS = 10**7
CALLS = 200  # of each kind
CONSOLES = 5
CONSOLE_SECONDS = 2  # between two refreshes of each
PRICE_SECONDS = 20
DRAINED = 30_000
WARM = 2000  # runs before the clock starts
# Shares of the rows in each status.
MIXES = {
    "success": {"success": 0.97, "error": 0.01, "pending": 0.01, "sent": 0.01},
    "pending": {"success": 0.01, "error": 0.01, "pending": 0.97, "sent": 0.01},
    "errors": {"success": 0.70, "error": 0.20, "pending": 0.05, "sent": 0.05},
}
FILL = """
INSERT INTO tasks (text, status, error, created_at, sent_at, lease_until, finished_at)
SELECT
    'text ' || number,
    %(status)s::task_status,
    CASE WHEN %(status)s = 'error' THEN 'reason ' || chr(65 + number %% 7) || ': ' || number END,
    now() - interval '10 days',
    CASE WHEN %(status)s <> 'pending' THEN now() END,
    CASE WHEN %(status)s = 'sent' THEN now() + interval '1 day' END,
    CASE WHEN %(status)s IN ('success', 'error')
        THEN now() - interval '7 days' + number * interval '0.05 second' END
FROM generate_series(1, %(count)s) AS number
"""
QUERIES = {
    "list success": "list-tasks?status=success",
    "list error": "list-tasks?status=error&limit=50",
    "list pending": "list-tasks?status=pending",
    "list sent": "list-tasks?status=sent",
    "list a reason": "list-tasks?status=error&error=reason%20C",
    "list a rare reason": "list-tasks?status=error&error=nothing",
    "list 1,000": "list-tasks?status=success&limit=1000",
    "get-stats": "get-stats",
}


def fill(bench: Measured, rows: int, mix: dict[str, float]) -> None:
    """Put so many rows into the table, past the API and with the dispatch paused."""
    bench.sql("INSERT INTO pause DEFAULT VALUES ON CONFLICT DO NOTHING")
    with contextlib.closing(psycopg2.connect(bench.database_url)) as session:
        cursor = session.cursor()
        for status, share in mix.items():
            cursor.execute(FILL, {"status": status, "count": int(rows * share)})
        session.commit()
        session.autocommit = True
        cursor.execute("VACUUM ANALYZE tasks")
        cursor.execute("CHECKPOINT")


def timed(bench: Measured, path: str, body: Any = None, count: int = CALLS) -> tuple[float, float]:
    """Return p50 and p99 of a call in milliseconds, page after page if it has pages."""
    url = f"{bench.url}/api/v1/{path}"
    seconds = []
    cursor = ""
    for _ in range(count):
        began = time.perf_counter()
        if body is None:
            answer = bench.session.get(f"{url}{cursor}", timeout=60)
        else:
            answer = bench.session.post(url, json=body, timeout=60)
        seconds.append(time.perf_counter() - began)
        assert answer.status_code in (200, 201), answer.text
        following = answer.json().get("next") if body is None else None
        cursor = f"&cursor={following}" if following else ""
        if path == "get-stats":
            time.sleep(0.05)  # every twentieth reads anew
    return load.percentiles(seconds)


@contextlib.contextmanager
def consoles(bench: Measured, count: int) -> Iterator[None]:
    """Keep so many consoles open: each reads the statistics and a list again and again."""
    stop = threading.Event()

    def look(number: int) -> None:
        client = http.client.HTTPConnection("127.0.0.1", bench.port, timeout=60)  # takes little
        status = ("error", "success", "pending", "sent")[number % 4]
        while not stop.wait(CONSOLE_SECONDS):
            for call in ("get-stats", f"list-tasks?status={status}"):
                client.request("GET", f"/api/v1/{call}")
                client.getresponse().read()

    threads = [threading.Thread(target=look, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def price(bench: Measured, producer: int) -> float:
    """Return the milliseconds of processor a second that the service takes for its consoles. The
    drain beside them differs by less than it does from run to run."""
    pids = [producer, bench.postgres.pid]
    taken = []
    for count in (0, CONSOLES):
        with consoles(bench, count):
            time.sleep(CONSOLE_SECONDS)
            before = processor_seconds(each for pid in pids for each in family(pid))
            time.sleep(PRICE_SECONDS)
            after = processor_seconds(each for pid in pids for each in family(pid))
        taken.append((after - before) / PRICE_SECONDS)
    return 1000 * (taken[1] - taken[0])


def drain_rate(bench: Measured, count: int) -> float:
    """Return runs a second while the dispatch goes on, of the next runs."""
    runs = [int.from_bytes(path.read_bytes(), "little") for path in bench.counts_folder.iterdir()]
    before = sum(runs)
    bench.fill(count)
    bench.sql("DELETE FROM pause")
    bench.wait_runs(before + WARM)
    began = time.perf_counter()
    bench.wait_runs(before + count)
    seconds = time.perf_counter() - began
    bench.sql("INSERT INTO pause DEFAULT VALUES ON CONFLICT DO NOTHING")
    time.sleep(2)  # what is in the queue
    return (count - WARM) / seconds


def views(side: Side) -> Results:
    """Each call at ten million rows in every mix, and the drain beside five consoles."""
    results: Results = {}
    for name, mix in MIXES.items():
        with side.bench() as bench:
            with bench.running("producer"):
                pass  # the table
            began = time.monotonic()
            fill(bench, ROWS, mix)
            print(f"{name}: filled in {time.monotonic() - began:.0f} s", flush=True)
            with bench.running("producer") as [producer]:
                [task_id] = bench.create("x")
                calls = QUERIES | {"get-task-data": f"get-task-data?taskId={task_id}"}
                for call, path in calls.items():
                    p50, p99 = timed(bench, path)
                    results[f"{name}: {call} p50 ms"] = p50
                    results[f"{name}: {call} p99 ms"] = p99
                results[f"{name}: consoles, ms/s"] = price(bench, producer.pid)
                body = {"status": "error", "error": "reason C", "dryRun": True}
                p50, p99 = timed(bench, "retry-tasks", body, 5)
                results[f"{name}: count a reason p50 ms"] = p50
                p50, p99 = timed(bench, "create-task", {"text": "x"}, 1000)
                results[f"{name}: create p50 ms"], results[f"{name}: create p99 ms"] = p50, p99
                rates: dict[int, list[float]] = {0: [], CONSOLES: []}
                with bench.running("consumer", 2):
                    for run, count in itertools.product(range(5), rates):
                        with consoles(bench, count if run % 2 else CONSOLES - count):
                            rate = drain_rate(bench, DRAINED)
                            rates[count if run % 2 else CONSOLES - count].append(rate)
                for count, values in rates.items():
                    median = sorted(values)[len(values) // 2]
                    results[f"{name}: drain/s beside {count} consoles"] = median
                    print(name, count, [round(value) for value in values], flush=True)
            [(size, indexes)] = bench.sql(
                "SELECT pg_table_size('tasks')::float8, pg_indexes_size('tasks')::float8"
            )
            results |= {f"{name}: table MB": size / 1e6, f"{name}: indexes MB": indexes / 1e6}
    return results
