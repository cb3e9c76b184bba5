# SPDX-License-Identifier: Apache-2.0
"""Ended spans in OpenTelemetry's OTLP JSON file format: one ``TracesData`` object a line.

Follows the OTLP/JSON encoding (opentelemetry-proto, docs/specification.md): the ProtoJSON mapping
with trace and span ids as lowercase hex, enumerations as numbers, 64-bit integers as strings.

Text is put together by hand: this runs beside the application, under the GIL, once for each span,
and building dictionaries for `json.dumps` costs twice as much.
"""

from __future__ import annotations

import logging
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring as _quote
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

from .pprof import PprofExporter

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext

    from ..ended_span import EndedSpan

logger = logging.getLogger(__name__)

# trace.proto, enum SpanFlags
_CONTEXT_HAS_IS_REMOTE: Final = 0x100
_CONTEXT_IS_REMOTE: Final = 0x200
_SAMPLED: Final = 0x01
_LINE_SEPARATORS: Final = tuple((chr(code), f"\\u{code:04x}") for code in (0x85, 0x2028, 0x2029))
_INT64_MIN: Final = -(1 << 63)
_INT64_MAX: Final = (1 << 63) - 1


class CaptureExporter(PprofExporter):
    """The exporter of ``OTEL_PROFILES_EXPORTER=file``: profiles, and the spans to go with them."""

    wants_spans = True

    def encode_spans(self, spans: Sequence[EndedSpan]) -> bytes:
        """See `encode_traces_data`."""
        return encode_traces_data(spans)


def encode_traces_data(spans: Iterable[EndedSpan]) -> bytes:
    """One line of OTLP JSON with the sampled ones of `spans`; empty when there is none.

    A span that cannot be encoded is left out, and logged at level debug: the SDK does not check
    everything that an application may put into a span, and its neighbours are not to suffer.
    """
    # By identity: hashing a Resource serialises it, and a provider has one. The spans in `groups`
    # keep resources and scopes alive, so that an id is not used twice.
    groups: dict[int, tuple[Resource, dict[int, tuple[InstrumentationScope | None, list[str]]]]]
    groups = {}
    for span in spans:
        context = span.context
        if context is None or not context.trace_flags & _SAMPLED:
            continue
        try:
            text = _span(span, context)
        except Exception:
            logger.debug("a span could not be encoded and is left out", exc_info=True)
            continue
        resource, scope = span.resource, span.scope
        group = groups.get(id(resource))
        if group is None:
            group = groups[id(resource)] = (resource, {})
        entry = group[1].get(id(scope))
        if entry is None:
            entry = group[1][id(scope)] = (scope, [])
        entry[1].append(text)
    if not groups:
        return b""
    resource_spans = ",".join(
        f'{{"resource":{{"attributes":{_attributes(resource.attributes)}}},"scopeSpans":['
        + ",".join(_scope_spans(scope, texts) for scope, texts in scopes.values())
        + f"]{_schema_url(resource)}}}"
        for resource, scopes in groups.values()
    )
    text = f'{{"resourceSpans":[{resource_spans}]}}\n'
    # Legal in JSON, but readers that split lines the way Unicode does would cut the object in two.
    for separator, escaped in _LINE_SEPARATORS:
        text = text.replace(separator, escaped)
    # A lone surrogate is no Unicode: JSON could carry it escaped, but protobuf parsers refuse it.
    return text.encode(errors="replace")


def _scope_spans(scope: InstrumentationScope | None, spans: list[str]) -> str:
    head = "{}"
    if scope is not None:
        version = f',"version":{_quote(scope.version)}' if scope.version else ""
        attributes = f',"attributes":{_attributes(scope.attributes)}' if scope.attributes else ""
        head = f'{{"name":{_quote(scope.name or "")}{version}{attributes}}}'
    return f'{{"scope":{head},"spans":[{",".join(spans)}]{_schema_url(scope)}}}'


def _schema_url(owner: Resource | InstrumentationScope | None) -> str:
    url = owner.schema_url if owner is not None else None
    return f',"schemaUrl":{_quote(url)}' if url else ""


