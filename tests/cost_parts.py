"""The part of the benchmark that says who takes the processor's time: microseconds of each process
for a task and for a create, and milliseconds to an end at a high rate."""

from tests import load
from tests.fleet import Fleet, Results, fleet
from tests.measured import Side

TASKS, FAILURES, CREATES = 60_000, 10_000, 15_000
RATE, RATE_SECONDS = 2000, 10  # creates a second


def costs(side: Side) -> Results:
    """Measure instant tasks, failures and creates, at one producer and two consumers."""
    results: Results = {}
    with fleet(side, 1, 1) as all_:
        all_.grow(2)
        all_.work("0", 5000)  # all workers are there now
        for name, text, count in (("a task", "0", TASKS), ("a failure", "no number", FAILURES)):
            for key, value in all_.work(text, count).items():
                if key.endswith(" us"):
                    results[f"{name}, {key.removeprefix('a task, ')}"] = value
        results |= steady(all_)
        all_.pause()
        with all_.costs(results, "a create", lambda seconds: 1.1 * CREATES):
            results |= load.measure_creates(all_.bench.url, CREATES, "create beside costs")
    del results["a create, requests"]
    return results


def steady(all_: Fleet) -> Results:
    """Return the milliseconds from create to success at RATE single creates a second."""
    bench = all_.bench
    bench.sql("CHECKPOINT")
    load.create_aside(bench.url, RATE * RATE_SECONDS, RATE, "0")
    bench.wait_ended()
    [(count, seconds)] = bench.sql(
        "SELECT count(*), extract(epoch FROM max(created_at) - min(created_at))::float8 FROM tasks"
    )
    rows = bench.sql("SELECT extract(epoch FROM finished_at - created_at)::float8 FROM tasks")
    p50, p99 = load.percentiles([value for (value,) in rows])
    bench.sql("TRUNCATE tasks")
    name = f"at {RATE}/s"
    return {
        f"{name}, offered/s": count / seconds,
        f"{name}, p50 ms": p50,
        f"{name}, p99 ms": p99,
    }
