# SPDX-License-Identifier: Apache-2.0
"""The table: what it says, how it fits, and what hostile text cannot do to it."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence

import pytest
from rich.cells import cell_len
from rich.console import Console

from otel_proflink.report import CaptureError
from otel_proflink.report.model import Report, SpanNode, ThreadKey, Totals, build_report
from otel_proflink.report.pprof_reader import Frame, Stack
from otel_proflink.report.spans_reader import SpanRecord
from otel_proflink.report.table import Limits, duration, render, visible

MS = 1_000_000
PROCESS = "host-42-100"


def node(
    name: str | None,
    *children: SpanNode,
    ms: float = 100,
    cpu: int = 0,
    gil: int = 0,
    samples: int = 0,
    functions: Sequence[tuple[str, int]] = (),
    threads: Sequence[str] = (),
    failed: bool = False,
    endpoint: str = "",
    process: str = PROCESS,
) -> SpanNode:
    """A span with what was sampled under it; `functions` with their CPU in ms."""
    number = random.getrandbits(64)
    made = SpanNode("a" * 32, f"{number:016x}", endpoint=endpoint, span_type="web")
    if name is not None:
        made.record = SpanRecord(
            trace_id=made.trace_id,
            span_id=made.span_id,
            parent_span_id="",
            parent_is_remote=None,
            name=name,
            kind="server",
            start_ns=0,
            end_ns=int(ms * MS),
            failed=failed,
            service="shop",
        )
    made.own = Totals(samples=samples, on_cpu=samples, cpu_ns=cpu * MS, gil_wait_ns=gil * MS)
    made.total.add(made.own)
    for child in children:
        made.total.add(child.total)
    made.children = list(children)
    for place, thread in enumerate(threads):
        made.threads[ThreadKey(process, len(thread), thread)] = Totals(cpu_ns=MS * (99 - place))
    for function, weight in functions:
        made.stacks[Stack((Frame(function, "app.py", 1),))] = [1, weight * MS, weight * MS]
    return made


def report_of(*roots: SpanNode) -> Report:
    report = Report(roots=list(roots), profile_files=1, span_files=1, processes={PROCESS})
    for root in roots:
        report.traced.add(root.total)
    return report


def draw(
    report: Report,
    width: int = 100,
    limits: Limits | None = None,
    *,
    encoding: str = "utf-8",
    color: bool = False,
) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    console = Console(
        file=file,
        width=width,
        markup=False,
        emoji=False,
        highlight=False,
        force_terminal=color,
        color_system="standard" if color else None,
    )
    console.print(render(report, console, limits))
    file.flush()
    return raw.getvalue().decode(encoding)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines()]


def shop() -> Report:
    rules = node("match rules", ms=207, cpu=67, gil=126, samples=20, threads=["pool_1"])
    report = report_of(
        node(
            "POST /checkout",
            node("reserve stock", ms=30, cpu=30, samples=3, functions=[("reserve_stock", 30)]),
            node(
                "price basket",
                rules,
                ms=695,
                cpu=280,
                samples=251,
                functions=[("price_basket", 235), ("convert_currency", 45)],
                threads=["pool_0", "pool_1", "pool_2", "main"],
            ),
            ms=968,
            cpu=14,
            gil=39,
            samples=6,
            functions=[("check_credentials", 14)],
            threads=["main"],
        )
    )
    report.untraced = Totals(samples=10, on_cpu=8, cpu_ns=80 * MS)
    report.untraced_stacks = {Stack((Frame("refresh", "app.py", 1),)): [10, 80 * MS, 80 * MS]}
    report.untraced_threads = {ThreadKey(PROCESS, 9, "rates"): Totals(cpu_ns=80 * MS)}
    return report


SHOP = """\
Span                                 Duration       CPU  GIL wait  Samples  Top functions
────────────────────────────────────────────────────────────────────────────────────────────────────
1  POST /checkout                      968 ms    391 ms    165 ms      280   73% price_basket
   web · shop                                                                14% convert_currency
   pool_* ×3, main                                                            9% reserve_stock
   aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
   ├─ itself                                –   14.0 ms   39.0 ms        6  100% check_credentials
   │  main
   ├─ reserve stock                   30.0 ms   30.0 ms         –        3  100% reserve_stock
   └─ price basket                     695 ms    280 ms         –      251   84% price_basket
      │  pool_* ×3, main                                                     16% convert_currency
      └─ match rules                   207 ms   67.0 ms    126 ms       20
         pool_1

   No span                                  –   80.0 ms         –       10  100% refresh
   rates

