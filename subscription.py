"""The deliveries of one broker connection: its window, and how messages are settled."""

import collections
import logging
import time

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
        self.unsettled: dict[int, str] = {}  # delivery tags, ascending, with their consumer tags
        self.counts: dict[str, int] = {}  # the prefetch counts of consumer tags
        self.loads: dict[str, int] = {}  # unsettled messages of consumer tags
        self.held: dict[int, str] = {}  # to be acked when the window is smaller
        self.renewal = broker.Renewal()
        self.ending = False
        broker.raise_when_cancelled(channel)
        self.decoder = deliveries.Decoder(connection, channel)

    def taken(self) -> int:
        """Return how many messages may be unsettled, once those that rows hold are acked."""
        held = sum(self.unsettled.get(tag) not in self.counts for tag in self.held)
        left = sum(load for tag, load in self.loads.items() if tag not in self.counts)
        late = sum(each.consumer_tag not in self.counts for each in self.decoder.arrived)
        return sum(self.counts.values()) + left + late - held

    def resize(self, window: int) -> None:
        """Let the broker send so many unsettled messages. Tags whose count is used up are cancelled
        first: messages of another may be on their way. Those come, and count; what has not left the
        broker comes again as redelivered, so that its start is asked for. For held tasks, the
        window takes effect at once, else when the messages of cancelled tags are settled."""
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
            self.counts[self.decoder.consume(broker.QUEUE)] = room
        log.debug("window is now %d", window)

    def end(self) -> None:
        """Let no message come any more, whatever the window should be. One that is on its way goes
        back: the end would wait for its task."""
        self.ending = True
        self.resize(0)

    def is_empty(self) -> bool:
        """Tell whether each delivery is settled."""
        return not (self.unsettled or self.decoder.arrived)

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

    def take(self) -> list[Entry]:
        """Return what has come; what is not a task of ours goes to the dead letters."""
        entries = []
        for delivery in self.decoder.take():
            self.renewal.used = True
            tag, consumer_tag = delivery.tag, delivery.consumer_tag
            self.unsettled[tag] = consumer_tag
            self.loads[consumer_tag] = self.loads.get(consumer_tag, 0) + 1
            if self.ending:
                self.settle({tag: REQUEUE})
                continue
            try:
                message = task.parse_message(delivery.body)
            except ValueError as error:
                shown = process.printable(delivery.body[:80])
                log.warning("dead-lettered a message that is no task (%s): %s", error, shown)
                self.settle({tag: DEAD_LETTER})
                continue
            suspect = delivery.redelivered or broker.SUSPECT in (delivery.properties.headers or {})
            size = len(delivery.body)
            entries.append(Entry(message, size, suspect, [(self, tag)], time.monotonic()))
        return entries

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
