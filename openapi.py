"""The contract of the HTTP API, as OpenAPI 3.1 (https://spec.openapis.org/oas/v3.1.0). A test
compares it with the routes, and tests/contract.py with what they answer."""

from typing import Any

import process
import task_list
from openapi_schemas import (
    ANY_TIME,
    CURSOR,
    INTEGER,
    NAME,
    OUTCOME,
    SCHEMAS,
    UUID,
    WORD,
    Json,
    array,
    enum,
    record,
    ref,
)

MAX_ELEMENTS = 10_000
EXAMPLE_ID = "d5474d4e-0069-4601-98d4-742e54cc4fe3"
CREATE_EXAMPLES = {
    "one": {"summary": "A task", "value": {"text": "any text"}},
    "several": {
        "summary": "Two tasks, both or none",
        "value": [
            {"text": "with an id of my own", "taskId": EXAMPLE_ID},
            {"text": "later", "runAt": "2030-01-31T12:00:00Z", "timeoutSeconds": 60},
        ],
    },
}

MEANINGS = {
    "200": "Done.",
    "201": "Committed to disk.",
    "400": "Bad input: what was expected.",
    "401": "Without the API_TOKEN or READ_TOKEN.",
    "403": "The token is for reading only, or a page of another site has called.",
    "404": "There is no such task.",
    "408": "The body came too slowly.",
    "409": "The task is not as the call takes it to be.",
    "413": "The body is too large.",
    "431": "The head is too large.",
    "503": "Not now: the database is away, or too much is going on.",
}
HEADERS = {
    "401": {"WWW-Authenticate": {"schema": {"const": "Bearer", "type": "string"}}},
    "503": {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}},
}
OPEN = ("400", "403", "408", "413", "431", "503")  # what every call may answer
GUARDED = ("401", *OPEN)


def response(code: str, schema: Json, media_type: str = "application/json") -> Json:
    """Return one answer by its status."""
    headers = {"headers": HEADERS[code]} if code in HEADERS else {}
    content = {media_type: {"schema": schema}}
    return {code: {"description": MEANINGS[code], **headers, "content": content}}


def errors(*codes: str) -> Json:
    """Return answers that say what was expected."""
    return {code: value for each in codes for code, value in response(each, ref("Error")).items()}


def call(name: str, summary: str, answers: Json, *codes: str, **more: Any) -> Json:
    """Return one operation: how it answers when all is well, and its further errors."""
    is_open = more.get("security") == []
    responses = answers | errors(*sorted({*codes, *(OPEN if is_open else GUARDED)} - {*answers}))
    return {"operationId": name, "summary": summary, **more, "responses": responses}


def body(schema: Json, **more: Any) -> Json:
    """Return a request body in JSON."""
    return {"required": True, "content": {"application/json": {"schema": schema, **more}}}


def query(name: str, schema: Json, description: str = "", required: bool = False) -> Json:
    """Return a parameter of the query; an empty one counts as none."""
    about: Json = {"description": description} if description else {}
    about |= {} if required else {"allowEmptyValue": True}
    return {"name": name, "in": "query", "required": required, **about, "schema": schema}


def one_or_many(one: Json, **limits: int) -> Json:
    """Return the schema of a thing or an array of them."""
    return {"anyOf": [one, array(one, **limits)]}


TASK_ID = query("taskId", UUID, required=True)
WAIT = query(
    "wait",
    {"type": "number", "minimum": 0, "maximum": 60},
    "Answer when the task has ended, or after so many seconds.",
)
UPDATE_PARAMETERS = [
    query("taskId", UUID),
    query("taskStatus", WORD, "`pending` runs an ended task again, `error` cancels one."),
    query("attempt", INTEGER, "Refuse this if the task has another attempt by now."),
    query(
        "skipLocked",
        enum("true", "false"),
        "Of an array: do not wait for rows that are locked, but name them in `locked`.",
    ),
    query("host", NAME, "Of an array: where the tasks ran whose reports do not say it."),
]
REPORTS = array(
    {"anyOf": [ref("Report"), {"description": "Anything else is rejected by itself."}]},
    maxItems=MAX_ELEMENTS,
)
UPDATE_BODY = {
    "required": False,
    "description": "One report, whose fields may stand in the query too, or an array of them.",
    "content": {
        "application/json": {"schema": {"anyOf": [ref("Report"), REPORTS]}},
        "application/x-www-form-urlencoded": {"schema": ref("ReportForm")},
    },
}
LIST_PARAMETERS = [
    query(
        "status",
        enum(*task_list.VIEWS),
        "With a cursor it may be left out: that holds the filter.",
        required=True,
    ),
    query("error", OUTCOME, "What the error begins with."),
    query("from", ANY_TIME, "Of the end for tasks that have ended, else of the creation."),
    query("to", ANY_TIME, "The same, exclusive."),
    query("limit", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 50}),
    query("cursor", CURSOR),
]
PUBLIC: Json = {"security": []}

