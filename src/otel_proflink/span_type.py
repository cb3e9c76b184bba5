# SPDX-License-Identifier: Apache-2.0
"""The span type of a local root, from its kind and semantic-convention attributes at start.

Attribute names follow the OpenTelemetry semantic conventions 1.44 (and the older spellings that
instrumentations still emit).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from opentelemetry.trace import SpanKind

SPAN_TYPE_ATTRIBUTE: Final = "proflink.span_type"

# Local roots of these types serve requests that have a route or an operation name.
ENDPOINT_TYPES: Final = frozenset({"web", "rpc", "messaging"})


def _has(attributes: Mapping[str, object], *prefixes: str) -> bool:
    return any(name.startswith(prefixes) for name in attributes)


def span_type_of(kind: SpanKind, attributes: Mapping[str, object] | None) -> str:
    """Returns the span type of a local root.

    Args:
        kind: the span's kind.
        attributes: the attributes that it has at start.

    An explicit string attribute `proflink.span_type` overrides everything else.
    """
    attributes = attributes or {}
    explicit = attributes.get(SPAN_TYPE_ATTRIBUTE)
    if isinstance(explicit, str) and explicit:
        return explicit
    if kind is SpanKind.SERVER:
        return "rpc" if _has(attributes, "rpc.") else "web"
    if kind is SpanKind.CONSUMER:
        return "worker" if _has(attributes, "celery.") else "messaging"
    if kind is SpanKind.PRODUCER:
        return "messaging"
    if kind is SpanKind.CLIENT:
        for prefix, name in (("db.", "db"), ("rpc.", "rpc"), ("messaging.", "messaging")):
            if _has(attributes, prefix):
                return name
        return "client"
    return "internal"
