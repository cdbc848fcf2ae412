"""When the housekeeper looks again, without a server."""

import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

import dispatcher
import housekeeper
import metrics
import process

pytestmark = pytest.mark.pure
NOW = 100.0


class Table:
    """Stands for the connections: each sweep answers with this."""

    def __init__(self, answer: datetime | None) -> None:
        self.answer = answer

    def transaction(self, work: Callable) -> datetime | None:
        """Return where the sweep has ended."""
        return self.answer


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [(None, housekeeper.SWEEP_SECONDS), (datetime(2026, 1, 1, tzinfo=UTC), 0)],
)
def test_the_next_sweep_is_at_once_while_old_tasks_are_left_and_later_when_none_is(
    answer: datetime | None, seconds: float
) -> None:
    keeper = housekeeper.Housekeeper(
        Table(answer), threading.Event(), dispatcher.Arrivals(), metrics.Metrics(), "a producer"
    )
    keeper.sweep_when_due(NOW, process.Backoff(logging.getLogger("test"), "not deleted"))
    assert keeper.sweep_at == NOW + seconds
