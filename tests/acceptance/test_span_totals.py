# SPDX-License-Identifier: Apache-2.0
"""What was sampled of a span, on the span; and the label with its name."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from otel_proflink._linker import enrich_spans
from tests.support.ground_truth import GroundTruth, Label, needs_sampler

pytestmark = needs_sampler

needs_on_ending = pytest.mark.skipif(
    not hasattr(SpanProcessor, "_on_ending"), reason="this SDK calls nobody before a span has ended"
)

OWN = ("proflink.samples", "proflink.cpu_ns", "proflink.wall_ns", "proflink.gil_wait_ns")
TOTAL = tuple(name.replace("proflink.", "proflink.total.") for name in OWN)


class Ended(SpanProcessor):
    """Keeps ended spans as an exporter would see them."""

    def __init__(self) -> None:
        self.spans: dict[str, ReadableSpan] = {}

    def on_end(self, span: ReadableSpan) -> None:
        self.spans[span.name] = span

    def __getitem__(self, name: str) -> dict[str, Any]:
        attributes = self.spans[name].attributes or {}
        return {key: value for key, value in attributes.items() if key.startswith("proflink.")}


def close(measured: float, seconds: float, within: float = 0.35) -> bool:
    return abs(measured / 1e9 - seconds) <= within * seconds


@needs_on_ending
def test_a_span_gets_its_own_and_its_local_root_all(tmp_path: Path) -> None:
    ended = Ended()
    # Ours is added first: the other processor must see the attributes all the same.
    with GroundTruth(tmp_path, processors=[ended]) as truth:
        start = truth.tracer.start_as_current_span
        with ThreadPoolExecutor(2) as pool, start("root"):
            truth.burn(None, 0.4)
            with start("child"):
                truth.burn(None, 0.4)

                def work() -> None:
                    with start("in worker"):
                        truth.burn(None, 0.4)

                pool.submit(work).result()
    for name, seconds in (("root", 0.4), ("child", 0.4), ("in worker", 0.4)):
        own = ended[name]
        assert set(OWN) <= own.keys(), name
        assert close(own["proflink.cpu_ns"], seconds), f"too few samples? {name}: {own}"
        assert own["proflink.samples"] >= 20, f"too few samples: {own}"
        assert own["proflink.wall_ns"] >= 0.9 * own["proflink.cpu_ns"]
    total = ended["root"]
    assert set(TOTAL) <= total.keys()
    assert close(total["proflink.total.cpu_ns"], 1.2), f"too few samples? {total}"
    parts = sum(ended[name]["proflink.samples"] for name in ("root", "child", "in worker"))
    assert total["proflink.total.samples"] == pytest.approx(parts, abs=5)
    for name in ("child", "in worker"):
        assert not set(TOTAL) & ended[name].keys(), "only local roots have totals"


@needs_on_ending
def test_a_root_that_only_waits_for_its_children(tmp_path: Path) -> None:
    ended = Ended()
    with GroundTruth(tmp_path, processors=[ended]) as truth:
        root = truth.tracer.start_span("root")
        from opentelemetry.trace import set_span_in_context, use_span

        child = truth.tracer.start_span("child", context=set_span_in_context(root))
        with use_span(child, end_on_exit=True):
            truth.burn(None, 0.4)
        root.end()
    assert set(ended["root"]) == set(TOTAL)
    assert close(ended["root"]["proflink.total.cpu_ns"], 0.4), f"too few samples? {ended['root']}"


def test_no_samples_no_attributes(tmp_path: Path) -> None:
    ended = Ended()
    with GroundTruth(tmp_path, rate_hz=1, processors=[ended]) as truth:
        for i in range(50):
            with truth.tracer.start_as_current_span(f"short {i}", attributes={"its": "own"}):
                pass
    sampled = [name for name in ended.spans if ended[name]]
    assert len(sampled) <= 2, sampled
    assert all(span.attributes == {"its": "own"} for span in list(ended.spans.values())[:2])


@needs_on_ending
def test_an_application_s_own_attributes_are_never_pushed_out(tmp_path: Path) -> None:
    ended = Ended()
    with GroundTruth(tmp_path) as truth:
        provider = TracerProvider(
            shutdown_on_exit=False, span_limits=SpanLimits(max_span_attributes=4)
        )
        for processor in truth.provider._active_span_processor._span_processors:
            provider.add_span_processor(processor)
        provider.add_span_processor(ended)
        tracer = provider.get_tracer("full")
        with tracer.start_as_current_span("full", attributes={"a": 1, "b": 2}):
            truth.burn(None, 0.1)
    assert ended.spans["full"].attributes == {"a": 1, "b": 2}


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    ended = Ended()
    try:
        with (
            GroundTruth(tmp_path, span_attributes=False, processors=[ended]) as truth,
            truth.tracer.start_as_current_span("plain"),
        ):
            truth.burn(None, 0.1)
        assert ended["plain"] == {}
    finally:
        enrich_spans(True)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_span_s_name_is_a_label(tmp_path: Path, wanted: bool) -> None:
    with GroundTruth(tmp_path, span_names=wanted) as truth:
        with truth.tracer.start_as_current_span("outer name"):
            truth.burn(None, 0.1)
            with truth.tracer.start_as_current_span("inner näme"):
                truth.burn(None, 0.1)
        truth.burn(None, 0.1)
    names: dict[str, set[str | None]] = {}
    for sample in truth.samples():
        for function in sample.functions:
            if function in truth.expected and sample.values["cpu"]:
                names.setdefault(function, set()).add(sample.labels.get("span_name"))
    if wanted:
        assert sorted(names.values(), key=str) == [{"inner näme"}, {"outer name"}, {None}]
    else:
        assert list(names.values()) == [{None}] * 3


def test_a_trace_that_is_not_sampled_is_linked_and_says_so(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        dropped = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False).get_tracer("dropped")
        with dropped.start_as_current_span("not recorded") as span:
            truth.burn(Label.of(span, span_type=""))
        with truth.tracer.start_as_current_span("recorded") as span:
            truth.burn(Label.of(span))
    truth.verdict().assert_right()
    said = {
        function: sample.labels.get("trace_sampled")
        for sample in truth.samples()
        for function in set(sample.functions) & set(truth.expected)
        if sample.values["cpu"]
    }
    assert [said[function] for function in truth.expected] == ["false", None]
