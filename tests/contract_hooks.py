"""What schemathesis has to know of the service beyond its document."""

import base64
import json
from typing import Any

import schemathesis

# What a cursor of each call begins with, one status that it may go on with, and where.
PLACES = {
    "listTasks": ("list-tasks", "pending", 0.5),
    "retryTasks": ("retry-tasks", "error", "2030-01-31T12:00:00Z"),
    "cancelTasks": ("cancel-tasks", "pending", 0.5),
}
TASK = "d5474d4e-0069-4601-98d4-742e54cc4fe3"
SHORT_SECONDS = 0.1


def cursor(call: str, status: str, key: Any) -> str:
    """Return what a call answers as `next`."""
    fields = [call, status, None, None, None, key, TASK]
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode().rstrip("=")


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Wait for a moment only, since a wait is as long as it says; and go on from where a page could
    have ended, since no schema can say what a cursor holds."""
    wait = (case.query or {}).get("wait")
    if type(wait) in (int, float) and SHORT_SECONDS < wait <= 60:
        case.query["wait"] = SHORT_SECONDS
    place = PLACES.get(case.operation.definition.raw.get("operationId"))
    if place is None or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    for fields in (case.query, case.body):
        if not isinstance(fields, dict) or not fields.get("cursor"):
            continue
        if "taskIds" not in fields:  # beside them it is an id
            fields["cursor"] = cursor(*place)
            if fields is case.body:  # what it has to agree with
                fields |= dict.fromkeys(("status", "error", "before"))
