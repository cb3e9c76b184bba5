# SPDX-License-Identifier: Apache-2.0
"""Names of threads by native thread id, also of threads that end between two flushes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

# Threads that end within one export interval and are remembered for its profile.
_LIMIT: Final = 4096
# Looked up on the class by each thread as its very last Python call. Wrapping it, and not
# `_bootstrap_inner` or `run`, adds no frame below the application's own in any stack.
_HOOKED: Final = "_delete"


class ThreadNames:
    """Remembers the names of ended threads while installed; knows those of live ones anyway.

    `threading` offers no hook for the end of a thread, hence one narrow wrap of a private method.
    Where a Python version lacks that method, only threads alive at a flush have a name.
    """

    def __init__(self) -> None:
        self._ended: dict[int, str] = {}
        self._original: Callable[[threading.Thread], None] | None = None
        self._wrapper: Callable[[threading.Thread], None] | None = None

    def install(self) -> None:
        """Begin to remember. Once is enough; again is harmless."""
        original = threading.Thread.__dict__.get(_HOOKED)
        if self._wrapper is not None or not callable(original):
            return

        def _delete(thread: threading.Thread, *args: Any) -> None:
            self._remember(thread)
            original(thread, *args)

        self._original, self._wrapper = original, _delete
        setattr(threading.Thread, _HOOKED, _delete)

    def uninstall(self) -> None:
        """Stop remembering, and take the wrap away unless someone has wrapped it since."""
        wrapper, original = self._wrapper, self._original
        self._wrapper = self._original = None
        if wrapper is not None and threading.Thread.__dict__.get(_HOOKED) is wrapper:
            setattr(threading.Thread, _HOOKED, original)
        self._ended.clear()

    def take(self) -> dict[int, str]:
        """Names of live threads and of those that ended since the last call."""
        names, self._ended = self._ended, {}
        names = dict(names)
        for thread in threading.enumerate():
            if thread.native_id is not None:
                names[thread.native_id] = thread.name
        # Last, so that it wins: with gevent's patches every "thread" has the main thread's id.
        main = threading.main_thread()
        if main.native_id is not None:
            names[main.native_id] = main.name
        return names

    def _remember(self, thread: threading.Thread) -> None:
        # Runs in other people's threads: nothing may leave it.
        try:
            if self._wrapper is not None and len(self._ended) < _LIMIT:
                native_id = thread.native_id
                if native_id is not None:
                    self._ended[native_id] = thread.name
        except Exception:
            pass
