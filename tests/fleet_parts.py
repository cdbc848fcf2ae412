"""Parts of the benchmark about a fleet: what more consumers and a second producer cost, who gets
how much of the work, and how long an outage of broker or producer lasts for all."""

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tests.fleet import Fleet, Results, Watch, back_after, established, fleet
from tests.measured import Side
from tests.stack import until

WORKERS = 10  # of each consumer
SIZES = (2, 20, 50, 100, 200)
IDLE_SECONDS = 15
INSTANT_TASKS = 20_000
FAILING_TASKS = 5000
ROUNDS = 8  # of tasks of a second
HALF = 0.5  # of the rate that was reached
OFFER_SECONDS = 10
BEFORE_SECONDS, AFTER_SECONDS = 15, 40  # of an outage
OUTAGE_WORKERS = 1  # of each consumer: with ten, they want more than two cores, and hide the rest
CROWD = 450  # clients that keep a connection
CROWD_SECONDS = 15


def say(name: str, results: Results) -> None:
    """Print a line of figures: the whole takes half an hour."""
    shown = ", ".join(f"{key}: {value:.2f}" for key, value in results.items())
    print(f"{time.strftime('%T')} {name}: {shown}", file=sys.stderr, flush=True)


def under(name: str, results: Results) -> Results:
    """Return results whose names begin with what they are of."""
    say(name, results)
    return {f"{name}: {key}": value for key, value in results.items()}


def connections(all_: Fleet) -> Results:
    """Return how many connections each server has."""
    backends = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tasks-producer'"
    return {
        "HTTP": sum(map(established, all_.ports)),
        "AMQP": established(all_.bench.rabbit.port),
        "PostgreSQL": all_.bench.sql(backends)[0][0],
    }


def size(all_: Fleet, count: int, name: str) -> Results:
    """Measure a fleet of so many consumers: idle, at instant tasks, and at tasks of a second."""
    all_.grow(count)
    workers = count * all_.workers
    all_.work("1", 3 * workers)  # all workers are there now
    results = under(f"{name}, connections", connections(all_))
    idle: Results = {}
    with all_.costs(idle, "a second", lambda seconds: seconds):
        time.sleep(IDLE_SECONDS)
    results |= under(f"{name}, idle", idle)
    results |= under(f"{name}, instant", all_.work("0", INSTANT_TASKS))
    results |= under(f"{name}, failing", all_.work("no number", FAILING_TASKS))
    naps = all_.work("1", ROUNDS * workers)
    results |= under(f"{name}, 1 s", naps)
    offered = all_.offer("1", HALF * naps["tasks/s"], OFFER_SECONDS)
    return results | under(f"{name}, 1 s, half", offered)


def sizes(side: Side) -> Results:
    """Measure fleets of all sizes at one producer."""
    results: Results = {}
    with fleet(side, 1, WORKERS) as all_:
        for count in SIZES:
            results |= size(all_, count, f"{count} at 1")
        results |= under(f"{SIZES[-1]} at 1", beside(all_))
    return results


def producers(side: Side) -> Results:
    """Measure the largest fleet at two producers."""
    count = SIZES[-1]
    with fleet(side, 2, WORKERS) as all_:
        results = size(all_, count, f"{count} at 2")
        return results | under(f"{count} at 2", beside(all_))


def beside(all_: Fleet) -> Results:
    """Return what a create takes while the fleet works, its memory, and its warnings."""
    results: Results = {}
    workers = len(all_.consumers) * all_.workers
    for text, count in (("0", INSTANT_TASKS), ("1", 15 * workers)):
        all_.fill(text, count)
        all_.resume()
        results |= {f"{text} s, {key}": value for key, value in all_.creates(text).items()}
        clear(all_)
    return results | all_.memory() | {"warnings": all_.warnings()}


def clear(all_: Fleet) -> None:
    """Empty the table when what was sent has ended."""
    all_.pause()
    all_.wait_sent()
    all_.bench.sql("TRUNCATE tasks")


