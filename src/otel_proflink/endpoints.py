# SPDX-License-Identifier: Apache-2.0
"""Endpoints: the names of local roots, known late, joined to samples by local root span id."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from opentelemetry.trace import SpanKind

if TYPE_CHECKING:
    from .ended_span import EndedSpan

# Semantic conventions, HTTP server spans.
_HTTP_ROUTE: Final = "http.route"
# Enough for the roots of one interval at 200 requests a second; about 2 MB when full.
_LIMIT: Final = 12_000
_ENTRY_KINDS: Final = frozenset({SpanKind.SERVER, SpanKind.CONSUMER})


class EndpointTable:
    """Local root span id -> endpoint, least recently used out first. For one thread only."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._names: OrderedDict[int, str] = OrderedDict()

    def record(self, span: EndedSpan) -> None:
        """Take the endpoint of an ended span, if it may be a local root."""
        parent = span.parent
        # A server span below a local, non-recording parent is the first span that is really there.
        if parent is not None and not parent.is_remote and span.kind not in _ENTRY_KINDS:
            return
        context = span.context
        if context is None:
            return
        names = self._names
        names[context.span_id] = endpoint_of(span)
        if len(names) > self._limit:
            names.popitem(last=False)

    def find(self, local_roots: Iterable[int]) -> dict[int, str]:
        """The endpoints of those of `local_roots` that are known."""
        known: dict[int, str] = {}
        names = self._names
        for root in local_roots:
            name = names.get(root)
            if name is not None:
                known[root] = name
                names.move_to_end(root)
        return known

    def __len__(self) -> int:
        return len(self._names)


def endpoint_of(span: EndedSpan) -> str:
    """``http.route`` where the span has one, else its name.

    Taken at the end: instrumentations learn the route, and rename the span, while it runs.
    """
    route = span.attributes.get(_HTTP_ROUTE)
    return route if isinstance(route, str) and route else str(span.name)
