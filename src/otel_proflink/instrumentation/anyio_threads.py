# SPDX-License-Identifier: Apache-2.0
"""`anyio.to_thread.run_sync`, and what builds on it: Starlette's and FastAPI's sync handlers.

AnyIO copies the context variables into its worker threads, so the label is right without us. The
call is made a propagated one all the same, so that its samples name the task that awaits it, as
those of `asyncio.to_thread` do.

The method of the asyncio backend is wrapped, which all ways of calling it lead to: from a wrapper
around the coroutine function `run_sync` itself every await stack and traceback would have a frame
of ours, or the awaiting task would not be known yet.
"""

from __future__ import annotations

import functools
import logging
import sys
from types import ModuleType
from typing import Any, Final

from otel_proflink._linker import propagated
from otel_proflink.instrumentation.wrappers import install, remove, when_imported

logger = logging.getLogger(__name__)

_MODULE: Final = "anyio._backends._asyncio"
_METHOD: Final = "run_sync_in_worker_thread"

_active = False


def instrument() -> None:
    """Wrap AnyIO, once it is imported. Does nothing where it is wrapped already."""
    global _active
    _active = True
    when_imported(_MODULE, _wrap)


def uninstrument() -> None:
    """Take our wrapper out. Calls that are waiting keep their context."""
    global _active
    _active = False
    backend = getattr(sys.modules.get(_MODULE), "AsyncIOBackend", None)
    if backend is not None:
        remove(backend, _METHOD)


def _wrap(module: ModuleType) -> None:
    # AnyIO 4; without it (AnyIO 3), or in a later one that has none, the label is right anyway.
    backend = getattr(module, "AsyncIOBackend", None)
    if _active and backend is not None and isinstance(vars(backend).get(_METHOD), classmethod):
        install(backend, _METHOD, _propagating)


def _propagating(stock: Any) -> Any:
    function = stock.__func__

    @functools.wraps(function)
    def run_sync_in_worker_thread(cls: type, func: Any, *args: Any, **kwargs: Any) -> Any:
        if _active:
            try:
                func = propagated(func)
            except Exception:  # the call matters more than its label
                logger.debug("a call is made without its context", exc_info=True)
        return function(cls, func, *args, **kwargs)

    return classmethod(run_sync_in_worker_thread)
