"""Measures the service beside a bare pika pipe, on private servers, in one run: ratios count.

Run it with `sudo bash run.sh bench [--tasks 30000] [--only drain,create] [--runs 5] [--peers]
[--against DIR]`: the table goes to stdout, its JSON to .run/benchmark.json, progress to stderr.

With --peers, other task queues are measured too (docs/benchmark.md), and benchmark.svg is drawn.
DIR is another checkout: its scripts are measured, by its .run/venv-test, in turns."""

import argparse
import contextlib
import functools
import json
import pathlib
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psycopg2

from native import servers
from tests import (
    chart,
    cost_parts,
    fleet_parts,
    load,
    peer_parts,
    row_parts,
    table,
    view_parts,
    worker_parts,
)
from tests.measured import Measured, Side
from tests.stack import clean_environment, until

MILLION = 10**6
NO_BROKER = "amqp://tasks:tasks@127.0.0.1:1/%2F"
Results = dict[str, float]


def say(text: str) -> None:
    print(f"{time.strftime('%T')} {text}", file=sys.stderr, flush=True)


def bare_pipe(side: Side) -> Results:
    """Messages/s of pika alone: no database, no HTTP; as fast as it can, and as it mostly is."""
    url, count = side.rabbit.url, side.tasks
    blocking = load.bare_pipe(url, count, load.pipe_publish_blocking)
    return {"pipe/s": load.bare_pipe(url, count), "pipe/s, blocking": blocking}


def drain(
    side: Side,
    name: str = "drain/s",
    count: int = 0,
    prepare: Callable[[Measured], Any] | None = None,
    consumers: int = 2,
    producers: int = 1,
    after: Callable[[Measured], Results] = lambda bench: {},
    **env: Any,
) -> Results:
    """Tasks/s from the first to the last end of waiting tasks, which prepare() has made."""
    count = count or side.tasks
    with side.bench() as bench:
        with bench.running("producer"):
            pass  # the table
        if prepare:
            prepare(bench)
        else:
            bench.fill(count)
        bench.sql("VACUUM ANALYZE tasks")
        bench.sql("CHECKPOINT")
        with (
            bench.running("consumer", consumers, **env) as takers,
            bench.running("producer", producers, **env),
        ):
            if "HANDLER" not in env:
                bench.wait_runs(count)
            bench.wait_ends(count)
            for taker in takers:  # they would wait for a producer that stops before them
                taker.stop()
        return {name: bench.rate(count)} | after(bench)


