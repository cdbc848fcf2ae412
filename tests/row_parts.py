"""The part of the benchmark about ten million waiting and ten million finished rows: the drain, its
minutes, creates, rescue, release and retention, a pg_dump beside it, and time-ordered against
random ids."""

import contextlib
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2

import housekeeper
import leases
import pool
from native import servers
from tests import load, row_table
from tests.measured import Measured, Side
from tests.stack import until

Results = dict[str, float]

ROWS = 10**7  # waiting, and as many finished
RUNS = 3
SHORT_SECONDS = 8.0
LONG_SECONDS = 240.0
SAMPLE_SECONDS = 5.0
WARM = 3000  # runs before the clock starts
CREATES = 15_000
SENT = (2000, 100_000)
OLD_DAYS = 9  # a tenth of row_table.DAYS is older
NO_BROKER = "amqp://tasks:tasks@127.0.0.1:1/%2F"
INSERT_NEW = """
INSERT INTO tasks (id, text)
SELECT {id}, %s FROM (SELECT clock_timestamp() AS made FROM generate_series(1, %s)) AS new
"""
SELECT_STATE = """
SELECT
    pg_current_wal_insert_lsn() - '0/0',
    (SELECT redo_lsn FROM pg_control_checkpoint()),
    (SELECT autovacuum_count FROM pg_stat_user_tables WHERE relname = 'tasks'),
    (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'tasks'),
    (SELECT phase FROM pg_stat_progress_vacuum WHERE relid = 'tasks'::regclass)
"""
SEND = """
UPDATE tasks SET status = 'sent', sent_at = now(), lease_until = now() + %s * interval '1 second'
WHERE id = ANY(ARRAY(SELECT id FROM tasks WHERE status = 'pending' AND NOT delayed LIMIT %s))
"""
ANY_SENT = "SELECT EXISTS (SELECT FROM tasks WHERE status = 'sent')"
INSERT_DUE = f"""
INSERT INTO tasks (id, text, delayed, run_at)
SELECT {row_table.TIME_ORDERED_ID}, 'due', true, now()
FROM (SELECT clock_timestamp() AS made FROM generate_series(1, %s)) AS new
"""


def say(text: str) -> None:
    """Print what a median hides."""
    print(f"{time.strftime('%T')} {text}", flush=True)


def ran(bench: Measured) -> int:
    """Return how many runs the workers have counted."""
    counts = (path.read_bytes() for path in bench.counts_folder.iterdir())
    return sum(int.from_bytes(count, "little") for count in counts)


@contextlib.contextmanager
def topped_up(bench: Measured, id_: str) -> Iterator[None]:
    """Insert a row for each run, so that as many wait all the time."""
    stop, inserted = threading.Event(), ran(bench)

    def work() -> None:
        nonlocal inserted
        with contextlib.closing(psycopg2.connect(bench.database_url)) as session:
            session.autocommit = True
            while not stop.wait(0.1):
                due = ran(bench) - inserted
                session.cursor().execute(INSERT_NEW.format(id=id_), (load.TEXT, due))
                inserted += due

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def flow(bench: Measured, name: str, seconds: float, done: Callable[[], bool]) -> Results:
    """Watch a drain for so many seconds, or longer until done(); return what it was like."""
    before = ran(bench)
    until(lambda: ran(bench) >= before + WARM, 300, f"{WARM} runs")
    [(wal, redo, vacuums, _, _)] = bench.sql(SELECT_STATE)
    began, first = time.monotonic(), ran(bench)
    at, count, redos, rates = began, first, {redo}, []
    while at - began < seconds or not done():
        left = began + seconds - at
        time.sleep(min(SAMPLE_SECONDS, left if left > 0 else SAMPLE_SECONDS))
        now, runs = time.monotonic(), ran(bench)
        rates.append((runs - count) / (now - at))
        [(last_wal, redo, last_vacuums, dead, phase)] = bench.sql(SELECT_STATE)
        at, count, redos = now, runs, redos | {redo}
        if seconds > SHORT_SECONDS:
            say(f"  {name} {at - began:5.0f} s {rates[-1]:6.0f}/s dead {dead:8d} {phase or ''}")
    return {
        f"{name}: drain/s": (count - first) / (at - began),
        f"{name}: slowest 5 s, drain/s": min(rates),
        f"{name}: WAL bytes a task": float(last_wal - wal) / (count - first),
        f"{name}: checkpoints": len(redos) - 1,
        f"{name}: autovacuums": last_vacuums - vacuums,
        f"{name}: seconds": at - began,
    }


