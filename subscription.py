"""The deliveries of one broker connection: its window, and how messages are settled."""

import collections
import logging
import time
from typing import Any

import pika
from pika.adapters.blocking_connection import BlockingChannel

import broker
import deliveries
import process
import task
from entry import ACK, DEAD_LETTER, HELD, REQUEUE, Entry

log = logging.getLogger("consumer")


class Subscription:
    """One connection's deliveries and window. Only the I/O thread calls it, other threads by
    add_callback_threadsafe().

    The window is the sum of the consumer tags' prefetch counts: a tag's count cannot be changed.
    To narrow it, tags are cancelled; their unsettled messages still count.
    """

    def __init__(self, connection: pika.BlockingConnection, channel: BlockingChannel) -> None:
        self.connection = connection
        self.channel = channel
        self.arrived: list[Entry] = []
        self.unsettled: dict[int, str] = {}  # delivery tags, ascending, with their consumer tags
        self.counts: dict[str, int] = {}  # the prefetch counts of consumer tags
        self.loads: dict[str, int] = {}  # unsettled messages of consumer tags
        self.held: dict[int, str] = {}  # to be acked when the window is smaller
        self.renewal = broker.Renewal()
        self.ending = False
        broker.raise_when_cancelled(channel)
        deliveries.Decoder(connection, channel)

    def taken(self) -> int:
        """Return how many messages may be unsettled, once those that rows hold are acked."""
        held = sum(self.unsettled.get(tag) not in self.counts for tag in self.held)
        left = sum(load for tag, load in self.loads.items() if tag not in self.counts)
        return sum(self.counts.values()) + left - held

    def resize(self, window: int) -> None:
        """Let the broker send so many unsettled messages. Tags whose count is used up are cancelled
        first: of another, a message may be on its way, which pika sends back as redelivered. For
        held tasks, it takes effect at once, else when the messages of cancelled tags are settled.
        """
        window = 0 if self.ending else window
        held = collections.Counter(self.unsettled.get(tag) for tag in self.held)
        order = lambda tag: (self.unused(tag), -held[tag], -self.counts[tag])  # noqa: E731
        for tag in sorted(self.counts, key=order):
            if (self.taken() if self.held else sum(self.counts.values())) <= window:
                break
            self.channel.basic_cancel(tag)
            del self.counts[tag]
        room = window - self.taken()
        if room > 0:
            self.channel.basic_qos(prefetch_count=room)
            tag = self.channel.basic_consume(broker.QUEUE, self.on_message)
            self.counts[tag] = room
        log.debug("window is now %d", window)

    def end(self) -> None:
        """Let no message come any more, whatever the window should be."""
        self.ending = True
        self.resize(0)

    def is_empty(self) -> bool:
        """Tell whether each delivery is settled."""
        return not self.unsettled

    def is_worn(self) -> bool:
        """Tell whether the connection should be renewed, and nothing would be lost by that."""
        return self.is_empty() and self.renewal.is_due()

    def unused(self, tag: str) -> int:
        """Return how many messages the broker may still send for a consumer tag."""
        return self.counts[tag] - self.loads.get(tag, 0)

    def is_full(self) -> bool:
        """Tell whether no message can be on its way."""
        return not any(map(self.unused, self.counts))

    def unload(self, tag: int) -> None:
        """Forget a delivery."""
        consumer_tag = self.unsettled.pop(tag)
        load = self.loads.pop(consumer_tag) - 1
        if load:
            self.loads[consumer_tag] = load

    def on_message(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        """Take a delivery; what is not a task of ours goes to the dead letters."""
        self.renewal.used = True
        consumer_tag = method.consumer_tag
        self.unsettled[method.delivery_tag] = consumer_tag
        self.loads[consumer_tag] = self.loads.get(consumer_tag, 0) + 1
        try:
            message = task.parse_message(body)
        except ValueError as error:
            shown = process.printable(body[:80])
            log.warning("dead-lettered a message that is no task (%s): %s", error, shown)
            self.settle({method.delivery_tag: DEAD_LETTER})
            return
        suspect = method.redelivered or broker.SUSPECT in (properties.headers or {})
        delivery = self, method.delivery_tag
        self.arrived.append(Entry(message, len(body), suspect, [delivery], time.monotonic()))

    def settle(self, verdicts: dict[int, str]) -> None:
        """Ack, dead-letter or requeue deliveries, each run of equals at the front by one frame.
        Those that the row holds come later."""
        if HELD in verdicts.values():
            self.held |= {tag: ACK for tag, verdict in verdicts.items() if verdict == HELD}
            verdicts = {tag: verdict for tag, verdict in verdicts.items() if verdict != HELD}
        last = None
        for tag in list(self.unsettled):
            verdict = verdicts.get(tag)
            if last is not None and verdict != last[1]:
                self.send(*last, multiple=True)
            if verdict is None:
                break
            last = tag, verdict
            self.unload(tag)
            del verdicts[tag]
        else:
            if last is not None:
                self.send(*last, multiple=True)
        for tag, verdict in verdicts.items():
            if tag in self.unsettled:
                self.unload(tag)
                self.send(tag, verdict, multiple=False)

    def send(self, tag: int, verdict: str, multiple: bool) -> None:
        """Send one ack or nack; with multiple it covers every unsettled tag up to this one."""
        if verdict == ACK:
            self.channel.basic_ack(tag, multiple)
        else:
            self.channel.basic_nack(tag, multiple, requeue=verdict == REQUEUE)
