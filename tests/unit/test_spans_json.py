# SPDX-License-Identifier: Apache-2.0
"""Our OTLP JSON, read back by protobuf's own JSON parser and held against the SDK's encoder."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf import json_format
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)

from otel_proflink.ended_span import content_of
from otel_proflink.exporters.spans_json import encode_traces_data
from otel_proflink.span_inbox import SpanInbox


def provider_with_memory(**arguments: Any) -> tuple[TracerProvider, InMemorySpanExporter]:
    memory = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False, **arguments)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return provider, memory


def encode(spans: Sequence[ReadableSpan]) -> bytes:
    """As the profiler does it, from what its inbox kept; which must be all of it."""
    inbox = SpanInbox()
    inbox.open()
    for span in spans:
        inbox.put(span)
    data = encode_traces_data(inbox.take(len(inbox)))
    assert data == encode_traces_data([content_of(span) for span in spans])
    return data


def parse(data: bytes) -> TracesData:
    """Strictly: unknown fields, wrong types and bad numbers are errors."""

    def to_base64(node: Any) -> Any:
        # The one place where OTLP leaves the ProtoJSON mapping: ids are hex, not base64.
        if isinstance(node, dict):
            return {
                key: base64.b64encode(bytes.fromhex(value)).decode()
                if key in ("traceId", "spanId", "parentSpanId")
                else to_base64(value)
                for key, value in node.items()
            }
        return [to_base64(item) for item in node] if isinstance(node, list) else node

    lines = data.decode("utf-8").splitlines()
    assert len(lines) == 1, "one object a line"
    message = TracesData()
    json_format.ParseDict(to_base64(json.loads(lines[0], parse_constant=pytest.fail)), message)
    return message


def only_span(spans: Sequence[ReadableSpan]) -> Any:
    message = parse(encode(spans))
    (resource_spans,) = message.resource_spans
    (scope_spans,) = resource_spans.scope_spans
    (span,) = scope_spans.spans
    return span


def one(name: str = "one", **arguments: Any) -> Any:
    provider, memory = provider_with_memory()
    provider.get_tracer("t").start_span(name, **arguments).end()
    return only_span(memory.get_finished_spans())


def value_of(value: Any) -> Any:
    """What protobuf reads for one attribute value, put past the SDK's own cleaning."""
    span = ReadableSpan(
        "s",
        context=SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1)),
        resource=Resource({}),
        attributes={"key": value},
    )
    (attribute,) = only_span([span]).attributes
    assert attribute.key == "key"
    return attribute.value


def everything() -> Sequence[ReadableSpan]:
    provider, memory = provider_with_memory(
        resource=Resource({"service.name": "shop", "host.cpus": 4}, "https://schema/1")
    )
    remote = SpanContext(
        0x00000000000000000000000000000ABC,
        0x000000000000000F,
        is_remote=True,
        trace_flags=TraceFlags(1),
        trace_state=TraceState([("vendor", "x:1"), ("other", "y")]),
    )
    first = provider.get_tracer("scope.one", "1.2", "https://schema/2", {"scope.key": True})
    second = provider.get_tracer("scope.two")
    parent = set_span_in_context(NonRecordingSpan(remote))
    with first.start_as_current_span(
        'GET /grün "quoted" \\ \n\t\x00 \U0001f600',
        context=parent,
        kind=SpanKind.SERVER,
        attributes={
            "text": "héllo",
            "flag": True,
            "count": 2**53 + 1,
            "ratio": 0.1,
            "many": ["a", "b"],
            "numbers": [1, -2],
            "flags": [True, False],
            "empty": [],
        },
        links=[Link(remote, {"why": "retry"}), Link(SpanContext(5, 6, is_remote=False))],
    ) as span:
        span.add_event("cache miss", {"key": "k"}, timestamp=1_700_000_000_123_456_789)
        span.add_event("bare")
        with second.start_as_current_span("child", kind=SpanKind.CLIENT) as child:
            child.set_status(Status(StatusCode.ERROR, "went wrong"))
            child.record_exception(ValueError("boom"))
        span.set_status(StatusCode.OK)
    for kind in SpanKind:
        second.start_span(kind.name, kind=kind).end()
    return memory.get_finished_spans()