def drain(
    bench: Measured,
    name: str,
    seconds: float = SHORT_SECONDS,
    done: Callable[[], bool] = lambda: True,
    id_: str = row_table.TIME_ORDERED_ID,
    checkpoint: bool = True,
    prepare: Callable[[Measured], None] = row_table.warm,
    **env: Any,
) -> Results:
    """Return what a drain with new processes is like while as many rows wait all the time."""
    with bench.running("producer", **env), bench.running("consumer", 2):
        prepare(bench)
        if checkpoint:
            bench.sql("CHECKPOINT")
        with topped_up(bench, id_):
            bench.sql("DELETE FROM pause")
            results = flow(bench, name, seconds, done)
            bench.sql("INSERT INTO pause DEFAULT VALUES ON CONFLICT DO NOTHING")
            until(lambda: bench.sql(ANY_SENT) == [(False,)], what="what is in the queue has ended")
            time.sleep(0.5)  # and has been topped up
    return results


def medians(samples: list[Results]) -> Results:
    """Return the median of each figure."""
    return {name: statistics.median(each[name] for each in samples) for name in samples[0]}


def alternating(small: Measured, big: Measured, id_: str = row_table.TIME_ORDERED_ID) -> Results:
    """The drain out of a small table and out of the big one, in turns."""
    samples = []
    for run in range(RUNS):
        pair: Results = {}
        for bench, name in ((small, "small"), (big, "big"))[:: 1 if run % 2 == 0 else -1]:
            pair |= drain(bench, name, id_=id_)
        samples.append({each: pair[each] for each in sorted(pair)})
        say(f"{pair['small: drain/s']:.0f} {pair['big: drain/s']:.0f}")
    results = medians(samples)
    ratios = [each["big: drain/s"] / each["small: drain/s"] for each in samples]
    return results | {"big of small": statistics.median(ratios)}


def minutes(small: Measured, big: Measured) -> Results:
    """The same for minutes, across checkpoints and autovacuums, and what the table weighs."""
    results: Results = {}
    for bench, name in ((small, "small, minutes"), (big, "big, minutes")):
        before = row_table.sizes(bench)
        results |= drain(bench, name, LONG_SECONDS, checkpoint=False)
        after = row_table.sizes(bench)
        for part in after:
            results |= {f"{name}: {part} MB before": before[part]}
            results |= {f"{name}: {part} MB after": after[part]}
    rate = "minutes: drain/s"
    return results | {"big of small, minutes": results[f"big, {rate}"] / results[f"small, {rate}"]}


def creates(small: Measured, big: Measured) -> Results:
    """Single creates of sixteen clients into each table, in turns."""
    samples = []
    for _ in range(RUNS):
        pair: Results = {}
        for bench, name in ((small, "small: create"), (big, "big: create")):
            row_table.warm(bench)
            bench.sql("CHECKPOINT")
            service = bench.start("producer", RABBITMQ_URL=NO_BROKER)
            until(lambda bench=bench: load.creates(bench.url), what="producer takes tasks")
            pair |= load.measure_creates(bench.url, CREATES, name)
            service.stop()
        samples.append(pair)
    return medians(samples)


def turn(bench: Measured, work: Callable[[Any], Any]) -> float:
    """Return the milliseconds of one step of the housekeeper, committed."""
    options = pool.SERVER_OPTIONS
    with contextlib.closing(psycopg2.connect(bench.database_url, options=options)) as session:
        cursor = session.cursor()
        cursor.execute("SELECT 1")
        began = time.monotonic()
        work(cursor)
        session.commit()
        return 1000 * (time.monotonic() - began)