@contextlib.contextmanager
def crowd(port: int, counts: dict[str, int]) -> Iterator[None]:
    """Keep CROWD connections open, each with a request every two seconds; count what is closed."""
    done = threading.Event()
    request = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

    def ask(client: socket.socket | None) -> socket.socket | None:
        try:
            client = client or socket.create_connection(("127.0.0.1", port), 5)
            client.sendall(request)
            if client.recv(4096).startswith(b"HTTP/1.1 200"):
                counts["answered"] += 1
                return client
        except OSError:
            pass
        counts["closed"] += 1
        if client is not None:
            client.close()
        return None

    def keep() -> None:
        clients: list[socket.socket | None] = [None] * CROWD
        while not done.is_set():
            for index, client in enumerate(clients):
                clients[index] = ask(client)
                time.sleep(2 / CROWD)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def crowded(all_: Fleet) -> Results:
    """Let more clients keep connections than the producer has places: are reports held up?"""
    counts = {"answered": 0, "closed": 0}
    before = all_.warnings()
    all_.fill("1", 60 * len(all_.consumers) * all_.workers)
    all_.resume()
    with crowd(all_.ports[0], counts):
        time.sleep(2 * CROWD_SECONDS)
        now = time.time()
    rate = len(all_.ends(now - CROWD_SECONDS, now)) / CROWD_SECONDS
    clear(all_)
    results = {"tasks/s": rate, "consumers' warnings": all_.warnings() - before}
    return results | {f"clients {name}": value for name, value in counts.items()}


def outage(all_: Fleet, port: int, text: str, count: int, act: Callable[[], None]) -> Results:
    """Restart a server in the middle of waiting tasks. Return how long it was away, how long until
    it had all connections and the rate was there again, the most tries to connect in a second, and
    what ran twice."""
    all_.fill(text, count)
    runs = sum(all_.runs().values())
    watch = Watch([port])
    watch.start()
    all_.resume()
    time.sleep(BEFORE_SECONDS)
    connected, down = watch.looks[-1][2], time.time()
    act()
    up = time.time()
    time.sleep(AFTER_SECONDS)
    watch.done.set()
    now = time.time()
    all_.pause()
    all_.wait_sent()
    ends = all_.ends(down - BEFORE_SECONDS / 2, now)
    rate = sum(at < down for at in ends) / (BEFORE_SECONDS / 2)
    counts = all_.bench.counts()
    assert counts.keys() <= {"success", "pending"}, counts
    all_.bench.sql("TRUNCATE tasks")
    return {
        "tasks/s before": rate,
        "seconds away": up - down,
        "connections": connected,
        "seconds until all are connected": watch.reached(connected, up) - up,
        "seconds until the first end": next((at - up for at in ends if at > up), -1.0),
        "seconds until full speed": back_after(ends, rate, up),
        "most tries to connect a second": watch.most_tries(),
        "ran twice": sum(all_.runs().values()) - runs - counts.get("success", 0),
    }


def outages(side: Side) -> Results:
    """Restart the broker, then the producer, under the largest fleet; then crowd the producer."""
    results: Results = {}
    with fleet(side, 1, OUTAGE_WORKERS) as all_:
        all_.grow(SIZES[-1])
        workers = SIZES[-1] * all_.workers
        all_.work("1", 3 * workers)
        rabbit = all_.bench.rabbit

        def restart_broker() -> None:
            rabbit.stop()
            rabbit.start()

        def restart_producer() -> None:
            all_.producers[0].kill()
            all_.producers[0] = all_.start_producer(all_.ports[0])

        for name, port, act in (
            ("broker", rabbit.port, restart_broker),
            ("producer", all_.ports[0], restart_producer),
        ):
            for text, count in (("1", 60 * workers), ("0", 100_000)):
                title = f"{name} restarted, tasks of {text} s"
                results |= under(title, outage(all_, port, text, count, act))
        results |= under("crowded", crowded(all_))
        until(lambda: all_.bench.waiting() == 0, what="no message is left")
    return results


def whole(side: Side) -> Results:
    """Measure it all: half an hour."""
    return sizes(side) | producers(side) | outages(side)


PARTS = {
    "fleet": whole,
    "fleet-sizes": sizes,
    "fleet-producers": producers,
    "fleet-outages": outages,
}
