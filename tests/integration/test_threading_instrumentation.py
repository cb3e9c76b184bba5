# SPDX-License-Identifier: Apache-2.0
"""Beside `opentelemetry-instrumentation-threading`, whichever of the two comes first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.context import Context, get_current

from otel_proflink._linker import Link, current_link
from otel_proflink.instrumentation import thread_pool
from tests.support.ground_truth import GroundTruth, Label, attached, linking, remote_context
from tests.support.processes import run_app

threading_instrumentation = pytest.importorskip("opentelemetry.instrumentation.threading")

ORDERS = ["ours first", "theirs first"]


@pytest.fixture(params=ORDERS)
def both(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Both at work; yields the function that switches ours on, for the harness to call."""
    theirs = threading_instrumentation.ThreadingInstrumentor()
    if request.param == "theirs first":
        theirs.instrument()
        yield lambda: None
    else:
        yield theirs.instrument
    if theirs.is_instrumented_by_opentelemetry:
        theirs.uninstrument()


def test_labels(both: Any, tmp_path: Path) -> None:
    with GroundTruth(tmp_path) as truth:
        both()
        with ThreadPoolExecutor(1) as pool:
            with truth.tracer.start_as_current_span("first") as first:
                pool.submit(truth.unit(Label.of(first))).result()
            # The worker's thread was started under `first`, and keeps that for life.
            pool.submit(truth.unit(None)).result()
            with truth.tracer.start_as_current_span("second") as second:
                future = pool.submit(truth.unit(Label.of(second)))
                after = truth.unit(None)
                future.add_done_callback(lambda _future: after())
                future.result()
            pool.submit(truth.unit(None)).result()
    truth.verdict().assert_right()


def test_idle_workers_carry_no_label(both: Any, tmp_path: Path) -> None:
    """Off CPU, too: a worker that waits for its next task works for nobody."""
    with GroundTruth(tmp_path) as truth:
        both()
        with ThreadPoolExecutor(2, thread_name_prefix="idler") as pool:
            with truth.tracer.start_as_current_span("first"):
                list(pool.map(lambda _: truth.burn(None, 0), range(4)))
            truth.burn(None, 0.1)
    idle = [
        sample
        for sample in truth.samples()
        if sample.labels.get("thread_name", "").startswith("idler")
        and not any(name.startswith("burn_") for name in sample.functions)
        and sample.values["wall"] > 0
    ]
    assert sum(sample.values["wall"] for sample in idle) > 100_000_000
    blocked = [s for s in idle if s.labels.get("thread_state") == "blocked"]
    assert blocked
    labelled = sum(s.values["wall"] for s in blocked if "trace_id" in s.labels)
    assert labelled <= 0.005 * sum(s.values["wall"] for s in blocked)


def test_base_context_of_a_worker_is_clean(both: Any) -> None:
    def look() -> tuple[Context, Link | None, Any]:
        return get_current(), current_link(), trace.get_current_span()

    with linking(), ThreadPoolExecutor(1) as pool:
        both()
        with attached(remote_context(1, 2)):
            _, link, span = pool.submit(look).result()
            assert link is not None
            assert span.get_span_context().span_id == 2
        assert pool.submit(look).result() == (Context(), None, trace.INVALID_SPAN)


def test_a_root_known_by_its_record_only_survives_a_nested_submit(both: Any) -> None:
    """Neither attach of the other instrumentation's may lose it."""

    def nested(pool: ThreadPoolExecutor) -> Link | None:
        link: Link | None = pool.submit(current_link).result()
        return link

    with linking() as provider, ThreadPoolExecutor(2) as pool:
        both()
        tracer = provider.get_tracer("test")
        with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
            own = root.get_span_context()
            # A span of the trace that no processor saw: sampled out, or of another provider.
            dark = trace.NonRecordingSpan(trace.SpanContext(own.trace_id, 0xD, is_remote=False))
            with trace.use_span(dark):
                link = pool.submit(nested, pool).result()
    assert link is not None
    assert (link.span_id, link.local_root_span_id, link.span_type) == (0xD, own.span_id, "web")


@pytest.mark.parametrize(
    "order",
    [
        order
        for order in itertools.permutations(["+ours", "+theirs", "-ours", "-theirs"])
        if order.index("+ours") < order.index("-ours")
        and order.index("+theirs") < order.index("-theirs")
    ],
    ids=" ".join,
)
def test_each_leaves_without_the_other(order: tuple[str, ...]) -> None:
    theirs = threading_instrumentation.ThreadingInstrumentor()
    stock = vars(ThreadPoolExecutor)["submit"]
    steps = {
        "+ours": thread_pool.instrument,
        "-ours": thread_pool.uninstrument,
        "+theirs": theirs.instrument,
        "-theirs": theirs.uninstrument,
    }

    def propagated() -> bool:
        with attached(remote_context(1, 2)), ThreadPoolExecutor(1) as pool:
            return pool.submit(current_link).result() is not None

    on = set()
    with linking(pool=False):
        for step in order:
            steps[step]()
            (on.add if step[0] == "+" else on.discard)(step[1:])
            assert propagated() == bool(on), step
    assert vars(ThreadPoolExecutor)["submit"] is stock


APP = """
from opentelemetry.baggage.propagation import W3CBaggagePropagator


def outgoing():
    carrier = {}
    W3CBaggagePropagator().inject(carrier)
    return carrier


def with_child(root):
    with tracer.start_as_current_span("child") as child:
        unit("child", child, root, "web")()


with ThreadPoolExecutor(1) as pool:
    with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
        pool.submit(unit("first", root, None, "web")).result()
        header = pool.submit(outgoing).result()
        pool.submit(with_child, root).result()
        thread = threading.Thread(target=unit("thread", root, None, "web"))
        thread.start()
        thread.join()
    pool.submit(unit("untraced", None)).result()
report(header=header)
"""


def test_zero_code_with_both(tmp_path: Path) -> None:
    run = run_app(tmp_path, APP, zero_code=True)
    run.assert_clean()
    run.verdict().assert_right()
    assert run.told["header"] == {}