def test_equals_what_the_sdk_encodes() -> None:
    encoder = pytest.importorskip("opentelemetry.exporter.otlp.proto.common.trace_encoder")
    spans = everything()
    ours = parse(encode(spans))
    theirs = TracesData()
    theirs.ParseFromString(encoder.encode_spans(spans).SerializeToString())
    for message in (ours, theirs):
        for resource_spans in message.resource_spans:
            for scope_spans in resource_spans.scope_spans:
                for span in scope_spans.spans:
                    # Bits 0-7 are the W3C flags (trace.proto); the SDK's encoder leaves them out.
                    span.flags &= 0x300
                    span.status.SetInParent()  # ours leaves an unset status out
                    for link in span.links:
                        link.flags &= 0x300
                        link.ClearField("trace_state")  # left out by the SDK's encoder, too
    assert ours == theirs


def test_trace_state_of_span_and_link() -> None:
    for scope_spans in parse(encode(everything())).resource_spans[0].scope_spans:
        for span in scope_spans.spans:
            if span.name.startswith("GET"):
                assert span.trace_state == span.links[0].trace_state == "vendor=x:1,other=y"
                assert span.links[0].flags == 0x301
                assert span.links[1].flags == 0x100


def test_ids_are_lowercase_hex_of_full_length() -> None:
    spans = everything()
    text = json.loads(encode(spans))
    span = next(
        span
        for scope in text["resourceSpans"][0]["scopeSpans"]
        for span in scope["spans"]
        if span["name"].startswith("GET")
    )
    assert span["traceId"] == "00000000000000000000000000000abc"
    assert span["parentSpanId"] == "000000000000000f"
    assert len(span["spanId"]) == 16
    assert span["spanId"] == span["spanId"].lower()


def test_64_bit_numbers_are_strings_and_enumerations_numbers() -> None:
    text = json.loads(encode(everything()))
    for scope in text["resourceSpans"][0]["scopeSpans"]:
        for span in scope["spans"]:
            assert isinstance(span["startTimeUnixNano"], str)
            assert isinstance(span["endTimeUnixNano"], str)
            assert isinstance(span["kind"], int)
            assert all(isinstance(event["timeUnixNano"], str) for event in span.get("events", ()))
            for attribute in span.get("attributes", ()):
                if attribute["key"] == "count":
                    assert attribute["value"] == {"intValue": "9007199254740993"}


def test_spans_are_grouped_by_resource_and_scope() -> None:
    message = parse(encode(everything()))
    (resource_spans,) = message.resource_spans
    assert resource_spans.schema_url == "https://schema/1"
    names = [scope_spans.scope.name for scope_spans in resource_spans.scope_spans]
    assert sorted(names) == ["scope.one", "scope.two"]


def test_two_resources_in_one_batch() -> None:
    spans = [*everything()]
    provider, memory = provider_with_memory(resource=Resource({"service.name": "other"}))
    provider.get_tracer("t").start_span("x").end()
    message = parse(encode([*spans, *memory.get_finished_spans()]))
    assert len(message.resource_spans) == 2


