"""An upgrade from version 1.1, whose scripts are in version_1.1.tar.gz as they were: first the
producer, then the consumers. Nothing is lost, and nothing that had ended runs again."""

import pathlib
import subprocess
import sys
import time

from native import servers
from tests.stack import Stack, until

ARCHIVE = pathlib.Path(__file__).with_name("version_1.1.tar.gz")
TIMES = {"SENT_TIMEOUT_SECONDS": 30}


def test_an_upgrade_under_load_loses_nothing_and_repeats_nothing(
    stack: Stack, tmp_path: pathlib.Path
) -> None:
    old = tmp_path / "version_1.1"
    old.mkdir()  # no tarfile: the Python of Debian 12 knows no filter=, that of 13 wants one
    subprocess.run(["tar", "-xzf", ARCHIVE, "-C", old], check=True)
    runs = tmp_path / "runs"
    work = TIMES | {"HANDLER": "handlers:note", "RUNS": runs, "PREFETCH": 5}
    stack.checkout = (old, sys.executable)
    producer = stack.producer(**TIMES)
    consumers = [stack.consumer(**work) for _ in range(2)]
    ended = stack.create("done", "fail done")
    stack.wait_ended()
    long = stack.create("sleep=12 long", "sleep=12 fail long")
    until(lambda: len(stack.runs(runs)) == 4, what="both old consumers run a long task")
    later = stack.create("later", runAt="2000-01-01T00:00:00Z")
    [(soon,)] = stack.sql("SELECT now() + interval '15 seconds'")
    delayed = stack.create("delayed", runAt=soon.isoformat())
    queued = stack.create(*[f"queued {index}" for index in range(100)], "fail queued")
    stack.wait_status(queued, "sent")
    producer.stop()
    pending = "INSERT INTO tasks (text) SELECT 'pending ' || n FROM generate_series(1, 50) n"
    stack.sql(pending)

    stack.checkout = (servers.HERE, sys.executable)
    stack.producer(**TIMES)
    columns = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'tasks'"
    until(lambda: stack.sql(columns + " AND column_name = 'lease_until'") == [(1,)])
    time.sleep(2)  # the old consumers and the new producer work together for a moment
    for consumer in consumers:
        consumer.child.terminate()
    new = [stack.consumer(**work) for _ in range(2)]
    for consumer in consumers:
        assert consumer.child.wait(60) == 0
    stack.wait_ended(timeout=200)
    counts = stack.counts()
    assert counts["error"] == 3 and counts["success"] == len(queued) - 1 + 50 + 4
    assert set(stack.runs(runs).values()) == {1}
    assert len(stack.runs(runs)) == sum(counts.values())
    until(lambda: stack.unsettled() == {})
    assert all(consumer.poll() is None for consumer in new)
    assert len(ended + long + later + delayed) == 6
