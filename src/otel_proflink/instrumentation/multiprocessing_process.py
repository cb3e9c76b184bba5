# SPDX-License-Identifier: Apache-2.0
"""`multiprocessing.Process`: a child runs under its starter's context.

The context that is current at `Process.start()` is current in the child from before `run()` until
`run()` ends. A forked child has it anyway. Into one that is made by spawn or forkserver it goes
with the pickled `Process` object, as a carrier that also makes the child profile itself the way
its parent does. Workers of pools and servers of managers carry no label of their own: see
`services`, `process_pool` and `multiprocessing_pool`.

What a child sampled is written when it ends, by a finalizer of `multiprocessing`: its children run
no `atexit` handlers before Python 3.13. A child that is killed (`Process.terminate`, and
`Pool.terminate`, which `with Pool()` calls at its end) loses what it sampled since its last
export, unless ``OTEL_PROFLINK_FLUSH_ON_SIGTERM`` is set. `Pool.close` and `Pool.join` lose nothing.

A subclass of `Process` with a `__getstate__` of its own, that does not build on its parent's,
travels without a carrier.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

from opentelemetry.context import Context, attach, get_current

from otel_proflink.instrumentation import arrival
from otel_proflink.instrumentation.carrier import pack
from otel_proflink.instrumentation.services import is_service
from otel_proflink.instrumentation.wrappers import install, remove, when_imported

logger = logging.getLogger(__name__)

_MODULE: Final = "multiprocessing.process"
# What every child calls, on its `Process` object, before `run`. To hook that, and the pickling of
# the object, leaves no frame in any stack; around `start` or `run` a wrapper would leave one.
_HOOKED: Final = "_after_fork"

_active = False


def instrument() -> None:
    """Hook `multiprocessing.Process`, once it is imported. Does nothing where that is done."""
    global _active
    _active = True
    when_imported(_MODULE, _wrap)


def uninstrument() -> None:
    """Take our hooks out, and nobody else's. Processes that run keep their context."""
    global _active
    _active = False
    module = sys.modules.get(_MODULE)
    if module is not None:
        remove(module.BaseProcess, _HOOKED)
        if vars(module.BaseProcess).get("__getstate__") is _getstate:
            del module.BaseProcess.__getstate__


def _wrap(module: ModuleType) -> None:
    base = module.BaseProcess
    if _active and install(base, _HOOKED, _labelling) and "__getstate__" not in vars(base):
        base.__getstate__ = _getstate


def _getstate(self: Any) -> Any:
    """What a `Process` is pickled as: with a carrier, when it starts by spawn or forkserver."""
    state: Any = object.__getstate__(self)
    if not _active:
        return state
    try:
        carrier = pack(Context() if is_service(self) else get_current())
        if carrier is not None:
            hook = {_HOOKED: arrival.begin(carrier)}
            # A pair when a subclass has slots.
            if isinstance(state, tuple):
                return ({**(state[0] or {}), **hook}, *state[1:])
            return {**state, **hook}
    except Exception:
        logger.debug("a process is started without its context", exc_info=True)
    return state


def _labelling(stock: Callable[[], None]) -> Callable[..., None]:
    # A static method, but called on the object, which therefore comes along.
    @functools.wraps(stock)
    def _after_fork(*process: Any) -> None:
        stock()
        if _active and process:
            try:
                _begin_forked(process[0])
            except Exception:
                logger.debug("a forked process keeps its parent's context", exc_info=True)

    return _after_fork


def _begin_forked(process: Any) -> None:
    if is_service(process):
        attach(Context())
    elif get_current():
        arrival.end_label_with_run()
