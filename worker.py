"""Runs tasks in a process of its own: one JSON line a task on stdin, one an outcome on stdout.

The consumer starts it. Try it with `echo '{"id": "1", "text": "a"}' | python worker.py`. Exit
codes: 0 stdin has ended, 2 HANDLER cannot be loaded. It imports little, to stay small."""

import functools
import importlib
import json
import json.encoder
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from io import BufferedReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from asyncio import Runner

# The consumer has checked these, and sets what is not set.
PROCESSING_SECONDS = float(os.environ.get("PROCESSING_SECONDS") or 0)
FAILURE_RATE = float(os.environ.get("FAILURE_RATE") or 0)
HANDLER = os.environ.get("HANDLER", "").strip()
HANDLERS_FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "handlers")

MAX_CHARACTERS = 64 * 1024  # of a result or error text; a line stays below a megabyte
CO_GENERATOR, CO_ASYNC_GENERATOR = 0x20, 0x200  # of code.co_flags; inspect takes 2 MB

quote = json.encoder.encode_basestring_ascii  # the encoder's own part for strings, in C
Handler = Callable[[str], object]


def imitate(text: str) -> None:
    """Imitate work: sleep PROCESSING_SECONDS, fail at FAILURE_RATE."""
    if PROCESSING_SECONDS:  # sleep(0) would give the processor away, for 79 microseconds
        time.sleep(PROCESSING_SECONDS)
    if random.random() < FAILURE_RATE:
        raise RuntimeError("imitated failure")


def load_handler() -> Handler:
    """Return the function that HANDLER names, or the imitation; raise ValueError if there is no
    such function, or a call would only make a generator."""
    if not HANDLER:
        return imitate
    # Last, so that handlers/email.py does not stand for the standard library's.
    sys.path += [HANDLERS_FOLDER, os.getcwd()]
    module, _, name = HANDLER.partition(":")
    try:
        handler: Handler = getattr(importlib.import_module(module), name)
        if not callable(handler):
            raise TypeError(f"{name} is not a function")
        for function in (handler, getattr(handler, "__call__", None)):  # noqa: B004
            flags = getattr(getattr(function, "__code__", None), "co_flags", 0)
            if flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
                raise TypeError(f"{name} is a generator, expected a function that returns")
    except BaseException as error:  # the user's module may raise anything, or exit
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"HANDLER={HANDLER!r} is not valid: expected module:function: {reason}"
        ) from None
    return handler


class Tasks:
    """Runs the handler, whose coroutines share one event loop."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.runner: Runner | None = None

    def run(self, task: dict[str, str]) -> str:
        """Return the line that says how a task ended: its result, or the text of what the handler
        raised."""
        name, value = "result", "null"
        try:
            result = self.handler(task["text"])
            if hasattr(result, "__await__"):
                result = self.wait_for(result)
            if hasattr(result, "__next__") or hasattr(result, "__anext__"):
                kind = type(result).__name__
                raise TypeError(f"expected a string or None, got a {kind} that never ran")
            if result is not None:
                value = quote(text_of(result))
        except BaseException as error:  # SystemExit too: it ends the task, not the worker
            name, value = "error", quote(f"{type(error).__name__}: {text_of(error)}")
        return f'{{"id": {quote(task["id"])}, "{name}": {value}}}'

    def wait_for(self, awaitable: object) -> object:
        """Run a coroutine to its end; asyncio is imported only for those who use it."""
        if self.runner is None:
            import asyncio

            self.runner = asyncio.Runner()

        async def result() -> object:
            return await awaitable  # type: ignore[misc]

        return self.runner.run(result())


def text_of(value: object) -> str:
    """Return a value as text, cut; the user's own __str__ may raise."""
    try:
        return str(value)[:MAX_CHARACTERS]
    except Exception as error:
        return f"{type(value).__name__} without a text: {type(error).__name__}"


def lines_with_ticket(lines: BufferedReader, tickets: int) -> Iterator[bytes]:
    """Yield the lines that may be run. Each has a ticket, its number from 1 on in 4 bytes. Who
    takes the ticket has the task: the consumer takes back what has not begun in the same way."""
    number = 0
    while ticket := os.read(tickets, 4):
        wanted = int.from_bytes(ticket, "little")
        line = b""
        while number < wanted:
            line = lines.readline()
            if not line:
                return
            number += 1
        yield line


def close(descriptors: list[int]) -> None:
    """Close descriptors, once: in a child's child their numbers may be somebody else's."""
    while descriptors:
        os.close(descriptors.pop())


def write(descriptor: int, line: str) -> None:
    """Write a line."""
    data = line.encode() + b"\n"
    while data:  # at once, as a rule
        data = data[os.write(descriptor, data) :]


def main() -> None:
    """Run tasks until stdin or the tickets end."""
    tickets = int(sys.argv[1]) if len(sys.argv) > 1 else None
    stdout, stdin = os.dup(1), os.dup(0)
    os.dup2(2, 1)  # print() is for the log
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    private = [stdout, stdin] if tickets is None else [stdout, stdin, tickets]
    # A child that outlives the worker would keep its pipes open.
    os.register_at_fork(after_in_child=functools.partial(close, private))
    try:
        handler = load_handler()
    except ValueError as error:
        write(stdout, json.dumps({"ready": False, "error": str(error)}))
        sys.exit(2)
    write(stdout, json.dumps({"ready": True}))
    tasks = Tasks(handler)
    lines = open(stdin, "rb")  # noqa: SIM115
    for line in lines if tickets is None else lines_with_ticket(lines, tickets):
        write(stdout, tasks.run(json.loads(line.decode())))


if __name__ == "__main__":
    main()
