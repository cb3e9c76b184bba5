# SPDX-License-Identifier: Apache-2.0
"""Section A: the propagation record, the values carried in the copied OTel Context."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry import baggage
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.context import Context, set_value
from opentelemetry.trace import INVALID_SPAN, set_span_in_context

from otel_proflink._linker import Link, PropagatedCall, current_link, new_link
from otel_proflink.instrumentation.propagation import (
    LOCAL_ROOT_KEY,
    SPAN_TYPE_KEY,
    entries_of,
    extract,
    inject,
)
from tests.support.ground_truth import linking, remote_context

TRACE = 0x0102030405060708090A0B0C0D0E0F10
SPAN = 456


def with_record(context: Context, root: str, span_type: str | None = None) -> Context:
    context = baggage.set_baggage(LOCAL_ROOT_KEY, root, context)
    return context if span_type is None else baggage.set_baggage(SPAN_TYPE_KEY, span_type, context)


def in_worker(context: Context) -> Link | None:
    """What the native side holds while a task runs that was handed `context`."""
    link: Link | None = PropagatedCall(current_link, context)()
    return link


def test_a1_span_without_root_information_is_its_own_root() -> None:
    copy = inject(remote_context(TRACE, SPAN))
    assert dict(baggage.get_all(copy)) == {LOCAL_ROOT_KEY: f"{SPAN:016x}"}

    _, link = extract(remote_context(TRACE, SPAN))
    assert link == new_link(TRACE, SPAN, 1, SPAN, "")
    with linking(pool=False):
        assert in_worker(copy) == link


@pytest.mark.parametrize("read", ["extract", "native"])
def test_a2_root_and_type_are_exactly_those_of_the_record(read: str) -> None:
    context = with_record(remote_context(TRACE, SPAN), f"{789:016x}", "web")
    with linking(pool=False):
        link = extract(context)[1] if read == "extract" else in_worker(context)
    assert link is not None
    assert (link.trace_id, link.span_id, link.trace_flags) == (TRACE, SPAN, 1)
    assert (link.local_root_span_id, link.span_type) == (789, "web")


def test_a3_adding_the_record_copies() -> None:
    context = remote_context(TRACE, SPAN)
    context = set_value("mine", ["kept"], baggage.set_baggage("tenant", "acme", context))
    before = dict(context)
    bag_before = dict(baggage.get_all(context))

    copy = inject(context)

    assert copy is not context
    assert type(copy) is Context
    assert dict(context) == before
    assert dict(baggage.get_all(context)) == bag_before == {"tenant": "acme"}
    assert copy["mine"] is context["mine"]
    assert baggage.get_baggage("tenant", copy) == "acme"
    assert baggage.get_baggage(LOCAL_ROOT_KEY, copy) == f"{SPAN:016x}"

    clean, _ = extract(copy)
    assert dict(clean) == before
    assert baggage.get_baggage(LOCAL_ROOT_KEY, copy) is not None, "extract copies, too"


def test_a4_text_form() -> None:
    assert entries_of(new_link(TRACE, SPAN, 1, 99, "")) == {LOCAL_ROOT_KEY: "0000000000000063"}
    highest = new_link(TRACE, SPAN, 1, 0xFEDCBA9876543210, "web")
    assert entries_of(highest) == {LOCAL_ROOT_KEY: "fedcba9876543210", SPAN_TYPE_KEY: "web"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a5_pickle_round_trip(protocol: int) -> None:
    link = new_link(TRACE, SPAN, 1, 99, "web")
    entries, again = pickle.loads(pickle.dumps((entries_of(link), link), protocol))
    assert entries == entries_of(link)
    assert again == link
    assert hash(again) == hash(link)


def test_a5_pickle_round_trip_to_another_process() -> None:
    """The API's own keys differ there; the record's names must not."""
    context = inject(with_record(remote_context(TRACE, SPAN), f"{789:016x}", "web"))
    record = pickle.dumps(dict(baggage.get_all(context)))
    program = f"""
import pickle
from opentelemetry import baggage
from otel_proflink.instrumentation.propagation import extract
from tests.support.ground_truth import remote_context
context = remote_context({TRACE}, {SPAN})
for name, value in pickle.loads({record!r}).items():
    context = baggage.set_baggage(name, value, context)
link = extract(context)[1]
print(link.local_root_span_id, link.span_type, dict(baggage.get_all(extract(context)[0])))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.strip() == "789 web {}"


def test_a5_text_round_trip() -> None:
    """Through a baggage header; a span type may be any text."""
    for span_type in ("web", "Größe, 100 % = ;", ""):
        link = new_link(TRACE, SPAN, 1, 0xAB, span_type)
        context = Context()
        for name, value in entries_of(link).items():
            context = baggage.set_baggage(name, value, context)
        carrier: dict[str, str] = {}
        W3CBaggagePropagator().inject(carrier, context)
        received = W3CBaggagePropagator().extract(carrier, remote_context(TRACE, SPAN))
        assert extract(received)[1] == link


@pytest.mark.parametrize(
    "context",
    [
        Context(),
        remote_context(TRACE, 0),
        remote_context(0, SPAN),
        set_span_in_context(INVALID_SPAN, Context()),
        set_value("current-span", "not a span", Context()),
    ],
    ids=["empty", "no span id", "no trace id", "invalid span", "foreign key"],
)
def test_a6_no_valid_span_no_link(context: Context) -> None:
    copy = inject(context)
    assert dict(baggage.get_all(copy)) == {}
    assert extract(context)[1] is None

    stale = with_record(context, f"{789:016x}", "web")
    assert dict(baggage.get_all(inject(stale))) == {}
    with linking(pool=False):
        assert in_worker(stale) is None
