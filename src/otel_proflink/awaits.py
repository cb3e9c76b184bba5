# SPDX-License-Identifier: Apache-2.0
"""Where asyncio tasks wait: a low-rate look at the tasks that wait under a span.

A task that waits is on no thread, so the native sampler cannot see it. What asyncio offers are a
`WeakSet` of all tasks and, from Python 3.14 on, the tasks of one loop (of each in which a span was
started): both take the GIL to read, and so do the coroutines of a task, which must not run
meanwhile: on free-threaded builds nothing is looked at. Hence a thread of its own, in processes
that import asyncio, with bounds: `OTEL_PROFLINK_AWAIT_RATE` looks a second (10), at most
`MOST_TASKS` tasks each, chosen at random; the weights of those make up for the others.
"""

from __future__ import annotations

import contextvars
import logging
import random
import sys
import threading
import time
from queue import Empty
from typing import TYPE_CHECKING, Any, Final

from . import _linker
from .native_thread import NativeThread, original

if TYPE_CHECKING:
    from queue import SimpleQueue

    from .sampling import Sampler

logger = logging.getLogger(__name__)

THREAD_NAME: Final = "otel-proflink-awaits"
MOST_TASKS: Final = 50
# While there are no tasks, there is nothing to be late for.
_IDLE_S: Final = 1.0
_JOIN_S: Final = 1.0


class AwaitSampler:
    """Looks at waiting tasks from `start` to `stop`.

    Args:
        rate_hz: looks a second; 0: it never starts. Nor does it on free-threaded builds.
        sampler: the native sampler, which is to leave this thread out.
    """

    def __init__(self, rate_hz: float, sampler: Sampler) -> None:
        # Reading the frames of a coroutine that another thread may run is not safe without the GIL.
        self._rate_hz = 0.0 if _linker.FREE_THREADED else rate_hz
        self._sampler = sampler
        self._thread: NativeThread | None = None
        self._stopping: SimpleQueue[None] = original("queue", "SimpleQueue")()
        self._random = random.Random()

    @property
    def enabled(self) -> bool:
        """Whether it will look at tasks, should there be any."""
        return self._rate_hz > 0

    def start(self) -> None:
        """Begin if the process uses asyncio by now; to be called now and then.

        On failure tasks are not looked at, and one line says so.
        """
        if not self._rate_hz or self._thread is not None or "asyncio.tasks" not in sys.modules:
            return
        thread = NativeThread(self._run, THREAD_NAME)
        try:
            contextvars.Context().run(thread.start)
            self._thread = thread
        except Exception as error:
            self._rate_hz = 0
            logger.warning("otel-proflink does not look at waiting tasks: %s", error)

    def stop(self) -> None:
        """End, without waiting for long."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping.put(None)
        if not thread.is_current():
            thread.join(_JOIN_S)

    def _run(self) -> None:
        native_id = threading.get_native_id()
        self._sampler.ignore_thread(native_id)
        try:
            period = 1 / self._rate_hz
            last = time.monotonic_ns()
            wait = period
            while self._wait(wait):
                now = time.monotonic_ns()
                wait = period if self._look(now - last) else max(period, _IDLE_S)
                last = now
        except Exception:
            logger.debug("waiting tasks are not looked at any more", exc_info=True)
        finally:
            self._sampler.unignore_thread(native_id)

    def _wait(self, timeout_s: float) -> bool:
        try:
            self._stopping.get(timeout=timeout_s)
        except Empty:
            return True
        return False

    def _look(self, elapsed_ns: int) -> bool:
        """Look once. Returns whether there are tasks."""
        module = sys.modules["asyncio.tasks"]
        tasks = _all_tasks(module)
        total = len(tasks)
        if total > MOST_TASKS:
            tasks = self._random.sample(tasks, MOST_TASKS)
        if not tasks or not _readable(module):
            return bool(tasks)
        from ._awaits import book, look

        seen = []
        for task in tasks:
            try:
                found = look(task)
            except Exception:  # a task class of somebody's own
                continue
            if found is not None:
                seen.append(found)
        book(seen, elapsed_ns * total // len(tasks))
        return True


def _all_tasks(module: Any) -> list[Any]:
    """The tasks of all loops. `list` of a set of weak references is one step under the GIL."""
    found: list[Any] = []
    if sys.version_info >= (3, 14):
        for loop in _linker.loops():
            found += module.all_tasks(loop)
        return found
    # One set up to 3.11; in 3.12 and 3.13 eager tasks are in a plain set of their own.
    for name in ("_all_tasks", "_scheduled_tasks"):
        weak = getattr(module, name, None)
        if weak is not None:
            found += [task for ref in list(weak.data) if (task := ref()) is not None]
            break
    found += list(getattr(module, "_eager_tasks", ()))
    return [task for task in found if not task.done()]


_layout: bool | None = None


def _readable(module: Any) -> bool:
    """Whether a task's context can be found; 3.11 has no way to ask for it."""
    global _layout
    if _layout is None:
        _layout = hasattr(module.Task, "get_context") or _learn_layout(module.Task)
    return _layout


class _Loop:
    """As much of an event loop as a task needs to be made. It runs nothing."""

    def get_debug(self) -> bool:
        return False

    def call_soon(self, callback: object, *args: object, context: object = None) -> None:
        pass

    def call_exception_handler(self, context: object) -> None:
        pass


async def _nothing() -> None:
    pass


def _learn_layout(task_class: Any) -> bool:
    from ._awaits import learn_task_layout

    context = contextvars.Context()
    coroutine = _nothing()
    task = task_class(coroutine, loop=_Loop(), context=context)
    try:
        return learn_task_layout(task, context)
    finally:
        task._log_destroy_pending = False
        coroutine.close()
