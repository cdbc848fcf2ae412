"""What the supervisor of the native mode does to its children's logs and ports."""

import os
import pathlib
import subprocess
import sys

import pytest

from native import processes, servers
from tests.stack import until


def test_a_log_is_cut_while_its_child_goes_on_writing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 10_000)
    child = processes.Process(tmp_path / "child.log")
    child.spawn(child.tied(["sh", "-c", "while echo line; do :; done"]), dict(os.environ))
    older = tmp_path / "child.log.1"
    try:
        for _ in range(2):
            until(lambda: child.log.stat().st_size > 10_000)
            older.unlink(missing_ok=True)
            child.rotate_log()
            assert older.read_text().startswith("line\nline\n")
        child.signal(19)  # SIGSTOP
        child.rotate_log()
        assert child.log.stat().st_size <= 10_000 and child.poll() is None
        child.signal(18)  # SIGCONT
        until(lambda: child.log.read_bytes().endswith(b"line\n"))
        assert b"\0" not in child.log.read_bytes()  # it appends: no hole where the old content was
    finally:
        child.kill()


def test_the_brokers_own_log_is_cut_too(tmp_path: pathlib.Path) -> None:
    verbose = "log.file.level = debug\nlog.file.rotation.size = 4000\n"
    rabbit = servers.Rabbit(tmp_path / "rabbit", config=verbose)
    rabbit.start()
    try:
        older = rabbit.folder / "tasks@localhost.log.0"
        until(older.exists)
        rabbit.ctl("status")  # more lines
        logs = {path.name for path in rabbit.folder.glob("tasks@localhost.log*")}
        assert logs <= {"tasks@localhost.log", older.name}
        assert older.stat().st_size < 10_000
    finally:
        rabbit.stop()


def test_no_two_processes_are_given_one_port() -> None:
    command = "from native import processes; print(*[processes.free_port() for _ in range(300)])"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", f"{command}; input()"],
            cwd=servers.HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    ports = [port for child in children for port in child.stdout.readline().split()]
    for child in children:
        child.communicate("\n")
    ports += map(str, (processes.free_port() for _ in range(300)))
    assert len(set(ports)) == 1200
