# SPDX-License-Identifier: Apache-2.0
"""Reads spans in OpenTelemetry's OTLP JSON file format: one ``{"resourceSpans": [...]}`` a line.

Follows the OTLP/JSON encoding (opentelemetry-proto, docs/specification.md): ids are lowercase or
uppercase hex, 64-bit integers are strings or numbers, enumerations are numbers, unknown fields are
ignored, absent fields have their default.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from . import MAX_FILE_BYTES, CaptureError

__all__ = ["AttributeValue", "SpanRecord", "read_spans"]

AttributeValue: TypeAlias = (
    "str | bool | int | float | bytes | list[AttributeValue] | dict[str, AttributeValue] | None"
)

# trace.proto, enum SpanKind: its place is its number.
KINDS: Final = ("unspecified", "internal", "server", "client", "producer", "consumer")
# trace.proto, enum SpanFlags
_HAS_IS_REMOTE: Final = 0x100
_IS_REMOTE: Final = 0x200
_STATUS_ERROR: Final = 2

_TRACE_ID: Final = re.compile(r"[0-9a-fA-F]{32}")
_SPAN_ID: Final = re.compile(r"[0-9a-fA-F]{16}")
_INTEGER: Final = re.compile(r"-?[0-9]{1,20}")


@dataclass(slots=True, frozen=True, kw_only=True)
class SpanRecord:
    """One ended span.

    Attributes:
        trace_id: 32 lowercase hex digits.
        span_id: 16 lowercase hex digits.
        parent_span_id: 16 lowercase hex digits, empty for the root of a trace.
        parent_is_remote: whether the parent ran in another process; None where the file does not
            say.
        name: the span's name when it ended.
        kind: ``internal``, ``server``, ``client``, ``producer``, ``consumer`` or ``unspecified``.
        start_ns: nanoseconds since the Unix epoch.
        end_ns: nanoseconds since the Unix epoch, not before `start_ns`.
        attributes: the span's attributes.
        failed: whether its status is an error.
        service: the resource's ``service.name``, or an empty text.
    """

    trace_id: str
    span_id: str
    parent_span_id: str
    parent_is_remote: bool | None
    name: str
    kind: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    failed: bool = False
    service: str = ""


def read_spans(
    source: str | os.PathLike[str] | bytes, *, name: str = "<bytes>"
) -> list[SpanRecord]:
    """The spans of one file, or of bytes that errors shall call `name`.

    Raises:
        CaptureError: unreadable, larger than the limit, cut short, or not OTLP JSON; it names the
            line.
    """
    if isinstance(source, bytes):
        data = source
    else:
        name = os.fspath(source)
        try:
            with Path(source).open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise CaptureError(name, error.strerror or str(error)) from error
    if len(data) > MAX_FILE_BYTES:
        raise CaptureError(name, f"larger than {MAX_FILE_BYTES >> 20} MiB")
    spans: list[SpanRecord] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                spans += _line(line)
            except _UnfitError as error:
                raise CaptureError(name, f"line {number} is not OTLP JSON: {error}") from None
            except (ValueError, RecursionError) as error:
                torn = number == len(lines)  # nothing but a torn line lacks its line end
                reason = "is cut short" if torn else f"is not JSON: {error}"
                raise CaptureError(name, f"line {number} {reason}") from None
    return spans


class _UnfitError(Exception):
    """JSON, but not what OTLP says."""


def _line(line: bytes) -> Iterator[SpanRecord]:
    document = json.loads(line)
    if not isinstance(document, dict) or "resourceSpans" not in document:
        raise _UnfitError("no resourceSpans")
    for resource_spans in _objects(document, "resourceSpans"):
        resource = _attributes(_object(resource_spans, "resource"))
        service = resource.get("service.name")
        for scope_spans in _objects(resource_spans, "scopeSpans"):
            for span in _objects(scope_spans, "spans"):
                yield _span(span, service if isinstance(service, str) else "")


def _span(span: dict[str, Any], service: str) -> SpanRecord:
    flags = _integer(span, "flags")
    start_ns = _integer(span, "startTimeUnixNano")
    end_ns = _integer(span, "endTimeUnixNano")
    if end_ns < start_ns:
        # The wall clock was set back while the span ran: it took some time, how much is not known.
        end_ns = start_ns
    kind = _integer(span, "kind")
    return SpanRecord(
        trace_id=_identity(span, "traceId", _TRACE_ID),
        span_id=_identity(span, "spanId", _SPAN_ID),
        parent_span_id=_identity(span, "parentSpanId", _SPAN_ID, optional=True),
        parent_is_remote=bool(flags & _IS_REMOTE) if flags & _HAS_IS_REMOTE else None,
        name=_text(span, "name"),
        kind=KINDS[kind] if 0 <= kind < len(KINDS) else KINDS[0],
        start_ns=start_ns,
        end_ns=end_ns,
        attributes=_attributes(span),
        failed=_integer(_object(span, "status"), "code") == _STATUS_ERROR,
        service=service,
    )


def _identity(
    span: dict[str, Any], key: str, pattern: re.Pattern[str], *, optional: bool = False
) -> str:
    text = _text(span, key)
    if optional and not text.strip("0"):
        return ""
    if not pattern.fullmatch(text) or not text.strip("0"):
        raise _UnfitError(f"{key} is {_short(text)}")
    return text.lower()


def _attributes(owner: dict[str, Any]) -> dict[str, AttributeValue]:
    return {
        _text(item, "key"): _value(_object(item, "value")) for item in _objects(owner, "attributes")
    }


def _value(value: dict[str, Any]) -> AttributeValue:
    """An ``AnyValue``; one of a kind that this reader does not know is None."""
    if "stringValue" in value:
        return _text(value, "stringValue")
    if "boolValue" in value:
        return value["boolValue"] is True
    if "intValue" in value:
        return _integer(value, "intValue")
    if "doubleValue" in value:
        try:
            return float(value["doubleValue"])  # "NaN" and "Infinity" are texts
        except (TypeError, ValueError, OverflowError):
            raise _UnfitError(f"doubleValue is {_short(value['doubleValue'])}") from None
    if "bytesValue" in value:
        try:
            return b64decode(_text(value, "bytesValue"))
        except ValueError:
            raise _UnfitError("bytesValue is not base64") from None
    if "arrayValue" in value:
        return [_value(item) for item in _objects(_object(value, "arrayValue"), "values")]
    if "kvlistValue" in value:
        pairs = _objects(_object(value, "kvlistValue"), "values")
        return {_text(pair, "key"): _value(_object(pair, "value")) for pair in pairs}
    return None


def _objects(owner: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = owner.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise _UnfitError(f"{key} is {_short(found)}, not a list of objects")
    return found


def _object(owner: dict[str, Any], key: str) -> dict[str, Any]:
    found = owner.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _UnfitError(f"{key} is {_short(found)}, not an object")
    return found


def _text(owner: dict[str, Any], key: str) -> str:
    found = owner.get(key)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise _UnfitError(f"{key} is {_short(found)}, not a text")
    return found


def _integer(owner: dict[str, Any], key: str) -> int:
    found = owner.get(key)
    if found is None:
        return 0
    if isinstance(found, str) and _INTEGER.fullmatch(found):
        return int(found)
    if isinstance(found, int) and not isinstance(found, bool):
        return found
    raise _UnfitError(f"{key} is {_short(found)}, not an integer")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
