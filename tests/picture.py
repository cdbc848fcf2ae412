"""Takes the README's picture of the console: runs a service that is as busy as a shop for a while.

Run it with `.run/venv-test/bin/python -m tests.picture [MINUTES]`; it writes console.png."""

import pathlib
import random
import sys
import tempfile
import time

from native import servers
from tests.browser import Browser
from tests.stack import Stack, clean_environment, until

MINUTES = 30
PICTURE = servers.HERE / "console.png"
MAX_BYTES = 150_000
WIDTH, HEIGHT = 1180, 1000
TURN_SECONDS = 2
ORDERS = 12  # a turn, more or less by a wave of ten minutes


def run(stack: Stack, minutes: float) -> None:
    """Keep the service busy, and let two tasks hang."""
    stack.create("order 4711: hang", "order 4712: hang")
    number, end = 10_000, time.monotonic() + 60 * minutes
    while time.monotonic() < end:
        wave = 1 + 0.5 * (time.monotonic() % 600 / 600)
        count = max(1, round(random.gauss(ORDERS * wave, 3)))
        stack.create(*(f"order {number + each}" for each in range(count)))
        number += count
        time.sleep(TURN_SECONDS)


def main() -> None:
    """Run the service, take the picture."""
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else MINUTES
    clean_environment()
    with tempfile.TemporaryDirectory(prefix="tasks-picture-", dir="/var/tmp") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)
        postgres, rabbit = servers.Postgres(folder / "postgres"), servers.Rabbit(folder / "rabbit")
        postgres.start()
        rabbit.start()
        stack = Stack(postgres, rabbit, folder)
        try:
            stack.producer(LOG_LEVEL="INFO")
            for _ in range(2):
                stack.consumer(HANDLER="handlers:shop", CONCURRENCY=4, LOG_LEVEL="INFO")
            run(stack, minutes)
            with Browser(width=WIDTH, height=HEIGHT) as browser:
                browser.go(stack.url)
                browser.find("#longest tbody tr")
                until(lambda: browser.find_all("[data-reason]"), what="reasons")
                browser.screenshot(PICTURE)
        finally:
            stack.close()
            rabbit.stop()
            postgres.stop()
    size = PICTURE.stat().st_size
    print(f"{PICTURE}: {size} bytes")
    if size > MAX_BYTES:
        sys.exit(f"expected at most {MAX_BYTES} bytes")


if __name__ == "__main__":
    main()
