# SPDX-License-Identifier: Apache-2.0
"""Putting wrappers into other people's classes, and taking out our own again and nobody else's.

`opentelemetry.instrumentation.utils.unwrap`, by which instrumentations take themselves out, takes
off the outermost wrapt proxy, whosoever it is. So ours are no proxies (which would also double the
cost of a call) and go below all of them: whoever comes and goes, in whatever order, each takes off
its own.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, NamedTuple

import wrapt

logger = logging.getLogger(__name__)

# wrapt 2 has a proxy class below `ObjectProxy`.
_PROXY: Final[type] = next(
    getattr(wrapt, name) for name in ("BaseObjectProxy", "ObjectProxy") if hasattr(wrapt, name)
)


class _Wrapper(NamedTuple):
    ours: Any
    stock: Any


# (owner, name) -> our wrapper there. By identity: `functools.wraps` copies any mark that a function
# could bear to the wrappers around it.
_wrappers: dict[tuple[Any, str], _Wrapper] = {}

_awaited: set[tuple[str, Callable[[ModuleType], object]]] = set()


def install(owner: Any, name: str, wrap: Callable[[Any], Any]) -> bool:
    """Put `wrap(stock)` in the place of `owner.name`, below all proxies; once.

    Args:
        owner: a class or module that has `name` itself, not by inheritance.
        name: of a function, static method or class method.
        wrap: makes the wrapper, of the same kind, of the object that it finds there.

    Returns:
        False if there is no such thing to wrap.
    """
    outer, innermost = _innermost(owner, name)
    if not callable(innermost) and not isinstance(innermost, classmethod):
        return False
    present = _wrappers.get((owner, name))
    if present is None or innermost is not present.ours:
        made = _Wrapper(wrap(innermost), innermost)
        _wrappers[owner, name] = made
        _put(owner, name, outer, made.ours)
    return True


def remove(owner: Any, name: str) -> None:
    """Undo `install`; without effect where ours is no longer in place."""
    present = _wrappers.pop((owner, name), None)
    outer, innermost = _innermost(owner, name)
    if present is not None and innermost is present.ours:
        _put(owner, name, outer, present.stock)


def when_imported(name: str, wrap: Callable[[ModuleType], object]) -> None:
    """Call `wrap(module)` if the module is imported, or else as soon as it is.

    Nothing is imported for it: most applications never need most of the modules. An import hook
    cannot be taken back, so `wrap` has to look whether it is still wanted.
    """
    if name in sys.modules:
        _guarded(wrap, sys.modules[name])
    elif (name, wrap) not in _awaited:
        _awaited.add((name, wrap))
        wrapt.register_post_import_hook(  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
            lambda module: _guarded(wrap, module), name
        )


def _guarded(wrap: Callable[[ModuleType], object], module: ModuleType) -> None:
    try:
        wrap(module)
    except Exception:  # it would end the application's import
        logger.warning("%s is not as expected: not instrumented", module.__name__, exc_info=True)


def _innermost(owner: Any, name: str) -> tuple[Any, Any]:
    """Return the last wrapt proxy around `owner.name`, None if there is none, and what it wraps."""
    outer, current = None, vars(owner).get(name)
    # Not isinstance: a proxy gives the class of what it wraps as its own.
    while issubclass(type(current), _PROXY):
        # `unwrap` leaves a bound wrapper in place of a nested one, which looks at its parent's
        # `__wrapped__` when it is bound again, not at its own.
        parent = getattr(current, "_self_parent", None)
        outer = current if parent is None else parent
        current = outer.__wrapped__
    return outer, current


def _put(owner: Any, name: str, outer: Any, function: Any) -> None:
    if outer is None:
        setattr(owner, name, function)
    else:
        outer.__wrapped__ = function
