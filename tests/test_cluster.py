"""A cluster of three RabbitMQ nodes that die, freeze, restart and part while tasks flow: what was
answered with 201 ends, and the dispatch goes on over the nodes that are left."""

import pathlib
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from tests.rabbit_cluster import SIZE, Cluster
from tests.stack import Stack, until

CREATE_SECONDS = 0.1  # between two tasks
FLOW_SECONDS = 1  # of work between two harms
# An election takes a second; the rest is for a machine that is busy with something else.
STALL_SECONDS = 15
# The cluster gives a silent node up after 15 to 25 s, a client leaves it after 15 to 30 s, and both
# consumers may be at the same one.
FREEZE_SECONDS = 35
FROZEN_SECONDS = 65
# 5 to 10 s until another leader is elected, 5 s for each count of a queue that names the old one.
FROZEN_DISPATCH_SECONDS = 30


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster for all tests of this file, each of which leaves it whole."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def stack(cluster: Cluster, postgres: Any, tmp_path: pathlib.Path) -> Iterator[Stack]:
    """A project on the cluster: a producer and two consumers. The queues stay for the next test,
    since a new one needs some seconds until it outlives a kill."""
    cluster.mend()
    stack = Stack(postgres, cluster, tmp_path)
    try:
        stack.env["LOG_LEVEL"] = "INFO"
        stack.producer()
        for _ in range(2):
            stack.consumer(HANDLER="handlers:note", RUNS=tmp_path / "runs")
        stack.wait_status(stack.create("first"), "success")
        yield stack
    finally:
        stack.close(queues=False)
        stack.print_logs()


