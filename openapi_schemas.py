"""The schemas that openapi.py refers to. JSON Schema counts characters where the service counts
bytes of UTF-8: what is longer than a limit here is refused, and what is shorter may be."""

from typing import Any

import bulk
import stats
import task
from metrics import KEPT_MINUTES

Json = dict[str, Any]


def text(most: int | None = None, least: int = 0, **more: Any) -> Json:
    """Return the schema of a string of so many characters."""
    limits = ({"minLength": least} if least else {}) | ({"maxLength": most} if most else {})
    return {"type": "string", **limits, **more}


def enum(*values: str, **more: Any) -> Json:
    """Return the schema of one of some strings."""
    return {"type": "string", "enum": list(values), **more}


def nullable(schema: Json) -> Json:
    """Return a schema that allows null too."""
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: Json, **more: Any) -> Json:
    """Return the schema of an array."""
    return {"type": "array", "items": items, **more}


def record(properties: Json, *optional: str, closed: bool = False, **more: Any) -> Json:
    """Return the schema of an object; all properties are required but the optional ones."""
    required = [name for name in properties if name not in optional]
    schema: Json = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return schema | ({"additionalProperties": False} if closed else {}) | more


def loose(properties: Json, **more: Any) -> Json:
    """Return the schema of an object in which every property may be absent or null."""
    optional = {name: nullable(schema) for name, schema in properties.items()}
    return record(optional, *optional, **more)


def given(*names: str) -> list[Json]:
    """Return the alternatives of which one has to hold: that a text is there and not null."""
    return [{"required": [name], "properties": {name: {"type": "string"}}} for name in names]


