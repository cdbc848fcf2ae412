"""Measures the service beside a bare pika pipe, on private servers, in one run: ratios, since the
figures of a shared machine are not worth much alone.

Run it with `sudo bash run.sh bench [--tasks 30000] [--only drain,create] [--peer PYTHON]`: the
table goes to stdout, its JSON to .run/benchmark.json, progress to stderr. PYTHON is an interpreter
with fastapi, uvicorn and asyncpg, for the comparison of create-task."""

import argparse
import contextlib
import json
import multiprocessing
import pathlib
import platform
import re
import selectors
import shutil
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pika
import psycopg2
import requests

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from native import servers  # noqa: E402

PIPE_QUEUE = "bench.pipe"
BODY = b"x" * 180
TEXT = "x" * 100
CLIENTS = 16


def say(text: str) -> None:
    """Show progress."""
    print(f"{time.strftime('%T')} {text}", file=sys.stderr, flush=True)


def pipe_publish(url: str, count: int) -> None:
    """Publish in AMQP transactions of 500: the bare pipe's producer, a process of its own."""
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.tx_select()
    properties = pika.BasicProperties(delivery_mode=2)
    for sent in range(1, count + 1):
        channel.basic_publish("", PIPE_QUEUE, BODY, properties)
        if sent % 500 == 0:
            channel.tx_commit()
    channel.tx_commit()


def pipe_consume(url: str, total: Any, count: int) -> None:
    """Take messages and ack them in groups of 100: the bare pipe's consumer."""
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.basic_qos(prefetch_count=300)
    mine = 0
    for method, _, _ in channel.consume(PIPE_QUEUE, inactivity_timeout=0.2):
        if method is not None:
            mine += 1
        if mine and (mine % 100 == 0 or method is None):
            with total.get_lock():
                total.value += mine % 100 or (100 if method else 0)
            channel.basic_ack(0, multiple=True)
            mine -= mine % 100 if method is None else 0
        if method is None and total.value >= count:
            return


class Bench:
    """The servers and processes of one run."""

    def __init__(self, folder: pathlib.Path, tasks: int, peer: str | None) -> None:
        self.folder = folder
        self.tasks = tasks
        self.peer = peer
        self.postgres = servers.Postgres(folder / "postgres")
        self.rabbit = servers.Rabbit(folder / "rabbit")
        self.port = servers.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = {
            "DATABASE_URL": self.postgres.url,
            "RABBITMQ_URL": self.rabbit.url,
            "PRODUCER_URL": self.url,
            "HTTP_PORT": str(self.port),
            "HANDLER": "handlers:count",
            "COUNTS": str(folder / "counts"),
            "PYTHONPATH": str(HERE),
            "LOG_LEVEL": "WARNING",
        }
        self.session = requests.Session()

    def sql(self, statement: str, *arguments: Any) -> list[tuple]:
        """Run a statement and return its rows."""
        with contextlib.closing(psycopg2.connect(self.postgres.url)) as session:
            session.autocommit = True
            cursor = session.cursor()
            cursor.execute(statement, arguments)
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def running(self, script: str, count: int = 1, **env: Any) -> Iterator[list[servers.Service]]:
        """Run some processes of a script."""
        settings = self.env | {name: str(value) for name, value in env.items()}
        services = [
            servers.Service(f"{script}.py", settings, self.folder / f"{script}-{number}.log")
            for number in range(count)
        ]
        for number, service in enumerate(services):
            if script == "producer" and number:
                service.env = service.env | {"HTTP_PORT": "0"}
            service.start()
        try:
            if script == "producer":
                self.wait(self.is_ready, "producer")
            yield services
        finally:
            for service in services:
                service.child.terminate()
            for service in services:
                service.stop()

    def is_ready(self) -> bool:
        """Tell whether the producer is ready."""
        return servers.is_ready("127.0.0.1", self.port)

    def wait(self, is_done: Callable[[], Any], what: str, timeout: float = 300) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + timeout
        while not is_done():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not in {timeout} s")
            time.sleep(0.05)

    def fresh(self) -> None:
        """Empty the table, the queues and the counts."""
        shutil.rmtree(self.folder / "counts", ignore_errors=True)
        (self.folder / "counts").mkdir()
        if self.sql("SELECT to_regclass('tasks')")[0][0]:
            self.sql("TRUNCATE tasks")
        connection = pika.BlockingConnection(pika.URLParameters(self.rabbit.url))
        for queue in ("tasks", "tasks.dlq", PIPE_QUEUE):
            connection.channel().queue_delete(queue)
        connection.close()

    def fill(self, count: int, status: str = "pending") -> None:
        """Put rows into the table, past the API."""
        self.sql(
            "INSERT INTO tasks (text, status, finished_at)"
            " SELECT %s, %s::task_status, CASE WHEN %s = 'success' THEN now() END"
            " FROM generate_series(1, %s)",
            TEXT, status, status, count,
        )  # fmt: skip
        self.sql("VACUUM ANALYZE tasks")
        self.sql("CHECKPOINT")

    def ran(self) -> int:
        """Return how often the handler ran; to ask the table would slow what is measured."""
        counts = (path.read_bytes() for path in (self.folder / "counts").iterdir())
        return sum(struct.unpack("q", count)[0] for count in counts if count)

    def ended(self) -> int:
        """Return how many tasks have ended."""
        where = "status IN ('success', 'error') AND sent_at IS NOT NULL"
        return self.sql(f"SELECT count(*) FROM tasks WHERE {where}")[0][0]

    def rate(self, count: int) -> float:
        """Return ended tasks a second, from the first end to the one that makes so many."""
        [(ended, seconds)] = self.sql(
            "SELECT count(*), extract(epoch FROM max(finished_at) - min(finished_at))::float8"
            " FROM (SELECT finished_at FROM tasks"
            " WHERE finished_at IS NOT NULL AND sent_at IS NOT NULL"
            " ORDER BY finished_at LIMIT %s) AS ends",
            count,
        )
        assert ended == count, f"{ended} of {count} tasks ended"
        return count / seconds


