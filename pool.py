"""Connections to PostgreSQL: the hosts of DATABASE_URL, a time-out for every reply, and the pool.
Only the producer imports it."""

import logging
import re
import select
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import psycopg2
import psycopg2.errors
import psycopg2.extensions

import process

log = logging.getLogger("database")

Result = TypeVar("Result")


def dsn(value: str) -> str:
    """Check a libpq URL or key=value string. The reasons of libpq are not shown: they may quote the
    password."""
    try:
        host = psycopg2.extensions.parse_dsn(value).get("host", "")
    except psycopg2.ProgrammingError:
        host = "@"
    if "@" in host:
        raise ValueError(
            "expected postgresql://user:password@host:port/name, a @ in the password as %40"
        )
    return value


URL = process.setting("DATABASE_URL", "postgresql://tasks:tasks@127.0.0.1:5432/tasks", dsn)
CONNECTIONS = 16  # for HTTP and the housekeeper
CONNECTION_WAIT_SECONDS = 2  # for a free one, then 503
REPEAT_SECONDS = 5  # a transaction that failed later than this is not tried again
CONNECT_SECONDS = 3  # for each host
REPLY_SECONDS = 15  # longer than statement_timeout: only a frozen server is silent for so long
# The planner must not choose by stale statistics: a queue's table is empty now and full soon. What
# it is kept from looks so dear that it would compile the statement, for 150 ms.
SERVER_OPTIONS = (
    "-c timezone=UTC -c client_encoding=UTF8 -c lock_timeout=2000 -c statement_timeout=10000"
    " -c idle_in_transaction_session_timeout=60000"
    " -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off -c jit=off"
    " -c plan_cache_mode=force_generic_plan"
)

# Away, full, read-only, over a time limit, or so new or old that the table is not ready yet.
UNAVAILABLE = (
    psycopg2.OperationalError,
    psycopg2.InterfaceError,
    psycopg2.InternalError,
    psycopg2.errors.UndefinedTable,
    psycopg2.errors.UndefinedColumn,
)


# A pooler gives its server connections to whoever comes next: settings of a session, and the locks
# of an index build, would be lost or become somebody else's.
POOLED = (
    "DATABASE_URL leads to a connection pooler that does not pass on `options`, expected PostgreSQL"
    " itself: the producer keeps few connections and needs settings of its own in each"
)
SELECT_SOURCE = "SELECT source FROM pg_settings WHERE name = 'lock_timeout'"


PARAMETER = re.compile(r"%\((\w+)\)s::([\w\[\]]+)")


class Connection(psycopg2.extensions.connection):
    """A session, and which statements it has prepared."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.prepared: set[str] = set()


class Prepared:
    """A statement that each session plans once: for one row, that takes as long as the rest. Its
    parameters are written `%(name)s::type`, at least once each.
    https://www.postgresql.org/docs/current/sql-prepare.html"""

    def __init__(self, name: str, sql: str) -> None:
        types = dict(PARAMETER.findall(sql))
        numbers = {parameter: f"${number}" for number, parameter in enumerate(types, 1)}
        self.name = name
        self.prepare = f"PREPARE {name} ({', '.join(types.values())}) AS {sql % numbers}"
        self.statement = f"EXECUTE {name} ({', '.join(f'%({each})s' for each in types)})"

    def execute(self, cursor: Any, values: dict[str, Any]) -> None:
        """Run it."""
        if self.name not in cursor.connection.prepared:
            cursor.execute(self.prepare)  # no ROLLBACK undoes that
            cursor.connection.prepared.add(self.name)
        cursor.execute(self.statement, values)


class Unavailable(Exception):
    """The database cannot do it now; nothing was changed, or nobody can know yet."""


def is_about_a_lock(error: Unavailable) -> bool:
    """Tell whether somebody else has locked a row for too long."""
    return isinstance(error.__cause__, psycopg2.errors.LockNotAvailable)


def wait_for_reply(connection: psycopg2.extensions.connection) -> None:
    """Wait until the server has answered: TCP time-outs do not fire for a frozen server whose
    kernel still acknowledges. psycopg2 closes the connection if this raises."""
    connecting = connection.status == psycopg2.extensions.STATUS_SETUP
    seconds = CONNECT_SECONDS if connecting else REPLY_SECONDS
    deadline = time.monotonic() + seconds
    while (state := connection.poll()) != psycopg2.extensions.POLL_OK:
        reading = state == psycopg2.extensions.POLL_READ
        poller = select.poll()  # a new one each time: while connecting, libpq may change its socket
        poller.register(connection.fileno(), select.POLLIN if reading else select.POLLOUT)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            raise psycopg2.OperationalError(f"no reply in {seconds} seconds")


