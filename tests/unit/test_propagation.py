# SPDX-License-Identifier: Apache-2.0
"""Corners of the propagation record that section A of the acceptance tests does not name."""

from __future__ import annotations

import pytest
from opentelemetry import baggage, trace
from opentelemetry.context import Context, get_current, set_value

from otel_proflink._linker import (
    PropagatedCall,
    current_link,
    link_for_context,
    new_link,
    propagated,
)
from otel_proflink.instrumentation.propagation import (
    LOCAL_ROOT_KEY,
    SPAN_TYPE_KEY,
    entries_of,
    extract,
    inject,
)
from tests.support.ground_truth import attached, linking, remote_context

TRACE = 0xA1
SPAN = 0xB2


def test_a_local_span_brings_its_own_root_and_type() -> None:
    with linking(pool=False) as provider:
        tracer = provider.get_tracer("test")
        with (
            tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root,
            tracer.start_as_current_span("mid"),
            tracer.start_as_current_span("leaf") as leaf,
        ):
            copy = inject(get_current())
            assert dict(baggage.get_all(copy)) == {
                LOCAL_ROOT_KEY: f"{root.get_span_context().span_id:016x}",
                SPAN_TYPE_KEY: "web",
            }
            assert trace.get_current_span(copy) is leaf


def test_a_record_that_is_there_already_is_replaced() -> None:
    """What came in from outside says nothing about a span of ours."""
    with (
        linking(pool=False) as provider,
        provider.get_tracer("test").start_as_current_span("root") as root,
    ):
        context = baggage.set_baggage(LOCAL_ROOT_KEY, f"{0xBAD:016x}")
        copy = inject(baggage.set_baggage(SPAN_TYPE_KEY, "forged", context))
        root_id = root.get_span_context().span_id
        assert baggage.get_baggage(LOCAL_ROOT_KEY, copy) == f"{root_id:016x}"
        assert baggage.get_baggage(SPAN_TYPE_KEY, copy) == "internal"


@pytest.mark.parametrize(
    "root", ["", "63", "0" * 16, "x" * 16, "0" * 17, None, 99], ids=lambda root: f"root={root!r}"
)
def test_a_record_that_cannot_be_read_is_dropped(root: object) -> None:
    context = baggage.set_baggage(LOCAL_ROOT_KEY, root, remote_context(TRACE, SPAN))
    clean, link = extract(context)
    assert link == new_link(TRACE, SPAN, 1, SPAN, "")
    assert dict(baggage.get_all(clean)) == {}


def test_a_span_type_alone_is_dropped() -> None:
    context = baggage.set_baggage(SPAN_TYPE_KEY, "web", remote_context(TRACE, SPAN))
    clean, link = extract(context)
    assert link == new_link(TRACE, SPAN, 1, SPAN, "")
    assert dict(baggage.get_all(clean)) == {}
    with linking(pool=False):
        seen = PropagatedCall(lambda: dict(baggage.get_all()), inject(context))()
    assert seen == {}


def test_other_baggage_survives_the_round_trip() -> None:
    context = baggage.set_baggage("tenant", "acme", remote_context(TRACE, SPAN))
    clean, _ = extract(inject(context))
    assert clean == context
    assert clean is not context


def test_a_context_without_baggage_has_none_afterwards() -> None:
    context = set_value("mine", 1, remote_context(TRACE, SPAN))
    clean, _ = extract(inject(context))
    assert clean == context


def test_extract_leaves_a_context_without_record_alone() -> None:
    context = baggage.set_baggage("tenant", "acme", remote_context(TRACE, SPAN))
    assert extract(context)[0] is context


def test_propagated_knows_a_root_whose_record_is_gone() -> None:
    """A task's task: the entries were removed in the first worker, the link was not."""
    context = baggage.set_baggage(LOCAL_ROOT_KEY, f"{789:016x}", remote_context(TRACE, SPAN))
    context = baggage.set_baggage(SPAN_TYPE_KEY, "web", context)
    with linking(pool=False):
        copy = PropagatedCall(lambda: propagated(print).context, context)()
    assert dict(baggage.get_all(copy)) == {LOCAL_ROOT_KEY: f"{789:016x}", SPAN_TYPE_KEY: "web"}


def test_propagated_without_the_context_hook() -> None:
    with attached(remote_context(TRACE, SPAN)):
        assert current_link() is None
        copy = propagated(print).context
    assert baggage.get_baggage(LOCAL_ROOT_KEY, copy) == f"{SPAN:016x}"


@pytest.mark.parametrize("entries", [{}, {"tenant": "acme"}])
@pytest.mark.parametrize("span", [True, False])
def test_propagated_carries_what_inject_does(entries: dict[str, str], span: bool) -> None:
    context = remote_context(TRACE, SPAN) if span else Context({"other": 1})
    for name, value in entries.items():
        context = baggage.set_baggage(name, value, context)
    before = dict(context)
    with linking(pool=False), attached(context):
        copy = propagated(print).context
    assert copy == inject(context)
    assert copy is not context
    assert dict(context) == before


def test_entries_of_different_links_are_not_mixed_up() -> None:
    first, second = new_link(1, 2, 1, 3, "web"), new_link(1, 2, 1, 4, "")
    for _ in range(3):
        assert entries_of(first) == {LOCAL_ROOT_KEY: f"{3:016x}", SPAN_TYPE_KEY: "web"}
        assert entries_of(second) == {LOCAL_ROOT_KEY: f"{4:016x}"}


def test_link_for_context_and_extract_agree() -> None:
    context = baggage.set_baggage(LOCAL_ROOT_KEY, f"{789:016x}", remote_context(TRACE, SPAN))
    assert extract(context)[1] == link_for_context(context)
    assert inject(Context()) == Context()
