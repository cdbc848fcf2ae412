"""The part of the benchmark that measures other task queues: the drain of waiting tasks by two
worker processes, a durable row a task, and the latency at 50 tasks/s. tests/peers has the peers."""

import contextlib
import dataclasses
import functools
import pathlib
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator

from native import servers
from tests import load
from tests.measured import PART_SECONDS, Measured, Side
from tests.stack import until

Results = dict[str, float]

ENVIRONMENT = servers.HERE / ".run" / "venv-peers"
REQUIREMENTS = servers.HERE / "tests" / "peers" / "requirements.txt"
WORKERS = 2
RATE = 50  # tasks/s
LATENCIES = 500
WARM = 50
QUEUES = [
    "peer.celery",
    "peer.dramatiq",
    "peer.dramatiq.DQ",
    "peer.dramatiq.XQ",
    "peer.taskiq",
    "taskiq.dead_letter",
]
PEER_ROWS = """
CREATE TABLE peer_rows (
    number     bigint      PRIMARY KEY,
    created_at timestamptz NOT NULL,
    ended_at   timestamptz NOT NULL DEFAULT clock_timestamp()
)
"""
OWN_ROWS = "SELECT number, created_at, ended_at FROM peer_rows"
PGQUEUER_LOG = """
SELECT job_id, queued.created, ended.created
FROM pgqueuer_log AS queued JOIN pgqueuer_log AS ended USING (job_id)
WHERE queued.status = 'queued' AND ended.status = 'successful'
"""
PROCRASTINATE_EVENTS = """
SELECT job_id, deferred.at, succeeded.at
FROM procrastinate_events AS deferred JOIN procrastinate_events AS succeeded USING (job_id)
WHERE deferred.type = 'deferred' AND succeeded.type = 'succeeded'
"""


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer: its module, the command of its workers, and where its ended tasks are."""

    name: str
    package: str
    module: str
    command: str
    processes: int = 1  # commands; of one the two workers are children
    rows: str = OWN_ROWS  # number, when it was created and when it ended
    share: float = 1.0  # of the tasks that ours gets


PEERS = [
    Peer(
        f"PgQueuer, batches of {size}",
        "pgqueuer",
        "pgqueuer_peer",
        f"python -m tests.peers.pgqueuer_peer {size}",
        processes=WORKERS,
        rows=PGQUEUER_LOG,
    )
    for size in (100, 10)
] + [
    Peer(
        "Dramatiq",
        "dramatiq",
        "dramatiq_peer",
        f"dramatiq tests.peers.dramatiq_peer --processes {WORKERS} --threads 8",
        share=0.3,
    ),
    Peer(
        "Taskiq",
        "taskiq",
        "taskiq_peer",
        f"taskiq worker tests.peers.taskiq_peer:broker --workers {WORKERS} --no-parse"
        " --log-level WARNING",
        share=0.3,
    ),
    Peer(
        "Celery",
        "celery",
        "celery_peer",
        "celery -A tests.peers.celery_peer worker --pool threads --concurrency 8 --loglevel WARNING"
        " --without-gossip --without-mingle --without-heartbeat",
        processes=WORKERS,
        share=0.3,
    ),
    Peer(
        "Procrastinate",
        "procrastinate",
        "procrastinate_peer",
        "python -m tests.peers.procrastinate_peer",
        processes=WORKERS,
        rows=PROCRASTINATE_EVENTS,
        share=0.1,
    ),
]


def environment() -> pathlib.Path:
    """Return the folder of the peers' programs; install the peers first, once for each list."""
    text = REQUIREMENTS.read_bytes() + sys.version.encode()
    marker = ENVIRONMENT / f"installed-{zlib.crc32(text)}"
    if not marker.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True, stdout=sys.stderr)
        marker.touch()
    return ENVIRONMENT / "bin"


@functools.cache
def versions() -> dict[str, str]:
    """Return the version of each required package."""
    lines = [line.split("==") for line in REQUIREMENTS.read_text().split()]
    return {name.partition("[")[0]: version for name, version in lines}


