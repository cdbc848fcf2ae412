"""PREFETCH=auto: slow tasks are shared, fast ones are held in numbers, and no change of the window
counts as a delivery."""

import pathlib
import re

from tests.stack import Stack, until


def test_slow_tasks_from_an_empty_queue_are_shared_evenly(
    stack: Stack, tmp_path: pathlib.Path
) -> None:
    stack.producer()
    runs = [tmp_path / "runs-0", tmp_path / "runs-1"]
    for path in runs:
        stack.consumer(HANDLER="handlers:note", RUNS=path)
    with stack.channel() as channel:
        declared = lambda: channel.queue_declare("tasks", passive=True).method  # noqa: E731
        until(lambda: declared().consumer_count == 2, what="two consumers")
    stack.wait_status(stack.create("warm up"), "success")
    stack.create(*[f"sleep=0.25 {index}" for index in range(40)])
    stack.wait_ended()
    shares = [sum(stack.runs(path).values()) for path in runs]
    assert sum(shares) == 41
    assert all(15 <= share <= 26 for share in shares), shares  # 41 and 0 without sharing


def test_a_window_that_widens_and_narrows_redelivers_nothing(
    stack: Stack, tmp_path: pathlib.Path
) -> None:
    stack.producer()
    runs = tmp_path / "runs"
    consumer = stack.consumer(HANDLER="handlers:note", RUNS=runs)
    for round_, words in enumerate(("", "sleep=0.005 ", "")):
        stack.create(*[f"{words}{round_}-{index}" for index in range(1200 if words else 3000)])
        stack.wait_ended()
    assert set(stack.runs(runs).values()) == {1}
    [(starts,)] = stack.sql("SELECT max(starts) FROM tasks")
    assert starts == 0  # a redelivered message would have been counted
    sizes = [int(size) for size in re.findall(r"window is now (\d+)", consumer.log.read_text())]
    wide = next((index for index, size in enumerate(sizes) if size >= 100), len(sizes))
    assert min(sizes[wide:], default=0) in range(1, 31), sizes


def test_what_waits_behind_a_long_task_goes_to_an_idle_consumer(
    stack: Stack, tmp_path: pathlib.Path
) -> None:
    stack.producer()
    runs = tmp_path / "runs"
    stack.consumer(HANDLER="handlers:note", RUNS=runs)
    stack.wait_status(stack.create(*map(str, range(2000))), "success")  # its window is wide now
    long, *short = stack.create("sleep=90 long", *[f"sleep=0.01 {index}" for index in range(50)])
    until(lambda: stack.runs(runs).get("sleep=90 long"))
    stack.consumer(HANDLER="handlers:note", RUNS=runs)
    stack.wait_status(short, "success", timeout=60)
    assert stack.get(long)["taskStatus"] == "sent"
