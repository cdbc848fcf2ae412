"""The files of the profile observability, against each other and against a producer's /metrics."""

import itertools
import json
import os
import re
import subprocess
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from native import servers
from tests import containers
from tests.stack import Stack

FOLDER = servers.HERE / "observability"
SUFFIXES = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
    "summary": ("", "_count", "_sum"),
}
KEYWORDS = {"and", "by", "ignoring", "le", "offset", "on", "or", "unless", "without"}
OF_PROMETHEUS = {"ALERTS", "up"}
OF_RABBITMQ = {
    "rabbitmq_detailed_queue_messages_ready",
    "rabbitmq_detailed_queue_messages_unacked",
    "rabbitmq_process_resident_memory_bytes",
    "rabbitmq_resident_memory_limit_bytes",
}


def read(path: str) -> Any:
    """Parse a YAML or JSON file of the project."""
    return yaml.safe_load((servers.HERE / path).read_text())


COMPOSE = read("docker-compose.yml")
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/tasks.json").read_text())
PANELS = DASHBOARD["panels"]
RULES = [rule for group in read("observability/alerts.yml")["groups"] for rule in group["rules"]]


def expressions() -> list[str]:
    """Return the PromQL of all panels and alerts."""
    targets = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
    return targets + [rule["expr"] for rule in RULES]


def used(expression: str) -> set[str]:
    """Return the names of the metrics in PromQL."""
    bare = re.sub(r"\b(by|without|on|ignoring) *\([^)]*\)", " ", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", bare)
    return set(re.findall(r"\b[a-zA-Z_:][\w:]*\b(?! *\()", bare)) - KEYWORDS


def served(text: str) -> set[str]:
    """Return the names of the series in a text of /metrics, also of those without samples."""
    return {
        family.name + suffix
        for family in text_string_to_metric_families(text)
        for suffix in SUFFIXES.get(family.type, ("",))
    }


@pytest.mark.pure
def test_the_names_of_metrics_are_found_in_promql() -> None:
    expression = 'max by (a) (b{c="d"}) > 1 unless on (e) rate(f_total[$__rate_interval]) offset 5m'
    assert used(expression) == {"b", "f_total"}
    assert used("sum_over_time(max(a)[1h:1m]) < 59 or vector(0)") == {"a"}


def test_every_metric_of_dashboard_and_alerts_is_served_by_the_producer(api: Stack) -> None:
    answer = api.session.get(api.url + "/metrics", timeout=10)
    assert answer.status_code == 200, answer.text
    # Prometheus 3 refuses a scrape whose type it does not know.
    assert re.match(r"(text/plain|application/openmetrics-text)\b", answer.headers["Content-Type"])
    names = set[str]().union(*map(used, expressions()))
    assert names - OF_PROMETHEUS - OF_RABBITMQ - served(answer.text) == set()


@pytest.mark.pure
def test_three_alerts_say_what_to_do() -> None:
    assert [rule["alert"] for rule in RULES] == [
        "TasksWaitTooLong",
        "DeadLettersNotDrained",
        "NoConsumers",
    ]
    for rule in RULES:
        assert rule["for"] and rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"] and rule["annotations"]["description"]
    tested = {
        test["alertname"]
        for group in read("observability/alerts_test.yml")["tests"]
        for test in group["alert_rule_test"]
        if test.get("exp_alerts")
    }
    assert tested == {rule["alert"] for rule in RULES}


@pytest.mark.pure
def test_what_is_the_same_for_every_producer_is_no_sum_and_counters_are_no_max() -> None:
    gauge = r"(current|oldest_pending_seconds|broker_messages|consumers|workers\w*|dispatch_paused)"
    for expression in expressions():
        assert not re.search(rf"sum( by \([^)]*\))? \(?\(?tasks_{gauge}\b", expression), expression
        assert not re.search(r"max[^(]*\(.*_(total|bucket|count)\b", expression), expression


@pytest.mark.pure
def test_panels_have_a_title_an_id_and_a_place_of_their_own() -> None:
    assert all(panel["title"] for panel in PANELS)
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    places = [panel["gridPos"] for panel in PANELS]
    for place in places:
        assert place["x"] >= 0 and place["w"] > 0 and place["x"] + place["w"] <= 24, place
    for one, other in itertools.combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


@pytest.mark.pure
def test_every_query_asks_the_data_source_that_is_provisioned() -> None:
    [source] = read("observability/grafana/datasources/prometheus.yml")["datasources"]
    expected = {"type": source["type"], "uid": source["uid"]}
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["datasource"] == expected, panel["title"]
            assert panel["targets"], panel["title"]
        assert all(target["datasource"] == expected for target in panel.get("targets", []))
    assert source["url"] == "http://prometheus:9090"
    config = read("observability/prometheus.yml")
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


@pytest.mark.pure
def test_grafana_looks_where_compose_mounts_the_dashboard() -> None:
    grafana = COMPOSE["services"]["grafana"]
    [provider] = read("observability/grafana/dashboards/provider.yml")["providers"]
    path = provider["options"]["path"]
    assert f"./observability/grafana/dashboards:{path}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{path}/tasks.json"


@pytest.mark.pure
def test_prometheus_scrapes_all_producers_with_the_token_and_the_broker() -> None:
    config = read("observability/prometheus.yml")
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    [discovery] = jobs["producer"]["dns_sd_configs"]
    assert discovery["names"] == ["producer"] and discovery["port"] == 8080
    script = " ".join(COMPOSE["services"]["prometheus"]["entrypoint"])
    assert f">{jobs['producer']['authorization']['credentials_file']};" in script
    for name in ("rabbit", "rabbit_queues"):
        assert jobs[name]["static_configs"] == [{"targets": ["rabbit:15692"]}]
    assert "rabbitmq_prometheus" in (servers.HERE / "Dockerfile.rabbit").read_text()
    assert config["rule_files"] == ["alerts.yml"]


@pytest.mark.pure
def test_without_the_profile_compose_has_its_five_containers() -> None:
    always = {
        name: service.get("deploy", {}).get("replicas", 1)
        for name, service in COMPOSE["services"].items()
        if "profiles" not in service
    }
    assert always == {"rabbit": 1, "postgres": 1, "producer": 1, "consumer": 2}


@pytest.mark.pure
def test_the_profile_is_as_locked_up_as_the_rest() -> None:
    for name in ("prometheus", "grafana"):
        service = COMPOSE["services"][name]
        assert service["profiles"] == ["observability"]
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"] and service["healthcheck"]
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        [port] = service["ports"]
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port)
        for volume in service["volumes"]:
            assert volume.endswith(":ro") or not volume.startswith(".")


if containers.HAS_DOCKER or "CI" in os.environ:  # there its absence is a failure

    @pytest.mark.parametrize(
        "token", [{}, {"API_TOKEN": "a"}, {"API_TOKEN": "a", "READ_TOKEN": ""}]
    )
    @pytest.mark.parametrize("profile", [(), ("--profile", "observability")])
    def test_compose_accepts_the_file(profile: tuple[str, ...], token: dict[str, str]) -> None:
        passwords = {"POSTGRES_PASSWORD": "p", "RABBITMQ_PASSWORD": "r"}
        done = subprocess.run(
            ["docker", "compose", *profile, "config", "--format", "json"],
            cwd=servers.HERE,
            env=os.environ | passwords | token,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        services = json.loads(done.stdout)["services"]
        assert ("prometheus" in services) == ("grafana" in services) == bool(profile)
        if profile:
            given = services["prometheus"]["environment"]["SCRAPE_TOKEN"]
            assert given == token.get("API_TOKEN", "")
