# SPDX-License-Identifier: Apache-2.0
"""FastAPI: a coroutine, a handler in AnyIO's threads, a task after the response."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anyio.to_thread
import units
from fastapi import BackgroundTasks, FastAPI

app = FastAPI()


@app.get("/async/{name}")
async def asynchronous(name: str) -> dict[str, Any]:
    work = units.Work(name)
    plain = work.unit("plain", units.SECONDS / units.SLICES)
    for _ in range(units.SLICES):
        plain()
        await asyncio.sleep(0)  # others run in between, under spans of theirs
    with units.tracer.start_as_current_span(f"child of {name}"):
        child = work.unit("child", units.SECONDS / units.SLICES)
        for _ in range(units.SLICES):
            child()
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, work.unit("executor"))
        await asyncio.to_thread(work.unit("to_thread"))
        await anyio.to_thread.run_sync(work.unit("anyio"))
        async with asyncio.TaskGroup() as group:
            group.create_task(_in_task(work.unit("task")))
    return work.told()


async def _in_task(unit: Any) -> None:
    await asyncio.sleep(0)
    unit()


@app.get("/work/{name}")
def work(name: str) -> dict[str, Any]:
    return units.synchronous(name)


@app.get("/slow/{name}")
async def slow(name: str) -> dict[str, Any]:
    """Work that the test lets begin."""
    work = units.Work(name)
    Path("began").touch()
    while not Path("go").exists():
        await asyncio.sleep(0.01)
    work.unit("slow")()
    return work.told()


@app.get("/background/{name}")
async def background(name: str, tasks: BackgroundTasks) -> dict[str, Any]:
    # The instrumentation gives each of them a span of its own.
    work = units.Work(name)
    tasks.add_task(work.after_the_response, "in_thread")  # AnyIO's
    tasks.add_task(_after_the_response, work)
    return work.told()


async def _after_the_response(work: units.Work) -> None:
    await asyncio.sleep(0)
    work.after_the_response("in_loop")