def bare_pipe(bench: Bench) -> dict[str, float]:
    """(a) messages/s of pika alone: no database, no HTTP."""
    bench.fresh()
    connection = pika.BlockingConnection(pika.URLParameters(bench.rabbit.url))
    connection.channel().queue_declare(
        PIPE_QUEUE, durable=True, arguments={"x-queue-type": "quorum"}
    )
    total = multiprocessing.Value("i", 0)
    url, count = bench.rabbit.url, bench.tasks
    consumers = [
        multiprocessing.Process(target=pipe_consume, args=(url, total, count)) for _ in range(2)
    ]
    publisher = multiprocessing.Process(target=pipe_publish, args=(url, count))
    for process in consumers:
        process.start()
    time.sleep(1)
    began = time.monotonic()
    publisher.start()
    bench.wait(lambda: total.value >= count, "pipe")
    seconds = time.monotonic() - began
    for process in (publisher, *consumers):
        process.join()
    connection.close()
    return {"pipe/s": count / seconds}


def drain(bench: Bench, name: str = "drain/s", **env: Any) -> dict[str, float]:
    """(b) tasks/s from the first to the last success of waiting tasks, two consumers."""
    consumers, producers = env.pop("consumers", 2), env.pop("producers", 1)
    waiting, finished = env.pop("waiting", bench.tasks), env.pop("finished", 0)
    bench.fresh()
    with bench.running("producer"):
        pass  # the schema
    if finished:
        bench.fill(finished, "success")
    bench.fill(waiting)
    with (
        bench.running("consumer", consumers, **env) as takers,
        bench.running("producer", producers, **env),
    ):
        if "HANDLER" not in env:
            bench.wait(lambda: bench.ran() >= bench.tasks, name)
        bench.wait(lambda: bench.ended() >= bench.tasks, name)
        for taker in takers:  # they would wait for a producer that stops before them
            taker.stop()
    return {name: bench.rate(bench.tasks)}


def backlogs(bench: Bench) -> dict[str, float]:
    """(f) the drain of the same number of tasks out of ever more, and beside finished rows."""
    results: dict[str, float] = {}
    for waiting in (10_000, 100_000, 1_000_000):
        say(f"backlog {waiting}")
        tasks, bench.tasks = bench.tasks, min(bench.tasks, waiting)
        results |= drain(bench, f"drain/s of {waiting}", waiting=waiting)
        bench.tasks = tasks
    say("backlog beside a million finished")
    return results | drain(bench, "drain/s beside 1000000 finished", finished=1_000_000)


def dead_letters(bench: Bench) -> dict[str, float]:
    """(g) failed tasks/s through the dead-letter queue."""
    return drain(bench, "dead letters/s", HANDLER="", PROCESSING_SECONDS=0, FAILURE_RATE=1)


