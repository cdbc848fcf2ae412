"""Runs the whole service without containers: private PostgreSQL and RabbitMQ in `.run`, one
producer and two consumers, kept alive until a signal.

Run it with `bash run.sh --native`, end it with Ctrl-C or `bash run.sh down`. Exit codes: 0 stopped,
1 crash, 2 bad configuration."""

import contextlib
import os
import pathlib
import signal
import sys
import time

from native.processes import HERE, START_SECONDS, STOP_SECONDS, Missing, Process
from native.servers import Postgres, Rabbit, Service, is_ready


def read_env_file(path: pathlib.Path) -> dict[str, str]:
    """Return the settings of a file of NAME=value lines, the value in quotes or not."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    pairs = [line.partition("=") for line in lines if line.strip() and not line.startswith("#")]
    return {name.strip(): value.strip().strip("'\"") for name, _, value in pairs}


class Project:
    """The servers and services of one project folder, in its `.run`."""

    def __init__(self, root: pathlib.Path) -> None:
        self.run = root / ".run"
        self.run.mkdir(exist_ok=True)
        self.pid_file = self.run / "native.pid"
        self.env = read_env_file(root / ".env") | dict(os.environ)
        host = self.env.get("HTTP_HOST") or "127.0.0.1"
        self.host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        self.address = f"http://{self.host}:{self.env.get('HTTP_PORT')}"
        self.processes: list[Process] = []
        self.stop_asked = False

    def running_pid(self) -> int | None:
        """Return the pid of the supervisor that runs this folder already; raise
        PermissionError if that is another user's."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(self.pid_file.read_text())
            words = pathlib.Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            if "native.run" in words and os.path.samefile(f"/proc/{pid}/cwd", HERE):
                return pid
        return None

    def make(self) -> None:
        """Prepare servers and services."""
        passwords = [self.env.get(f"{name}_PASSWORD", "tasks") for name in ("POSTGRES", "RABBITMQ")]
        postgres = Postgres(self.run / "postgres", password=passwords[0])
        rabbit = Rabbit(self.run / "rabbit", password=passwords[1])
        env = self.env | {
            "DATABASE_URL": postgres.url,
            "RABBITMQ_URL": rabbit.url,
            "PRODUCER_URL": self.address,
            "ALLOWED_HOSTS": f"{self.host},{self.env.get('ALLOWED_HOSTS', '')}",
        }
        services = [
            Service(f"{role}.py", env, self.run / f"{name}.log")
            for name, role in (
                ("producer", "producer"),
                ("consumer-1", "consumer"),
                ("consumer-2", "consumer"),
            )
        ]
        self.processes = [postgres, rabbit, *services]

    def start(self) -> None:
        """Start everything in order and wait until a task can be created."""
        for process in self.processes:
            process.start()
        deadline = time.monotonic() + START_SECONDS
        while not self.stop_asked and not is_ready(self.host, int(self.env["HTTP_PORT"])):
            self.revive()
            if time.monotonic() > deadline:
                raise RuntimeError(f"not ready in {START_SECONDS} seconds, see {self.run}/*.log")
            self.pause(0.2)

    def revive(self) -> None:
        """Start again what has died; bad configuration ends the project instead."""
        for process in self.processes:
            code = process.poll()
            if code is None:
                continue
            if code == 2 and isinstance(process, Service):
                tail = process.log.read_text("utf-8", "replace").splitlines()[-1:]
                raise Missing(f"{process.script} did not start: {' '.join(tail)}")
            print(f"{process.log.stem} ended with {code}, starting it again", file=sys.stderr)
            self.pause(1)
            process.start()

    def supervise(self) -> None:
        """Keep everything running, and the logs short, until a signal asks to stop."""
        while not self.stop_asked:
            self.revive()
            for process in self.processes:
                process.rotate_log()
            self.pause(0.5)

    def pause(self, seconds: float) -> None:
        """Sleep, less if a signal comes."""
        deadline = time.monotonic() + seconds
        while not self.stop_asked and time.monotonic() < deadline:
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop everything: consumers, producer, broker, database. The services have STOP_SECONDS
        and ten more; what is no number has ended them with 2."""
        seconds = 0.0
        with contextlib.suppress(ValueError):
            seconds = float(self.env.get("STOP_SECONDS") or 0)
        services = self.processes[2:]
        for process in services:
            if process.child is not None and process.poll() is None:
                process.child.terminate()
        for process in reversed(self.processes):
            process.stop(max(STOP_SECONDS, seconds + 10))

    def ask_to_stop(self, *_: object) -> None:
        """Handle a signal: stop in order; at the second one, at once."""
        if self.stop_asked:
            for process in self.processes:
                process.kill()
            os._exit(1)
        self.stop_asked = True

    def print_welcome(self) -> None:
        """Say where it runs, what to try and how to stop."""
        api = f"{self.address}/api/v1"
        curl = "curl"
        if self.env.get("API_TOKEN"):
            curl += ' -H "Authorization: Bearer $API_TOKEN"'
        print(
            f"\nThe console: {self.address}/\n\n"
            f"The task service runs at {self.address}, its logs and data are in {self.run}.\n\n"
            f'  {curl} -X POST {api}/create-task -d \'{{"text": "any text"}}\'\n'
            f"  {curl} '{api}/get-task-data?taskId=<the taskId of the answer>'\n\n"
            "Stop it with Ctrl-C, or with `sudo bash run.sh down` from another terminal.",
            flush=True,
        )


def up(project: Project) -> None:
    """Run a project until a signal; run.sh has checked HTTP_PORT."""
    if project.running_pid():
        raise Missing(
            f"it runs already, with pid {project.running_pid()}: stop it with run.sh down"
        )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, project.ask_to_stop)
    project.pid_file.write_text(str(os.getpid()))
    try:
        project.make()
        project.start()
        if not project.stop_asked:
            project.print_welcome()
        project.supervise()
    finally:
        project.stop()
        project.pid_file.unlink()
    print("stopped", flush=True)


def down(project: Project) -> None:
    """Stop the supervisor that runs this project, and wait for it."""
    pid = project.running_pid()
    if pid is None:
        print("not running")
        return
    os.kill(pid, signal.SIGTERM)
    while project.running_pid() == pid:
        time.sleep(0.1)
    print("stopped")


def main() -> None:
    """Run the project, or stop it with the word down."""
    root = pathlib.Path(os.environ.get("PROJECT_ABSOLUTE_PATH") or HERE)
    command = sys.argv[1:] or ["up"]
    if command not in (["up"], ["down"]):
        print(f"usage: python -m native.run [up|down], got {' '.join(command)}", file=sys.stderr)
        sys.exit(2)
    try:
        (up if command == ["up"] else down)(Project(root))
    except Missing as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except PermissionError as error:
        print(f"started by another user, use sudo: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
