"""Creates that come together, when what they are written to is away or changes under them."""

import concurrent.futures
import io
import json
import time
from typing import Any

import psycopg2.errors
import pytest
import requests

import database
import pool
from group_commit import GroupCommit
from native import servers
from tests.proxy import Proxy
from tests.stack import Stack, until


def test_while_the_database_is_frozen_every_create_is_told_soon(stack: Stack, proxy: Any) -> None:
    host, _, port = stack.database_url.rpartition("@")[2].partition("/")[0].partition(":")
    link: Proxy = proxy(int(port))
    url = stack.database_url.replace(f"{host}:{port}", f"127.0.0.1:{link.port}")
    stack.producer(DATABASE_URL=url)

    def create(number: int) -> tuple[int, float]:
        time.sleep(number * 0.02)
        began = time.monotonic()
        answer = requests.post(f"{stack.url}/api/v1/create-task", json={"text": "a"}, timeout=120)
        return answer.status_code, time.monotonic() - began

    with concurrent.futures.ThreadPoolExecutor(300) as clients:
        assert create(0)[0] == 201
        link.frozen.set()
        answers = list(clients.map(create, range(300)))
        assert {status for status, _ in answers} == {503}
        assert max(seconds for _, seconds in answers) < pool.REPLY_SECONDS + 5
        link.frozen.clear()
        until(lambda: create(0)[0] == 201, timeout=2 * pool.REPLY_SECONDS)
        assert {create(0)[0] for _ in range(10)} == {201}


def request(text: str, **fields: Any) -> dict[str, Any]:
    """Return the environ of a create."""
    body = json.dumps({"text": text, **fields}).encode()
    return {"wsgi.input": io.BytesIO(body), "tasks.began": time.perf_counter()}


@pytest.mark.parametrize("is_locked", [False, True])
def test_what_a_group_has_created_is_not_created_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, is_locked: bool
) -> None:
    import producer

    monkeypatch.setattr(pool, "URL", stack.database_url)
    stack.sql((servers.HERE / "schema.sql").read_text())
    group = GroupCommit("/", producer.parse_new_task, lambda tasks, began: None, pool.Pool(2))
    known = "11111111-0000-0000-0000-000000000000"
    assert group.answer([request("known", taskId=known)]) != [None]
    select_tasks = database.select_tasks

    def change_and_select(cursor: Any, ids: list[str]) -> Any:
        monkeypatch.setattr(database, "select_tasks", select_tasks)
        if is_locked:
            raise_locked = pool.Unavailable("locked")
            raise raise_locked from psycopg2.errors.LockNotAvailable()
        stack.sql("DELETE FROM tasks WHERE id = %s", known)
        return select_tasks(cursor, ids)

    monkeypatch.setattr(database, "select_tasks", change_and_select)
    environs = [request("known", taskId=known), request("new 1"), request("new 2")]
    answers = group.answer(environs)
    for environ, answer in zip(environs, answers, strict=True):
        if answer is None:  # the application tries it alone
            group.insert(environ["tasks.new"])
    assert stack.sql("SELECT text, count(*) FROM tasks GROUP BY text ORDER BY text") == [
        ("known", 1),
        ("new 1", 1),
        ("new 2", 1),
    ]