@dataclasses.dataclass
class Run:
    """A peer on the servers of a benchmark."""

    peer: Peer
    bench: Measured
    processes: list[servers.Process] = dataclasses.field(default_factory=list)

    def env(self) -> dict[str, str]:
        """Return the environment of the peer's processes."""
        names = ("DATABASE_URL", "RABBITMQ_URL")
        urls = {name: self.bench.env[name] for name in names}
        return urls | {"PATH": f"{environment()}:/usr/bin:/bin"}

    def send(self, first: int, count: int, rate: int | None = None) -> None:
        """Create tasks by a process of its own, which makes first what they need."""
        words = [self.peer.module, str(first), str(count)] + [str(rate)] * (rate is not None)
        command = [str(environment() / "python"), "-m", "tests.peers.send", *words]
        subprocess.run(command, env=self.env(), cwd=servers.HERE, check=True)

    @contextlib.contextmanager
    def workers(self) -> Iterator[None]:
        """Run the two workers; show their logs if what is measured meanwhile fails."""
        logs = [self.bench.folder / f"peer-{each}.log" for each in range(self.peer.processes)]
        self.processes = [servers.Process(log) for log in logs]
        program, *words = self.peer.command.split()
        try:
            for process in self.processes:
                process.spawn(process.tied([str(environment() / program), *words]), self.env())
            yield
        except BaseException:
            for log in filter(pathlib.Path.exists, logs):
                print(log.read_text("utf-8", "replace")[-4000:], file=sys.stderr)
            raise
        finally:
            for process in self.processes:
                process.kill()

    def ended(self) -> int:
        """Return how many tasks have ended."""
        return self.bench.sql(f"SELECT count(*) FROM ({self.peer.rows}) AS rows")[0][0]

    def wait_ends(self, count: int) -> None:
        """Wait for the ends, and look seldom: this is not part of the peer."""

        def are_there() -> bool:
            assert all(process.poll() is None for process in self.processes), "a worker ended"
            return self.ended() >= count

        until(are_there, PART_SECONDS, f"{count} ends", pause=1)

    def delete_queues(self) -> None:
        """Delete what the peer has declared in the broker."""
        with self.bench.channel() as channel:
            for name in QUEUES:
                channel.queue_delete(name)


@contextlib.contextmanager
def running(side: Side, peer: Peer) -> Iterator[Run]:
    """Yield a peer with an empty database and no queues."""
    with side.bench() as bench:
        bench.sql(PEER_ROWS)
        run = Run(peer, bench)
        run.delete_queues()
        try:
            yield run
        finally:
            run.delete_queues()


def drain(side: Side, peer: Peer) -> Results:
    """Tasks/s from the first to the last end of waiting tasks, by the database's clock."""
    count = int(side.tasks * peer.share)
    with running(side, peer) as run:
        run.send(0, count)
        run.bench.sql("VACUUM ANALYZE")
        run.bench.sql("CHECKPOINT")
        with run.workers():
            run.wait_ends(count)
        [(ended, seconds)] = run.bench.sql(
            "SELECT count(*), extract(epoch FROM max(ended) - min(ended))::float8"
            f" FROM ({peer.rows}) AS rows (number, created, ended)"
        )
    assert ended == count, f"{ended} of {count} tasks ended"
    return {f"{label(peer)}, {count} tasks, tasks/s": count / seconds}


def latency(side: Side, peer: Peer) -> Results:
    """From create to the end at 50 tasks/s."""
    with running(side, peer) as run:
        run.send(0, WARM)
        with run.workers():
            run.wait_ends(WARM)
            run.send(WARM, LATENCIES, RATE)
            run.wait_ends(WARM + LATENCIES)
        rows = run.bench.sql(
            "SELECT extract(epoch FROM ended - created)::float8"
            f" FROM ({peer.rows}) AS rows (number, created, ended)"
            " ORDER BY number OFFSET %s", WARM,
        )  # fmt: skip
    p50, p99 = load.percentiles([seconds for (seconds,) in rows])
    return {f"{label(peer)} p50 ms": p50, f"{label(peer)} p99 ms": p99}


def label(peer: Peer) -> str:
    """Return the peer's name with its version."""
    name, comma, rest = peer.name.partition(",")
    return f"{name} {versions()[peer.package]}{comma}{rest}"


def name_of(result: str) -> str | None:
    """Return the peer whose drain this result is, None for any other."""
    found = re.fullmatch(r"(.+), \d+ tasks, tasks/s", result)
    return found and found[1]


def peers(side: Side) -> Results:
    """Measure each peer."""
    results: Results = {}
    for peer in PEERS:
        results |= drain(side, peer)
        results |= latency(side, peer)
    return results
