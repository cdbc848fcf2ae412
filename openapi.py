"""The contract of the HTTP API, as OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0). A test
compares it with the routes, and a fuzzer with what they answer."""

from typing import Any

import bulk
import process
import stats
import task
import task_list
from metrics import KEPT_MINUTES

Json = dict[str, Any]


def text(most: int | None = None, least: int = 0, **more: Any) -> Json:
    """Return the schema of a string of so many characters."""
    limits = {"minLength": least} | ({"maxLength": most} if most else {})
    return {"type": "string", **limits, **more}


def nullable(schema: Json) -> Json:
    """Return a schema that allows null too."""
    return {"anyOf": [schema, {"type": "null"}]}


def array(items: Json, **more: Any) -> Json:
    """Return the schema of an array."""
    return {"type": "array", "items": items, **more}


def record(properties: Json, *optional: str, closed: bool = False) -> Json:
    """Return the schema of an object; all properties are required but the optional ones."""
    required = [name for name in properties if name not in optional]
    schema: Json = {"type": "object", "properties": properties, "required": required}
    return schema | ({"additionalProperties": False} if closed else {})


def ref(name: str) -> Json:
    """Return a reference to one of the shared schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


UUID = {
    "type": "string",
    "format": "uuid",
    "pattern": f"^{task.UUID.pattern.replace('a-f', 'a-fA-F')}$",
}
TIME = {"type": "string", "format": "date-time"}
COUNT = {"type": "integer", "minimum": 0}
SECONDS = {"type": "number", "minimum": 0}
MAYBE_SECONDS = nullable(SECONDS)
TIMEOUT = {"type": "number", "exclusiveMinimum": 0, "maximum": task.MAX_TIMEOUT_SECONDS}
INT64 = {"type": "integer", "minimum": -(2**63) + 1, "maximum": 2**63 - 1}
STATUS = {"type": "string", "enum": ["pending", "sent", "success", "error"]}
WORD = {"type": "string", "enum": sorted(task.WORDS)}
LISTED = {"type": "string", "enum": list(task_list.VIEWS)}
NUL_FREE = "^[^\\u0000]*$"
OUTCOME = text(task.MAX_OUTCOME_BYTES // 4, pattern=NUL_FREE)
NAME = text(task.MAX_WORD_BYTES // 4, pattern=NUL_FREE)
WINDOW_TIMES = record({"p50": MAYBE_SECONDS, "p95": MAYBE_SECONDS})

TASK = {
    "taskId": UUID,
    "text": text(),
    "taskStatus": STATUS,
    "attempt": {"type": "integer", "minimum": 1},
    "result": nullable(text()),
    "error": nullable(text()),
    "timeoutSeconds": nullable(TIMEOUT),
    "runAt": nullable(TIME),
    "createdAt": TIME,
    "sentAt": nullable(TIME),
    "startedAt": nullable(TIME),
    "finishedAt": nullable(TIME),
    "seconds": MAYBE_SECONDS,
    "host": nullable(text()),
}
CONSUMER = {
    "consumer": UUID,
    "host": text(),
    "version": text(),
    "concurrency": COUNT,
    "busy": COUNT,
    "startedAt": TIME,
    "seenAt": TIME,
    "silentSeconds": SECONDS,
    "inFlight": COUNT,
    "tasks": array(record({"taskId": UUID, "attempt": INT64, "seconds": SECONDS, "state": text()})),
}
REPORT = {
    "taskId": UUID,
    "taskStatus": nullable(WORD),
    "attempt": nullable({"type": "integer"}),
    "result": nullable(OUTCOME),
    "error": nullable(OUTCOME),
    "startedAt": nullable(TIME),
    "seconds": nullable(SECONDS | {"maximum": task.MAX_TIMEOUT_SECONDS}),
    "host": nullable(NAME),
}

SCHEMAS = {
    "Error": record({"error": text()}),
    "NewTask": record(
        {
            "text": text(task.MAX_TEXT_BYTES // 4, 1, pattern="^[^\\u0000]+$"),
            "taskId": nullable(UUID),
            "runAt": nullable(TIME),
            "timeoutSeconds": nullable(TIMEOUT),
        },
        *("taskId", "runAt", "timeoutSeconds"),
        closed=True,
    ),
    "Task": record(TASK),
    "TaskWithHistory": record(
        TASK
        | {
            "history": nullable(
                array(
                    record(
                        {
                            "attempt": {"type": "integer"},
                            "outcome": {
                                "type": "string",
                                "enum": ["failed", "timed out", "cancelled", "rescued", "retried"],
                            },
                            "error": nullable(text()),
                            "consumer": nullable(text()),
                            "startedAt": nullable(TIME),
                            "seconds": nullable({"type": "number"}),
                            "at": TIME,
                        }
                    )
                )
            )
        }
    ),
    "Report": record(REPORT, *(REPORT.keys() - {"taskId"})),
    "Updated": record(
        {
            "updated": COUNT,
            "rejected": array(record({"index": COUNT, "taskId": {}, "reason": text()})),
            "alone": array(COUNT),
            "locked": array(COUNT),
        },
        *("alone", "locked"),
    ),
    "Heartbeat": record(
        {
            "consumer": UUID,
            "host": NAME,
            "concurrency": COUNT | {"maximum": task.MAX_NAMED},
            "busy": COUNT | {"maximum": task.MAX_NAMED},
            "version": NAME,
            "tasks": array(
                record(
                    {
                        "taskId": UUID,
                        "attempt": {"type": "integer", "minimum": 1, "maximum": 2**31 - 1},
                        "seconds": SECONDS | {"maximum": task.MAX_TIMEOUT_SECONDS},
                        "state": NAME,
                        "sent": nullable(INT64),
                    },
                    "sent",
                ),
                maxItems=task.MAX_NAMED,
            ),
        },
        "busy",
    ),
    "HeartbeatAnswer": record(
        {
            "now": {"type": "number"},
            **{
                name: array(record({"taskId": UUID, "attempt": {"type": "integer"}}))
                for name in ("held", "stop")
            },
        }
    ),
    "TaskPage": record({"tasks": array(ref("Task")), "next": nullable(text())}),
    "BulkAnswer": record({"matched": COUNT, "changed": COUNT, "next": nullable(text())}),
    "Pause": record({"paused": {"type": "boolean"}, "pausedAt": nullable(TIME)}),
    "Window": record(
        {
            **{name: COUNT for name in ("created", "success", "error")},
            **{f"{name}Rate": SECONDS for name in ("created", "success", "error")},
            "wait": WINDOW_TIMES,
            "run": WINDOW_TIMES,
        }
    ),
    "Stats": record(
        {
            "now": TIME,
            "version": text(),
            "readOnly": {"type": "boolean"},
            "paused": nullable({"type": "boolean"}),
            "pausedAt": nullable(TIME),
            "counts": record(
                {
                    name: {"anyOf": [COUNT, {"const": f"{stats.MOST}+"}, {"type": "null"}]}
                    for name in stats.STATUSES
                }
            ),
            "pendingAge": nullable(record({"oldest": MAYBE_SECONDS, "median": MAYBE_SECONDS})),
            "windows": record({name: nullable(ref("Window")) for name in ("5", "60")}),
            "minutes": nullable(
                array(
                    record(
                        {
                            "minute": TIME,
                            **{name: COUNT for name in ("created", "success", "error")},
                            "waitP95": MAYBE_SECONDS,
                            "runP95": MAYBE_SECONDS,
                        }
                    ),
                    maxItems=KEPT_MINUTES,
                )
            ),
            "queues": nullable(record({"tasks": COUNT, "tasks.dlq": COUNT})),
            "consumers": nullable(array(record(CONSUMER))),
            "errors": nullable(array(record({"error": text(), "count": COUNT, "latest": TIME}))),
            "health": record({name: text() for name in ("database", "broker", "dispatcher")}),
        }
    ),
    "Ready": record({name: text() for name in ("database", "broker", "dispatcher")}),
}


def bulk_body(action: bulk.Action) -> Json:
    """Return the schema of a call on many tasks."""
    common = {"dryRun": nullable({"type": "boolean"}), "cursor": nullable(text())}
    status = {"type": "string", "enum": list(action.views)}
    by_filter = {"status": status, "error": nullable(OUTCOME), "before": nullable(TIME)}
    ids = array(UUID, minItems=1, maxItems=task.MAX_NAMED)
    return {
        "anyOf": [
            record({"taskIds": ids} | common, *common, closed=True),
            record(by_filter | common, *common, *("error", "before"), closed=True),
        ]
    }


def answers(schema: Json, code: str = "200", *others: str) -> Json:
    """Return the answers of a call: what it says when all is well, and errors."""
    texts = {
        "200": "Done.",
        "201": "Committed to disk.",
        "400": "Bad input: what was expected.",
        "401": "The token is missing.",
        "403": "The token is for reading only, or a browser's page of another site has called.",
        "404": "There is no such task.",
        "408": "The body came too slowly.",
        "409": "The task is not as the call takes it to be.",
        "413": "The body is too large.",
        "503": "Not now: the database is away, or too much is going on. See Retry-After.",
    }
    error = {"application/json": {"schema": ref("Error")}}
    codes = {other: {"description": texts[other], "content": error} for other in others}
    content = {"application/json": {"schema": schema}}
    return {code: {"description": texts[code], "content": content}, **codes}


def body(schema: Json) -> Json:
    """Return a request body in JSON."""
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def query(name: str, schema: Json, required: bool = False) -> Json:
    """Return a parameter of the query."""
    return {"name": name, "in": "query", "required": required, "schema": schema}


ALWAYS = ("400", "401", "403", "413", "503")
TASK_ID = query("taskId", UUID, required=True)
ANY_TIME = TIME
LIST_PARAMETERS = [
    query("status", LISTED),
    query("error", OUTCOME),
    query("from", ANY_TIME),
    query("to", ANY_TIME),
    query("limit", {"type": "integer", "minimum": 1, "maximum": 1000}),
    query("cursor", text()),
]


def call(summary: str, responses: Json, **more: Any) -> Json:
    """Return one operation."""
    return {"summary": summary, "responses": responses, **more}


PATHS: Json = {
    "/api/v1/create-task": {
        "post": call(
            "Create a task, or an array of them: all or none",
            answers({"anyOf": [ref("Task"), array(ref("Task"))]}, "201", *ALWAYS, "409"),
            requestBody=body(
                {"anyOf": [ref("NewTask"), array(ref("NewTask"), minItems=1, maxItems=10_000)]}
            ),
        )
    },
    "/api/v1/get-task-data": {
        "get": call(
            "Read a task; with wait, when it has ended or so many seconds are over",
            answers(ref("TaskWithHistory"), "200", *ALWAYS, "404"),
            parameters=[TASK_ID, query("wait", {"type": "number", "minimum": 0, "maximum": 60})],
        )
    },
    "/api/v1/update-task-status": {
        "put": call(
            "Report what became of tasks, run one again (pending), or cancel one (error)",
            answers(
                {"anyOf": [ref("TaskWithHistory"), ref("Updated")]}, "200", *ALWAYS, "404", "409"
            ),
            parameters=[
                query("taskId", UUID),
                query("taskStatus", WORD),
                query("skipLocked", {"type": "string", "enum": ["true", "false"]}),
                query("host", NAME),
            ],
            requestBody=body({"anyOf": [ref("Report"), array(ref("Report"), maxItems=10_000)]})
            | {"required": False},
        )
    },
    "/api/v1/consumer-heartbeat": {
        "put": call(
            "Say what a consumer runs; the answer says what its rows hold, and what it is to stop",
            answers(ref("HeartbeatAnswer"), "200", *ALWAYS),
            requestBody=body(ref("Heartbeat")),
        )
    },
    "/api/v1/list-tasks": {
        "get": call(
            "List the tasks of one status; the cursor of an answer holds its filter",
            answers(ref("TaskPage"), "200", *ALWAYS),
            parameters=LIST_PARAMETERS,
        )
    },
    **{
        f"/api/v1/{action.name}": {
            "post": call(
                f"{summary} many tasks, by id or by a filter",
                answers(ref("BulkAnswer"), "200", *ALWAYS),
                requestBody=body(bulk_body(action)),
            )
        }
        for summary, action in (("Retry", bulk.RETRY), ("Cancel", bulk.CANCEL))
    },
    "/api/v1/pause": {"post": call("Stop the dispatch", answers(ref("Pause"), "200", *ALWAYS))},
    "/api/v1/resume": {
        "post": call("Let the dispatch go on", answers(ref("Pause"), "200", *ALWAYS))
    },
    "/api/v1/get-stats": {
        "get": call("Tell how the service is", answers(ref("Stats"), "200", *ALWAYS))
    },
    "/healthz": {
        "get": call("Tell that the process is alive", answers(record({"status": text()})))
    },
    "/readyz": {
        "get": call(
            "Tell what works; 503 without the database",
            answers(ref("Ready"))
            | {
                "503": {
                    "description": "The database is away.",
                    "content": {"application/json": {"schema": ref("Ready")}},
                }
            },
        )
    },
    "/metrics": {
        "get": call(
            "Answer everything in Prometheus' text format",
            {
                "200": {
                    "description": "The metrics.",
                    "content": {"text/plain": {"schema": {"type": "string"}}},
                },
                **{
                    code: answers({}, "200", code)[code]
                    for code in ("400", "401", "403", "413", "503")
                },
            },
        )
    },
    "/openapi.json": {
        "get": call("Answer this document", answers({"type": "object"}, "200", *ALWAYS))
    },
    "/": {
        "get": call(
            "Answer the console",
            {
                "200": {
                    "description": "A page.",
                    "content": {"text/html": {"schema": {"type": "string"}}},
                },
                "403": answers({}, "200", "403")["403"],
            },
        )
    },
}

DOCUMENT: Json = {
    "openapi": "3.1.0",
    "info": {
        "title": "Tasks",
        "version": process.VERSION,
        "description": "A task service: PostgreSQL holds the tasks, RabbitMQ carries them.",
    },
    "components": {
        "schemas": SCHEMAS,
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
    },
    "security": [{"token": []}, {}],
    "paths": PATHS,
}
