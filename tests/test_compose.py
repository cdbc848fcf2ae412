"""The real compose project through run.sh, wherever a Docker engine answers."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator

import pytest
import requests

from native import servers
from tests import containers, test_observability
from tests.stack import until


class Compose:
    """A copy of the project with a name, images, a port and passwords of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        ignore = shutil.ignore_patterns(".[!d]*", "__pycache__", "tests")  # with .dockerignore
        shutil.copytree(servers.HERE, folder, ignore=ignore)
        self.folder = folder
        self.name = f"tasks-test-{uuid.uuid4().hex[:12]}"
        self.port = servers.free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env = os.environ | {
            "COMPOSE_PROJECT_NAME": self.name,
            "TAG": self.name,
            "PROJECT_ABSOLUTE_PATH": str(folder),
            "HTTP_PORT": str(self.port),
            "PROCESSING_SECONDS": "0.02",
            "FAILURE_RATE": "0.1",
        }

    def run(self, *command: str) -> subprocess.CompletedProcess:
        """Run a command in the project's environment, from another folder."""
        return subprocess.run(command, env=self.env, cwd="/", capture_output=True, text=True)

    def script(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run run.sh."""
        return self.run("bash", str(self.folder / "run.sh"), *arguments)

    def compose(self, *arguments: str) -> str:
        """Run docker compose and return what it printed."""
        done = self.run("docker", "compose", "--project-directory", str(self.folder), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def close(self) -> None:
        """Remove the containers, the volumes and the images."""
        project = ("--project-directory", str(self.folder))
        self.run("docker", "compose", *project, "down", "--volumes")
        names = ("producer", "consumer", "rabbit")
        self.run("docker", "rmi", *(f"localhost:5000/tasks-{name}:{self.name}" for name in names))

    def containers(self, service: str = "") -> list[str]:
        """Return the ids of a service's running containers."""
        return self.compose("ps", "--quiet", *([service] if service else [])).split()

    def create(self, count: int) -> list[str]:
        """Create tasks."""
        body = [{"text": f"task {index}"} for index in range(count)]
        answer = requests.post(f"{self.url}/api/v1/create-task", json=body, timeout=60)
        assert answer.status_code == 201, answer.text
        return [task["taskId"] for task in answer.json()]

    def ends(self, ids: list[str]) -> dict[str, str]:
        """Return the status of the tasks that have ended, once all have."""
        url = f"{self.url}/api/v1/get-task-data"
        session = requests.Session()
        ends: dict[str, str] = {}

        def all_ended() -> bool:
            for task_id in ids:
                if task_id not in ends:
                    with contextlib.suppress(requests.RequestException):
                        answer = session.get(url, params={"taskId": task_id}, timeout=10)
                        status = answer.json().get("taskStatus")
                        if status in ("success", "error"):
                            ends[task_id] = status
            return len(ends) == len(ids)

        until(all_ended, 120, "all tasks ended")
        return ends


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    compose = Compose(tmp_path_factory.mktemp("compose") / "project")
    try:
        started = compose.script("--docker")
        assert started.returncode == 0, started.stderr[-3000:]
        assert f"curl -X POST {compose.url}/api/v1/create-task" in started.stdout
        yield compose
    finally:
        compose.close()


if containers.HAS_DOCKER or "CI" in os.environ:  # there its absence is a failure

    def test_five_containers_carry_tasks_to_their_ends_past_a_killed_consumer(
        compose: Compose,
    ) -> None:
        assert len(compose.containers()) == 5
        assert (compose.folder / ".env").stat().st_mode & 0o777 == 0o600
        ids = compose.create(400)
        subprocess.run(["docker", "kill", compose.containers("consumer")[0]], check=True)
        ends = list(compose.ends(ids).values())
        assert 300 < ends.count("success") < 400
        assert ends.count("success") + ends.count("error") == 400

    def test_services_run_as_nobody_on_a_read_only_disk(compose: Compose) -> None:
        for service in ("rabbit", "postgres", "producer", "consumer"):
            assert compose.compose("exec", service, "id", "-u") != "0"
            form = "{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.CapDrop}}"
            [container, *_] = compose.containers(service)
            assert containers.docker("inspect", "--format", form, container) == "true [ALL]"

    def test_only_the_producer_is_published_and_only_on_loopback(compose: Compose) -> None:
        ports = compose.compose("ps", "--format", "{{.Ports}}").split()
        assert [port for port in ports if "->" in port] == [f"127.0.0.1:{compose.port}->8080/tcp"]

    def test_the_broker_serves_the_metrics_of_the_dashboard(compose: Compose) -> None:
        script = (
            "import urllib.request as u; base = 'http://rabbit:15692/metrics'\n"
            "for end in ('', '/detailed?family=queue_coarse_metrics'):\n"
            "    print(u.build_opener(u.ProxyHandler({})).open(base + end, timeout=10)"
            ".read().decode())"
        )
        text = compose.compose("exec", "-T", "producer", "python", "-c", script)
        assert test_observability.served(text) >= test_observability.OF_RABBITMQ
        assert 'rabbitmq_detailed_queue_messages_ready{vhost="/",queue="tasks"}' in text

    def test_the_cluster_file_gives_all_clients_three_nodes(compose: Compose) -> None:
        names = ("docker-compose.yml", "docker-compose.cluster.yml")
        files = [word for name in names for word in ("-f", str(compose.folder / name))]
        services = json.loads(compose.compose(*files, "config", "--format", "json"))["services"]
        nodes = {each["hostname"] for name, each in services.items() if "rabbit" in name}
        conf = (compose.folder / "rabbitmq-cluster.conf").read_text()
        assert nodes == set(re.findall(r"= rabbit@(\S+)", conf)) and len(nodes) == 3
        for name in ("producer", "consumer"):
            url = services[name]["environment"]["RABBITMQ_URL"]
            assert set(re.findall(r"@(\w+):5672/%2F", url)) == nodes
            assert url.count("amqp://tasks:") == 3 and " " not in url

    def test_a_restart_under_load_loses_nothing(compose: Compose) -> None:
        ids = compose.create(300)
        time.sleep(0.5)
        compose.compose("restart", "consumer", "producer")
        compose.compose("stop", "rabbit", "consumer")
        compose.compose("up", "--detach", "--wait")
        assert len(compose.ends(ids)) == 300

    def test_data_outlives_down_and_up(compose: Compose) -> None:
        ids = compose.create(5)
        compose.ends(ids)
        assert compose.script("down").returncode == 0
        assert compose.containers() == []
        assert compose.script("--docker").returncode == 0
        assert len(compose.ends(ids)) == 5
