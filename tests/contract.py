"""Shows that the service answers as its OpenAPI document says: starts private servers, a producer
and a consumer, makes tasks of every status, and lets schemathesis send good and bad input to every
call; first to a service without tokens, then, in fewer ways, to one with.

Run it with `python -m tests.contract [PATH OF st]`. Exit codes: 0 they agree, 1 they do not."""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from native import servers
from tests.stack import Stack, clean_environment

ST = servers.HERE / ".run/linters/bin/st"
HERE = pathlib.Path(__file__).parent
TOKENS = ("", "secret")
FUZZ_SECONDS = 300
LATER = "2099-01-01T00:00:00Z"


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[tuple[Any, Any]]:
    """Start PostgreSQL and RabbitMQ, and stop them in the end."""
    postgres, rabbit = servers.Postgres(folder / "postgres"), servers.Rabbit(folder / "rabbit")
    with contextlib.ExitStack() as ends:
        for server in (postgres, rabbit):
            ends.callback(server.stop)
            server.start()
        yield postgres, rabbit


def make_tasks(stack: Stack) -> None:
    """Make a few tasks of every status."""
    ended = stack.create("first", "second", "third")
    stack.wait_status(ended, "success")
    cancelled, sent, _ = stack.create("cancelled", "sent", "later", runAt=LATER)
    stack.put(taskId=cancelled, taskStatus="error", error="not wanted")
    stack.sql(
        "UPDATE tasks SET status = 'sent', sent_at = now(), run_at = NULL, delayed = false,"
        " lease_until = now() + interval '1 hour' WHERE id = %s",
        sent,
    )


def fuzz(st: str, stack: Stack, token: str) -> bool:
    """Send input to every call; tell whether all answers were as documented."""
    stack.producer(API_TOKEN=token)
    stack.consumer(API_TOKEN=token)
    options = []
    if token:
        stack.session.headers["Authorization"] = f"Bearer {token}"
        options = ["--header", f"Authorization: Bearer {token}", "--phases", "coverage,stateful"]
    make_tasks(stack)
    command = [st, "--config-file", "schemathesis.toml", "run", f"{stack.url}/openapi.json"]
    environment = os.environ | {"PYTHONPATH": str(HERE)}  # of the hooks
    fuzzer = subprocess.run([*command, *options], cwd=HERE, env=environment, timeout=FUZZ_SECONDS)
    return fuzzer.returncode == 0


def main() -> None:
    """Fuzz a service without tokens, then one with."""
    clean_environment()
    st = sys.argv[1] if len(sys.argv) > 1 else str(ST)
    agree = True
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)  # PostgreSQL's own user has to enter it
        with running(folder) as (postgres, rabbit):
            for token in TOKENS:
                stack = Stack(postgres, rabbit, folder)
                try:
                    agree = fuzz(st, stack, token) and agree
                finally:
                    stack.close()
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