def rescue(bench: Measured) -> Results:
    """A look for lost tasks among ever more that are sent, and the rescue of them all."""
    results: Results = {}
    for count in SENT:
        bench.sql(SEND, 1000, count)
        look = [
            turn(bench, lambda cursor: leases.rescue_lost(cursor, time.time())) for _ in range(5)
        ]
        results[f"look at {count} sent, ms"] = statistics.median(look)
        steps = []
        while bench.sql("SELECT EXISTS (SELECT FROM tasks WHERE status = 'sent')") == [(True,)]:
            steps.append(turn(bench, lambda cursor: leases.rescue_lost(cursor, time.time() + 2000)))
        results[f"rescue of {count}, ms a step"] = statistics.median(steps)
        results[f"rescue of {count}, slowest step ms"] = max(steps)
    return results


def release(bench: Measured, count: int) -> Results:
    """The drain while so many delayed rows are due at once."""
    bench.sql(INSERT_DUE, count)
    bench.sql("ANALYZE tasks")
    steps = [turn(bench, housekeeper.release_due) for _ in range(10)]
    due = "SELECT EXISTS (SELECT FROM tasks WHERE delayed)"
    results = drain(bench, "release", 10, lambda: bench.sql(due) == [(False,)])
    return results | {"release of 5,000, ms": statistics.median(steps)}


def retention(bench: Measured) -> Results:
    """The drain while a tenth of the finished rows is deleted."""
    [(bound,)] = bench.sql("SELECT now() - %s * interval '1 day'", OLD_DAYS)
    old = "FROM tasks WHERE status = 'success' AND finished_at < %s"
    [(before,)] = bench.sql(f"SELECT count(*) {old}", bound)
    done = lambda: bench.sql(f"SELECT EXISTS (SELECT {old})", bound) == [(False,)]  # noqa: E731
    results = drain(bench, "retention", 10, done, RETENTION_DAYS=OLD_DAYS)
    return results | {"retention: rows": before}


def creates_beside_retention(bench: Measured) -> Results:
    """Creates while another tenth of the finished rows is deleted."""
    service = bench.start("producer", RABBITMQ_URL=NO_BROKER, RETENTION_DAYS=OLD_DAYS - 1)
    until(lambda: load.creates(bench.url), what="producer takes tasks")
    results = load.measure_creates(bench.url, 2 * CREATES, "create beside retention")
    service.stop()
    return results


@contextlib.contextmanager
def dump(bench: Measured, *options: str) -> Iterator[Callable[[], bool]]:
    """Run pg_dump to nowhere; yield what tells whether it has ended."""
    command = [f"{servers.postgres_bin()}/pg_dump", *options, "--no-unlogged-table-data"]
    command += ["--file=/dev/null", bench.database_url]
    with subprocess.Popen(command) as child:
        try:
            yield lambda: child.poll() is not None
        finally:
            child.terminate()
            say(f"pg_dump ended with {child.wait()}")


def dumps(bench: Measured) -> Results:
    """The drain while pg_dump reads the table, and after that until vacuum has been there."""
    results = drain(bench, "before a dump", 30)
    with dump(bench, "--format=custom") as ended:
        results |= drain(bench, "beside a dump", 10, ended)
    for part, size in row_table.sizes(bench).items():
        results[f"after a dump: {part} MB"] = size
    return results | drain(bench, "after a dump", 90)


def rows(side: Side) -> Results:
    """All of it with time-ordered ids, and what matters with random ones."""
    results: Results = {}
    with row_table.pair(side, True) as (small, big):
        results |= alternating(small, big) | creates(small, big) | minutes(small, big)
        results |= drain(big, "from the disk", 20, prepare=row_table.chill)
        results |= rescue(big) | release(big, side.rows // 10)
        results |= retention(big) | creates_beside_retention(big) | dumps(big)
    with row_table.pair(side, False) as (small, big):
        random = alternating(small, big, row_table.RANDOM_ID) | row_table.sizes(big)
        return results | {f"random ids: {name}": value for name, value in random.items()}
