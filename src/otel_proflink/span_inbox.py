# SPDX-License-Identifier: Apache-2.0
"""Where ended spans wait for the exporter thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from .ended_span import EndedSpan, content_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

# What is kept of a span takes 0.5 to 1 kB: some four megabytes at most wait here.
LIMIT: Final = 4096

_OnEnd = Callable[["ReadableSpan"], None]


class SpanInbox:
    """A bounded queue: any thread puts, one thread takes. When it is full the oldest go.

    The oldest, because a local root ends last and tells most about its trace.

    While the inbox is open, `on_end` of the processors connected to it is shadowed by a function of
    its own: the shortest way at span end, and none at all while nothing runs.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._waiting: deque[Any] = deque(maxlen=limit)
        self._on_end, self._count_dropped = _receiver(self._waiting, limit)
        self._dropped_before = 0
        self._processors: WeakSet[SpanProcessor] = WeakSet()
        self._open = False
        # Held while processors are connected, never at the end of a span.
        self._lock = threading.Lock()

    def connect(self, processor: SpanProcessor) -> None:
        """Let the ended spans of `processor` come here whenever the inbox is open."""
        with self._lock:
            self._processors.add(processor)
            if self._open:
                vars(processor)["on_end"] = self._on_end

    def put(self, span: ReadableSpan) -> None:
        """Take one ended span, if the inbox is open. Never blocks, never raises."""
        if self._open:
            self._on_end(span)

    @property
    def dropped(self) -> int:
        """Spans that had to go since the inbox was opened."""
        return self._count_dropped() - self._dropped_before

    def open(self) -> None:
        """Take spans from now on."""
        with self._lock:
            self._dropped_before = self._count_dropped()
            self._open = True
            for processor in self._processors:
                vars(processor)["on_end"] = self._on_end

    def close(self) -> None:
        """Take none any more, and let go of those that wait."""
        with self._lock:
            self._open = False
            for processor in self._processors:
                vars(processor).pop("on_end", None)
            self._waiting.clear()

    def forget(self) -> None:
        """In a forked child: drop the parent's spans, whatever other threads held at the fork."""
        self._lock = threading.Lock()
        self.close()

    def take(self, most: int) -> list[EndedSpan]:
        """Up to `most` spans, oldest first. From one thread only.

        Two processors on one provider put the same span twice in a row; it is returned once.
        """
        taken: list[EndedSpan] = []
        last: object = None
        popleft = self._waiting.popleft
        for _ in range(min(most, len(self._waiting))):
            item = popleft()
            span = EndedSpan._make(item) if type(item) is tuple else content_of(item)
            if span.context is not last:
                taken.append(span)
                last = span.context
        return taken

    def __len__(self) -> int:
        return len(self._waiting)


def _receiver(waiting: deque[Any], limit: int) -> tuple[_OnEnd, Callable[[], int]]:
    """The function that takes an ended span, and one that tells how many had to go.

    It runs in the application at every span end. An SDK span holds locks, deques and mappings of
    2 to 3 kB, most of them empty. To keep them until the next export makes every later span touch
    cold memory: measured, 0.7 us a span. Keeping the content alone costs 0.3 us, of which 0.2 us
    are this function; so it reads the SDK's own attributes, where the properties would copy.
    """
    append = waiting.append
    dropped = 0

    def on_end(span: Any) -> None:
        nonlocal dropped
        if len(waiting) >= limit:
            # Two threads may count one for two: cheaper than a lock, and never off by much.
            dropped += 1
        try:
            attributes, events, links = span._attributes, span._events, span._links
            append(
                (
                    span._name,
                    span._context,
                    span._parent,
                    span._kind,
                    span._start_time,
                    span._end_time,
                    attributes._dict,
                    events if events._dq else (),
                    links if links._dq else (),
                    attributes.dropped,
                    events.dropped,
                    links.dropped,
                    span._status,
                    span._resource,
                    span._instrumentation_scope,
                )
            )
        except AttributeError:
            # An SDK with other insides, a span that some library made by hand.
            append(span)

    return on_end, lambda: dropped