def hosts(parameters: dict[str, Any]) -> list[dict[str, str]]:
    """Return what tells each host of a URL from the others. They are tried one by one, as libpq
    would wait for a silent first one for ever under a wait callback."""
    lists = {
        name: parameters[name].split(",")
        for name in ("host", "hostaddr", "port")
        if name in parameters
    }
    count = max((len(values) for values in lists.values()), default=1)
    return [
        {name: values[index if len(values) > 1 else 0] for name, values in lists.items()}
        for index in range(count)
    ]


def has_several_hosts() -> bool:
    """Tell whether DATABASE_URL names a standby beside the primary."""
    return len(hosts(psycopg2.extensions.parse_dsn(URL))) > 1


def connect(options: str = "") -> Connection:
    """Connect to the first host that accepts the connection, with settings of the session such as
    `-c lock_timeout=100`. Those of the URL are honoured."""
    psycopg2.extensions.set_wait_callback(wait_for_reply)
    parameters: dict[str, Any] = psycopg2.extensions.parse_dsn(URL) | {
        "application_name": "tasks-producer",
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    }
    parameters["options"] = f"{SERVER_OPTIONS} {options} {parameters.get('options', '')}"
    reasons = []
    known = hosts(parameters)
    if len(known) > 1:  # a former primary comes back as a standby
        parameters.setdefault("target_session_attrs", "read-write")
    for host in known:
        try:
            session: Connection = psycopg2.connect(
                **(parameters | host), connection_factory=Connection
            )
            check_options(session)
            return session
        except psycopg2.OperationalError as error:
            reason = str(error).strip()
            reasons.append(POOLED if "unsupported startup parameter" in reason else reason)
    raise psycopg2.OperationalError("; ".join(reasons))


def check_options(session: Connection) -> None:
    """Close the session and raise OperationalError if its settings are not the ones that were asked
    for: PgBouncer drops them with ignore_startup_parameters = options."""
    session.autocommit = True
    with session.cursor() as cursor:
        cursor.execute(SELECT_SOURCE)
        source = cursor.fetchone()
    if source != ("client",):
        session.close()
        raise psycopg2.OperationalError(POOLED)
    session.autocommit = False


def array(values: Collection[str | float | None]) -> str:
    """Return an array as PostgreSQL reads it from one string, a third of the price of a list of
    psycopg2. One without any values is empty: unnest() fills it up with NULL."""
    if not any(value is not None for value in values):
        return "{}"
    return "{" + ",".join(map(element, values)) + "}"


def element(value: str | float | None) -> str:
    """Return an element of an array."""
    if value is None:
        return "NULL"
    if type(value) is str:
        return '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'
    return repr(value)


class Pool:
    """Connections kept between requests; a caller waits for a free one, but not for ever."""

    def __init__(self, size: int = CONNECTIONS, options: str = "") -> None:
        self.options = options
        self.places = threading.BoundedSemaphore(size)
        self.idle: list[Connection] = []

    def statement(self, work: Callable[[Any], Result]) -> Result:
        """Return work(cursor), whose statements each commit themselves: one trip to the server
        instead of three. The work must be repeatable."""
        return self.transaction(work, autocommit=True)

    def transaction(
        self, work: Callable[[Any], Result], repeatable: bool = True, autocommit: bool = False
    ) -> Result:
        """Return work(cursor), committed. Raise Unavailable if the database cannot do it now.

        A kept connection may have died unnoticed and a deadlock's victim has done nothing wrong, so
        it is tried again; after a COMMIT of unknown outcome only if the work is repeatable.
        """
        if not self.places.acquire(timeout=CONNECTION_WAIT_SECONDS):
            raise Unavailable("all database connections are busy")
        try:
            deadline = time.monotonic() + REPEAT_SECONDS
            while True:
                connection, committing = None, False
                try:
                    connection = self.idle.pop() if self.idle else connect(self.options)
                    connection.autocommit = autocommit
                    with connection.cursor() as cursor:
                        result = work(cursor)
                    committing = True
                    connection.commit()
                    self.idle.append(connection)
                    return result
                except BaseException as error:
                    lost = connection is not None and bool(connection.closed)
                    again = isinstance(error, psycopg2.errors.DeadlockDetected) or (
                        lost and (repeatable or not committing)
                    )
                    self.discard(connection, error)
                    if not isinstance(error, UNAVAILABLE):
                        raise
                    if time.monotonic() > deadline or not again:
                        raise Unavailable(str(error).strip()) from error
        finally:
            self.places.release()

    def discard(self, connection: Connection | None, error: BaseException) -> None:
        """Close a connection after any error, so that its locks end now and not with the garbage;
        and the idle ones too if they may be as dead as it is."""
        if connection is None:
            return
        log.debug("connection discarded: %s", process.printable(error))
        if connection.closed or isinstance(error, psycopg2.errors.ReadOnlySqlTransaction):
            while self.idle:
                self.idle.pop().close()
        connection.close()
