"""Private PostgreSQL and RabbitMQ servers from the distribution's packages, and the project's own
scripts, as child processes in a folder and on loopback ports: for run.py, tests, benchmark."""

import contextlib
import glob
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

from native.processes import HERE, LOG_BYTES, STOP_SECONDS, Missing, Process, free_port

AMQP_HEADER = b"AMQP\0\0\x09\x01"
POSTGRES_SETTINGS = {
    "shared_buffers": "128MB",
    "max_connections": "100",
    # After a checkpoint the first change of a page writes all of it to the WAL. A drain out of
    # millions of rows changes three pages a task: with 1 GB it is always just after one.
    "max_wal_size": "4GB",
    "wal_compression": "lz4",
}
# The broker of Debian 12 knows no x-consumer-timeout; a task may run for hours all the same.
RABBIT_CONFIG = f"""
consumer_timeout = 2000000000
log.file.level = warning
log.file.rotation.size = {LOG_BYTES}
log.file.rotation.count = 1
"""


def write_private(path: pathlib.Path, text: str) -> None:
    """Write a file that holds a password: only its owner may read it."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


class Postgres(Process):
    """A PostgreSQL cluster in a folder, on a loopback port, with the database `tasks`."""

    stop_signal = signal.SIGINT  # fast shutdown: does not wait for clients to leave

    def __init__(
        self,
        folder: pathlib.Path,
        password: str = "tasks",
        settings: dict[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / "postgres.log")
        self.folder = folder
        self.data = folder / "data"
        self.port = free_port()
        self.password = password
        self.settings = POSTGRES_SETTINGS | (settings or {})
        self.bin = postgres_bin()
        self.url = f"postgresql://tasks:{password}@127.0.0.1:{self.port}/tasks"

    def start(self) -> None:
        """Start the server, in a new cluster if there is none, and wait until it answers."""
        if not self.data.exists():
            self.make_cluster()
        settings = self.settings | {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        server = [f"{self.bin}/postgres", "-D", str(self.data), *options]
        # The kernel forgets the tie when the user changes, so it comes after that.
        self.spawn([*self.user(), *self.tied(server)], env={})
        probe = [f"{self.bin}/pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        self.wait_until(lambda: subprocess.run(probe).returncode == 0)

    def signal(self, number: int) -> None:
        """Send a signal to the server and its backends, which have left its process group."""
        pids = [self.pid]
        with contextlib.suppress(OSError):
            children = pathlib.Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
            pids += map(int, children.split())
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def make_cluster(self) -> None:
        """Make the cluster with one role and one database, both called tasks; only a whole one gets
        its name, so that an interrupted start does no harm."""
        new = self.folder / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        password = self.folder / "password"
        write_private(password, self.password)
        if os.geteuid() == 0:
            for path in (new, password):
                shutil.chown(path, "postgres", "postgres")
        initdb = f"{self.bin}/initdb --no-sync -E UTF8 --locale=C.UTF-8 -U tasks -A scram-sha-256"
        self.run([*initdb.split(), f"--pwfile={password}", "-D", str(new)])
        password.unlink()
        single = [f"{self.bin}/postgres", "--single", "-D", str(new), "postgres"]
        self.run(single, "CREATE DATABASE tasks;\n")
        new.rename(self.data)

    def run(self, command: list[str], text: str = "") -> None:
        """Run one of PostgreSQL's programs to its end, its output in the log."""
        with self.log.open("ab") as log:
            subprocess.run(
                [*self.user(), *command],
                input=text.encode(),
                stdout=log,
                stderr=log,
                cwd="/",
                check=True,
            )

    def user(self) -> list[str]:
        """Return the words that run a command as `postgres`: the server refuses to be root.

        Below a folder that this user cannot enter, such as /root, it is given the one capability
        that lets it.
        """
        if os.geteuid() != 0:
            return []
        words = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        if subprocess.run([*words, "test", "-x", str(self.folder)], cwd="/").returncode != 0:
            words += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
        return words


