"""Worker processes: what a task does to its own, it does to nobody else."""

import os
import pathlib
import re
import shutil
import signal
import sys
import time
from typing import Any

import pytest

from native import servers
from tests.stack import Stack, until
from tests.worker_parts import processor_seconds


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> pathlib.Path:
    """The file in which the handler notes each run."""
    return tmp_path / "runs"


def handler(runs: pathlib.Path, **env: Any) -> dict[str, Any]:
    """Return the settings of a consumer that notes its runs."""
    return {"HANDLER": "handlers:note", "RUNS": runs, **env}


def workers_of(consumer: servers.Service) -> list[int]:
    """Return the pids of a consumer's worker processes."""
    children = pathlib.Path(f"/proc/{consumer.pid}/task").glob("*/children")
    return sorted(int(pid) for path in children for pid in path.read_text().split())


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; a zombie does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_running(stack: Stack, runs: pathlib.Path, *texts: str) -> None:
    """Wait until tasks have begun."""
    until(lambda: set(texts) <= stack.runs(runs).keys(), what=f"{texts} begun")


def test_a_killed_worker_costs_its_task_one_more_run_and_nobody_else_anything(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    consumer = stack.consumer(**handler(runs, CONCURRENCY=3))
    ids = stack.create("sleep=3 a", "sleep=3 b", "sleep=3 c")
    wait_running(stack, runs, "sleep=3 a", "sleep=3 b", "sleep=3 c")
    victim = workers_of(consumer)[0]
    os.kill(victim, signal.SIGKILL)
    began = time.monotonic()
    more = stack.create(*[f"quick {index}" for index in range(20)])
    stack.wait_status(ids + more, "success")
    assert time.monotonic() - began < 30
    counts = stack.runs(runs)
    assert sorted(counts[text] for text in counts if text.startswith("sleep")) == [1, 1, 2]
    assert {counts[f"quick {index}"] for index in range(20)} == {1}
    assert stack.sql("SELECT sum(starts) FROM tasks") == [(1,)]
    assert consumer.poll() is None


def test_a_task_that_kills_its_worker_ends_in_error_and_the_innocent_run_once(
    stack: Stack, runs: pathlib.Path
) -> None:
    """Some have just been answered, some wait in the dead worker's pipe."""
    stack.producer()
    consumer = stack.consumer(**handler(runs, PREFETCH=200))
    texts = [f"innocent {index}" for index in range(400)]
    ids = stack.create(*texts[:200], "segfault", *texts[200:])
    stack.wait_ended()
    assert stack.get(ids[200])["error"] == "killed its worker 3 times, the last time by SIGSEGV"
    assert stack.runs(runs) == dict.fromkeys(texts, 1) | {"segfault": 3}
    until(lambda: stack.unsettled() == {})
    assert consumer.poll() is None


def test_a_hung_task_is_ended_at_its_deadline_and_its_neighbours_never_notice(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    consumer = stack.consumer(**handler(runs, CONCURRENCY=2, TASK_TIMEOUT_SECONDS=60))
    began = time.monotonic()
    hung = stack.create("sleep=1000 hung", "stop", timeoutSeconds=2)
    quick = stack.create(*[f"sleep=0.1 {index}" for index in range(20)])
    stack.wait_status(hung, "error", timeout=30)
    assert time.monotonic() - began < 20
    stack.wait_status(quick, "success")
    assert {stack.get(task_id)["error"] for task_id in hung} == {"timed out after 2 s"}
    assert stack.get(hung[0])["timeoutSeconds"] == 2
    assert set(stack.runs(runs).values()) == {1}
    until(lambda: stack.unsettled() == {})
    assert consumer.poll() is None


def test_a_timed_out_attempt_is_retried(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer(MAX_ATTEMPTS=2, RETRY_SECONDS=0.2)
    stack.consumer(**handler(runs, TASK_TIMEOUT_SECONDS=1))
    ids = stack.create("sleep=1000 hung")
    stack.wait_status(ids, "error", timeout=60)
    task = stack.get(ids[0])
    assert (task["attempt"], task["error"]) == (2, "timed out after 1 s")
    assert stack.runs(runs) == {"sleep=1000 hung": 2}


def test_an_outcome_that_is_in_the_pipe_when_the_deadline_fires_counts(
    stack: Stack, runs: pathlib.Path
) -> None:
    """The consumer is frozen while the task ends and its time runs out."""
    stack.producer()
    consumer = stack.consumer(**handler(runs))
    ids = stack.create("sleep=1 a", timeoutSeconds=2)
    wait_running(stack, runs, "sleep=1 a")
    consumer.child.send_signal(signal.SIGSTOP)
    ids += stack.create("b")
    time.sleep(3)
    consumer.child.send_signal(signal.SIGCONT)
    stack.wait_status(ids, "success")
    assert stack.runs(runs) == {"sleep=1 a": 1, "b": 1}
    assert stack.sql("SELECT sum(starts) FROM tasks") == [(0,)]


def test_a_frozen_worker_that_claims_nothing_loses_its_task_to_another(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    consumer = stack.consumer(**handler(runs, CONCURRENCY=1))
    stack.wait_status(stack.create("before"), "success")
    [frozen] = workers_of(consumer)
    os.kill(frozen, signal.SIGSTOP)
    ids = stack.create("a")
    stack.wait_status(ids, "success", timeout=60)
    assert not is_alive(frozen)
    assert stack.runs(runs) == {"before": 1, "a": 1}
    assert stack.sql("SELECT sum(starts) FROM tasks") == [(0,)]


def test_a_cancelled_task_is_ended_and_its_process_is_gone(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    consumer = stack.consumer(**handler(runs, CONCURRENCY=2))
    ids = stack.create("sleep=1000 a", "sleep=15 b")
    wait_running(stack, runs, "sleep=1000 a", "sleep=15 b")
    before = workers_of(consumer)
    began = time.monotonic()
    assert stack.put(taskId=ids[0], taskStatus="error").status_code == 200
    until(lambda: not all(map(is_alive, before)), 10, "a worker is gone")
    assert time.monotonic() - began < 10
    stack.wait_status(ids[1:], "success")
    task = stack.get(ids[0])
    assert (task["taskStatus"], task["error"]) == ("error", "cancelled")
    assert stack.runs(runs) == {"sleep=1000 a": 1, "sleep=15 b": 1}
    until(lambda: stack.unsettled() == {})


def test_a_worker_that_ignores_sigterm_is_killed_and_nobody_waits_busily(
    stack: Stack, runs: pathlib.Path
) -> None:
    stack.producer()
    consumer = stack.consumer(**handler(runs))
    [task_id] = stack.create("ignore sleep=1000", timeoutSeconds=1)
    wait_running(stack, runs, "ignore sleep=1000")
    before, began = processor_seconds([consumer.pid]), time.monotonic()
    stack.wait_status([task_id], "error", timeout=20)
    assert 5 < time.monotonic() - began < 15
    assert processor_seconds([consumer.pid]) - before < 2
    assert stack.get(task_id)["error"] == "timed out after 1 s"
    stack.wait_status(stack.create("after"), "success")


def test_of_what_was_cancelled_nothing_starts(stack: Stack, runs: pathlib.Path) -> None:
    """Queued, in flight, ahead in a worker's pipe, running, and done but unreported."""
    stack.producer()
    consumer = stack.consumer(**handler(runs, CONCURRENCY=2, PREFETCH=50))
    stack.wait_status(stack.create(*[f"warm {index}" for index in range(500)]), "success")
    texts = [f"sleep=1 {index}" for index in range(300)]
    ids = stack.create(*texts)
    until(lambda: len(stack.runs(runs)) > 502)
    stack.sql("UPDATE tasks SET status = 'error', attempt = 2 WHERE status IN ('pending', 'sent')")
    time.sleep(10)
    before = stack.runs(runs)
    assert len(before) < 500 + 30
    time.sleep(3)
    assert stack.runs(runs) == before
    until(lambda: stack.unsettled() == {})
    assert consumer.poll() is None
    assert stack.counts().keys() == {"success", "error"}
    stack.wait_status(stack.create("after"), "success")
    assert len(ids) == 300


def test_workers_die_with_their_consumer(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer()
    consumer = stack.consumer(**handler(runs, CONCURRENCY=3))
    stack.create("sleep=1000 a", "stop b")
    wait_running(stack, runs, "sleep=1000 a", "stop b")
    workers = workers_of(consumer)
    assert len(workers) >= 2
    consumer.child.kill()
    until(lambda: not any(map(is_alive, workers)), 10, "the workers are gone")


def test_a_worker_ends_after_so_many_tasks(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer()
    consumer = stack.consumer(**handler(runs, TASKS_PER_WORKER=3, CONCURRENCY=4))
    until(lambda: workers_of(consumer))
    first = workers_of(consumer)
    ids = stack.create(*[f"sleep=0.01 {index}" for index in range(400)])
    stack.wait_status(ids, "success")
    assert set(stack.runs(runs).values()) == {1}
    until(lambda: workers_of(consumer) and not set(first) & set(workers_of(consumer)))


def write_handler(folder: pathlib.Path, body: str) -> None:
    """Write the module `deployed` with a function `work`."""
    folder.mkdir(exist_ok=True)
    new = folder / "new"
    new.write_text(f"import os\n{body}\n")
    new.replace(folder / "deployed.py")


WORKING = "def work(text):\n    open(os.environ['RUNS'], 'a').write(text + chr(10))"


def test_a_handler_that_cannot_be_loaded_touches_no_task(
    stack: Stack, runs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stack.producer()
    ids = stack.create(*map(str, range(20)))
    stack.wait_status(ids, "sent")
    rows = stack.sql("SELECT * FROM tasks ORDER BY id")
    folder = tmp_path / "deployed"
    settings = {"HANDLER": "deployed:work", "RUNS": runs, "PYTHONPATH": folder}
    for broken in ("import no_such_module", "raise SystemExit(0)", "work = 5"):
        write_handler(folder, broken)
        consumer = stack.consumer(**settings)
        assert consumer.child.wait(60) == 2
        last = consumer.log.read_text().splitlines()[-1]
        assert last.startswith("HANDLER='deployed:work' is not valid: expected module:function")
    assert stack.sql("SELECT * FROM tasks ORDER BY id") == rows
    write_handler(folder, WORKING)
    stack.consumer(**settings)
    stack.wait_status(ids, "success")


def test_a_deploy_that_breaks_the_handler_turns_no_task_into_an_error(
    stack: Stack, runs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Each new worker fails to start: the consumer takes nothing until one does."""
    stack.producer()
    folder = tmp_path / "deployed"
    write_handler(folder, WORKING)
    consumer = stack.consumer(
        HANDLER="deployed:work", RUNS=runs, PYTHONPATH=folder, TASKS_PER_WORKER=1,
        PYTHONDONTWRITEBYTECODE=1,
    )  # fmt: skip
    stack.wait_status(stack.create("a"), "success")
    write_handler(folder, "import no_such_module")
    ids = stack.create(*map(str, range(20)))
    with stack.channel() as channel:
        declared = lambda: channel.queue_declare("tasks", passive=True).method  # noqa: E731
        until(lambda: declared().consumer_count == 0, what="nothing is taken")
        until(lambda: declared().message_count >= 18, what="the tasks wait in the queue")
    assert "error" not in stack.counts() and consumer.poll() is None
    write_handler(folder, WORKING)
    stack.wait_status(ids, "success")


WORKER = """
import json, os, subprocess, sys, time
for line in sys.stdin:
    task = json.loads(line)
    word, answer = task["text"].split()[0], {"id": task["id"], "result": task["text"]}
    if word == "flood":
        for _ in range(1024):
            sys.stdout.write("x" * 2**20)
    elif word == "chatter":
        for _ in range(200_000):
            sys.stderr.write("y" * 999 + chr(10))
    elif word == "unknown":
        answer["id"] = "00000000-0000-0000-0000-000000000000"
    elif word == "number":
        answer["result"] = 5
    elif word == "plain":
        print("done", flush=True)
        time.sleep(0.05)  # an answer that comes later is none either
    elif word == "close":
        os.close(1)
        time.sleep(1000)
    elif word == "child":
        subprocess.Popen(["sleep", "1000"])
        sys.exit(3)
    elif word == "deaf":
        time.sleep(1000)
    elif word == "fail":
        del answer["result"]
        answer["error"] = "told to fail"
    else:
        time.sleep(0.02)
    print(json.dumps(answer), flush=True)
"""


def test_a_worker_that_breaks_the_protocol_is_ended_and_slows_nobody(
    stack: Stack, tmp_path: pathlib.Path
) -> None:
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    stack.producer()
    consumer = stack.consumer(WORKER=f"{sys.executable} {program}", CONCURRENCY=4)
    calm = [f"calm {index}" for index in range(300)]
    stack.wait_status(stack.create(*calm[:100]), "success")
    began = time.monotonic()
    stack.wait_status(stack.create(*calm), "success")
    alone = time.monotonic() - began
    expected = {
        "flood": "its worker wrote a line of over 1048576 bytes",
        "unknown": "its worker answered 00000000-0000-0000-0000-000000000000, expected the id",
        "number": "its worker wrote {",
        "plain": "its worker wrote done, expected",
        "close": "its worker closed its stdout",
        "child": "killed its worker 3 times, the last time by exit code 3",
        "fail": "told to fail",
    }
    began = time.monotonic()
    bad = dict(zip(stack.create(*expected), expected, strict=True))
    deaf = stack.create("deaf " + "x" * 2**19, timeoutSeconds=3)
    [chatter] = stack.create("chatter")
    ids = stack.create(*calm)
    stack.wait_status(ids, "success")
    beside = time.monotonic() - began
    stack.wait_status([*bad, *deaf], "error", timeout=60)
    stack.wait_status([chatter], "success")
    for task_id, text in bad.items():
        assert stack.get(task_id)["error"].startswith(expected[text]), text
    # Three of four workers are busy with mischief now and then.
    assert beside < 3 * alone + 5, (alone, beside)
    assert consumer.poll() is None
    assert consumer.log.stat().st_size < 50 * 2**20
    until(lambda: stack.unsettled() == {})


def test_an_async_handler_is_awaited(stack: Stack, runs: pathlib.Path) -> None:
    stack.producer()
    stack.consumer(HANDLER="handlers:asynchronous", RUNS=runs)
    ids = stack.create("a", "b fail")
    stack.wait_ended()
    assert stack.get(ids[0])["result"] == "awaited a"
    assert stack.get(ids[1])["error"] == "ValueError: told to fail: b fail"


def test_what_a_task_prints_is_in_the_log_with_its_id(stack: Stack, tmp_path: pathlib.Path) -> None:
    write_handler(
        tmp_path / "deployed",
        "import sys\ndef work(text):\n    print('printed', text)\n"
        "    os.system('echo of a child')\n    assert sys.stdin.read() == ''",
    )
    stack.producer()
    consumer = stack.consumer(HANDLER="deployed:work", PYTHONPATH=tmp_path / "deployed")
    ids = stack.create("loud")
    stack.wait_status(ids, "success")
    until(lambda: f"{ids[0]}: of a child" in consumer.log.read_text())
    assert f"{ids[0]}: printed loud" in consumer.log.read_text()


def example(language: str) -> str:
    """Return the worker of docs/workers.md in a language."""
    readme = (servers.HERE / "docs/workers.md").read_text()
    return readme.partition(f"```{language}\n")[2].partition("```")[0]


def test_the_readmes_worker_in_another_language_runs_a_thousand_tasks(
    stack: Stack, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "worker.sh"
    path.write_text(example("bash"))
    stack.producer()
    stack.consumer(WORKER=f"bash {path}", CONCURRENCY=2)
    texts = [f'any "text" \\ {index} ' + "ж\n" for index in range(1000)]
    ids = stack.create(*texts)
    stack.wait_status(ids, "success")
    assert [stack.get(task_id)["result"] for task_id in ids[:50]] == texts[:50]


def test_a_module_of_the_users_hides_none_of_ours_or_pythons(
    stack: Stack, runs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A copy of the project whose handlers folder has an email.py and a task.py."""
    root = tmp_path / "project"
    shutil.copytree(servers.HERE, root, ignore=shutil.ignore_patterns(".*", "tests", "__pycache__"))
    (root / "handlers" / "email.py").write_text("raise SystemError('not the standard library')")
    (root / "handlers" / "task.py").write_text(
        "import email.message\ndef work(text):\n    return email.message.__name__"
    )
    stack.producer()
    stack.checkout = (root, sys.executable)
    stack.consumer(HANDLER="task:work")
    ids = stack.create("a")
    stack.wait_status(ids, "success")
    assert stack.get(ids[0])["result"] == "email.message"


def test_of_a_flood_of_failures_the_first_of_each_second_are_logged(stack: Stack) -> None:
    stack.producer()
    consumer = stack.consumer(FAILURE_RATE=1, LOG_LEVEL="WARNING")
    stack.create(*["a"] * 2000)
    stack.wait_ended()

    def lines_and_more() -> tuple[int, int]:
        log = consumer.log.read_text()
        more = re.findall(r"task failures without a line: (\d+) more in a second", log)
        return log.count("failed: RuntimeError: imitated failure"), sum(map(int, more))

    until(lambda: sum(lines_and_more()) == 2000)
    assert 100 <= lines_and_more()[0] < 2000
