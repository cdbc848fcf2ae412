"""run.sh and the publish scripts as their user calls them."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess

import pytest
import requests

from native import servers
from tests.stack import SETTINGS, until


@pytest.fixture
def project(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the project, without its settings and data."""
    folder = tmp_path / "project"
    shutil.copytree(servers.HERE, folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    return folder


def run(project: pathlib.Path, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    """Run run.sh to its end, from another folder."""
    return subprocess.run(
        ["bash", str(project / "run.sh"), *arguments],
        env=os.environ | {"COMPOSE_PROJECT_NAME": "tasks-test"} | env,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_native_start_carries_a_task_keeps_its_data_and_stops(project: pathlib.Path) -> None:
    port = servers.free_port()
    log = project.parent / "run.log"
    env = os.environ | {"HTTP_PORT": str(port), "FAILURE_RATE": "0", "PROCESSING_SECONDS": "0"}
    command = ["bash", str(project / "run.sh"), "--native"]
    api = f"http://127.0.0.1:{port}/api/v1"

    def start() -> subprocess.Popen:
        with log.open("w") as output:
            child = subprocess.Popen(command, env=env, cwd="/", stdout=output, stderr=output)
        until(lambda: "create-task" in log.read_text() or child.poll() is not None, 240)
        assert child.poll() is None, log.read_text()
        return child

    def status() -> str:
        answer = requests.get(f"{api}/get-task-data", params={"taskId": task_id}, timeout=10)
        return answer.json()["taskStatus"]

    child = start()
    try:
        created = requests.post(f"{api}/create-task", json={"text": "a"}, timeout=10)
        task_id = created.json()["taskId"]
        until(lambda: status() == "success")
        assert (project / ".env").stat().st_mode & 0o777 == 0o600
        again = run(project, "--native", HTTP_PORT=str(port))
        assert again.returncode == 2 and "it runs already" in again.stderr
        assert run(project, "down", HTTP_PORT=str(port)).returncode == 0
        assert child.wait(60) == 0
        child = start()
        assert status() == "success"
        child.send_signal(signal.SIGINT)
        assert child.wait(90) == 0
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            child.wait(90)
    assert "stopped" in log.read_text()


def test_a_taken_port_is_a_clear_sentence_and_nothing_is_started(project: pathlib.Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run(project, "--native", HTTP_PORT=port)
    assert done.returncode == 2
    assert f"port {port} is taken" in done.stderr
    assert not (project / ".run" / "postgres").exists()


@pytest.mark.parametrize(
    ("arguments", "env", "expected"),
    [
        (["up"], {}, "unknown command up"),
        (["--native", "more"], {}, "unexpected more"),
        (["--native"], {"HTTP_PORT": "http"}, "HTTP_PORT"),
        (["--native"], {"PROJECT_ABSOLUTE_PATH": "/nowhere"}, "no such folder"),
        (["--native"], {"PROJECT_ABSOLUTE_PATH": "/tmp"}, "expected producer.py there"),
    ],
)
def test_wrong_words_are_a_clear_sentence_and_2(
    project: pathlib.Path, arguments: list[str], env: dict[str, str], expected: str
) -> None:
    done = run(project, *arguments, **env)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]


def test_without_docker_the_docker_way_says_so(project: pathlib.Path) -> None:
    tools = project.parent / "bin"
    tools.mkdir()
    for tool in ("bash", "sed", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = run(project, "--docker", PATH=str(tools))
    assert done.returncode == 2
    assert "expected a Docker engine" in done.stderr


@pytest.mark.pure
def test_usage_is_the_head_of_the_script(project: pathlib.Path) -> None:
    done = run(project, "--help")
    assert done.returncode == 0
    assert "sudo bash run.sh --native" in done.stdout and "set -euo" not in done.stdout


@pytest.mark.parametrize("name", ["producer", "consumer", "rabbit"])
def test_publishing_outside_git_without_a_tag_says_what_to_give(
    project: pathlib.Path, name: str
) -> None:
    done = subprocess.run(
        ["bash", str(project / f"publish_{name}.sh")], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 2 and "expected a TAG" in done.stderr


@pytest.mark.pure
def test_every_setting_stands_in_the_readme_and_in_compose() -> None:
    compose = (servers.HERE / "docker-compose.yml").read_text()
    readme = (servers.HERE / "README.md").read_text()
    for name in SETTINGS - {"HEALTH_FILE"}:
        assert f"`{name}`" in readme, name
        assert re.search(rf"^\s+{name}: ", compose, re.MULTILINE) or name == "HTTP_PORT", name
    assert "${HTTP_PORT:-8080}:8080" in compose


def test_the_passwords_join_the_settings_that_are_there(project: pathlib.Path) -> None:
    (project / ".env").write_text("HTTP_PORT=http")  # without an end of line
    done = run(project, "--native")
    assert done.returncode == 2 and "HTTP_PORT=http is not valid" in done.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (project / ".env").write_text(f'HTTP_PORT="{taken.getsockname()[1]}"')
        assert "is taken" in run(project, "--native").stderr
    names = [line.partition("=")[0] for line in (project / ".env").read_text().splitlines()]
    made = ["POSTGRES_PASSWORD", "RABBITMQ_PASSWORD", "RABBITMQ_COOKIE"]
    assert names == ["HTTP_PORT", *made]
    assert (project / ".env").stat().st_mode & 0o777 == 0o600