def growth(bench: Bench) -> dict[str, float]:
    """What the table's hot indexes weigh after a million tasks have gone through them, without and
    with a snapshot as old as all of that, such as pg_dump's; and the drain meanwhile."""
    results: dict[str, float] = {}
    for case in ("", " under an old snapshot"):
        say(f"a million tasks{case}")
        with contextlib.ExitStack() as stack:
            if case:
                old = stack.enter_context(contextlib.closing(psycopg2.connect(bench.postgres.url)))
                old.set_session("REPEATABLE READ")
                old.cursor().execute("SELECT count(*) FROM pg_class")  # for tasks, TRUNCATE waits
            tasks, bench.tasks = bench.tasks, 1_000_000
            try:
                results |= drain(bench, f"drain/s of a million{case}")
            finally:
                bench.tasks = tasks
            for index in ("tasks_pending", "tasks_sent", "tasks_pkey"):
                size = bench.sql("SELECT pg_relation_size(%s::regclass)", index)[0][0]
                results[f"{index} MB{case}"] = size / 2**20
    return results


def scaling(bench: Bench) -> dict[str, float]:
    """What more consumers and producers add on this machine."""
    results: dict[str, float] = {}
    for consumers, producers in ((1, 1), (3, 1), (4, 1), (2, 2)):
        name = f"drain/s, {consumers} consumers, {producers} producers"
        results |= drain(bench, name, consumers=consumers, producers=producers)
    return results


