"""Handlers that the tests give to consumers, HANDLER=handlers:NAME; each run is a line in RUNS."""

import mmap
import os
import pathlib
import random
import signal
import struct
import time
from collections.abc import Iterator


def note(text: str) -> str | None:
    """Note the run, then do as the text says: sleep, fail, die, answer, or nothing."""
    with pathlib.Path(os.environ["RUNS"]).open("a") as runs:
        runs.write(f"{text}\n")
    for word in text.split():
        name, _, value = word.partition("=")
        if name == "sleep":
            time.sleep(float(value))
        elif name == "fail":
            raise ValueError(f"told to fail: {text}")
        elif name == "die":
            os._exit(9)
        elif name == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif name == "kill":  # the whole consumer
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        elif name == "ignore":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif name == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif name == "exit":
            raise SystemExit(3)
        elif name == "scream":
            raise ValueError("x" * int(value))
        elif name == "bytes":
            return "x" * int(value)
        elif name == "nul":
            return "a\0b\ud800c"
    return None


def fail_twice(text: str) -> str:
    """Fail the first two runs of a text, then answer."""
    note(text)
    runs = pathlib.Path(os.environ["RUNS"]).read_text().splitlines().count(text)
    if runs < 3:
        raise ValueError(f"run {runs}")
    return f"run {runs}"


async def asynchronous(text: str) -> str:
    """Note the run, and answer after a pause that others could use."""
    import asyncio  # 3 MB in each worker of the other tests, too

    await asyncio.sleep(0.01)
    note(text)
    return f"awaited {text}"


def generator(text: str) -> Iterator[str]:
    """Look like a handler: a call would only make a generator."""
    yield text


def lazy(text: str) -> object:
    """Return what would still have to be run."""
    return generator(text)


def nap(text: str) -> None:
    """Sleep for so many seconds."""
    if text != "0":
        time.sleep(float(text))


def burn(text: str) -> None:
    """Take so many seconds of a processor."""
    end = time.thread_time() + float(text)
    while time.thread_time() < end:
        pass


def count(text: str) -> None:
    """Do no work but count it in COUNTS, a file of this process's own: the benchmark's handler."""
    global counted, counts
    if counts is None:
        path = pathlib.Path(os.environ["COUNTS"]) / str(os.getpid())
        path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            counts = mmap.mmap(file.fileno(), 8)
    counted += 1
    struct.pack_into("q", counts, 0, counted)


def tally(text: str) -> None:
    """Sleep for so many seconds, and count that in COUNTS."""
    count(text)
    nap(text)


def shop(text: str) -> str:
    """Be as busy as a shop, where some orders fail and some hang: for the README's picture."""
    time.sleep(random.lognormvariate(-1.5, 0.6) if "hang" not in text else 10**6)
    chance = random.random()
    if chance < 0.03:
        raise KeyError("price")
    if chance < 0.045:
        raise TimeoutError("no answer from payments.internal within 30 s")
    if chance < 0.05:
        raise ValueError("address: expected a postcode")
    return "shipped"


counted = 0
counts: mmap.mmap | None = None
