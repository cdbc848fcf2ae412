"""The benchmark's peer: create-task on FastAPI, uvicorn and asyncpg, one process, a pool of 16."""

import contextlib
import os
import uuid
from collections.abc import AsyncIterator

import asyncpg
import fastapi
import pydantic


class NewTask(pydantic.BaseModel):
    """The body of create-task."""

    text: str = pydantic.Field(min_length=1, max_length=1024 * 1024)


@contextlib.asynccontextmanager
async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
    """Keep a pool while the application runs."""
    async with asyncpg.create_pool(os.environ["DATABASE_URL"], min_size=16, max_size=16) as pool:
        app.state.pool = pool
        yield


app = fastapi.FastAPI(lifespan=lifespan)


@app.post("/api/v1/create-task", status_code=201)
async def create_task(new: NewTask) -> dict:
    """Insert one task and answer it."""
    row = await app.state.pool.fetchrow(
        "INSERT INTO tasks (id, text) VALUES ($1, $2) RETURNING id, text, status, created_at",
        uuid.uuid4(),
        new.text,
    )
    return {
        "taskId": str(row["id"]),
        "text": row["text"],
        "taskStatus": row["status"],
        "createdAt": row["created_at"].isoformat(),
    }