Read 1 profile and 1 span file of 1 process · 1 of 1 local root shown
290 samples · 97.2 % of 288 on a CPU have a span
CPU 471 ms: 391 ms in spans, 80.0 ms untraced · GIL wait 165 ms
"""


def test_the_whole_table() -> None:
    assert lines(draw(shop())) == SHOP.splitlines()


@pytest.mark.parametrize("width", [72, 80, 95, 96, 100, 140, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    report = shop()
    report.roots.append(
        node(
            "名前" * 60,
            node("x" * 500, functions=[("名" * 99, 5), ("a.b." * 99 + "c", 4)], threads=["t" * 99]),
            node("y" * 500, ms=1e13, cpu=10**13, samples=10**15, failed=True),
            node(None, endpoint="/" * 300),
            ms=1e12,
            samples=10**9,
            cpu=1,
        )
    )
    drawn = lines(draw(report, width))
    assert max(cell_len(line) for line in drawn) <= width
    # A row that wraps would begin a line with the rest of a text.
    assert [line.strip(" │├└─")[:2] for line in drawn].count("xx") == 1


def test_a_terminal_too_narrow_for_it_does_not_fail() -> None:
    assert draw(shop(), 20)


def test_an_encoding_without_lines_and_dots() -> None:
    text = draw(shop(), 80, encoding="ascii")
    text.encode("ascii")
    assert "|- itself" in text
    assert "`- price basket" in text
    assert "pool_* x3" in text
    assert "\\u" not in text


@pytest.mark.parametrize("place", ["span", "function", "thread", "service", "error", "endpoint"])
def test_text_of_a_capture_is_shown_and_obeyed_by_nobody(place: str) -> None:
    evil = "[red]a[/red]:bomb:\x1b[2J\r\n\u202eb\x00"
    root = node(
        evil if place == "span" else "root",
        node(None, endpoint=evil if place == "endpoint" else "", samples=1),
        functions=[(evil if place == "function" else "f", 10)],
        threads=[evil if place == "thread" else "t"],
        samples=1,
        cpu=10,
    )
    report = report_of(root)
    if place == "service" and root.record is not None:
        root.span_type = evil
    if place == "error":
        report.errors.append(CaptureError(f"captures/{evil}", "no"))
    text = draw(report, 200)
    assert "[red]a[/red]:bomb:\\x1b" in text
    assert not set("\x1b\r\x00\u202e") & set(text)


def test_visible() -> None:
    assert visible("Größe 名前 🦜 e\u0301") == "Größe 名前 🦜 e\u0301"
    assert visible("a\tb\u2028\ud800\u200b") == "a\\tb\\u2028\\ud800\\u200b"


def test_a_heap_of_combining_characters_stays_in_its_cell() -> None:
    assert len(draw(report_of(node("a" + "\u0301" * 100_000)))) < 3000


def test_colours_stand_on_the_right_parts() -> None:
    text = draw(shop(), color=True)
    assert "\x1b[1mPOST /checkout\x1b[0m" in text  # bold, and not grey as the number before it
    assert "\x1b[90m 73% \x1b[0mprice_basket" in text
    assert "\x1b[32m  391 ms\x1b[0m" in text


def test_limits() -> None:
    roots = [node(f"root {n}", *(node(f"child {m}", cpu=m) for m in range(9))) for n in range(9)]
    for root in roots:
        root.stacks = {Stack((Frame(f"f{n}", "a.py", 1),)): [1, 9 - n, 9 - n] for n in range(9)}
    report = report_of(*roots)

    few = draw(report, limits=Limits(roots=2, children=3, functions=1))
    assert "root 1" in few
    assert "root 2" not in few
    assert "2 of 9 local roots shown" in few
    assert "child 6" in few  # those with the most CPU ...
    assert few.index("child 7") < few.index("child 8")  # ... in the order in which they began
    assert "child 5" not in few
    assert "… 6 more spans" in few
    assert "f1" not in few

    everything = draw(report, limits=Limits(0, 0, 0))
    assert everything.count("child 0") == 9
    assert "more span" not in everything
    assert "root 8" in everything
    assert "f8" in everything


def test_siblings_of_one_name_share_a_row_unless_asked_for() -> None:
    twins = [
        node("parse", node("verify", ms=5), ms=10 * n, cpu=n, samples=n, threads=["pool_1"])
        for n in (1, 2, 3)
    ]
    report = report_of(node("batch", *twins, node("end")))
    together = draw(report)
    (row,) = [line for line in together.splitlines() if "parse" in line]
    assert "parse ×3" in row
    assert row.split()[3:] == ["30.0", "ms", "6.00", "ms", "–", "6"]
    assert "verify ×3" in together
    each = draw(report, limits=Limits(each=True))
    assert each.count("─ parse ") == each.count("─ verify ") == 3
    assert "×" not in each


def test_a_failed_span_is_marked() -> None:
    text = draw(report_of(node("good"), node("bad" + "x" * 90, failed=True)))
    assert [line.split()[2] for line in lines(text) if "bad" in line] == ["!"]
    assert "good !" not in text


def test_spans_without_a_record_say_so() -> None:
    lost = node(None, samples=3, cpu=30, endpoint="/slow")
    text = draw(report_of(node("root", lost, node(None), node(None)), node(None, samples=1)))
    assert "(not recorded) ×3" in text
    assert f"{text.split('2  ')[1].split()[0]} (not recorded)" in text
    assert "not sampled by the tracer, or still running" in text
    assert "not recorded" not in draw(shop())


def test_a_span_that_only_waited_shows_where() -> None:
    waiting = node("wait", samples=5, threads=["main"])
    waiting.threads = {ThreadKey(PROCESS, 1, "main"): Totals(wall_ns=5, blocked_ns=5)}
    waiting.stacks = {Stack((Frame("Condition.wait", "threading.py", 1),)): [5, 0, 5]}
    text = draw(report_of(waiting))
    assert "main (waited)" in text
    assert "100% Condition.wait" in text


def test_threads_of_several_processes_tell_the_process() -> None:
    one = node("root", threads=["main"])
    one.threads[ThreadKey("host-43-100", 0, "main")] = Totals(cpu_ns=MS)
    report = report_of(one)
    report.processes = {PROCESS, "host-43-100"}
    assert "main @42, main @43" in draw(report, 140)
    assert "of 2 processes" in draw(report)


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        ("short", "short"),
        ("Basket.price", "Basket.price"),
        ("handle.<locals>.price", "handle.price"),
        ("a_rather_long_class_name.Inner.method", "…Inner.method"),
        ("a_rather_long_class_name.Inner.<lambda>", "…Inner.<lambda>"),
        ("a_rather_long_function_name.<lambda>", "a_rather_long_func…"),
        ("render.<locals>.<genexpr>", "render.<genexpr>"),
        ("a_function_with_a_very_long_name", "a_function_with_a_…"),
        ("x." * 40 + "run", "…x.x.x.x.x.x.x.run"),
    ],
)
def test_long_function_names_keep_what_says_most(function: str, shown: str) -> None:
    text = draw(report_of(node("r", functions=[(function, 10)], cpu=10, samples=1)))
    assert f"100% {shown}" in [line[76:] for line in lines(text)]


def test_an_empty_report() -> None:
    text = draw(build_report([], []))
    assert "Span" not in text
    assert "0 samples" in text


def test_a_very_deep_tree_keeps_its_names_readable() -> None:
    deep = node("bottom")
    for _ in range(2000):
        deep = node("level", deep)
    text = draw(report_of(deep), 80)
    assert text.count("└─ level") == 1999
    assert "└─ bottom" in text


def test_unknown_stands_in_the_footer() -> None:
    report = shop()
    assert "unknown" not in draw(report)
    report.unknown = Totals(samples=3, on_cpu=3, cpu_ns=7 * MS)
    assert "80.0 ms untraced, 7.00 ms unknown" in draw(report)


def test_a_loss_is_never_rounded_away() -> None:
    report = report_of(node("r", samples=100_000, cpu=1))
    assert "100 % of 100,000" in draw(report)
    report.untraced = Totals(samples=1, on_cpu=1)
    assert "99.9 % of 100,001" in draw(report)


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0 µs"),
        (999, "1.00 µs"),
        (1_500, "1.50 µs"),
        (99_949, "99.9 µs"),
        (999_400, "999 µs"),
        (999_600, "1.00 ms"),
        (9_994_000, "9.99 ms"),
        (9_996_000, "10.0 ms"),
        (99_960_000, "100 ms"),
        (999_400_000, "999 ms"),
        (999_600_000, "1.00 s"),
        (59_940_000_000, "59.9 s"),
        (99_960_000_000, "1m 40s"),
        (119_600_000_000, "2m 00s"),
        (3_599_900_000_000, "1h 00m"),
        (90_000_000_000_000, "25h 00m"),
    ],
)
def test_durations_for_people(nanoseconds: int, text: str) -> None:
    assert duration(nanoseconds) == text
