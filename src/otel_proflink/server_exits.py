# SPDX-License-Identifier: Apache-2.0
"""Servers whose workers leave without running any exit handler, and how they are caught.

* uvicorn (by itself, with ``--workers``, and as gunicorn's worker), from 0.29 on: when it has shut
  down gracefully it restores the signal handlers of before, and sends itself the signal that it
  had caught. With the default action of SIGTERM that is a sudden death.
* Celery's prefork pool: its processes leave by ``os._exit``, right after the signal
  ``worker_process_shutdown``.

Each is caught where all of its work is done. What is not loaded yet is caught when it is imported.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Final

import wrapt

logger = logging.getLogger(__name__)

_Flush = Callable[[], object]


def watch(flush: _Flush) -> None:
    """Have `flush` called before such a worker leaves.

    To be called once in a process: a hook of an import cannot be taken back. In a process where
    nothing runs `flush` has nothing to do.

    Args:
        flush: exports what was sampled; bounded in time, must not raise.
    """
    for module, hook in _HOOKS.items():
        wrapt.register_post_import_hook(  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
            _guarded(hook, flush), module
        )


def _guarded(hook: Callable[[Any, _Flush], None], flush: _Flush) -> Callable[[Any], None]:
    def run(module: Any) -> None:
        # It runs inside the application's import statement.
        try:
            hook(module, flush)
        except Exception:
            logger.debug("no last export at the exit of %s", module.__name__, exc_info=True)

    return run


def _hook_uvicorn(module: Any, flush: _Flush) -> None:
    stock = module.Server.shutdown

    @functools.wraps(stock)
    async def shutdown(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await stock(self, *args, **kwargs)
        finally:
            # Without a signal the process ends as others do, or goes on: a server may be a part of
            # an application. All connections are closed here: nobody is held up.
            if getattr(self, "_captured_signals", None):
                flush()

    module.Server.shutdown = shutdown


def _hook_celery(module: Any, flush: _Flush) -> None:
    def flush_worker(**_: object) -> None:
        flush()

    # Not weak: nobody else holds it.
    module.worker_process_shutdown.connect(flush_worker, weak=False)


_HOOKS: Final[dict[str, Callable[[Any, _Flush], None]]] = {
    "uvicorn.server": _hook_uvicorn,
    "celery.signals": _hook_celery,
}