class Rabbit(Process):
    """A RabbitMQ node in a folder, on a loopback port, with an Erlang name server of its own."""

    def __init__(
        self,
        folder: pathlib.Path,
        password: str = "tasks",
        config: str = "",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder / "rabbit.log")
        self.folder = folder
        self.port = free_port()
        self.epmd: subprocess.Popen[bytes] | None = None
        self.sbin = rabbit_sbin()
        self.url = f"amqp://tasks:{password}@127.0.0.1:{self.port}/%2F"
        user = f"default_user = tasks\ndefault_pass = {password}\n"
        listen = f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
        write_private(folder / "rabbitmq.conf", listen + user + RABBIT_CONFIG + config)
        (folder / "enabled_plugins").write_text("[].\n")
        self.env = {
            "HOME": str(folder),
            "PATH": f"{self.sbin}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "tasks@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_PID_FILE": str(folder / "rabbit.pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def start(self) -> None:
        """Start the name server and the node, and wait until it speaks AMQP."""
        self.end_epmd()
        epmd = ["setpriv", "--pdeathsig=KILL", find_epmd(), "-address", "127.0.0.1"]
        epmd += ["-port", self.env["ERL_EPMD_PORT"]]
        self.epmd = subprocess.Popen(
            epmd, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.spawn(self.tied([f"{self.sbin}/rabbitmq-server"]), self.env, self.folder)
        self.wait_until(self.speaks_amqp)

    def speaks_amqp(self) -> bool:
        """Tell whether the node answers the protocol header with its Connection.Start."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as client:
                client.settimeout(1)
                client.sendall(AMQP_HEADER)
                return client.recv(1) == b"\x01"
        except OSError:
            return False

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on this node and return what it printed; it takes a second or two."""
        command = [f"{self.sbin}/rabbitmqctl", "-q", *arguments]
        return subprocess.run(
            command, env=self.env, cwd=self.folder, check=True, capture_output=True, text=True
        ).stdout

    def stop(self, timeout: float = STOP_SECONDS) -> int:
        """Stop the node, what it leaves behind, and its name server."""
        code = super().stop(timeout)
        self.kill()
        return code

    def kill(self) -> int:
        """SIGKILL the node and its name server."""
        code = super().kill()
        self.end_epmd()
        return code

    def wipe(self) -> None:
        """Delete all that the stopped node has stored."""
        shutil.rmtree(self.folder / "mnesia")

    def end_epmd(self) -> None:
        """End the name server and reap it."""
        if self.epmd is not None:
            self.epmd.kill()
            self.epmd.wait()
            self.epmd = None


class Service(Process):
    """One of the project's scripts as a child, or of another checkout's."""

    def __init__(
        self,
        script: str,
        env: dict[str, str],
        log: pathlib.Path,
        root: pathlib.Path = HERE,
        python: str = sys.executable,
    ) -> None:
        super().__init__(log)
        self.script = script
        self.env = env
        self.command = [python, str(root / script)]

    def start(self) -> None:
        """Start the script; it may need a moment until it answers."""
        self.spawn(self.tied(self.command), os.environ | {"PYTHONUNBUFFERED": "1"} | self.env)


def is_ready(host: str, port: int) -> bool:
    """Tell whether the producer there says that all it needs is ok: while only the broker is away,
    it answers 200 as well, since it takes tasks."""
    client = http.client.HTTPConnection(host, port, timeout=20)
    try:  # no urllib: it would ask a proxy that the environment names
        client.request("GET", "/readyz")
        answer = client.getresponse()
        return answer.status == 200 and set(json.load(answer).values()) == {"ok"}
    except (OSError, http.client.HTTPException, ValueError, AttributeError):
        return False  # or it is no producer
    finally:
        client.close()


def postgres_bin() -> str:
    """Return the folder of the newest PostgreSQL server programs."""
    folders = glob.glob("/usr/lib/postgresql/*/bin/postgres")
    newest = max(
        folders, key=lambda path: int(path.split("/")[4]), default=shutil.which("postgres")
    )
    if newest is None or shutil.which("initdb", path=os.path.dirname(newest)) is None:
        raise Missing("PostgreSQL is not installed: expected the package postgresql")
    return os.path.dirname(newest)


def rabbit_sbin() -> str:
    """Return the folder of RabbitMQ's own scripts; the wrappers on the PATH switch users."""
    folders = sorted(glob.glob("/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin"))
    if not folders:
        raise Missing("RabbitMQ is not installed: expected the package rabbitmq-server")
    return folders[-1]


def find_epmd() -> str:
    """Return Erlang's name server program."""
    found = shutil.which("epmd") or next(iter(glob.glob("/usr/lib/erlang/erts-*/bin/epmd")), None)
    if found is None:
        raise Missing("Erlang's epmd is not installed: expected the package erlang-base")
    return found
