"""Writes the durable row of an ended task, over one connection a thread."""

import os
import threading

import psycopg2

INSERT = (
    "INSERT INTO peer_rows (number, created_at) VALUES (%s, to_timestamp(%s))"
    " ON CONFLICT DO NOTHING"
)

local = threading.local()


def write(number: int, created: float) -> None:
    """Write the row and commit it; the table's default is the time."""
    try:
        cursor = local.cursor
    except AttributeError:
        connection = psycopg2.connect(os.environ["DATABASE_URL"])
        connection.autocommit = True
        cursor = local.cursor = connection.cursor()
    cursor.execute(INSERT, (number, created))
