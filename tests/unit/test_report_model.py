# SPDX-License-Identifier: Apache-2.0
"""Joining profiles and spans: what belongs under which span, and what is missing from either."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from otel_proflink.report import CaptureError
from otel_proflink.report.model import (
    Report,
    SpanNode,
    ThreadKey,
    build_report,
    read_report,
    to_document,
)
from otel_proflink.report.pprof_reader import read_profile
from otel_proflink.report.spans_reader import SpanRecord
from tests.support.pprof_schema import ProfileBuilder

MS = 1_000_000
TRACE = "a" * 32
PROCESS = "host-1-100"


def ident(number: int) -> str:
    return f"{number:016x}"


def span(
    number: int,
    parent: int = 0,
    *,
    name: str = "",
    ms: int = 100,
    start: int = 0,
    remote: bool | None = False,
    kind: str = "internal",
    trace: str = TRACE,
    **attributes: str,
) -> SpanRecord:
    return SpanRecord(
        trace_id=trace,
        span_id=ident(number),
        parent_span_id=ident(parent) if parent else "",
        parent_is_remote=remote,
        name=name or f"span {number}",
        kind=kind,
        start_ns=start * MS,
        end_ns=(start + ms) * MS,
        attributes=attributes,
    )


def labels(number: int, root: int = 0, **more: str | int) -> dict[str, str | int]:
    return {
        "trace_id": TRACE,
        "span_id": ident(number),
        "local_root_span_id": ident(root or number),
        "thread_name": "t",
        "thread_id": 1,
        "thread_state": "running",
        **more,
    }


Entry = tuple[Sequence[str], int, int, int, Mapping[str, str | int]]


def join(
    entries: Sequence[Entry] = (), spans: Sequence[SpanRecord] = (), process: str = PROCESS
) -> Report:
    """Entries: functions leaf first, samples, CPU ms, wall ms, labels."""
    return build_report(
        [(process, read_profile(encode(entries)))] if entries else [],
        [(process, spans)] if spans else [],
    )


def encode(entries: Sequence[Entry]) -> bytes:
    builder = ProfileBuilder()
    for functions, count, cpu, wall, more in entries:
        stack = [(function, "app.py", 1) for function in functions]
        builder.sample(stack, (count, cpu * MS, wall * MS), more)
    return builder.encode()


def shape(node: SpanNode) -> Any:
    """A tree as nested tuples of span numbers."""
    return (int(node.span_id, 16), *map(shape, node.children))


def test_totals_of_a_span_and_of_what_is_below() -> None:
    report = join(
        [
            (["price", "handle"], 3, 30, 30, labels(1)),
            (["wait", "handle"], 2, 0, 50, labels(1, thread_state="blocked")),
            (["parse", "work"], 4, 40, 40, labels(2, 1, thread_id=2, thread_name="pool_0")),
            (["parse", "work"], 1, 0, 10, labels(2, 1, thread_id=2, thread_state="gil_wait")),
            (["idle"], 5, 50, 60, {"thread_name": "t", "thread_id": 1, "thread_state": "running"}),
        ],
        [span(1, ms=200), span(2, 1)],
    )
    (root,) = report.roots
    assert shape(root) == (1, (2,))
    assert root.duration_ns == 200 * MS
    assert (root.own.samples, root.own.on_cpu, root.own.cpu_ns) == (5, 3, 30 * MS)
    assert (root.own.wall_ns, root.own.blocked_ns) == (80 * MS, 50 * MS)
    child = root.children[0]
    assert (child.own.samples, child.own.on_cpu, child.own.gil_wait_ns) == (5, 4, 10 * MS)
    assert (root.total.samples, root.total.cpu_ns) == (10, 70 * MS)
    assert (root.total.gil_wait_ns, root.total.wall_ns) == (10 * MS, 130 * MS)
    assert report.traced == root.total
    assert (report.untraced.samples, report.untraced.cpu_ns) == (5, 50 * MS)
    assert report.total.samples == 15
    assert report.on_cpu_share == 7 / 12
    assert [f.function for f in report.untraced_functions] == ["idle"]


def test_threads_of_a_span_across_processes() -> None:
    one = read_profile(encode([(["f"], 1, 10, 10, labels(1))]))
    two = read_profile(encode([(["f"], 1, 10, 10, labels(1)), (["f"], 2, 5, 5, labels(2, 1))]))
    report = build_report([("h-1-1", one), ("h-2-1", two)], [("h-1-1", [span(1), span(2, 1)])])
    (root,) = report.roots
    assert {k: t.cpu_ns for k, t in root.threads.items()} == {
        ThreadKey("h-1-1", 1, "t"): 10 * MS,
        ThreadKey("h-2-1", 1, "t"): 10 * MS,
    }
    assert root.tree_threads[ThreadKey("h-2-1", 1, "t")].cpu_ns == 15 * MS
    assert report.processes == {"h-1-1", "h-2-1"}


def test_functions_self_and_inclusive() -> None:
    report = join(
        [
            (["leaf", "mid", "top"], 1, 10, 10, labels(1)),
            (["mid", "top"], 1, 20, 20, labels(1)),
            (["leaf", "leaf", "top"], 1, 5, 5, labels(1)),  # a recursion counts once
            ([], 1, 1, 1, labels(1)),
        ]
    )
    functions = report.roots[0].functions
    assert [
        (f.function, f.samples, f.self_cpu_ns // MS, f.inclusive_cpu_ns // MS) for f in functions
    ] == [("mid", 2, 20, 30), ("leaf", 2, 15, 15), ("top", 3, 0, 35)]
    assert [f.inclusive_wall_ns // MS for f in functions] == [30, 15, 35]
    assert report.roots[0].tree_functions == functions


def test_the_same_stack_under_two_spans_is_summed_for_their_root() -> None:
    # One interned stack: its weights under either span must not overwrite each other.
    report = join(
        [(["work"], 1, 10, 10, labels(2, 1)), (["work"], 1, 20, 20, labels(3, 1))],
        [span(1), span(2, 1), span(3, 1)],
    )
    (function,) = report.roots[0].tree_functions
    assert function.self_cpu_ns == 30 * MS


def test_slowest_local_roots_first_and_children_by_start() -> None:
    spans = [span(1, ms=10), span(2, ms=30), span(3, 2, start=9), span(4, 2, start=4)]
    report = join([], spans)
    assert [shape(root) for root in report.roots] == [(2, (4,), (3,)), (1,)]
    assert report.on_cpu_share is None
    assert report.profile_files == 0


def test_a_remote_parent_makes_a_local_root_even_in_the_same_directory() -> None:
    spans = [span(1), span(2, 1, remote=True), span(3, 2)]
    assert {shape(root) for root in join([], spans).roots} == {(1,), (2, (3,))}


def test_a_parent_of_unknown_place_is_local_when_the_same_process_wrote_it() -> None:
    above, below = span(1), span(2, 1, remote=None)
    assert shape(join([], [above, below]).roots[0]) == (1, (2,))
    report = build_report([], [("h-1-1", [above]), ("h-2-1", [below])])
    assert {shape(root) for root in report.roots} == {(1,), (2,)}
    assert [shape(root) for root in join([], [below]).roots] == [(2,)]


def test_a_local_root_told_by_samples_wins_over_the_record() -> None:
    # The parent was local but not recording: the first span that is there is the root.
    report = join([(["f"], 1, 1, 1, labels(2))], [span(2, 1, remote=False)])
    assert [shape(root) for root in report.roots] == [(2,)]
    # A remote parent, but baggage told the submitter's root (another process of a pool).
    report = join([(["f"], 1, 1, 1, labels(2, 1))], [span(1), span(2, 9, remote=True)])
    assert [shape(root) for root in report.roots] == [(1, (2,))]


def test_a_span_that_still_ran_gathers_its_children() -> None:
    report = join(
        [(["f"], 1, 10, 10, labels(3, 1))],
        [span(3, 2, ms=5), span(4, 2, ms=5)],  # 2, and its root 1, have not ended
    )
    (root,) = report.roots
    assert shape(root) == (1, (2, (3,), (4,)))
    assert root.record is None
    assert root.duration_ns is None
    assert root.total.cpu_ns == 10 * MS
    assert root.children[0].record is None


def test_samples_of_spans_that_are_not_in_the_directory() -> None:
    report = join(
        [
            (["f"], 2, 20, 900, labels(7, endpoint="/slow", span_type="web")),
            (["g"], 1, 10, 10, labels(8, 7)),
        ],
        [span(1, ms=500)],
    )
    slow, other = report.roots  # at least 900 ms, though nobody knows when it ends
    assert (shape(slow), slow.record, slow.endpoint) == ((7, (8,)), None, "/slow")
    assert slow.children[0].endpoint == "/slow"
    assert shape(other) == (1,)


@pytest.mark.parametrize(
    ("kind", "attributes", "span_type", "endpoint"),
    [
        ("server", {"http.route": "/users/{id}"}, "web", "/users/{id}"),
        ("server", {}, "web", "root"),
        ("server", {"rpc.system": "grpc"}, "rpc", "root"),
        ("consumer", {"messaging.system": "kafka"}, "messaging", "root"),
        ("internal", {"http.route": "/x"}, "internal", ""),
        ("client", {"db.system": "sqlite"}, "db", ""),
    ],
)
def test_endpoint_of_a_root_without_samples(
    kind: str, attributes: dict[str, str], span_type: str, endpoint: str
) -> None:
    report = join([], [span(1, name="root", kind=kind, **attributes), span(2, 1)])
    for node in report.roots[0].walk():
        assert (node.span_type, node.endpoint) == (span_type, endpoint)
        assert node.local_root_span_id == ident(1)


def test_endpoint_comes_late_to_samples_exported_before_their_root_ended() -> None:
    early = read_profile(encode([(["f"], 1, 1, 1, labels(2, 1, span_type="web"))]))
    spans = [span(1, kind="server", name="GET", **{"http.route": "/late"}), span(2, 1)]
    report = build_report([(PROCESS, early)], [(PROCESS, spans)])
    assert [node.endpoint for node in report.roots[0].walk()] == ["/late", "/late"]


def test_the_type_that_samples_carry_wins_over_a_guess() -> None:
    report = join([(["f"], 1, 1, 1, labels(1, span_type="batch"))], [span(1, kind="server")])
    assert (report.roots[0].span_type, report.roots[0].endpoint) == ("batch", "")


def test_the_same_ids_in_another_trace_are_another_span() -> None:
    other = replace(span(1), trace_id="b" * 32)
    report = join([(["f"], 1, 10, 10, labels(1))], [span(1), other])
    assert sorted((r.trace_id[0], r.own.samples) for r in report.roots) == [("a", 1), ("b", 0)]


def test_a_span_written_twice_counts_once() -> None:
    report = join([], [span(1), span(1, ms=999), span(2, 1)])
    assert [shape(root) for root in report.roots] == [(1, (2,))]
    assert report.roots[0].duration_ns == 100 * MS


def test_unknown_is_neither_traced_nor_untraced() -> None:
    unknown = {"link": "unknown", "thread_name": "t", "thread_state": "running"}
    report = join([(["[unreadable]"], 2, 20, 20, unknown), (["f"], 2, 20, 20, labels(1))])
    assert (report.unknown.samples, report.untraced.samples, report.traced.samples) == (2, 0, 2)
    assert report.on_cpu_share == 0.5
    assert report.untraced_functions == []
    assert report.total.cpu_ns == 40 * MS


def test_on_cpu_without_states_is_what_used_cpu() -> None:
    plain = {"span_id": ident(1), "trace_id": TRACE}
    report = join([(["f"], 2, 20, 20, plain), (["g"], 3, 0, 30, plain)])
    assert report.traced.on_cpu == 2


def test_spans_that_are_their_own_ancestors_do_not_vanish() -> None:
    spans = [span(1, 1), span(2, 3), span(3, 2), span(4, 3)]
    report = join([], spans)
    assert sorted(int(n.span_id, 16) for r in report.roots for n in r.walk()) == [1, 2, 3, 4]


def test_any_depth() -> None:
    spans = [span(number, number - 1) for number in range(1, 5_001)]
    random.Random(1).shuffle(spans)
    (root,) = join([(["f"], 1, 1, 1, labels(5_000, 1))], spans).roots
    assert sum(1 for _ in root.walk()) == 5_000
    assert root.total.samples == 1
    document = to_document(build_report([], [(PROCESS, spans)]))
    assert json.loads(json.dumps(document))["local_roots"][0]["spans"][-1]["depth"] == 4_999


def test_two_hundred_thousand_samples_in_seconds() -> None:
    chance = random.Random(1)
    stacks = [[f"f{chance.randrange(400)}" for _ in range(30)] for _ in range(200)]
    numbers = [chance.randrange(1, 2000) for _ in range(20_000)]
    profile = read_profile(
        encode([(chance.choice(stacks), 1, 1, 1, labels(n, n // 10 or 1)) for n in numbers])
    )
    profile.samples.extend(profile.samples * 9)
    started = time.process_time()
    report = build_report([(PROCESS, profile)], [])
    assert report.total.samples == 200_000
    assert report.roots[0].tree_functions
    assert time.process_time() - started < 5  # about 0.3 s here


# --- directories ----------------------------------------------------------------------------------


def otlp(*records: SpanRecord) -> bytes:
    spans = [
        {
            "traceId": r.trace_id,
            "spanId": r.span_id,
            "parentSpanId": r.parent_span_id,
            "flags": 0x101,
            "name": r.name,
            "kind": 2,
            "startTimeUnixNano": str(r.start_ns),
            "endTimeUnixNano": str(r.end_ns),
        }
        for r in records
    ]
    return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]}).encode() + b"\n"


def test_a_directory_of_many_processes(tmp_path: Path) -> None:
    write = lambda name, data: (tmp_path / name).write_bytes(data)  # noqa: E731
    write("profile-web-1-host-10-100-1.pb.gz", encode([(["f"], 1, 10, 10, labels(1))]))
    write("profile-web-1-host-10-100-2.pb.gz", encode([(["f"], 1, 10, 10, labels(1))]))
    write("profile-web-1-host-11-100-1.pb.gz", encode([(["f"], 1, 10, 10, labels(2))]))
    write("spans-web-1-host-10-100-2.json", otlp(span(1)))
    write("spans-web-1-host-11-100-1.json", otlp(span(2)))
    # Nothing of ours, or not ready yet.
    write(".profile-web-1-host-10-100-3.pb.gz.tmp", b"half")
    write("notes.txt", b"x")
    write("profile-old.pb.gz", b"x")
    (tmp_path / "spans-dir-1-2-3.json").mkdir()
    os.mkfifo(tmp_path / "spans-pipe-1-2-3.json")
    report = read_report(tmp_path)
    assert (report.profile_files, report.span_files) == (3, 2)
    assert report.processes == {"web-1-host-10-100", "web-1-host-11-100"}
    assert sorted(root.own.samples for root in report.roots) == [1, 2]
    assert report.errors == []
    newer = read_report(tmp_path, exclude={"profile-web-1-host-10-100-1.pb.gz"})
    assert newer.profile_files == 2


def test_a_bad_file_does_not_hide_the_good_ones(tmp_path: Path) -> None:
    (tmp_path / "profile-h-1-1-1.pb.gz").write_bytes(encode([(["f"], 1, 10, 10, labels(1))]))
    (tmp_path / "profile-h-1-1-2.pb.gz").write_bytes(b"\x1f\x8bjunk")
    (tmp_path / "spans-h-1-1-1.json").write_bytes(otlp(span(1))[:-20])
    heap = ProfileBuilder([("alloc", "bytes")]).encode()
    (tmp_path / "profile-h-1-1-3.pb.gz").write_bytes(heap)
    report = read_report(tmp_path)
    assert (report.profile_files, report.span_files, report.total.samples) == (1, 0, 1)
    assert [Path(error.file).name for error in report.errors] == [
        "profile-h-1-1-2.pb.gz",
        "profile-h-1-1-3.pb.gz",
        "spans-h-1-1-1.json",
    ]


def test_directories_without_a_capture(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no capture in it"):
        read_report(tmp_path)
    with pytest.raises(CaptureError, match="No such file or directory"):
        read_report(tmp_path / "none")
    (tmp_path / "spans-h-1-1-1.json").write_bytes(b"x\n")
    with pytest.raises(CaptureError, match=r"spans-h-1-1-1\.json: line 1"):
        read_report(tmp_path)


def test_the_document() -> None:
    report = join(
        [(["leaf", "top"], 2, 20, 20, labels(2, 1)), (["x"], 1, 1, 1, {"thread_state": "running"})],
        [span(1, kind="server", ms=50), span(2, 1, ms=20), span(3, ms=1)],
    )
    document: Any = json.loads(json.dumps(to_document(report, limit=1)))
    assert document["version"] == 1
    assert document["local_root_count"] == 2
    assert document["on_cpu_share_with_span"] == pytest.approx(2 / 3)
    (root,) = document["local_roots"]
    assert (root["endpoint"], root["span_type"], root["duration_ns"]) == ("span 1", "web", 50 * MS)
    assert root["total"]["cpu_ns"] == 20 * MS
    first, second = root["spans"]
    assert (first["depth"], second["depth"]) == (0, 1)
    assert (second["recorded"], second["own"]["samples"]) == (True, 2)
    assert second["parent_span_id"] == first["span_id"]
    assert [f["function"] for f in second["functions"]] == ["leaf", "top"]
    assert second["threads"] == [
        {
            "process": PROCESS,
            "thread_id": 1,
            "name": "t",
            "samples": 2,
            "on_cpu": 2,
            "cpu_ns": 20 * MS,
            "wall_ns": 20 * MS,
            "gil_wait_ns": 0,
            "blocked_ns": 0,
        }
    ]
