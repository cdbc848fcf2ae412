"""Child processes that end with their parent, their logs, and loopback ports for them."""

import contextlib
import functools
import itertools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator

HERE = pathlib.Path(__file__).resolve().parent.parent
START_SECONDS = 90
STOP_SECONDS = 60
LOG_BYTES = 10 * 2**20
# Below the ports that the kernel gives to outgoing connections, which could take one meanwhile.
PORTS = range(10_000, 32_000)
PORTS_OF_A_PROCESS = 500


class Missing(Exception):
    """Something this needs is not there; the text says what to install or free."""


def is_free(port: int) -> bool:
    """Tell whether a loopback port can be bound."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def claim_ports() -> tuple[socket.socket, range]:
    """Return a part of PORTS that no other process has, and the socket whose name claims it.

    The kernel frees such a name, which is no file, when the process ends, however that is.
    """
    for first in PORTS[::PORTS_OF_A_PROCESS]:
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0tasks-ports-{first}")
        except OSError:
            claim.close()
            continue
        return claim, range(first, first + PORTS_OF_A_PROCESS)
    raise Missing("expected fewer than 44 runs of tests and services at once on this machine")


@functools.cache
def own_ports() -> tuple[socket.socket, Iterator[int]]:
    """Return this process's claim and its ports, round and round."""
    claim, ports = claim_ports()
    return claim, itertools.cycle(ports)


def free_port() -> int:
    """Return a loopback port that nobody uses, and that no other run gets before it is bound."""
    return next(port for port in own_ports()[1] if is_free(port))


class Process:
    """A child in a session of its own: signals reach all of it, and Ctrl-C only its parent."""

    stop_signal = signal.SIGTERM

    def __init__(self, log: pathlib.Path) -> None:
        self.log = log
        self.child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The child's process id."""
        assert self.child is not None
        return self.child.pid

    def start(self) -> None:
        """Start the child; each kind of process has its own way."""
        raise NotImplementedError

    def spawn(self, command: list[str], env: dict[str, str], cwd: pathlib.Path = HERE) -> None:
        """Start a command with its output appended to the log."""
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                command,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def tied(self, command: list[str]) -> list[str]:
        """Return the command that also gets its stop signal when the parent dies, even by SIGKILL.

        An orphaned server would hold its port and data against every later start. The kernel
        watches the thread that started the child: start none from a thread that ends before it.
        """
        return ["setpriv", f"--pdeathsig={self.stop_signal.name}", *command]

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Wait for a server to answer; raise with the end of its log if it does not."""
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            if self.poll() is not None or time.monotonic() > deadline:
                self.kill()
                tail = self.log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"{type(self).__name__} did not start: {self.log}:\n{tail}")
            time.sleep(0.05)

    def rotate_log(self) -> None:
        """Move the content of a log longer than LOG_BYTES to its .1, in place of what that had.

        The child goes on writing to the same file, at its new end since it appends. What it writes
        between copy and cut is lost, a line or two of ten megabytes.
        """
        with contextlib.suppress(OSError):  # a full disk stops nothing else
            if self.log.stat().st_size > LOG_BYTES:
                shutil.copyfile(self.log, f"{self.log}.1")
                os.truncate(self.log, 0)

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        return self.child.poll() if self.child else 0

    def signal(self, number: int) -> None:
        """Send a signal to the child and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def stop(self, timeout: float = STOP_SECONDS) -> int:
        """Ask the child to end, SIGKILL it after the time-out; return its exit code."""
        if self.child is None or self.child.poll() is not None:
            return self.poll() or 0
        self.child.send_signal(self.stop_signal)
        try:
            return self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL the child and all that it started, and reap it; return its exit code."""
        if self.child is None:
            return 0
        self.signal(signal.SIGKILL)
        return self.child.wait()