def ref(name: str) -> Json:
    """Return a reference to one of the shared schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


UUID = text(format="uuid", pattern=f"^{task.UUID.pattern}$")
CONSUMER = UUID | {"pattern": f"^(?!{task.NOBODY}$){UUID['pattern'][1:]}"}
TIME = text(format="date-time")
ANY_TIME = TIME | {"description": "ISO 8601; without an offset it is UTC. A date alone will do."}
COUNT = {"type": "integer", "minimum": 0}
INTEGER = {"type": "integer"}
INT64 = {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1}
SECONDS = {"type": "number", "minimum": 0}
RUN_SECONDS = SECONDS | {"maximum": task.MAX_TIMEOUT_SECONDS}
MAYBE_SECONDS = nullable(SECONDS)
TIMEOUT = {"type": "number", "exclusiveMinimum": 0, "maximum": task.MAX_TIMEOUT_SECONDS}
FLAG = {"type": "boolean"}
STATUS = enum("pending", "sent", "success", "error")
WORD = enum(*sorted(task.WORDS), description="In any case of letters.")
CURSOR = text(least=1, description="The `next` of an earlier answer; it holds the filter.")
NUL_FREE = "^[^\\u0000]*$"
OUTCOME = text(
    task.MAX_OUTCOME_BYTES,
    pattern=NUL_FREE,
    description=f"At most {task.MAX_OUTCOME_BYTES} bytes of UTF-8, no NUL, no lone surrogate.",
)
NAME = text(
    task.MAX_WORD_BYTES,
    pattern=NUL_FREE,
    description=f"At most {task.MAX_WORD_BYTES} bytes of UTF-8, no NUL, no lone surrogate.",
)
ENDS = ("created", "success", "error")  # what is counted of a minute or window
PARTS = ("database", "broker", "dispatcher")

TASK = {
    "taskId": UUID,
    "text": text(),
    "taskStatus": STATUS,
    "attempt": {"type": "integer", "minimum": 1},
    "result": nullable(text(description="What the function returned.")),
    "error": nullable(text(description="Why the task failed, or was cancelled.")),
    "timeoutSeconds": nullable(TIMEOUT),
    "runAt": nullable(TIME | {"description": "Not before; null once it may run."}),
    "createdAt": TIME,
    "sentAt": nullable(TIME),
    "startedAt": nullable(TIME | {"description": "When the last run that has ended began."}),
    "finishedAt": nullable(TIME),
    "seconds": nullable(SECONDS | {"description": "How long that run took."}),
    "host": nullable(text(description="Where that run was.")),
}
PAST_ATTEMPT = record(
    {
        "attempt": INTEGER,
        "outcome": enum("failed", "timed out", "cancelled", "rescued", "retried"),
        "error": nullable(text()),
        "consumer": nullable(text()),
        "startedAt": nullable(TIME),
        "seconds": nullable({"type": "number"}),
        "at": TIME,
    }
)
NEW_TASK = {
    "text": text(
        task.MAX_TEXT_BYTES,
        1,
        pattern="^[^\\u0000]+$",
        description="At most 1 MiB of UTF-8, no NUL, no lone surrogate.",
    ),
    "taskId": nullable(UUID | {"description": "Your own; a repeat is answered with the task."}),
    "runAt": nullable(ANY_TIME),
    "timeoutSeconds": nullable(TIMEOUT | {"description": "A run that takes longer has failed."}),
}
REPORT = {
    "taskId": UUID,
    "taskStatus": WORD,
    "attempt": INTEGER | {"description": "Of the run that this is about; another one is refused."},
    "result": OUTCOME,
    "error": OUTCOME,
    "startedAt": ANY_TIME,
    "seconds": RUN_SECONDS,
    "host": NAME,
}
FORM = ("taskId", "taskStatus", "attempt", "result", "error", "host")

RUNNING = {
    "taskId": UUID,
    "attempt": INTEGER,
    "seconds": RUN_SECONDS,
    "state": NAME,
    "sent": nullable(INT64 | {"description": "Of its message: microseconds since 1970."}),
}
HEARTBEAT = {
    "consumer": CONSUMER,
    "host": NAME,
    "concurrency": COUNT | {"maximum": task.MAX_NAMED},
    "busy": COUNT | {"maximum": task.MAX_NAMED},
    "version": NAME,
    "tasks": array(record(RUNNING, "sent"), maxItems=task.MAX_NAMED),
}
NAMED = array(record({"taskId": UUID, "attempt": INTEGER}))
CONSUMER_SEEN = {
    "consumer": UUID,
    "host": text(),
    "version": text(),
    "concurrency": COUNT,
    "busy": COUNT,
    "startedAt": TIME,
    "seenAt": TIME,
    "silentSeconds": SECONDS,
    "inFlight": COUNT,
    "tasks": array(
        record({"taskId": UUID, "attempt": INTEGER, "seconds": SECONDS, "state": text()})
    ),
}
WINDOW_TIMES = record({"p50": MAYBE_SECONDS, "p95": MAYBE_SECONDS})
WINDOW = {
    **{name: COUNT for name in ENDS},
    **{f"{name}Rate": SECONDS | {"description": "A second."} for name in ENDS},
    "wait": WINDOW_TIMES,
    "run": WINDOW_TIMES,
}
MINUTE = {
    "minute": TIME,
    **{name: COUNT for name in ENDS},
    "waitP95": MAYBE_SECONDS,
    "runP95": MAYBE_SECONDS,
}
STATUS_COUNT = {"anyOf": [COUNT, {"const": f"{stats.MOST}+"}, {"type": "null"}]}
STATS = {
    "now": TIME,
    "version": text(),
    "readOnly": FLAG | {"description": "The caller's token is for reading only."},
    "paused": nullable(FLAG),
    "pausedAt": nullable(TIME),
    "counts": record({name: STATUS_COUNT for name in stats.STATUSES}),
    "pendingAge": nullable(record({"oldest": MAYBE_SECONDS, "median": MAYBE_SECONDS})),
    "windows": record({name: nullable(ref("Window")) for name in ("5", "60")}),
    "minutes": nullable(array(record(MINUTE), maxItems=KEPT_MINUTES)),
    "queues": nullable(record({"tasks": COUNT, "tasks.dlq": COUNT})),
    "consumers": nullable(array(record(CONSUMER_SEEN))),
    "errors": nullable(array(record({"error": text(), "count": COUNT, "latest": TIME}))),
    "health": ref("Ready"),
}


def action_body(action: bulk.Action) -> Json:
    """Return the schema of what a call on many tasks takes. By id a cursor is an id too."""
    flag = nullable(FLAG | {"description": "Only count."})
    ids = array(UUID, minItems=1, maxItems=task.MAX_NAMED)
    by_id = {"taskIds": ids, "dryRun": flag, "cursor": nullable(UUID)}
    by_filter = {
        "status": enum(*action.views),
        "error": OUTCOME | {"minLength": 1, "description": "What the error begins with."},
        "before": ANY_TIME | {"description": "Only what was so before; else before the call."},
        "dryRun": FLAG | {"description": "Only count."},
        "cursor": CURSOR,
    }
    one = given("status", "error", "before", "cursor")
    return {
        "anyOf": [
            record(by_id, "dryRun", "cursor", closed=True),
            loose(by_filter, closed=True, anyOf=one),
        ]
    }


SCHEMAS = {
    "Error": record({"error": text(description="What is wrong, and what is expected.")}),
    "NewTask": record(NEW_TASK, "taskId", "runAt", "timeoutSeconds", closed=True),
    "Task": record(TASK),
    "TaskWithHistory": record(TASK | {"history": nullable(array(PAST_ATTEMPT))}),
    "Report": loose(
        REPORT,
        description="A taskId, and a taskStatus or the attempt of a task in flight. In a single"
        " report they may come from the query too.",
    ),
    "ReportForm": record({name: REPORT[name] for name in FORM}, *FORM),
    "Updated": record(
        {
            "updated": COUNT,
            "rejected": array(
                record({"index": COUNT, "taskId": nullable(text()), "reason": text()})
            ),
            "alone": array(COUNT),
            "locked": array(COUNT),
        },
        *("alone", "locked"),
    ),
    "Heartbeat": record(HEARTBEAT, "busy"),
    "HeartbeatAnswer": record({"now": {"type": "number"}, "held": NAMED, "stop": NAMED}),
    "TaskPage": record({"tasks": array(ref("Task")), "next": nullable(text())}),
    "Retry": action_body(bulk.RETRY),
    "Cancel": action_body(bulk.CANCEL),
    "ActionAnswer": record({"matched": COUNT, "changed": COUNT, "next": nullable(text())}),
    "Pause": record({"paused": FLAG, "pausedAt": nullable(TIME)}),
    "Window": record(WINDOW),
    "Stats": record(STATS),
    "Ready": record({name: text() for name in PARTS}, description='"ok", or what is wrong.'),
}
