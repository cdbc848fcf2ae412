"""A primary and a streaming standby of PostgreSQL on loopback, that change places."""

import pathlib
import shutil
import signal

from native.servers import Postgres
from tests.stack import run_sql, until

# A COMMIT waits for any standby.
SYNCHRONOUS = "ALTER SYSTEM SET synchronous_standby_names = '*'"


class Pair:
    """Two clusters, one a standby of the other; url is the primary's."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.primary = Postgres(folder / "a")
        self.standby = Postgres(folder / "b")
        self.ports = self.primary.port, self.standby.port  # they stay with their clusters

    @property
    def url(self) -> str:
        """The first database of the primary."""
        return self.primary.url

    def url_of(self, database: str) -> str:
        """Return what DATABASE_URL is for a database of whichever takes writes."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"postgresql://tasks:tasks@{hosts}/{database}?target_session_attrs=read-write"

    def start(self) -> None:
        """Start both."""
        self.primary.start()
        self.follow()

    def follow(self) -> None:
        """Make a new standby of the primary, with a slot of its own, and wait until it streams."""
        shutil.rmtree(self.standby.data, ignore_errors=True)
        self.standby.data.mkdir(mode=0o700)
        shutil.chown(self.standby.data, *self.owner())
        backup = f"{self.standby.bin}/pg_basebackup --write-recovery-conf --create-slot --slot=pair"
        words = ["--no-sync", "--checkpoint=fast", "-d", self.primary.url]
        self.standby.run([*backup.split(), *words, "-D", str(self.standby.data)])
        self.standby.start()
        query = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'"
        until(lambda: run_sql(self.url, query) == [(1,)], what="the standby streams")

    def owner(self) -> tuple[str, str]:
        """Return who owns the data of the primary."""
        return self.primary.data.owner(), self.primary.data.group()

    def wait_for_standby(self) -> None:
        """Have every COMMIT from now on wait for the standby."""
        run_sql(self.url, SYNCHRONOUS)
        run_sql(self.url, "SELECT pg_reload_conf()")
        query = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        until(lambda: run_sql(self.url, query) == [(1,)], what="the standby is synchronous")

    def cut_off(self) -> None:
        """Have the standby receive nothing more, as if the line between the two were cut."""
        run_sql(self.standby.url, "ALTER SYSTEM SET primary_conninfo = ''")
        run_sql(self.standby.url, "SELECT pg_reload_conf()")
        query = "SELECT count(*) FROM pg_stat_replication"
        until(lambda: run_sql(self.url, query) == [(0,)], what="the standby is cut off")

    def promote(self) -> None:
        """Make the standby the primary, and wait until it takes writes; what it was waits for
        nobody."""
        control = f"{self.standby.bin}/pg_ctl promote --wait --silent -D"
        self.standby.run([*control.split(), str(self.standby.data)])
        self.primary, self.standby = self.standby, self.primary

    def stop(self) -> None:
        """End both, a frozen one too."""
        for server in (self.standby, self.primary):
            if server.poll() is None:
                server.signal(signal.SIGCONT)
                server.stop()
