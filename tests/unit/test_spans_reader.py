# SPDX-License-Identifier: Apache-2.0
"""The OTLP JSON reader: what the format allows, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from otel_proflink.report import CaptureError, spans_reader
from otel_proflink.report.spans_reader import SpanRecord, read_spans

TRACE, SPAN, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "53995c3f42cd8ad8"


def span(**more: Any) -> dict[str, Any]:
    return {
        "traceId": TRACE,
        "spanId": SPAN,
        "name": "GET /",
        "kind": 2,
        "startTimeUnixNano": "1700000000000000001",
        "endTimeUnixNano": "1700000000250000001",
        **more,
    }


def document(*spans: Any, resource: Any = None) -> bytes:
    groups = {"resource": resource or {}, "scopeSpans": [{"scope": {}, "spans": list(spans)}]}
    return json.dumps({"resourceSpans": [groups]}).encode() + b"\n"


def one(**more: Any) -> SpanRecord:
    (record,) = read_spans(document(span(**more)))
    return record


def test_a_span() -> None:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": "shop"}}]}
    line = document(span(parentSpanId=PARENT, flags=0x301, status={"code": 2}), resource=resource)
    assert read_spans(line) == [
        SpanRecord(
            trace_id=TRACE,
            span_id=SPAN,
            parent_span_id=PARENT,
            parent_is_remote=True,
            name="GET /",
            kind="server",
            start_ns=1700000000000000001,
            end_ns=1700000000250000001,
            failed=True,
            service="shop",
        )
    ]


def test_defaults_of_absent_fields() -> None:
    (record,) = read_spans(document({"traceId": TRACE, "spanId": SPAN}))
    assert record == SpanRecord(
        trace_id=TRACE,
        span_id=SPAN,
        parent_span_id="",
        parent_is_remote=None,
        name="",
        kind="unspecified",
        start_ns=0,
        end_ns=0,
    )


@pytest.mark.parametrize(
    ("flags", "remote"), [(0x001, None), (0x101, False), (0x301, True), (0x200, None)]
)
def test_is_the_parent_remote(flags: int, remote: bool | None) -> None:
    assert one(parentSpanId=PARENT, flags=flags).parent_is_remote is remote


def test_ids_are_hex_in_either_case_and_zero_is_no_parent() -> None:
    record = one(traceId=TRACE.upper(), spanId=SPAN.upper(), parentSpanId="0" * 16)
    assert (record.trace_id, record.span_id, record.parent_span_id) == (TRACE, SPAN, "")


def test_times_as_numbers_and_a_clock_set_back() -> None:
    assert one(startTimeUnixNano=5, endTimeUnixNano=7).end_ns == 7
    assert one(startTimeUnixNano="9", endTimeUnixNano="7").end_ns == 9


def test_attribute_values_of_every_kind() -> None:
    values = {
        "text": {"stringValue": "Größe"},
        "yes": {"boolValue": True},
        "big": {"intValue": "-9223372036854775808"},
        "small": {"intValue": 3},
        "half": {"doubleValue": 0.5},
        "endless": {"doubleValue": "Infinity"},
        "bytes": {"bytesValue": "AAE="},
        "list": {"arrayValue": {"values": [{"intValue": "1"}, {"stringValue": "x"}]}},
        "map": {"kvlistValue": {"values": [{"key": "k", "value": {"boolValue": False}}]}},
        "empty": {},
        "later": {"hologramValue": 1},
    }
    record = one(attributes=[{"key": key, "value": value} for key, value in values.items()])
    assert record.attributes == {
        "text": "Größe",
        "yes": True,
        "big": -(1 << 63),
        "small": 3,
        "half": 0.5,
        "endless": float("inf"),
        "bytes": b"\x00\x01",
        "list": [1, "x"],
        "map": {"k": False},
        "empty": None,
        "later": None,
    }


def test_lines_without_a_final_line_end_blank_lines_and_unknown_fields() -> None:
    line = document(span(traceState="a=b", links=[{}], later=1))
    assert len(read_spans(line + b"\n\r\n" + line.strip())) == 2
    assert read_spans(b"") == []
    assert read_spans(b'{"resourceSpans":[]}\n') == []
    assert read_spans(b'{"resourceSpans":null}') == []


def test_a_torn_last_line_says_so() -> None:
    line = document(span())
    for length in (1, len(line) // 2, len(line) - 2):
        with pytest.raises(CaptureError) as caught:
            read_spans(line + line[:length], name="spans.json")
        assert str(caught.value) == "spans.json: line 2 is cut short"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"nonsense\n", "line 1 is not JSON"),
        (b"\xff\xfe\n", "line 1 is not JSON"),
        (b'{"resourceSpans":' + b"[" * 200_000 + b"\n", "line 1 is not JSON"),
        (b"[]\n", "no resourceSpans"),
        (b'{"spans":[]}\n', "no resourceSpans"),
        (b'{"resourceSpans":{}}\n', "resourceSpans is {}"),
        (b'{"resourceSpans":[1]}\n', "not a list of objects"),
        (document(span(traceId="12")), "traceId is '12'"),
        (document(span(traceId="0" * 32)), "traceId"),
        (document(span(spanId=5)), "spanId is 5"),
        (document(span(spanId="zz" * 8)), "spanId"),
        (document(span(parentSpanId="12")), "parentSpanId"),
        (document(span(name=["x"])), "name is"),
        (document(span(startTimeUnixNano="1e9")), "startTimeUnixNano"),
        (document(span(startTimeUnixNano="9" * 5000)), "startTimeUnixNano"),
        (document(span(endTimeUnixNano=1.5)), "endTimeUnixNano is 1.5"),
        (document(span(kind=True)), "kind is True"),
        (document(span(status="bad")), "status is 'bad'"),
        (document(span(attributes={})), "attributes is {}"),
        (document(span(attributes=[{"key": "k", "value": 1}])), "value is 1"),
        (document(span(attributes=[{"key": "k", "value": {"doubleValue": "x"}}])), "doubleValue"),
        (document(span(attributes=[{"key": "k", "value": {"bytesValue": "x"}}])), "base64"),
    ],
)
def test_lines_that_are_not_otlp(line: bytes, reason: str) -> None:
    with pytest.raises(CaptureError) as caught:
        read_spans(line, name="spans.json")
    assert str(caught.value).startswith("spans.json: line 1 ")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 200


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match=r"none\.json: No such file or directory"):
        read_spans(tmp_path / "none.json")
    monkeypatch.setattr(spans_reader, "MAX_FILE_BYTES", 1 << 20)
    path = tmp_path / "big.json"
    path.write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(CaptureError, match="larger than 1 MiB"):
        read_spans(path)
