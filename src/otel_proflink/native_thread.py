# SPDX-License-Identifier: Apache-2.0
"""A daemon thread that is one: also where gevent has made `threading` start greenlets.

A greenlet would run on the application's own thread, and only when that yields. The exporter must
not depend on that, and what it tells the sampler of "its" thread would be of the main thread.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

_JOIN_SLICE_S: Final = 0.05


def original(module: str, name: str) -> Any:
    """A function or class of the standard library as it was before any monkey patching."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None:
        return monkey.get_original(module, name)
    return getattr(import_module(module), name)


def _is_patched() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


class NativeThread:
    """Runs `target` once, in a daemon thread of the operating system.

    Args:
        target: what to run; should not raise.
        name: of the thread, where `threading` knows of it.
    """

    def __init__(self, target: Callable[[], object], name: str) -> None:
        self._target = target
        self._name = name
        self._thread: threading.Thread | None = None
        self._alive = False
        self.native_id: int | None = None

    def start(self) -> None:
        """Start it.

        Raises:
            RuntimeError: the system, or an interpreter that ends, gives no thread.
        """
        self._alive = True
        try:
            if _is_patched():
                original("_thread", "start_new_thread")(self._run, ())
            else:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                thread.start()
                self._thread = thread
        except BaseException:
            self._alive = False
            raise

    def _run(self) -> None:
        self.native_id = threading.get_native_id()
        try:
            self._target()
        finally:
            self._alive = False

    def is_alive(self) -> bool:
        """Whether the target has not returned yet. Not to be trusted across a fork."""
        return self._alive and (self._thread is None or self._thread.is_alive())

    def is_current(self) -> bool:
        """Whether the caller runs in it."""
        return self.native_id == threading.get_native_id()

    def join(self, timeout_s: float) -> None:
        """Wait for its end, `timeout_s` seconds at most."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        else:
            sleep = original("time", "sleep")
            for _ in range(int(timeout_s / _JOIN_SLICE_S)):
                if not self._alive:
                    break
                sleep(_JOIN_SLICE_S)
