"""A project under measurement, of this checkout or of another one."""

import contextlib
import dataclasses
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from native import servers
from tests import load
from tests.stack import Stack, until

PART_SECONDS = 900


class Measured(Stack):
    """A project under measurement, whose consumers count their runs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.counts_folder = self.folder / "counts"
        self.counts_folder.mkdir()
        self.env |= {
            "HANDLER": "handlers:count",
            "COUNTS": str(self.counts_folder),
            "LOG_LEVEL": "WARNING",
        }

    @contextlib.contextmanager
    def running(self, script: str, count: int = 1, **env: Any) -> Iterator[list[servers.Service]]:
        """Run some processes of a script; of several producers, the first has the port."""
        services = [self.start(script, **env)]
        if script == "producer":
            self.wait_ready(services[0])
            env["HTTP_PORT"] = 0
        services += [self.start(script, **env) for _ in range(1, count)]
        try:
            yield services
        finally:
            for service in services:
                service.child.terminate()
            for service in services:
                service.stop()

    def fill(self, count: int, status: str = "pending") -> None:
        """Put rows into the table, past the API."""
        self.sql(
            "INSERT INTO tasks (text, status, finished_at)"
            " SELECT %s, %s::task_status, CASE WHEN %s = 'success' THEN now() END"
            " FROM generate_series(1, %s)",
            load.TEXT, status, status, count,
        )  # fmt: skip

    def wait_runs(self, count: int) -> None:
        """Wait for so many runs; to ask the table for them would slow what is measured."""

        def ran() -> int:
            counts = (path.read_bytes() for path in self.counts_folder.iterdir())
            return sum(int.from_bytes(count, "little") for count in counts)

        until(lambda: ran() >= count, PART_SECONDS, f"{count} runs")

    def wait_ends(self, count: int) -> None:
        """Wait until so many tasks have ended, those that fill() has ended aside."""
        where = "status IN ('success', 'error') AND sent_at IS NOT NULL"
        ended = lambda: self.sql(f"SELECT count(*) FROM tasks WHERE {where}")[0][0]  # noqa: E731
        until(lambda: ended() >= count, PART_SECONDS, f"{count} ends", pause=0.2)

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


@dataclasses.dataclass
class Side:
    """A checkout under measurement, on servers that it shares with another."""

    name: str
    postgres: servers.Postgres
    rabbit: servers.Rabbit
    tasks: int
    root: pathlib.Path = servers.HERE
    python: str = sys.executable
    peer: str | None = None
    rows: int = 10**7

    @contextlib.contextmanager
    def bench(self) -> Iterator[Measured]:
        """Yield a project with an empty database and no queues; show its logs if it fails."""
        with tempfile.TemporaryDirectory(prefix="tasks-bench-", dir="/var/tmp") as folder:
            bench = Measured(
                self.postgres, self.rabbit, pathlib.Path(folder), self.root, self.python
            )
            try:
                yield bench
            except BaseException:
                bench.print_logs()
                raise
            finally:
                bench.close()
