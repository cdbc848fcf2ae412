"""Parts of the benchmark that are about worker processes: tasks that take long, processors, memory,
and a soak."""

import contextlib
import functools
import pathlib
import re
import threading
import time
from collections.abc import Iterable
from typing import Any

from tests.measured import Measured, Side
from tests.stack import until

Results = dict[str, float]

BURST_TASKS = 24  # of BURST_SECONDS, behind a burst of quick ones
BURST_SECONDS = 5
BURN_SECONDS = 0.02  # of a processor
SOAK_SECONDS = 1800
SOAK_WORKERS = 100  # of each of two consumers
SOAK_TASK_SECONDS = 0.05
SOAK_ARRAY = 100


def family(pid: int) -> list[int]:
    """Return a process and all that it has started."""
    pids = [pid]
    for path in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # has just ended
            for child in path.read_text().split():
                pids += family(int(child))
    return pids


def megabytes(pids: Iterable[int]) -> float:
    """Return the memory of processes, what they share divided among them (PSS)."""
    kilobytes = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # has just ended
            text = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text()
            kilobytes += sum(
                int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")
            )
    return kilobytes / 1024


def peak_megabytes(pid: int) -> float:
    """Return a process's peak resident memory."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def processor_seconds(pids: Iterable[int]) -> float:
    """Return the processor time that processes have taken."""
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / 100


def seconds_to_end(bench: Measured, texts: list[str]) -> float:
    """Create tasks and return how long it takes until all have succeeded."""
    began = time.monotonic()
    ids = bench.create(*texts)
    query = "SELECT count(*) FROM tasks WHERE id = ANY(%s::uuid[]) AND status = 'success'"
    # A look takes a new connection, and so a part of what is measured.
    until(lambda: bench.sql(query, ids) == [(len(ids),)], 600, "all succeed", pause=0.2)
    return time.monotonic() - began


def burst(side: Side) -> Results:
    """Long tasks right behind a burst of quick ones, as a multiple of the least possible time."""
    with (
        side.bench() as bench,
        bench.running("producer"),
        bench.running("consumer", 2, HANDLER="handlers:nap", CONCURRENCY=2),
    ):
        seconds_to_end(bench, ["0"] * 2000)  # the windows are wide now
        seconds = seconds_to_end(bench, [str(BURST_SECONDS)] * BURST_TASKS)
    return {"burst, times ideal": seconds / (BURST_TASKS / 4 * BURST_SECONDS)}


def processors(side: Side) -> Results:
    """Tasks that burn a processor, on one worker and on two."""
    results = {}
    for workers in (1, 2):
        with (
            side.bench() as bench,
            bench.running("producer"),
            bench.running("consumer", 1, HANDLER="handlers:burn", CONCURRENCY=workers),
        ):
            seconds_to_end(bench, [str(BURN_SECONDS)] * 20)
            results[workers] = seconds_to_end(bench, [str(BURN_SECONDS)] * 400)
    return {"processor-bound, two workers of one": results[1] / results[2]}


def memory(side: Side) -> Results:
    """The memory of a consumer with fifty workers, all at work."""
    with (
        side.bench() as bench,
        bench.running("producer"),
        bench.running("consumer", 1, HANDLER="handlers:nap", CONCURRENCY=50) as [consumer],
    ):
        seconds = seconds_to_end(bench, ["8"] * 50)
        value = megabytes(family(consumer.pid))
    return {"consumer and fifty workers, MB": value, "fifty tasks of 8 s, seconds": seconds}


def offer(bench: Measured, rate: float, stop: threading.Event) -> None:
    """Create tasks at a rate until stop is set: the body of a thread."""
    texts, due = [str(SOAK_TASK_SECONDS)] * SOAK_ARRAY, time.monotonic()
    while not stop.wait(max(0.0, due - time.monotonic())):
        bench.create(*texts)
        due += SOAK_ARRAY / rate


def soak(side: Side) -> Results:
    """Half an hour at half of what it can do, with 200 workers: what grows?"""
    with (
        side.bench() as bench,
        bench.running("producer") as [producer],
        bench.running("consumer", 2, HANDLER="handlers:nap", CONCURRENCY=SOAK_WORKERS) as takers,
    ):
        count = 10_000
        seconds_to_end(bench, [str(SOAK_TASK_SECONDS)] * count)  # all workers are there now
        most = count / seconds_to_end(bench, [str(SOAK_TASK_SECONDS)] * count)
        stop = threading.Event()
        work = functools.partial(offer, bench, most / 2, stop)
        clients = threading.Thread(target=work, daemon=True)
        clients.start()
        samples: list[dict[str, float]] = []
        deadline = time.monotonic() + SOAK_SECONDS
        while time.monotonic() < deadline:
            time.sleep(60)
            samples.append(sample(bench, producer, takers))
            print(samples[-1], flush=True)
        stop.set()
        clients.join()
        bench.wait_ended(timeout=300)
        until(lambda: bench.unsettled() == {}, 60)
    half = len(samples) // 2
    results: Results = {"soak, tasks/s at most": most}
    for name in samples[0]:
        if name != "tasks":
            for part, of in (("first", samples[:half]), ("last", samples[half:])):
                results[f"soak, {name}, {part} half"] = sum(each[name] for each in of) / len(of)
    first, last = samples[0], samples[-1]
    tasks = last["tasks"] - first["tasks"]
    for name in ("producer", "consumers and workers"):
        used = last[f"{name}, processor s"] - first[f"{name}, processor s"]
        results[f"soak, {name}, microseconds a task"] = used / tasks * 1e6
    return {name: value for name, value in results.items() if "processor s" not in name}


def sample(bench: Measured, producer: Any, takers: list[Any]) -> dict[str, float]:
    """Return what a minute of the soak has come to."""
    pids = [pid for taker in takers for pid in family(taker.pid)]
    statuses = "SELECT count(*) FROM tasks WHERE status = %s"
    return {
        "tasks": bench.sql(statuses, "success")[0][0],
        "pending": bench.sql(statuses, "pending")[0][0],
        "sent": bench.sql(statuses, "sent")[0][0],
        "in the queue": bench.waiting(),
        "dead letters": bench.waiting("tasks.dlq"),
        "producer MB": megabytes([producer.pid]),
        "consumers' MB": megabytes(taker.pid for taker in takers),
        "consumers and workers MB": megabytes(pids),
        "worker processes": len(pids) - len(takers),
        "producer, processor s": processor_seconds([producer.pid]),
        "consumers and workers, processor s": processor_seconds(pids),
    }
