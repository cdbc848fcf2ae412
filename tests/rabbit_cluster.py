"""A RabbitMQ cluster of three real nodes on loopback, whose nodes a test can hurt one by one."""

import pathlib
import re
import signal
import subprocess

from native import processes, servers
from tests.stack import until

SIZE = 3
COOKIE = "tasks-of-a-test"
# The queue's name as Ra, the library of RabbitMQ's quorum queues, knows it: vhost and queue.
RA_NAME = "'%2F_{queue}'"
# What docker-compose.cluster.yml gives its nodes, but for their names and what 3.10 does not know.
CONFIG = "".join(
    line
    for line in (servers.HERE / "rabbitmq-cluster.conf").read_text().splitlines(keepends=True)
    if not line.startswith(("cluster_formation.classic_config.nodes", "quorum_queue."))
)


class Node(servers.Rabbit):
    """One node: a folder, a name and ports of its own, the cookie and the name server of all."""

    def __init__(self, folder: pathlib.Path, name: str, names: list[str], epmd_port: int) -> None:
        peers = "".join(
            f"cluster_formation.classic_config.nodes.{number} = {peer}\n"
            for number, peer in enumerate(names, 1)
        )
        super().__init__(folder, config=CONFIG + peers)
        self.name = name
        self.env |= {"RABBITMQ_NODENAME": name, "ERL_EPMD_PORT": str(epmd_port)}
        servers.write_private(folder / ".erlang.cookie", COOKIE)

    def launch(self) -> None:
        """Start the node without waiting: alone in the cluster, it waits for another itself."""
        self.spawn(self.tied([f"{self.sbin}/rabbitmq-server"]), self.env, self.folder)

    def start(self) -> None:
        """Start the node and wait until it speaks AMQP."""
        self.launch()
        self.wait_until(self.speaks_amqp)

    def freeze(self) -> None:
        """Let the node do nothing; the kernel still accepts connections for it."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen node go on."""
        self.signal(signal.SIGCONT)

    def eval(self, expression: str) -> str:
        """Run an Erlang expression on the node and return its value as text; takes a second."""
        return self.ctl("eval", f"{expression}.").strip()

    def part(self, names: list[str]) -> None:
        """Cut the node off from others, while its clients stay connected: for them it gets a
        cookie that they do not accept."""
        self.set_cookie(names, "none")
        self.eval(f"[erlang:disconnect_node(N) || N <- {atoms(names)}]")

    def rejoin(self, names: list[str]) -> None:
        """End a part()."""
        self.set_cookie(names, COOKIE)

    def set_cookie(self, names: list[str], cookie: str) -> None:
        """Set the cookie that the node has for others."""
        self.eval(f"[erlang:set_cookie(N, '{cookie}') || N <- {atoms(names)}]")


class Cluster:
    """Three nodes, with the interface of one server for Stack; the nodes are named by numbers from
    0 on."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.names = [f"tasks{number}@localhost" for number in range(SIZE)]
        self.epmd_port = processes.free_port()
        self.epmd: subprocess.Popen[bytes] | None = None
        self.nodes = [
            Node(folder / name.partition("@")[0], name, peers_of(name, self.names), self.epmd_port)
            for name in self.names
        ]
        self.url = ",".join(node.url for node in self.nodes)

    def start(self) -> None:
        """Start all nodes; the first makes the cluster, the others join it."""
        command = ["setpriv", "--pdeathsig=KILL", servers.find_epmd(), "-address", "127.0.0.1"]
        command += ["-port", str(self.epmd_port)]
        self.epmd = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self.nodes[0].start()
        for node in self.nodes[1:]:
            node.launch()
        for node in self.nodes[1:]:
            node.wait_until(node.speaks_amqp)
        self.wait_whole()

    def stop(self) -> None:
        """Stop all nodes and the name server."""
        for node in self.nodes:
            if node.child is not None:
                node.thaw()
                node.kill()
        if self.epmd is not None:
            self.epmd.kill()
            self.epmd.wait()

    def running(self, at: int = 0) -> set[str]:
        """Return the names of the nodes that work, as one of them sees it."""
        return found(self.nodes[at].eval("rabbit_nodes:all_running()"))

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl on the first node."""
        return self.nodes[0].ctl(*arguments)

    def wait_whole(self) -> None:
        """Wait until all nodes work together again, and clients can use each."""
        until(lambda: all(node.speaks_amqp() for node in self.nodes), what="all nodes speak AMQP")
        until(lambda: self.running() == set(self.names), what="the cluster is whole")

    def mend(self) -> None:
        """Start what a test that failed has left dead."""
        for node in self.nodes:
            if node.poll() is not None:
                node.launch()
        self.wait_whole()

    def members_of(self, queue: str, at: int = 0) -> set[str]:
        """Return the names of the nodes that hold a copy of a queue."""
        return found(self.nodes[at].eval(f"ra_leaderboard:lookup_members({ra(queue)})"))

    def leader_of(self, queue: str, at: int = 0) -> int:
        """Return the number of the node that leads a queue, as one of them sees it."""
        answer = self.nodes[at].eval(f"ra_leaderboard:lookup_leader({ra(queue)})")
        [leader] = found(answer)
        return self.names.index(leader)

    def transfer(self, queue: str, to: int) -> None:
        """Make a node the leader of a queue."""
        leader = self.leader_of(queue, to)
        servers_of_queue = [f"{{{ra(queue)}, '{self.names[number]}'}}" for number in (leader, to)]
        if leader != to:
            self.nodes[to].eval(f"ra:transfer_leadership({', '.join(servers_of_queue)})")
        until(lambda: self.leader_of(queue, to) == to, what=f"node {to} leads {queue}")


def peers_of(name: str, names: list[str]) -> list[str]:
    """Return the nodes that a new one looks for. The first starts alone, and with RabbitMQ 4 it
    would wait for all that it is to look for."""
    if "rabbitmq_server-3." in servers.rabbit_sbin():
        return names
    return sorted({names[0], name})


def ra(queue: str) -> str:
    """Return the Erlang atom of a queue's Ra cluster."""
    return RA_NAME.format(queue=queue)


def atoms(names: list[str]) -> str:
    """Return a list of Erlang atoms."""
    return "[" + ", ".join(f"'{name}'" for name in names) + "]"


def found(answer: str) -> set[str]:
    """Return the names of nodes in an Erlang term."""
    return set(re.findall(r"tasks\d@localhost", answer))
