"""The consumer's workers: threads that run the user's function, or the imitation of one."""

import importlib
import inspect
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import process
from in_flight import InFlight
from task import Report, storable

log = logging.getLogger("workers")

CONCURRENCY = process.setting("CONCURRENCY", 1, process.whole(1, 1000))
PROCESSING_SECONDS = process.setting("PROCESSING_SECONDS", 0.1, process.number(0, 10**6))
FAILURE_RATE = process.setting("FAILURE_RATE", 0.1, process.number(0, 1))
HANDLER = process.setting("HANDLER", "", str)


def imitate(text: str) -> str | None:
    """Imitate work: sleep PROCESSING_SECONDS, fail at FAILURE_RATE."""
    if PROCESSING_SECONDS:  # sleep(0) would give the processor away, for 79 microseconds
        time.sleep(PROCESSING_SECONDS)
    if random.random() < FAILURE_RATE:
        raise RuntimeError("imitated failure")
    return None


def load_handler() -> Callable[[str], Any]:
    """Return the function that HANDLER names, or the imitation; end the process with 2 if there is
    no such function, or a call would only make an object that nobody runs."""
    if not HANDLER:
        return imitate
    module, _, name = HANDLER.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        handler = getattr(importlib.import_module(module), name)
        if not callable(handler):
            raise TypeError(f"{name} is not a function")
        for function in (handler, getattr(handler, "__call__", handler)):  # noqa: B004
            if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
                raise TypeError(f"{name} is async, expected a plain def")
            if inspect.isgeneratorfunction(function):
                raise TypeError(f"{name} is a generator, expected a function that returns")
    except Exception as error:  # the user's module may raise anything
        reason = process.printable(f"{type(error).__name__}: {error}")
        print(
            f"HANDLER={HANDLER!r} is not valid: expected module:function: {reason}", file=sys.stderr
        )
        sys.exit(2)
    return handler  # type: ignore[no-any-return]


def run_task(handler: Callable[[str], Any], text: str) -> str | None:
    """Return a task's result as it is stored; raise what the user's function raises."""
    result = handler(text)
    if inspect.isawaitable(result) or inspect.isgenerator(result):
        if hasattr(result, "close"):
            result.close()
        raise TypeError(f"expected a string or None, got a {type(result).__name__} that never ran")
    return None if result is None else storable(result)


def work(in_flight: InFlight, handler: Callable[[str], Any]) -> None:
    """Run tasks one after another until the consumer stops: the body of a worker thread."""
    while (entry := in_flight.take()) is not None:
        if entry.suspect and not in_flight.may_start(entry):
            continue
        report = Report(entry.message.id, attempt=entry.message.attempt)
        try:
            report.result = run_task(handler, entry.message.text)
            report.status = "success"
        except BaseException as error:  # SystemExit too: a worker that ends would be missed
            report.error = storable(f"{type(error).__name__}: {storable(error)}")
            log.warning("task %s failed: %s", entry.message.id, process.printable(report.error))
        in_flight.finish(entry, report)


def start(in_flight: InFlight, handler: Callable[[str], Any]) -> None:
    """Start CONCURRENCY worker threads."""
    for number in range(CONCURRENCY):
        threading.Thread(
            target=work, args=(in_flight, handler), name=f"worker-{number}", daemon=True
        ).start()
