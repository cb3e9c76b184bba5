# SPDX-License-Identifier: Apache-2.0
"""`concurrent.futures.ProcessPoolExecutor`: a task runs under its submitter's context.

`submit` sends the function with a carrier (see `carrier`), `executor.map` and
`loop.run_in_executor` through it. In the worker the function runs with that context attached, for
exactly as long as it runs; a worker's own loop carries no label. A worker that was started before
any of this (spawn, forkserver, a pool older than the instrumentation) is instrumented, and
profiled as the submitting process is, by the first task that it gets.

A label costs some 50 us and 600 bytes a task; without a current span nothing is added.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from otel_proflink.instrumentation.carrier import carried
from otel_proflink.instrumentation.wrappers import install, remove, when_imported

_MODULE: Final = "concurrent.futures.process"
_ABSENT: Final = object()

_active = False


def instrument() -> None:
    """Wrap the process pool, once it is imported. Does nothing where it is wrapped already."""
    global _active
    _active = True
    when_imported(_MODULE, _wrap)


def uninstrument() -> None:
    """Take our wrapper out, and nobody else's. Tasks that are queued keep their context."""
    global _active
    _active = False
    module = sys.modules.get(_MODULE)
    if module is not None:
        remove(module.ProcessPoolExecutor, "submit")


def _wrap(module: ModuleType) -> None:
    if _active:
        install(module.ProcessPoolExecutor, "submit", _carrying)


def _carrying(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def submit(self: Any, fn: Any = _ABSENT, /, *args: Any, **kwargs: Any) -> Any:
        if fn is _ABSENT:
            # As in `thread_pool`: by name it has only one meaning.
            if not _active or "fn" not in kwargs:
                return stock(self, *args, **kwargs)
            fn = kwargs.pop("fn")
        return stock(self, carried(fn) if _active else fn, *args, **kwargs)

    return submit