def texts(side: Side) -> Results:
    """The drain of texts of 20 KB that do not compress, forty megabytes."""
    count, size = 2000, 20_000
    bodies = [random.randbytes(size // 2).hex() for _ in range(count)]
    insert = "INSERT INTO tasks (text) SELECT unnest(%s)"
    name = "texts of 20 KB/s"
    [rate] = drain(side, name, count, lambda bench: bench.sql(insert, bodies)).values()
    return {name: rate, "texts of 20 KB, MB": rate * size / 1e6}


def million(side: Side) -> Results:
    """The drain out of a million waiting tasks."""
    prepare = functools.partial(Measured.fill, count=MILLION)
    return drain(side, "drain/s of a million waiting", prepare=prepare)


def backlogs(side: Side) -> Results:
    """The drain of the same number of tasks out of ever more, and beside finished rows."""
    results: Results = {}
    for waiting in (10_000, 100_000):
        prepare = functools.partial(Measured.fill, count=waiting)
        results |= drain(side, f"drain/s of {waiting}", min(side.tasks, waiting), prepare)

    def prepare_finished(bench: Measured) -> None:
        bench.fill(MILLION, "success")
        bench.fill(side.tasks)

    return results | drain(side, "drain/s beside a million finished", prepare=prepare_finished)


def dead_letters(side: Side) -> Results:
    """Failed tasks/s through the dead-letter queue."""
    return drain(side, "dead letters/s", HANDLER="", PROCESSING_SECONDS=0, FAILURE_RATE=1)


def growth(side: Side) -> Results:
    """What the table's indexes weigh after a million tasks have gone through them, without and with
    a snapshot as old as all of that, such as pg_dump's; and the drain meanwhile."""
    results: Results = {}
    for case in ("", " under an old snapshot"):
        say(f"a million tasks{case}")
        with contextlib.ExitStack() as snapshots:

            def prepare(bench: Measured, case: str = case, snapshots: Any = snapshots) -> None:
                bench.fill(MILLION)
                if case:
                    old = contextlib.closing(psycopg2.connect(bench.database_url))
                    session = snapshots.enter_context(old)
                    session.set_session("REPEATABLE READ")
                    session.cursor().execute("SELECT count(*) FROM pg_class")

            def weigh(bench: Measured, case: str = case) -> Results:
                sizes = "SELECT indexrelid::regclass::text, pg_relation_size(indexrelid) / 2^20"
                rows = bench.sql(f"{sizes} FROM pg_index WHERE indrelid = 'tasks'::regclass")
                return {f"{index} MB{case}": size for index, size in rows}

            results |= drain(side, f"drain/s of a million{case}", MILLION, prepare, after=weigh)
    return results


def scaling(side: Side) -> Results:
    """What more consumers and producers add on this machine."""
    results: Results = {}
    for consumers, producers in ((1, 1), (3, 1), (4, 1), (2, 2)):
        name = f"drain/s, {consumers} consumers, {producers} producers"
        results |= drain(side, name, consumers=consumers, producers=producers)
    return results


def create(side: Side) -> Results:
    """Creates one by one and in arrays, nothing dispatched meanwhile; and the peer's."""
    with side.bench() as bench:
        with bench.running("producer"):
            pass  # the table
        service = bench.start("producer", RABBITMQ_URL=NO_BROKER)
        until(lambda: load.creates(bench.url), what="producer takes tasks")
        results = load.measure_creates(bench.url, 20_000, "create")
        began = time.monotonic()
        for _ in range(60):
            bench.create(*[load.TEXT] * 500)
        results["create in arrays of 500, tasks/s"] = 30_000 / (time.monotonic() - began)
        service.stop()
        if side.peer:
            bench.sql("TRUNCATE tasks")
            results |= load.create_peer(side.peer, bench.database_url, bench.folder, 20_000)
        return results


def everything(side: Side) -> Results:
    """Creates in arrays, dispatch and work all at once; and the peak memory of each process."""
    with (
        side.bench() as bench,
        bench.running("producer") as producers,
        bench.running("consumer", 2) as consumers,
    ):
        for _ in range(side.tasks // 100):
            bench.create(*[load.TEXT] * 100)
        bench.wait_ends(side.tasks)
        memory = {
            f"peak MB {services[0].script}": max(
                worker_parts.peak_megabytes(each.pid) for each in services
            )
            for services in (producers, consumers)
        }
        span = "extract(epoch FROM max(finished_at) - min(created_at))::float8"
        [(seconds,)] = bench.sql(f"SELECT {span} FROM tasks")
    return {"everything at once, tasks/s": side.tasks / seconds} | memory


def latency(side: Side) -> Results:
    """From create to success at 50 tasks/s, by the database's clock."""
    with side.bench() as bench, bench.running("producer"), bench.running("consumer", 2):
        for number in range(550):
            began = time.monotonic()
            assert load.creates(bench.url, bench.session)
            if number == 49:  # warm now
                bench.wait_ends(50)
                bench.sql("DELETE FROM tasks")
            time.sleep(max(0, 0.02 - (time.monotonic() - began)))
        bench.wait_ends(500)
        rows = bench.sql("SELECT extract(epoch FROM finished_at - created_at)::float8 FROM tasks")
    p50, p99 = load.percentiles([seconds for (seconds,) in rows])
    return {"latency p50 ms": p50, "latency p99 ms": p99}


PARTS = {
    "pipe": bare_pipe,
    "drain": drain,
    "texts": texts,
    "create": create,
    "everything": everything,
    "latency": latency,
    "million": million,
    "backlogs": backlogs,
    "dead": dead_letters,
    "scaling": scaling,
    "growth": growth,
    "burst": worker_parts.burst,
    "processors": worker_parts.processors,
    "memory": worker_parts.memory,
    "soak": worker_parts.soak,
    "views": view_parts.views,
    "rows": row_parts.rows,
    "costs": cost_parts.costs,
    **fleet_parts.PARTS,
    "peers": peer_parts.peers,
}
LONG = ("soak", "views", "rows", "costs", "peers", *fleet_parts.PARTS)  # only when asked for
ALONE = ("pipe", "peers")  # have nothing of the project


def measure(sides: list[Side], parts: list[str], runs: int) -> dict[str, dict[str, list[float]]]:
    """Return the samples of each side, which take turns; who is first changes run by run."""
    samples: dict[str, dict[str, list[float]]] = {side.name: {} for side in sides}
    for run in range(runs):
        for part in parts:
            for side in sides[:1] if part in ALONE else sides[:: 1 if run % 2 == 0 else -1]:
                say(f"run {run + 1}: {part} of {side.name}")
                for name, value in PARTS[part](side).items():
                    samples[side.name].setdefault(name, []).append(value)
                    say(f"  {name}: {value:.1f}")
    return samples


def options() -> argparse.Namespace:
    """Return the command line's words."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=30_000)
    parser.add_argument("--rows", type=int, default=row_parts.ROWS, help="of each kind in `rows`")
    parser.add_argument("--only", default=",".join(p for p in PARTS if p not in LONG))
    parser.add_argument("--peers", action="store_true", help="install and measure the peers too")
    parser.add_argument("--runs", type=int, default=1, help="print the median of so many")
    parser.add_argument("--against", type=pathlib.Path, help="another checkout")
    return parser.parse_args()


def main() -> None:
    """Run the parts that are asked for, and print and write their results."""
    words = options()
    clean_environment()
    peer = str(peer_parts.environment() / "python") if words.peers else None
    parts = words.only.split(",") + ["peers"] * words.peers
    with tempfile.TemporaryDirectory(prefix="tasks-bench-", dir="/var/tmp") as folder:
        pathlib.Path(folder).chmod(0o755)
        postgres = servers.Postgres(pathlib.Path(folder) / "postgres")
        rabbit = servers.Rabbit(pathlib.Path(folder) / "rabbit")
        sides = [Side("this", postgres, rabbit, words.tasks, peer=peer, rows=words.rows)]
        if words.against:
            root = words.against.resolve()
            python = str(root / ".run/venv-test/bin/python")
            sides.append(Side("against", postgres, rabbit, words.tasks, root, python))
        postgres.start()
        rabbit.start()
        try:
            samples = measure(sides, parts, words.runs)
        finally:
            rabbit.stop()
            postgres.stop()
    results = {
        side: {name: statistics.median(values) for name, values in parts.items()}
        for side, parts in samples.items()
    }
    table.show(results)
    machine = {"machine": platform.platform(), "runs": words.runs, "tasks": words.tasks}
    output = servers.HERE / ".run" / "benchmark.json"  # run.sh has made the folder
    output.write_text(json.dumps(machine | {"results": results, "samples": samples}, indent=1))
    if words.peers and {"pipe", "drain"} <= set(parts):
        chart.main()


if __name__ == "__main__":
    main()