CLIENT_PATHS: Json = {
    "/api/v1/create-task": {
        "post": call(
            "createTask",
            "Create a task, or an array of them: all or none",
            response("201", one_or_many(ref("Task"))),
            "409",
            requestBody=body(
                one_or_many(ref("NewTask"), minItems=1, maxItems=MAX_ELEMENTS),
                examples=CREATE_EXAMPLES,
            ),
        )
    },
    "/api/v1/get-task-data": {
        "get": call(
            "getTask",
            "Read a task and what became of its earlier attempts",
            response("200", ref("TaskWithHistory")),
            "404",
            parameters=[TASK_ID, WAIT],
        )
    },
    "/api/v1/update-task-status": {
        "put": call(
            "updateTask",
            "Report what became of tasks, run one again (pending), or cancel one (error)",
            response("200", {"anyOf": [ref("TaskWithHistory"), ref("Updated")]}),
            *("404", "409"),
            parameters=UPDATE_PARAMETERS,
            requestBody=UPDATE_BODY,
        )
    },
    "/api/v1/consumer-heartbeat": {
        "put": call(
            "heartbeat",
            "Say what a consumer runs; hear what its rows hold, and what it is to stop",
            response("200", ref("HeartbeatAnswer")),
            requestBody=body(ref("Heartbeat")),
        )
    },
    "/healthz": {
        "get": call(
            "healthz",
            "Tell that the process is alive",
            response("200", record({"status": {"const": "alive", "type": "string"}})),
            **PUBLIC,
        )
    },
    "/readyz": {
        "get": call(
            "readyz",
            "Tell what works; 503 only without the database",
            response("200", ref("Ready"))
            | response("503", {"anyOf": [ref("Ready"), ref("Error")]}),
            **PUBLIC,
        )
    },
}

OPERATOR_PATHS: Json = {
    "/api/v1/list-tasks": {
        "get": call(
            "listTasks",
            f"List the tasks of one status; texts are cut to {task_list.MAX_CUT} characters",
            response("200", ref("TaskPage")),
            parameters=LIST_PARAMETERS,
        )
    },
    "/api/v1/retry-tasks": {
        "post": call(
            "retryTasks",
            "Run failed tasks again, by id or by a filter",
            response("200", ref("ActionAnswer")),
            requestBody=body(ref("Retry")),
        )
    },
    "/api/v1/cancel-tasks": {
        "post": call(
            "cancelTasks",
            "Cancel tasks that have not ended, by id or by a filter",
            response("200", ref("ActionAnswer")),
            requestBody=body(ref("Cancel")),
        )
    },
    "/api/v1/pause": {
        "post": call("pause", "Stop the dispatch of all producers", response("200", ref("Pause")))
    },
    "/api/v1/resume": {
        "post": call("resume", "Let the dispatch go on", response("200", ref("Pause")))
    },
    "/api/v1/get-stats": {
        "get": call("getStats", "Tell how the service is", response("200", ref("Stats")))
    },
    "/metrics": {
        "get": call(
            "metrics",
            "Answer everything in Prometheus' text format",
            response("200", {"type": "string"}, "text/plain"),
        )
    },
    "/openapi.json": {
        "get": call("openapi", "Answer this document", response("200", {"type": "object"}))
    },
    "/": {
        "get": call(
            "console",
            "Answer the console",
            response("200", {"type": "string"}, "text/html"),
            **PUBLIC,
        )
    },
}

DOCUMENT: Json = {
    "openapi": "3.1.0",
    "info": {
        "title": "Tasks",
        "version": process.VERSION,
        "description": "A task service: PostgreSQL holds the tasks, RabbitMQ carries them. Where"
        " this names a number of characters, the service counts bytes of UTF-8."
        " Query parameters that are empty or not named here are ignored.",
    },
    "security": [{"token": []}] if process.API_TOKEN else [],
    "paths": CLIENT_PATHS | OPERATOR_PATHS,
    "components": {
        "schemas": SCHEMAS,
        "securitySchemes": {
            "token": {
                "type": "http",
                "scheme": "bearer",
                "description": "API_TOKEN, or READ_TOKEN for GET; neither if they are not set.",
            }
        },
    },
}