def _span(span: EndedSpan, context: SpanContext) -> str:
    parts = [f'{{"traceId":"{context.trace_id:032x}","spanId":"{context.span_id:016x}"']
    parent = span.parent
    flags = int(context.trace_flags) | _CONTEXT_HAS_IS_REMOTE
    if context.trace_state:
        parts.append(f'"traceState":{_quote(context.trace_state.to_header())}')
    if parent is not None:
        parts.append(f'"parentSpanId":"{parent.span_id:016x}"')
        if parent.is_remote:
            flags |= _CONTEXT_IS_REMOTE
    parts.append(
        # The API counts kinds from INTERNAL = 0, the protocol from UNSPECIFIED = 0.
        f'"flags":{flags},"name":{_quote(str(span.name))},"kind":{span.kind.value + 1},'
        f'"startTimeUnixNano":"{span.start_time or 0}","endTimeUnixNano":"{span.end_time or 0}"'
    )
    if span.attributes:
        parts.append(f'"attributes":{_attributes(span.attributes)}')
    if span.events:
        parts.append(f'"events":[{",".join(map(_event, span.events))}]')
    if span.links:
        parts.append(f'"links":[{",".join(map(_link, span.links))}]')
    if span.dropped_attributes:
        parts.append(f'"droppedAttributesCount":{span.dropped_attributes}')
    if span.dropped_events:
        parts.append(f'"droppedEventsCount":{span.dropped_events}')
    if span.dropped_links:
        parts.append(f'"droppedLinksCount":{span.dropped_links}')
    status = span.status
    code = status.status_code.value
    if code:
        message = f',"message":{_quote(str(status.description))}' if status.description else ""
        parts.append(f'"status":{{"code":{code}{message}}}')
    return ",".join(parts) + "}"


def _event(event: Any) -> str:
    attributes = f',"attributes":{_attributes(event.attributes)}' if event.attributes else ""
    dropped = event.dropped_attributes
    count = f',"droppedAttributesCount":{dropped}' if dropped else ""
    name = _quote(str(event.name))
    return f'{{"timeUnixNano":"{event.timestamp or 0}","name":{name}{attributes}{count}}}'


def _link(link: Any) -> str:
    context = link.context
    flags = int(context.trace_flags) | _CONTEXT_HAS_IS_REMOTE
    if context.is_remote:
        flags |= _CONTEXT_IS_REMOTE
    states = context.trace_state
    state = f',"traceState":{_quote(states.to_header())}' if states else ""
    attributes = f',"attributes":{_attributes(link.attributes)}' if link.attributes else ""
    dropped = link.dropped_attributes
    count = f',"droppedAttributesCount":{dropped}' if dropped else ""
    return (
        f'{{"traceId":"{context.trace_id:032x}","spanId":"{context.span_id:016x}"'
        f'{state}{attributes}{count},"flags":{flags}}}'
    )


def _attributes(attributes: Mapping[str, Any] | None) -> str:
    if not attributes:
        return "[]"
    # One copy instead of a Python call for each item: the SDK's mapping is written in Python.
    copy = getattr(attributes, "copy", None)
    if copy is not None:
        attributes = copy()
    return (
        "["
        + ",".join(
            f'{{"key":{_quote(key)},"value":{_value(value)}}}' for key, value in attributes.items()
        )
        + "]"
    )


def _value(value: Any) -> str:
    """An ``AnyValue``. Never raises: a value of a foreign type is written as its text."""
    if isinstance(value, str):
        return f'{{"stringValue":{_quote(value)}}}'
    if isinstance(value, bool):
        return '{"boolValue":true}' if value else '{"boolValue":false}'
    if isinstance(value, int):
        # What int64 cannot hold becomes a string in decimal (specification, common/attribute type
        # mapping).
        kind = "intValue" if _INT64_MIN <= value <= _INT64_MAX else "stringValue"
        return f'{{"{kind}":"{_decimal(value)}"}}'
    if isinstance(value, float):
        return f'{{"doubleValue":{_double(value)}}}'
    if isinstance(value, bytes):
        return f'{{"bytesValue":"{b64encode(value).decode("ascii")}"}}'
    if value is None:
        return "{}"
    if isinstance(value, Mapping):
        items = {str(key): item for key, item in value.items()}
        return f'{{"kvlistValue":{{"values":{_attributes(items)}}}}}'
    if isinstance(value, Sequence):
        return f'{{"arrayValue":{{"values":[{",".join(map(_value, value))}]}}}}'
    try:
        return f'{{"stringValue":{_quote(str(value))}}}'
    except Exception:
        return f'{{"stringValue":{_quote(type(value).__qualname__)}}}'


def _decimal(value: int) -> str:
    try:
        return int.__repr__(value)
    except ValueError:  # longer than sys.set_int_max_str_digits allows
        return hex(value)


def _double(value: float) -> str:
    if isfinite(value):
        return float.__repr__(value)
    if value != value:
        return '"NaN"'
    return '"Infinity"' if value > 0 else '"-Infinity"'
