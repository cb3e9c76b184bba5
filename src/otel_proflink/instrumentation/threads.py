# SPDX-License-Identifier: Apache-2.0
"""`threading.Thread` and `threading.Timer`: a thread runs under its starter's context.

The context that is current at `start()` is current in the new thread from before `run()` to its
end: its samples carry the starter's span, and spans that it starts are that span's children. This
is what `opentelemetry-instrumentation-threading` does, what CPython itself does from 3.14 on where
`sys.flags.thread_inherit_context` is set, and what our pools do with tasks; so it needs no setting.
With that instrumentation beside ours, in either order, the same context is attached twice, which
nobody can see.

Two kinds of threads are not labelled: those that serve everybody (see `services`), and on 3.14 and
later those that were given a context (`Thread(context=...)`). A thread that some other library
starts in the middle of a request and keeps, such as a connection's monitor, cannot be told from
work that outlives the request on purpose: it carries the request's label until it ends. Start it
under an empty context (`opentelemetry.context.attach(Context())`) to prevent that. Threads of
`_thread.start_new_thread` carry what they attach themselves.

The context is attached by a hook that the new thread calls before `run()`: a wrapper of `run`
would be one more frame below the application's own in every stack of the thread.
"""

from __future__ import annotations

import contextvars
import functools
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from opentelemetry.context import attach, get_current

from otel_proflink.instrumentation.services import is_service
from otel_proflink.instrumentation.wrappers import install, remove

logger = logging.getLogger(__name__)

_ATTRIBUTE: Final = "_proflink_context"
# From 3.14 on `run` is called in a `contextvars.Context` that `start` may choose. Before, it is
# called in the thread's first one, in which the new thread itself has to attach: this is the last
# thing that it calls on itself before it says that it has started.
_CHOOSES_CONTEXT: Final = sys.version_info >= (3, 14)
_HOOKED: Final = "_set_native_id"

_active = False


def instrument() -> None:
    """Wrap `threading.Thread`. Does nothing where it is wrapped already."""
    global _active
    _active = True
    install(threading.Thread, "start", _carrying)
    if not _CHOOSES_CONTEXT:
        install(threading.Thread, _HOOKED, _attaching)


def uninstrument() -> None:
    """Take our wrappers out, and nobody else's. Threads that run keep their context."""
    global _active
    _active = False
    remove(threading.Thread, "start")
    remove(threading.Thread, _HOOKED)


def _carrying(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def start(self: threading.Thread, *args: Any, **kwargs: Any) -> None:
        if _active:
            try:
                _give_context(self)
            except Exception:  # one that is started wrongly is told so by the stock method
                logger.debug("a thread is started without its context", exc_info=True)
        try:
            return stock(self, *args, **kwargs)
        except BaseException:
            vars(self).pop(_ATTRIBUTE, None)
            raise

    return start


def _give_context(thread: Any) -> None:
    context = get_current()
    if not context or is_service(thread):
        return
    if not _CHOOSES_CONTEXT:
        vars(thread)[_ATTRIBUTE] = context
    elif thread._context is None and not _inherits():
        thread._context = contextvars.Context()
        thread._context.run(attach, context)


def _inherits() -> bool:
    return bool(getattr(sys.flags, "thread_inherit_context", False))


def _attaching(stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def _set_native_id(self: threading.Thread, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        context = vars(self).pop(_ATTRIBUTE, None)
        if context is not None:
            # Never detached: it goes with the thread's own `contextvars.Context`.
            attach(context)

    return _set_native_id
