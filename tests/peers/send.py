"""Creates a peer's tasks, numbered from FIRST: `-m tests.peers.send MODULE FIRST COUNT [RATE]`.

With a RATE, so many a second, each by a call of its own; else as fast as the peer can."""

import asyncio
import importlib
import sys
import time

CHUNK = 500


async def send(module: str, first: int, count: int, rate: float | None) -> None:
    """Create the tasks, after what they need."""
    numbers = range(first, first + count)
    begin = time.monotonic()
    async with importlib.import_module(f"tests.peers.{module}").sender() as create:
        if rate is None:
            for at in range(0, count, CHUNK):
                await create([(number, time.time()) for number in numbers[at : at + CHUNK]])
            return
        for number in numbers:
            await asyncio.sleep(begin + (number - first) / rate - time.monotonic())
            await create([(number, time.time())])


if __name__ == "__main__":
    module, first, count, *rate = sys.argv[1:]
    asyncio.run(send(module, int(first), int(count), float(rate[0]) if rate else None))