def test_only_sampled_spans() -> None:
    class RecordOnly(Sampler):
        def should_sample(self, *_args: Any, **_kwargs: Any) -> SamplingResult:
            return SamplingResult(Decision.RECORD_ONLY)

        def get_description(self) -> str:
            return "record only"

    ended: list[ReadableSpan] = []

    class Keep(SimpleSpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            ended.append(span)

    provider = TracerProvider(sampler=RecordOnly(), shutdown_on_exit=False)
    provider.add_span_processor(Keep(InMemorySpanExporter()))
    provider.get_tracer("t").start_span("recorded, not sampled").end()
    assert len(ended) == 1
    assert encode(ended) == b""
    assert encode([]) == b""


@pytest.mark.parametrize("remote", [True, False])
def test_flags_say_whether_the_parent_is_remote(remote: bool) -> None:
    context = SpanContext(7, 8, is_remote=remote, trace_flags=TraceFlags(1))
    span = one(context=set_span_in_context(NonRecordingSpan(context)))
    assert span.flags & 0x100
    assert bool(span.flags & 0x200) is remote
    assert span.flags & 0xFF == 1
    assert span.parent_span_id == (8).to_bytes(8, "big")


def test_a_root_has_no_parent() -> None:
    span = one()
    assert span.parent_span_id == b""
    assert span.flags & 0x300 == 0x100


def test_times_are_exact() -> None:
    provider, memory = provider_with_memory()
    span = provider.get_tracer("t").start_span("s", start_time=1_700_000_000_000_000_001)
    span.end(1_700_000_000_000_000_003)
    read = only_span(memory.get_finished_spans())
    assert read.start_time_unix_nano == 1_700_000_000_000_000_001
    assert read.end_time_unix_nano == 1_700_000_000_000_000_003


@pytest.mark.parametrize(
    ("value", "field", "read"),
    [
        ("", "string_value", ""),
        ("ünï\u2028", "string_value", "ünï\u2028"),
        (True, "bool_value", True),
        (False, "bool_value", False),
        (0, "int_value", 0),
        (-(2**63), "int_value", -(2**63)),
        (2**63 - 1, "int_value", 2**63 - 1),
        (2**63, "string_value", str(2**63)),
        (1.5, "double_value", 1.5),
        (-0.0, "double_value", -0.0),
        (5e-324, "double_value", 5e-324),
        (1e308, "double_value", 1e308),
        (math.inf, "double_value", math.inf),
        (-math.inf, "double_value", -math.inf),
        (b"\x00\xff", "bytes_value", b"\x00\xff"),
        (b"", "bytes_value", b""),
        (SpanKind.SERVER, "string_value", "SpanKind.SERVER"),
    ],
)
def test_values(value: Any, field: str, read: Any) -> None:
    found = value_of(value)
    assert found.WhichOneof("value") == field
    assert getattr(found, field) == read


def test_not_a_number() -> None:
    assert math.isnan(value_of(math.nan).double_value)


def test_none_is_an_empty_value() -> None:
    assert value_of(None).WhichOneof("value") is None


def test_arrays_and_maps_nest() -> None:
    found = value_of((1, "x", [b"y", None], {"k": 2.5}))
    items = found.array_value.values
    assert [item.WhichOneof("value") for item in items] == [
        "int_value",
        "string_value",
        "array_value",
        "kvlist_value",
    ]
    (pair,) = items[3].kvlist_value.values
    assert (pair.key, pair.value.double_value) == ("k", 2.5)


def test_an_integer_too_long_for_decimal_text() -> None:
    assert value_of(1 << 20_000).string_value.startswith("0x1")


def test_a_lone_surrogate_becomes_readable_text() -> None:
    assert value_of("a\ud800b").string_value == "a?b"


def test_a_value_that_cannot_be_shown_spoils_nothing() -> None:
    class Rude:
        def __str__(self) -> str:
            raise RuntimeError("no")

    assert "Rude" in value_of(Rude()).string_value


def test_a_span_that_cannot_be_encoded_is_left_out_alone() -> None:
    provider, memory = provider_with_memory()
    tracer = provider.get_tracer("t")
    tracer.start_span("good").end()
    broken = ReadableSpan(
        "broken",
        context=SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1)),
        resource=Resource({}),
        kind=None,  # type: ignore[arg-type]
    )
    assert only_span([broken, *memory.get_finished_spans()]).name == "good"


def test_a_name_that_is_no_text() -> None:
    assert one(42).name == "42"  # type: ignore[arg-type]


def test_dropped_counts() -> None:
    from opentelemetry.sdk.trace import SpanLimits

    provider, memory = provider_with_memory(
        span_limits=SpanLimits(max_span_attributes=1, max_events=1, max_links=1)
    )
    context = SpanContext(5, 6, is_remote=False)
    span = provider.get_tracer("t").start_span(
        "s", attributes={"a": 1, "b": 2}, links=[Link(context), Link(context)]
    )
    span.add_event("one")
    span.add_event("two")
    span.end()
    read = only_span(memory.get_finished_spans())
    assert read.dropped_attributes_count == 1
    assert read.dropped_events_count == 1
    assert read.dropped_links_count == 1
