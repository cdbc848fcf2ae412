"""The servers of docker-compose.yml for the tests, with the interface of servers.py."""

import pathlib
import shutil
import socket
import subprocess
import time
import uuid
from typing import Any

import psycopg2

from native import servers

HAS_DOCKER = (
    shutil.which("docker") is not None
    and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
)


def docker(*arguments: str) -> str:
    """Run a docker command and return what it printed."""
    return subprocess.run(
        ["docker", *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


class Container:
    """A container whose port is published on loopback."""

    image = ""
    arguments: tuple[str, ...] = ()

    def __init__(self, folder: pathlib.Path, settings: dict[str, str], volume: str) -> None:
        self.port = servers.free_port()
        self.name = f"tasks-test-{uuid.uuid4().hex[:12]}"
        options = [word for pair in settings.items() for word in ("-e", "=".join(pair))]
        volumes = ["-v", f"{self.name}:{volume}"]
        docker(
            "create",
            "--name",
            self.name,
            "--hostname",
            self.name,
            *self.ports(),
            *options,
            *volumes,
            self.image,
            *self.arguments,
        )

    def ports(self) -> list[str]:
        """Return the options that publish the server's port."""
        raise NotImplementedError

    def start(self) -> None:
        """Start the container and wait until its server answers."""
        docker("start", self.name)
        deadline = time.monotonic() + servers.START_SECONDS
        while not self.answers():
            if time.monotonic() > deadline:
                raise RuntimeError(docker("logs", "--tail", "20", self.name))
            time.sleep(0.1)

    def answers(self) -> bool:
        """Tell whether the server works."""
        raise NotImplementedError

    def stop(self, timeout: float = 30) -> None:
        """Stop and remove the container with its data."""
        docker("rm", "--force", "--volumes", self.name)
        docker("volume", "rm", self.name)

    def kill(self) -> None:
        """SIGKILL the server; its data stays."""
        docker("kill", self.name)

    def signal(self, number: int) -> None:
        """Freeze or thaw the server, for SIGSTOP and SIGCONT."""
        docker("pause" if number == 19 else "unpause", self.name)


class Postgres(Container):
    """PostgreSQL 17."""

    image = "postgres:17"
    arguments = ("postgres", "-c", "max_connections=100")

    def __init__(self, folder: pathlib.Path, settings: dict | None = None) -> None:
        user = {"POSTGRES_USER": "tasks", "POSTGRES_PASSWORD": "tasks", "POSTGRES_DB": "tasks"}
        super().__init__(folder, user, "/var/lib/postgresql/data")
        self.url = f"postgresql://tasks:tasks@127.0.0.1:{self.port}/tasks"

    def ports(self) -> list[str]:
        return ["-p", f"127.0.0.1:{self.port}:5432"]

    def answers(self) -> bool:
        try:
            psycopg2.connect(self.url, connect_timeout=2).close()
        except psycopg2.OperationalError:
            return False
        return True


class Rabbit(Container):
    """RabbitMQ 4."""

    image = "rabbitmq:4-management"

    def __init__(self, folder: pathlib.Path, config: str = "") -> None:
        user = {"RABBITMQ_DEFAULT_USER": "tasks", "RABBITMQ_DEFAULT_PASS": "tasks"}
        super().__init__(folder, user, "/var/lib/rabbitmq")
        self.url = f"amqp://tasks:tasks@127.0.0.1:{self.port}/%2F"
        if config:
            path = folder / "30-test.conf"
            path.write_text(config)
            path.chmod(0o644)
            docker("cp", str(path), f"{self.name}:/etc/rabbitmq/conf.d/30-test.conf")

    def ports(self) -> list[str]:
        return ["-p", f"127.0.0.1:{self.port}:5672"]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as client:
                client.settimeout(1)
                client.sendall(servers.AMQP_HEADER)
                return client.recv(1) == b"\x01"
        except OSError:
            return False

    def wipe(self) -> None:
        """Delete all that the stopped node has stored."""
        remove = ("sh", "-c", "rm -rf /data/mnesia/*")
        docker(
            "run", "--rm", "--volume", f"{self.name}:/data", "--entrypoint", "", self.image, *remove
        )

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl in the container."""
        user: Any = ("--user", "rabbitmq")
        return docker("exec", *user, self.name, "rabbitmqctl", "-q", *arguments)
