"""Who may call: the tokens, and what protects a service without them from a browser's other pages.
Judges a request by its head alone, so that nobody uploads in vain."""

import functools
import hmac
import ipaddress
from typing import Any

import process
from http_message import Refused


def names(value: str) -> frozenset[str]:
    """Split a comma-separated list of host names."""
    return frozenset(name.strip().lower() for name in value.split(",") if name.strip())


ALLOWED_HOSTS = process.setting("ALLOWED_HOSTS", frozenset[str](), names)
READ_METHODS = ("GET", "HEAD")
DEFAULT_PORTS = {"http": ":80", "https": ":443"}


def check_tokens() -> None:
    """Raise ValueError if the tokens that are set cannot be meant."""
    if process.READ_TOKEN and process.READ_TOKEN == process.API_TOKEN:
        raise ValueError("expected another token than API_TOKEN")
    if process.READ_TOKEN and not process.API_TOKEN:
        raise ValueError("expected API_TOKEN too: without it everybody may write")


def authorize(environ: dict[str, Any]) -> Refused | None:
    """Return why a request is refused, None if it is let in."""
    path = "/" + environ["PATH_INFO"].lstrip("/")  # as Bottle sees it
    is_call = path.startswith("/api/")
    is_private = is_call or path in ("/metrics", "/openapi.json")
    if not process.API_TOKEN and (is_private or path == "/"):
        # A page of another name that resolves to this address would be of the same origin.
        host = environ.get("HTTP_HOST", "")
        if host and not is_known(host):
            return forbidden("Host: expected an IP address, localhost or a name in ALLOWED_HOSTS")
    if is_call and not is_same_origin(environ.get("HTTP_ORIGIN"), environ.get("HTTP_HOST", "")):
        return forbidden("Origin: expected the host and port of this service, or none")
    if not process.API_TOKEN or not is_private:
        return None
    if holds(environ, process.API_TOKEN):
        return None
    if not holds(environ, process.READ_TOKEN):
        scheme = ("WWW-Authenticate", "Bearer")
        reason = "expected the header Authorization: Bearer <API_TOKEN>"
        return Refused("401 Unauthorized", reason, scheme)
    if environ["REQUEST_METHOD"] not in READ_METHODS:
        return forbidden("the READ_TOKEN allows GET only, expected the API_TOKEN")
    return None


def forbidden(reason: str) -> Refused:
    """Return a refusal that no token of the caller's helps against."""
    return Refused("403 Forbidden", reason)


def holds(environ: dict[str, Any], token: str) -> bool:
    """Tell whether a request brings a token that is set."""
    given = environ.get("HTTP_AUTHORIZATION", "").encode("latin-1")
    return hmac.compare_digest(given, f"Bearer {token}".encode()) and bool(token)


def is_read_only(environ: dict[str, Any]) -> bool:
    """Tell whether a request that was let in may only read."""
    return bool(process.API_TOKEN) and not holds(environ, process.API_TOKEN)


def is_same_origin(origin: str | None, host: str) -> bool:
    """Tell whether no page of another site has sent the request. Only browsers send an Origin."""
    if origin is None:
        return True
    scheme, _, name = origin.lower().partition("://")
    port = DEFAULT_PORTS.get(scheme, "")
    return bool(name) and name.removesuffix(port) == host.lower().removesuffix(port)


@functools.lru_cache(maxsize=256)
def is_known(host: str) -> bool:
    """Tell whether a Host header names no machine that a stranger's DNS could point to this one."""
    name = host.lower().removesuffix(".")
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    name = name.removesuffix(".")
    if name == "localhost" or "*" in ALLOWED_HOSTS or name in ALLOWED_HOSTS:
        return True
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return False
