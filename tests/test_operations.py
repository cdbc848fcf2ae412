"""The recipes of docs/operations.md, as they stand there."""

import os
import pathlib
import re
import subprocess
from typing import Any

import pytest

from native import servers
from tests.stack import Stack, until

TEXT = (servers.HERE / "docs/operations.md").read_text()
TIMES = {"LEASE_SECONDS": 8}  # the rescue begins after half of it


def recipes(heading: str) -> list[str]:
    """Return the commands below a heading, block by block."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def run(stack: Stack, commands: str) -> None:
    """Run commands as an operator of this stack would, in its folder."""
    commands = commands.replace("http://127.0.0.1:8080", stack.url)
    env: dict[str, Any] = os.environ | stack.rabbit.env | {"DATABASE_URL": stack.database_url}
    env["PATH"] = f"{servers.postgres_bin()}:{stack.rabbit.env['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=stack.folder, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def lose(stack: Stack) -> None:
    """End all processes and leave an empty database."""
    for each in stack.processes:
        each.kill()
    stack.administer(f"DROP DATABASE {stack.database} WITH (FORCE)")
    stack.administer(f"CREATE DATABASE {stack.database}")


@pytest.fixture
def busy(stack: Stack, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> Stack:
    """A project in the middle of its work."""
    if request.config.getoption("--servers") == "docker":
        pytest.skip("the commands here are the distribution's, too old for the image's server")
    stack.env |= {"HANDLER": "handlers:note", "RUNS": str(tmp_path / "runs")}
    stack.env |= {name: str(value) for name, value in TIMES.items()}
    stack.producer()
    stack.consumer()
    stack.create(*[f"sleep=0.05 {index}" for index in range(100)])
    until(lambda: stack.counts().get("success", 0) > 10)
    return stack


def test_a_dump_of_a_busy_service_brings_every_task_to_its_end(busy: Stack) -> None:
    dump, restore, _ = recipes("Backup and restore")
    run(busy, dump)
    lose(busy)
    run(busy, restore)
    counts = busy.counts()
    assert counts["sent"] > 0 and sum(counts.values()) == 100
    busy.producer()
    busy.consumer()
    busy.wait_ended()
    assert busy.counts() == {"success": 100}
    rescued = "SELECT count(*) FROM tasks WHERE history->0->>'outcome' = 'rescued'"
    assert busy.sql(rescued) == [(counts["sent"],)]


def test_a_dump_of_a_paused_service_has_nothing_in_flight_and_stays_paused(busy: Stack) -> None:
    _, restore, clean = recipes("Backup and restore")
    run(busy, clean)
    lose(busy)
    run(busy, restore)
    assert busy.counts() == {"success": 100}
    busy.producer()
    busy.consumer()
    api = f"{busy.url}/api/v1"
    until(lambda: busy.session.get(f"{api}/get-stats", timeout=10).json()["paused"] is True)
    busy.create("after")
    assert busy.counts()["pending"] == 1
    assert busy.session.post(f"{api}/resume", timeout=10).status_code == 200
    busy.wait_ended()
    assert busy.counts() == {"success": 101}
