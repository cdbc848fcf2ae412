"""Many consumers at once: nobody is left out, neither at work nor after a restart of the broker."""

import pathlib
import re

from tests.stack import Stack, until

CONSUMERS = 30
TASKS = 10 * CONSUMERS  # of TASK_SECONDS
TASK_SECONDS = 0.2
LEAST_SHARE = 3  # of the ten
LETTERS = 3000


def test_a_fleet_is_back_after_a_broker_restart_and_shares_the_work(
    own: Stack, tmp_path: pathlib.Path
) -> None:
    own.producer(LOG_LEVEL="INFO")
    runs = [tmp_path / f"runs-{number}" for number in range(CONSUMERS)]
    for path in runs:
        own.consumer(HANDLER="handlers:note", RUNS=path, LOG_LEVEL="INFO")
    wait_subscribed(own)
    first = [f"sleep={TASK_SECONDS} first {number}" for number in range(TASKS)]
    own.create(*first)
    until(lambda: own.counts().get("success", 0) >= CONSUMERS, what="the fleet works")
    own.rabbit.stop()
    own.rabbit.start()
    wait_subscribed(own)
    second = [f"sleep={TASK_SECONDS} second {number}" for number in range(TASKS)]
    own.create(*second)
    own.wait_ended()
    assert own.counts() == {"success": 2 * TASKS}
    ran = [own.runs(path) for path in runs]
    # Only what was in flight at the restart may have run twice, each consumer's one message.
    again = sum(sum(each.values()) for each in ran) - 2 * TASKS
    assert 0 <= again <= CONSUMERS, again
    assert sorted(text for each in ran for text in each if text in set(second)) == sorted(second)
    shares = sorted(sum(text in second for text in each) for each in ran)
    assert shares[0] >= LEAST_SHARE, shares


def wait_subscribed(stack: Stack) -> None:
    """Wait until every consumer is subscribed to the queue."""

    def subscribed() -> bool:
        with stack.channel() as channel:
            declared = channel.queue_declare("tasks", passive=True).method
            return declared.consumer_count >= CONSUMERS

    until(subscribed, what=f"{CONSUMERS} consumers", pause=0.2)


def test_the_dead_letters_of_many_consumers_are_reported_in_groups(stack: Stack) -> None:
    stack.producer(LOG_LEVEL="INFO")
    consumers = [stack.consumer(HANDLER="handlers:nap", LOG_LEVEL="INFO") for _ in range(CONSUMERS)]
    wait_subscribed(stack)
    stack.create(*["no number"] * LETTERS)
    stack.wait_ended()
    assert stack.counts() == {"error": LETTERS}
    logs = "".join(each.log.read_text() for each in consumers)
    groups = [int(size) for size in re.findall(r"reported (\d+) dead letters", logs)]
    assert sum(groups) >= LETTERS
    assert len(groups) <= LETTERS / 3, groups  # each in turn: nearly as many as there are letters
