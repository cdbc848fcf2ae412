"""Other task queues at their strongest, for `bench --peers`: each module is one peer's application,
run by the interpreter of .run/venv-peers with DATABASE_URL and RABBITMQ_URL.

A module has `sender()`, an asynchronous context that makes what tasks need and yields a coroutine
function, which creates a list of them, each `(number, created)` with seconds since 1970. Where the
peer itself keeps no row of a task that has ended, the task writes one: its number and two times.
fastapi_peer has create-task only."""