class Flow(threading.Thread):
    """A client that creates a task every CREATE_SECONDS, and notes the slowest answer."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(name="flow", daemon=True)
        self.url = f"{stack.url}/api/v1/create-task"
        self.stack = stack
        self.ended = threading.Event()
        self.refused: list[str] = []
        self.ids: list[str] = []
        self.slowest = 0.0  # seconds

    def __enter__(self) -> "Flow":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()

    def run(self) -> None:
        session = requests.Session()
        while not self.ended.wait(CREATE_SECONDS):
            began = time.monotonic()
            answer = session.post(self.url, json={"text": f"n{len(self.ids)}"}, timeout=60)
            self.slowest = max(self.slowest, time.monotonic() - began)
            if answer.status_code == 201:
                self.ids.append(answer.json()["taskId"])
            else:
                self.refused.append(answer.text)

    def moves_on(self, timeout: float = STALL_SECONDS) -> None:
        """Wait until tasks that are created from now on end; then let it flow for a while."""
        count = len(self.ids) + 10
        until(lambda: len(self.ids) > count, what="creates go on")
        self.stack.wait_status(self.ids[count - 10 : count], "success", timeout=timeout)
        time.sleep(FLOW_SECONDS)

    def verify(self, what: str) -> float:
        """Wait for the end of everything, compare rows with runs, and return the longest time in
        which no task ended."""
        self.ended.set()
        self.join()
        assert not self.refused, self.refused
        self.stack.wait_ended()
        assert self.stack.counts() == {"success": len(self.ids) + 1}
        runs = self.stack.runs(self.stack.folder / "runs")
        assert set(runs) == {"first", *(f"n{number}" for number in range(len(self.ids)))}
        until(lambda: self.stack.unsettled() == {}, what="queues empty")
        stall = self.gap("finished_at")
        print(
            f"{what}: {len(self.ids)} tasks, none ended for {stall:.1f} s at most, none sent for "
            f"{self.gap('sent_at'):.1f} s, {sum(runs.values()) - len(runs)} second runs, slowest "
            f"create {self.slowest:.2f} s"
        )
        return stall

    def gap(self, column: str) -> float:
        """Return the longest time between two neighbours of a column of times, in seconds."""
        order = f"SELECT {column} - lag({column}) OVER (ORDER BY {column}) AS gap FROM tasks"
        [(gap,)] = self.stack.sql(f"SELECT extract(epoch FROM max(gap)) FROM ({order}) AS gaps")
        return float(gap)


def nodes_of(cluster: Cluster) -> dict[int, list[str]]:
    """Return for each process id the names of the nodes that it is connected to."""
    nodes: dict[int, list[str]] = {}
    for line in cluster.ctl("list_connections", "pid", "client_properties").splitlines():
        if named := re.search(r'"connection_name","\S+?:(\d+)"', line):
            [node] = re.findall(r"tasks\d@localhost", line)
            nodes.setdefault(int(named[1]), []).append(node)
    return nodes


def test_each_queue_has_a_member_on_each_node(cluster: Cluster, stack: Stack) -> None:
    for queue in ("tasks", "tasks.dlq"):
        assert cluster.members_of(queue) == set(cluster.names)


def test_the_connections_of_a_process_go_to_different_nodes(cluster: Cluster, stack: Stack) -> None:
    nodes = nodes_of(cluster)
    assert nodes.keys() == {process.pid for process in stack.processes}
    assert all(len(set(each)) == len(each) == 2 for each in nodes.values()), nodes


def test_tasks_flow_past_the_death_of_the_leader_and_of_another(
    cluster: Cluster, stack: Stack
) -> None:
    with Flow(stack) as flow:
        for is_leader in (True, False):
            flow.moves_on()
            leader = cluster.leader_of("tasks")
            victim = cluster.nodes[leader if is_leader else (leader + 1) % SIZE]
            victim.kill()
            flow.moves_on()
            victim.start()
        assert flow.verify("leader killed, then another") < STALL_SECONDS


def test_tasks_flow_past_a_leader_that_freezes(cluster: Cluster, stack: Stack) -> None:
    # One of the producer's two threads is there, and must not hold up the other.
    number = cluster.names.index(nodes_of(cluster)[stack.processes[0].pid][0])
    leader = cluster.nodes[number]
    cluster.transfer("tasks", number)
    with Flow(stack) as flow:
        flow.moves_on()
        began = time.monotonic()
        leader.freeze()
        try:
            flow.moves_on(timeout=FROZEN_SECONDS)
            while time.monotonic() < began + FREEZE_SECONDS:
                time.sleep(0.1)
        finally:
            leader.thaw()
        flow.moves_on()
        leader.stop()  # the others had given it up: until it starts anew it has a view of its own
        leader.start()
        cluster.wait_whole()
        assert flow.verify("leader frozen") < FROZEN_SECONDS
        assert flow.gap("sent_at") < FROZEN_DISPATCH_SECONDS


def test_a_rolling_restart_stops_nothing(cluster: Cluster, stack: Stack) -> None:
    with Flow(stack) as flow:
        for node in cluster.nodes:
            cluster.transfer("tasks", cluster.nodes.index(node))
            node.stop()
            flow.moves_on()
            node.start()
        cluster.wait_whole()
        assert flow.verify("each leader stopped and started") < STALL_SECONDS


def test_the_clients_of_a_node_that_is_cut_off_go_to_the_others(
    cluster: Cluster, stack: Stack
) -> None:
    leader = cluster.leader_of("tasks")
    others = [name for name in cluster.names if name != cluster.names[leader]]
    with Flow(stack) as flow:
        flow.moves_on()
        cluster.nodes[leader].part(others)
        try:
            flow.moves_on()
        finally:
            cluster.nodes[leader].rejoin(others)
        cluster.wait_whole()
        assert flow.verify("leader cut off") < STALL_SECONDS


def test_without_a_majority_creates_are_answered_and_all_ends_when_it_is_back(
    cluster: Cluster, stack: Stack
) -> None:
    with Flow(stack) as flow:
        flow.moves_on()
        for node in cluster.nodes[1:]:
            node.kill()
        count = len(flow.ids)
        until(lambda: len(flow.ids) > count + 50, what="creates go on")
        for node in cluster.nodes[1:]:
            node.launch()
        cluster.wait_whole()
        flow.moves_on()
        flow.verify("two of three killed")
        assert flow.slowest < 5
