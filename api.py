"""What every call of the HTTP API shares: reading what a request says, answering in JSON, errors,
and what becomes of them."""

import functools
import json
import logging
import re
from collections.abc import Callable
from typing import Any, NoReturn
from urllib.parse import parse_qs

import bottle

import pool
import process
import task

log = logging.getLogger("api")
INTEGER = re.compile("-?[0-9]{1,19}")  # int() also takes 1_0 and digits of other scripts
outage = process.Backoff(log, "requests refused")  # not every one of an outage is a WARNING


def refuse_constant(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's reader takes and JSON does not have."""
    raise ValueError(f"JSON has no {name}")


ENCODER = json.JSONEncoder(ensure_ascii=False)
DECODER = json.JSONDecoder(parse_constant=refuse_constant)


def parse_skip_locked(value: str) -> bool:
    """Return whether a report leaves out rows that are locked; raise ValueError otherwise."""
    if value not in ("true", "false"):
        raise ValueError(f"skipLocked: expected true or false, got {task.shorten(value)}")
    return value == "true"


UPDATE_QUERY: dict[str, Callable[[str], Any]] = {
    "taskId": task.parse_uuid,
    "taskStatus": task.parse_status,
    "host": functools.partial(task.parse_word, name="host"),
    "skipLocked": parse_skip_locked,
}


def refuse(status: int, reason: str) -> NoReturn:
    """End the request with a JSON error."""
    raise bottle.HTTPError(status, reason)


def read_json() -> Any:
    """Return the request's body parsed as JSON, or end the request with a 400."""
    body = bottle.request.environ["wsgi.input"].read()
    try:
        return DECODER.decode(body.decode())
    except UnicodeDecodeError as error:
        refuse(400, f"expected a body in UTF-8, byte {error.start} is not")
    except (ValueError, RecursionError) as error:
        refuse(400, f"expected a JSON body: {error}")


def read_update() -> Any:
    """Return what a PUT says, merged from query, form and JSON object; or its JSON array."""
    request = bottle.request
    fields = read_form(request.query_string)
    try:
        for name in fields.keys() & UPDATE_QUERY.keys():
            UPDATE_QUERY[name](fields[name])  # a body that says something else would hide it
    except ValueError as error:
        refuse(400, str(error))
    if request.content_type.partition(";")[0].strip() == "application/x-www-form-urlencoded":
        body = request.environ["wsgi.input"].read()
        looks_like_json = body[:1] in (b"{", b"[")  # curl --data without a header says it is a form
        if not looks_like_json:
            return fields | read_form(body.decode("latin-1"))
        request.environ["wsgi.input"].seek(0)
    if request.content_length <= 0:
        return fields
    body = read_json()
    if isinstance(body, dict):
        return fields | body
    return body


def read_form(text: str) -> dict[str, Any]:
    """Return the pairs of a query string or form, `attempt` as a number."""
    try:
        pairs = parse_qs(text, errors="strict").items()
        fields: dict[str, Any] = {name: values[-1] for name, values in pairs}
    except UnicodeDecodeError:
        refuse(400, "expected a query and form in percent-encoded UTF-8")
    if "attempt" in fields:
        if not INTEGER.fullmatch(fields["attempt"]):
            refuse(400, f"attempt: expected an integer, got {task.shorten(fields['attempt'])}")
        fields["attempt"] = int(fields["attempt"])
    return fields


def answer(value: Any, status: int = 200) -> bytes:
    """Return a JSON answer and set its status."""
    bottle.response.status = status
    bottle.response.content_type = "application/json"
    return ENCODER.encode(value).encode()


def make_app() -> bottle.Bottle:
    """Return an application without calls, whose every error is JSON."""
    app = bottle.Bottle()
    app.config["json.enable"] = False  # answers are made by answer()

    def answer_error(error: bottle.HTTPError) -> bytes:
        """Answer every error in JSON, with what was expected; never HTML or a stack trace."""
        status, reason = error.status_code, error.body
        if "bottle.route" not in bottle.request.environ and status in (404, 405):
            calls = ", ".join(f"{route.method} {route.rule}" for route in app.routes)
            reason = f"{bottle.request.method} {bottle.request.path}: expected one of {calls}"
        elif error.exception is not None:  # Bottle has written its stack trace to stderr
            reason = "internal error, see the log"
        return answer({"error": reason}, status)

    app.default_error_handler = answer_error
    app.install(answer_unavailable)
    return app


def answer_unavailable(route: Callable[..., bytes]) -> Callable[..., bytes]:
    """Wrap a route so that a database that is away is a 503 that says when to try again."""

    def wrapped(**arguments: str) -> bytes:
        try:
            return route(**arguments)
        except pool.Unavailable as error:
            path, reason = bottle.request.path, process.printable(error)
            log.log(outage.level(), "%s refused: %s", path, reason)
            reason = f"the database is away, expected soon: {error}"
            raise bottle.HTTPError(503, reason, headers={"Retry-After": "1"}) from None

    return wrapped
