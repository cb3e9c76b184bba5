# SPDX-License-Identifier: Apache-2.0
"""Servers whose workers leave without running any exit handler, and how they are caught.

* uvicorn (by itself, with ``--workers``, and as gunicorn's worker), from 0.29 on: when it has shut
  down gracefully it restores the signal handlers of before, and sends itself the signal that it
  had caught. With the default action of SIGTERM that is a sudden death.
* Celery's prefork pool: its processes leave by ``os._exit``, right after the signal
  ``worker_process_shutdown``.

Each is caught where all of its work is done, once it is loaded. `wrapt` tells of imports, but
brings asyncio with it, eight megabytes: where nobody has it, we look for ourselves once a second.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any, Final

logger = logging.getLogger(__name__)

_Flush = Callable[[], object]


def watch(flush: _Flush) -> None:
    """Have `flush` called before such a worker leaves.

    To be called once in a process: what is hooked stays so. In a process where nothing runs `flush`
    has nothing to do.

    Args:
        flush: exports what was sampled; bounded in time, must not raise.
    """
    # Under `opentelemetry-instrument` it is there, and servers are imported after us.
    wrapt = sys.modules.get("wrapt")
    for name, hook in _HOOKS.items():
        _waiting[name] = _with(hook, flush)
        if wrapt is not None:
            wrapt.register_post_import_hook(_imported, name)
    look()


def _with(hook: Callable[[Any, _Flush], None], flush: _Flush) -> Callable[[Any], None]:
    return lambda module: hook(module, flush)


def look() -> None:
    """Hook what has been loaded since the last look. Any thread; never raises."""
    for name in list(_waiting):
        module = sys.modules.get(name)
        # Another thread may be in the middle of its import.
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _imported(module)


def _imported(module: Any) -> None:
    hook = _waiting.pop(module.__name__, None)  # one of two threads gets it
    try:
        if hook is not None:
            hook(module)
    except Exception:
        # It may run inside the application's import statement.
        logger.debug("no last export at the exit of %s", module.__name__, exc_info=True)


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


_waiting: dict[str, Callable[[Any], None]] = {}

_HOOKS: Final[dict[str, Callable[[Any, _Flush], None]]] = {
    "uvicorn.server": _hook_uvicorn,
    "celery.signals": _hook_celery,
}
