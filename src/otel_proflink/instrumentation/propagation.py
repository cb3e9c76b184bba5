# SPDX-License-Identifier: Apache-2.0
"""The propagation record: what a copied `Context` says about its span's local root.

It travels as two OpenTelemetry Baggage entries (https://opentelemetry.io/docs/specs/otel/baggage/),
so that whatever carries a `Context` or its baggage carries them too. They are for the worker's side
alone: `extract` (and natively `_linker.PropagatedCall`) takes them out before user code runs, so
that no propagator ever writes them into an outgoing request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from opentelemetry import baggage
from opentelemetry.context import Context

# The two names are fixed: `opentelemetry.context.create_key` draws a new suffix in each process.
from otel_proflink._linker import (
    LOCAL_ROOT_KEY,
    SPAN_TYPE_KEY,
    Link,
    link_for_context,
)

__all__ = ["LOCAL_ROOT_KEY", "SPAN_TYPE_KEY", "entries_of", "extract", "inject", "with_record"]

# The API keeps its own key for baggage private; a context with nothing but baggage shows it.
_BAGGAGE_KEY: Final = next(iter(baggage.set_baggage("", "", Context())))


# The record made last, by the serial of its link: a handler submits many tasks under one span.
_last: tuple[int, dict[str, object]] = (0, {})


def entries_of(link: Link) -> dict[str, object]:
    """Return the record of `link`: the baggage entries that carry its local root and span type.

    The root is 16 lowercase hex digits; the type's entry is absent when there is none. To be read
    only: the next call may return the same object.
    """
    global _last
    serial, entries = _last  # one read: other threads write
    if serial != link.serial:
        entries = {LOCAL_ROOT_KEY: f"{link.local_root_span_id:016x}"}
        if link.span_type:
            entries[SPAN_TYPE_KEY] = link.span_type
        _last = (link.serial, entries)
    return entries


def inject(context: Context) -> Context:
    """Return a copy of `context` that carries the record of its span; `context` is not touched.

    Other keys and other baggage are kept. Without a valid span there is nothing to carry: the copy
    has neither entry, not even one that `context` had.
    """
    link = link_for_context(context)
    return with_record(context, {} if link is None else entries_of(link))


def with_record(context: Context, record: Mapping[str, object]) -> Context:
    """Return a copy of `context` that carries `record`, as made by `entries_of`, and no other."""
    entries = context.get(_BAGGAGE_KEY)
    kept = _without_record(entries) if isinstance(entries, dict) else {}
    return _with_baggage(context, {**kept, **record})


def extract(context: Context) -> tuple[Context, Link | None]:
    """Return `context` without the record, and the link that context and record make together.

    A span without a readable record is its own local root, unless it is known better here. The
    link is None when `context` has no valid span.
    """
    # First: once the entries are gone, the link could only be a guess.
    link = link_for_context(context)
    entries = context.get(_BAGGAGE_KEY)
    if isinstance(entries, dict) and (LOCAL_ROOT_KEY in entries or SPAN_TYPE_KEY in entries):
        context = _with_baggage(context, _without_record(entries))
    return context, link


def _with_baggage(context: Context, entries: Mapping[str, object]) -> Context:
    if entries:
        return Context(context, **{_BAGGAGE_KEY: entries})
    if context.get(_BAGGAGE_KEY):  # nothing but the record was in it
        return Context({key: value for key, value in context.items() if key != _BAGGAGE_KEY})
    return Context(context)


def _without_record(entries: Mapping[str, object]) -> dict[str, object]:
    kept = dict(entries)
    kept.pop(LOCAL_ROOT_KEY, None)
    kept.pop(SPAN_TYPE_KEY, None)
    return kept