def create_load(url: str, count: int) -> tuple[float, list[float]]:
    """Create tasks one by one over kept connections; return requests/s and their seconds.

    One thread and prepared bytes, so that the machine's two cores go to the server, not to this.
    """
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"text": TEXT}).encode()
    head = (
        f"POST /api/v1/create-task HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    )
    request = head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body
    selector = selectors.DefaultSelector()
    seconds: list[float] = []
    began = time.perf_counter()
    for _ in range(CLIENTS):
        client = socket.create_connection((host, int(port)))
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(client, selectors.EVENT_READ, [time.perf_counter(), b""])
        client.sendall(request)
    while len(seconds) < count:
        for key, _ in selector.select():
            key.data[1] += key.fileobj.recv(65536)
            top, _, rest = key.data[1].partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", top, re.IGNORECASE)
            if length is None or len(rest) < int(length[1]):
                continue
            assert top.startswith(b"HTTP/1.1 201"), top
            now = time.perf_counter()
            seconds.append(now - key.data[0])
            key.data[:] = now, b""
            key.fileobj.sendall(request)
    return len(seconds) / (time.perf_counter() - began), seconds


def load_process(url: str, count: int, queue: Any) -> None:
    """Run create_load in a process of its own."""
    queue.put(create_load(url, count))


def measure_creates(url: str, count: int, name: str) -> dict[str, float]:
    """Return rate and latencies of single creates against a URL."""
    queue: Any = multiprocessing.Queue()
    process = multiprocessing.Process(target=load_process, args=(url, count, queue))
    process.start()
    rate, seconds = queue.get()
    process.join()
    percentiles = statistics.quantiles(seconds, n=100)
    return {
        f"{name}/s": rate,
        f"{name} p50 ms": percentiles[49] * 1000,
        f"{name} p99 ms": percentiles[98] * 1000,
    }


def create(bench: Bench) -> dict[str, float]:
    """(c) creates one by one and in arrays, nothing dispatched meanwhile; and the peer's."""
    bench.fresh()
    results: dict[str, float] = {}
    no_broker = "amqp://tasks:tasks@127.0.0.1:1/%2F"
    with bench.running("producer"):
        pass
    service = servers.Service(
        "producer.py", bench.env | {"RABBITMQ_URL": no_broker}, bench.folder / "create.log"
    )
    service.start()
    try:
        probe = {"text": "ready"}
        url = f"{bench.url}/api/v1/create-task"
        bench.wait(lambda: post(url, probe) == 201, "producer")
        measure_creates(bench.url, 2000, "warm up")
        results |= measure_creates(bench.url, 20_000, "create")
        body = [{"text": TEXT}] * 500
        began = time.monotonic()
        for _ in range(60):
            assert bench.session.post(url, json=body, timeout=60).status_code == 201
        results["create in arrays of 500, tasks/s"] = 30_000 / (time.monotonic() - began)
    finally:
        service.stop()
    return results | (create_peer(bench) if bench.peer else {})


def post(url: str, body: Any) -> int:
    """POST once and return the status, 0 without an answer."""
    with contextlib.suppress(requests.RequestException):
        return requests.post(url, json=body, timeout=10).status_code
    return 0


def create_peer(bench: Bench) -> dict[str, float]:
    """The same creates through FastAPI, uvicorn and asyncpg on the same table."""
    bench.sql("TRUNCATE tasks")
    port = servers.free_port()
    peer = servers.Process(bench.folder / "peer.log")
    arguments = ["--port", str(port), "--no-access-log", "--app-dir", str(HERE)]
    env = {"DATABASE_URL": bench.postgres.url, "PATH": "/usr/bin:/bin"}
    peer.spawn([bench.peer, "-m", "uvicorn", "fastapi_peer:app", *arguments], env)
    try:
        url = f"http://127.0.0.1:{port}"
        bench.wait(lambda: post(f"{url}/api/v1/create-task", {"text": "ready"}) == 201, "peer")
        measure_creates(url, 2000, "warm up")
        return measure_creates(url, 20_000, "FastAPI create")
    finally:
        peer.stop()


def everything(bench: Bench) -> dict[str, float]:
    """(d) creates in arrays, dispatch and work all at once; and (h) the peak memory of each."""
    bench.fresh()
    url = f"{bench.url}/api/v1/create-task"
    with bench.running("producer") as producers, bench.running("consumer", 2) as consumers:
        body = [{"text": TEXT}] * 100
        for _ in range(bench.tasks // 100):
            assert bench.session.post(url, json=body, timeout=60).status_code == 201
        bench.wait(lambda: bench.ended() >= bench.tasks, "everything")
        memory = {
            f"peak MB {service.script}": max(peak_megabytes(each.pid) for each in services)
            for services in (producers, consumers)
            for service in services[:1]
        }
    [(seconds,)] = bench.sql(
        "SELECT extract(epoch FROM max(finished_at) - min(created_at))::float8 FROM tasks"
    )
    return {"everything at once, tasks/s": bench.tasks / seconds} | memory


def peak_megabytes(pid: int) -> float:
    """Return a process's peak resident memory."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def latency(bench: Bench) -> dict[str, float]:
    """(e) from create to success at 50 tasks/s, by the database's clock."""
    bench.fresh()
    url = f"{bench.url}/api/v1/create-task"
    with bench.running("producer"), bench.running("consumer", 2):
        for number in range(550):
            began = time.monotonic()
            assert bench.session.post(url, json={"text": TEXT}, timeout=10).status_code == 201
            if number == 49:
                bench.wait(lambda: bench.ended() == 50, "warm up")
                bench.sql("DELETE FROM tasks")
            time.sleep(max(0, 0.02 - (time.monotonic() - began)))
        bench.wait(lambda: bench.ended() >= 500, "latency")
    rows = bench.sql("SELECT extract(epoch FROM finished_at - created_at)::float8 FROM tasks")
    percentiles = statistics.quantiles([seconds for (seconds,) in rows], n=100)
    return {"latency p50 ms": percentiles[49] * 1000, "latency p99 ms": percentiles[98] * 1000}


PARTS: dict[str, Callable[[Bench], dict[str, float]]] = {
    "pipe": bare_pipe,
    "drain": drain,
    "create": create,
    "everything": everything,
    "latency": latency,
    "backlogs": backlogs,
    "dead": dead_letters,
    "scaling": scaling,
    "growth": growth,
}


def report(results: dict[str, float]) -> None:
    """Print the table, ratios to the bare pipe first where there is one."""
    pipe = results.get("pipe/s")
    print(f"{'measured':<44} {'value':>12} {'of the pipe':>12}")
    for name, value in results.items():
        per_second = name.endswith("/s") or "/s " in name or "/s," in name
        ratio = f"{value / pipe:12.2f}" if pipe and per_second else ""
        print(f"{name:<44} {value:12.1f} {ratio}")
    if "FastAPI create/s" in results:
        print(f"create of FastAPI's: {results['create/s'] / results['FastAPI create/s']:.2f}")


def main() -> None:
    """Run the parts that are asked for, and print and write their results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=30_000)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--peer", help="a Python with fastapi, uvicorn and asyncpg")
    parser.add_argument("--runs", type=int, default=1, help="print the median of so many")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tasks-bench-", dir="/var/tmp") as folder:
        pathlib.Path(folder).chmod(0o755)
        bench = Bench(pathlib.Path(folder), options.tasks, options.peer)
        bench.postgres.start()
        bench.rabbit.start()
        try:
            samples: dict[str, list[float]] = {}
            for number in range(options.runs):
                for part in options.only.split(","):
                    say(f"run {number + 1}: {part}")
                    for name, value in PARTS[part](bench).items():
                        samples.setdefault(name, []).append(value)
                        say(f"  {name}: {value:.1f}")
        finally:
            bench.rabbit.stop()
            bench.postgres.stop()
    results = {name: statistics.median(values) for name, values in samples.items()}
    report(results)
    machine = {"machine": platform.platform(), "runs": options.runs, "tasks": options.tasks}
    output = HERE.parent / ".run" / "benchmark.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(machine | {"results": results, "samples": samples}, indent=1))


if __name__ == "__main__":
    main()
