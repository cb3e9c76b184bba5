# SPDX-License-Identifier: Apache-2.0
"""Section D: labels of the main thread, read back from the exported profile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from opentelemetry.trace import SpanKind

from tests.support.ground_truth import (
    WEB,
    GroundTruth,
    Label,
    attached,
    read_profiles,
    remote_context,
    verify,
)


def test_d1_web_span_has_label_and_endpoint(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        with truth.tracer.start_as_current_span(
            "GET", kind=SpanKind.SERVER, attributes=WEB
        ) as root:
            truth.burn(Label.of(root, span_type="web", endpoint="/users/{id}"))
            with truth.tracer.start_as_current_span("query", kind=SpanKind.CLIENT) as child:
                truth.burn(Label.of(child, root, "web", endpoint="/users/{id}"))
            root.set_attribute("http.route", "/users/{id}")  # as instrumentations do: late
        with truth.tracer.start_as_current_span("GET", kind=SpanKind.SERVER) as root:
            truth.burn(Label.of(root, span_type="web", endpoint="GET /health"))
            root.update_name("GET /health")
    truth.verdict().assert_right()


@pytest.mark.parametrize(
    ("kind", "attributes", "span_type"),
    [
        (SpanKind.INTERNAL, {}, "internal"),
        (SpanKind.CLIENT, {"db.system.name": "postgresql"}, "db"),
        (SpanKind.INTERNAL, {"proflink.span_type": "cron"}, "cron"),
    ],
)
def test_d2_other_span_types_have_no_endpoint(
    tmp_path: Path, kind: SpanKind, attributes: dict[str, str], span_type: str
) -> None:
    with (
        GroundTruth(tmp_path) as truth,
        truth.tracer.start_as_current_span("work", kind=kind, attributes=attributes) as root,
    ):
        truth.burn(Label.of(root, span_type=span_type, endpoint=None))
    truth.verdict().assert_right()


def test_d3_no_type_means_ids_only(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        with attached(remote_context(0xABC, 0xDEF)):
            truth.burn(Label(0xABC, 0xDEF, 0xDEF, "", endpoint=None))
        # Ids are 16 and 8 bytes, whatever they begin with.
        with attached(remote_context(1, 1)):
            truth.burn(Label(1, 1, 1, "", endpoint=None))
        with attached(remote_context(2**128 - 1, 2**64 - 1)):
            truth.burn(Label(2**128 - 1, 2**64 - 1, 2**64 - 1, "", endpoint=None))
    truth.verdict().assert_right()


def test_d4_endpoint_collection_off(tmp_path: Path) -> None:
    with (
        GroundTruth(tmp_path, endpoint_collection=False) as truth,
        truth.tracer.start_as_current_span("GET /", kind=SpanKind.SERVER, attributes=WEB) as root,
    ):
        truth.burn(Label.of(root, span_type="web", endpoint=None))
    truth.verdict().assert_right()


def test_d4_span_unfinished_at_flush_gets_its_endpoint_later(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        with truth.tracer.start_as_current_span(
            "GET", kind=SpanKind.SERVER, attributes=WEB
        ) as root:
            truth.burn(Label.of(root, span_type="web", endpoint="/late"))
            assert truth.profiler.flush()
            early = verify(read_profiles(tmp_path), truth.expected)
            (counts,) = early.counts.values()
            assert counts.wrong == counts.total > 0, "the endpoint cannot be known yet"
            assert all("endpoint" not in labels for labels in counts.examples)
            root.set_attribute("http.route", "/late")
        assert truth.profiler.flush()
        truth.verdict().assert_right()


def test_d5_child_parent_none(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        truth.burn(None)
        for _ in range(3):
            with truth.tracer.start_as_current_span("parent") as parent:
                truth.burn(Label.of(parent))
                with truth.tracer.start_as_current_span("child") as child:
                    truth.burn(Label.of(child, parent))
                truth.burn(Label.of(parent))
            truth.burn(None)
    truth.verdict().assert_right()


def test_d6_span_that_is_not_current_gives_no_label(tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        root = truth.tracer.start_span("root")
        truth.burn(None)
        with truth.tracer.start_as_current_span("other") as other:
            child = truth.tracer.start_span("never current")
            truth.burn(Label.of(other))
            child.end()
        truth.burn(None)
        root.end()
    truth.verdict().assert_right()


def test_d7_thirty_threads_with_5000_spans_each(tmp_path: Path) -> None:
    """Every thread has its own trace and its own functions; no span is ever seen in another's."""
    threads, spans, functions = 30, 5_000, 4
    burn = 10e-6  # seconds of CPU in each span

    def run(index: int) -> None:
        tracer = truth.tracer
        with tracer.start_as_current_span(f"thread {index}") as root:
            units = [truth.function(f"thread{index}", inner=20) for _ in range(functions)]
            labels: list[set[Label]] = [set() for _ in units]
            for turn in range(spans):
                slot = turn % functions
                with tracer.start_as_current_span("span") as span:
                    labels[slot].add(Label.of(span, root))
                    units[slot](burn)
            for unit, allowed in zip(units, labels, strict=True):
                truth.expect(unit, frozenset(allowed))

    with GroundTruth(tmp_path) as truth:
        workers = [threading.Thread(target=run, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    verdict = truth.verdict()
    assert len(verdict.counts) == threads * functions
    verdict.assert_right(min_samples=0, min_total=300)
    seen = {name.split("_")[0] for name, counts in verdict.counts.items() if counts.total}
    assert len(seen) == threads, "every thread was sampled"
