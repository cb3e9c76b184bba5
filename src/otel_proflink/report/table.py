# SPDX-License-Identifier: Apache-2.0
"""A report as a terminal table: the slowest local roots, and below each of them its spans.

All text that comes from a capture is shown as text: no markup, no control characters, cut to its
column. Columns are sized here and not by rich, so that nothing wraps at any width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich.box import Box
from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .model import FunctionTotals, Report, SpanNode, ThreadKey, Totals, sum_functions, sum_threads

__all__ = ["Limits", "duration", "render", "visible"]

DEFAULT_ROOTS: Final = 5
DEFAULT_CHILDREN: Final = 6
DEFAULT_FUNCTIONS: Final = 3

_WIDE: Final = 96  # from here on, columns stand two apart
_NARROWEST: Final = 72
_LEAST_NAME: Final = 12  # columns that indentation leaves to the name of the deepest span
# Functions below this share of a span are noise: at 100 Hz one sample of half a second is 2 %.
_LEAST_SHARE: Final = 0.02

# A rule below the headings, nothing else.
_BOX: Final = Box("    \n    \n ── \n    \n    \n    \n    \n    \n")
_ASCII_BOX: Final = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)

_CHARACTERS_PER_COLUMN: Final = 4
_LAST_NUMBER: Final = re.compile(r"[0-9]+(?=[^0-9]*$)")

_NOT_RECORDED: Final = "(not recorded)"

_HEAD: Final = "bold"
_QUIET: Final = "bright_black"
_CPU: Final = "green"
_WAIT: Final = "yellow"
_BAD: Final = "red"


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is shown; 0 means all.

    Attributes:
        roots: local roots, the slowest.
        children: spans below one span, those with the most CPU time.
        functions: functions of one span, those with the most CPU time of their own.
        each: whether siblings of the same name stand in rows of their own.
    """

    roots: int = DEFAULT_ROOTS
    children: int = DEFAULT_CHILDREN
    functions: int = DEFAULT_FUNCTIONS
    each: bool = False


def render(report: Report, console: Console, limits: Limits | None = None) -> RenderableType:
    """The table and its footer, made for the width and the encoding of `console`."""
    return _Renderer(report, console, limits or Limits()).render()


def duration(nanoseconds: int, micro: str = "µ") -> str:
    """Nanoseconds for people: three digits and a unit."""
    for unit, size in (("s", 1e9), ("ms", 1e6), (f"{micro}s", 1e3)):
        value = nanoseconds / size
        # 999.5 ms would be shown as 1000 ms
        if abs(value) >= 0.9995 or unit[0] == micro:
            break
    if unit == "s" and value >= 99.95:
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s"
    digits = 0 if nanoseconds == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


@dataclass(frozen=True, slots=True)
class _Glyphs:
    branch: str = "├─ "
    last: str = "└─ "
    pipe: str = "│  "
    blank: str = "   "
    dot: str = " · "
    more: str = "…"
    times: str = "×"
    none: str = "–"
    micro: str = "µ"


_UNICODE: Final = _Glyphs()
_ASCII: Final = _Glyphs("|- ", "`- ", "|  ", "   ", " - ", "...", "x", "-", "u")


@dataclass(frozen=True, slots=True)
class _Row:
    """Spans that one row stands for: one, or siblings of the same name."""

    nodes: Sequence[SpanNode]
    kind: Literal["spans", "own", "rest"] = "spans"

    @property
    def children(self) -> list[SpanNode]:
        return [child for node in self.nodes for child in node.children]

    @property
    def duration_ns(self) -> int | None:
        """The longest."""
        return max((node.duration_ns or 0 for node in self.nodes), default=None)

    @property
    def own(self) -> Totals:
        return _sum(node.own for node in self.nodes)

    @property
    def total(self) -> Totals:
        return _sum(node.total for node in self.nodes)

    @property
    def threads(self) -> dict[ThreadKey, Totals]:
        return sum_threads(node.threads for node in self.nodes)

    @property
    def functions(self) -> list[FunctionTotals]:
        return sum_functions(node.stacks for node in self.nodes)


class _Renderer:
    def __init__(self, report: Report, console: Console, limits: Limits) -> None:
        self._report = report
        self._limits = limits
        ascii_only = not console.encoding.lower().startswith("utf")
        self._glyphs = _ASCII if ascii_only else _UNICODE
        self._box = _ASCII_BOX if ascii_only else _BOX
        width = max(console.width, _NARROWEST)
        self._gap = 2 if width >= _WIDE else 1
        self._numbers = (8, 8, 8, 7) if width >= _WIDE else (7, 7, 7, 7)
        room = width - sum(self._numbers) - self._gap * (len(self._numbers) + 1)
        self._span_width = round(room * (0.6 if width >= _WIDE else 0.56))
        self._function_width = room - self._span_width
        self._deepest = (self._span_width - _LEAST_NAME) // len(self._glyphs.pipe) - 1

    def render(self) -> RenderableType:
        report = self._report
        shown = report.roots[: self._limits.roots or None]
        parts: list[RenderableType] = []
        if shown or report.untraced.samples:
            parts += [self._table(shown), Text()]
        parts.append(self._footer(len(shown)))
        return Group(*parts)

    def _table(self, roots: Sequence[SpanNode]) -> Table:
        table = Table(
            box=self._box,
            show_edge=False,
            pad_edge=False,
            padding=(0, self._gap - 1, 0, 0),
            header_style=_HEAD,
        )
        table.add_column("Span", width=self._span_width, no_wrap=True)
        names = ("Duration", "CPU", "GIL wait", "Samples")
        short = ("Time", "CPU", "GIL", "Samples")
        for name, brief, width in zip(names, short, self._numbers, strict=True):
            heading = name if len(name) <= width else brief
            table.add_column(heading, width=width, no_wrap=True, justify="right")
        table.add_column("Top functions", width=self._function_width, no_wrap=True)
        for number, root in enumerate(roots, start=1):
            if number > 1:
                table.add_row()
            self._root(table, number, root)
        if self._report.untraced.samples:
            if roots:
                table.add_row()
            self._untraced(table)
        return table

    # --- rows ------------------------------------------------------------------------------------

    def _root(self, table: Table, number: int, root: SpanNode) -> None:
        place = f"{number}  "
        indent = " " * len(place)
        title = Text().append(place, _QUIET).append_text(self._name([root], len(place), _HEAD))
        service = root.record.service if root.record else ""
        about = self._glyphs.dot.join(filter(None, (root.span_type, service)))
        threads = self._threads(root.tree_threads, len(indent))
        lines = [title]
        room = self._span_width - len(indent)
        for text in (self._cut(about, room), threads, self._cut(root.trace_id, room)):
            if text:
                lines.append(self._quiet(indent, text))
        self._add(table, lines, root.duration_ns, root.total, root.tree_functions)
        if root.children:
            self._below(table, root, indent)

    def _below(self, table: Table, root: SpanNode, indent: str) -> None:
        # A stack of iterators and no recursion: a broken or hostile capture nests without end.
        own = [_Row([root], "own")] if root.own.samples else []
        levels = [(indent, iter(own + self._rows(root.children)))]
        pending = [next(levels[0][1], None)]  # one row ahead on each level: is it the last?
        while levels:
            prefix, rows = levels[-1]
            row = pending[-1]
            if row is None:
                levels.pop()
                pending.pop()
                continue
            pending[-1] = next(rows, None)
            last = pending[-1] is None
            head = prefix + (self._glyphs.last if last else self._glyphs.branch)
            rest = prefix + (self._glyphs.blank if last else self._glyphs.pipe)
            below = self._rows(row.children) if row.kind == "spans" else []
            self._spans(table, row, head, rest + (self._glyphs.pipe if below else ""))
            if below:
                levels.append((rest if len(levels) < self._deepest else prefix, iter(below)))
                pending.append(next(levels[-1][1]))

    def _rows(self, children: Sequence[SpanNode]) -> list[_Row]:
        """What stands below a span."""
        groups: dict[object, list[SpanNode]] = {}
        for child in children:
            name = child.record.name if child.record else None
            groups.setdefault(child if self._limits.each else name, []).append(child)
        rows = [_Row(nodes) for nodes in groups.values()]
        keep = self._limits.children or len(rows)
        if len(rows) <= keep:
            return rows
        heaviest = sorted(rows, key=_weight, reverse=True)
        chosen = {id(row) for row in heaviest[:keep]}
        rest = [node for row in heaviest[keep:] for node in row.nodes]
        return [*(row for row in rows if id(row) in chosen), _Row(rest, "rest")]

    def _spans(self, table: Table, row: _Row, head: str, below: str) -> None:
        """One row; `below` is what its further lines begin with."""
        if row.kind == "rest":
            text = f"{self._glyphs.more} {_count(len(row.nodes), 'more span')}"
            self._add(table, [self._quiet(head, text)], None, row.total, [])
            return
        title = Text().append(head, _QUIET)
        if row.kind == "own":
            title.append("itself", "italic")
        else:
            title.append_text(self._name(row.nodes, len(head), ""))
        lines = [title]
        threads = self._threads(row.threads, len(below))
        if threads:
            lines.append(self._quiet(below, threads))
        took = row.duration_ns if row.kind == "spans" else None
        self._add(table, lines, took, row.own, row.functions, self._quiet(below))

    def _untraced(self, table: Table) -> None:
        report = self._report
        lines = [Text("   ").append("No span", _HEAD)]
        threads = self._threads(report.untraced_threads, 3)
        if threads:
            lines.append(self._quiet("   ", threads))
        self._add(table, lines, None, report.untraced, report.untraced_functions)

    def _add(
        self,
        table: Table,
        lines: list[Text],
        duration_ns: int | None,
        totals: Totals,
        functions: list[FunctionTotals],
        filler: Text | None = None,
    ) -> None:
        shares = self._shares(functions)
        if filler is not None:
            lines += [filler] * (len(shares) - len(lines))
        table.add_row(
            Text("\n").join(lines),
            self._time(duration_ns, ""),
            self._time(totals.cpu_ns, _CPU),
            self._time(totals.gil_wait_ns, _WAIT),
            Text(_compact(totals.samples)) if totals.samples else self._quiet(self._glyphs.none),
            Text("\n").join(shares),
        )

    # --- cells -----------------------------------------------------------------------------------

    def _name(self, nodes: Sequence[SpanNode], used: int, style: str) -> Text:
        node = nodes[0]
        count = f" {self._glyphs.times}{len(nodes)}" if len(nodes) > 1 else ""
        if node.record is None:
            label = "" if count else f"{node.endpoint or node.span_id} "
            width = self._span_width - used - len(_NOT_RECORDED) - len(count)
            return Text(f"{self._cut(label, width)}{_NOT_RECORDED}{count}", "italic")
        failed = any(node.record and node.record.failed for node in nodes)
        width = self._span_width - used - len(count) - 2 * failed
        name = Text().append(self._cut(node.record.name or "(no name)", width), style)
        name.append(count, _QUIET)
        return name.append(" !", _BAD) if failed else name

    def _threads(self, threads: dict[ThreadKey, Totals], used: int) -> str:
        """The threads that did something, or those that only waited; alike names as one."""
        busiest = sorted(
            threads, key=lambda k: (threads[k].cpu_ns, threads[k].gil_wait_ns), reverse=True
        )
        worked = [key for key in busiest if threads[key].cpu_ns or threads[key].gil_wait_ns]
        many = len(self._report.processes) > 1
        groups: dict[tuple[str, str], list[str]] = {}
        for key in worked or busiest:
            name = key.name or f"thread {key.thread_id}"
            pid = f" @{_pid(key.process)}" if many else ""
            groups.setdefault((_LAST_NUMBER.sub("*", name, count=1), pid), []).append(name)
        parts = []
        for (stem, pid), names in groups.items():
            count = f" {self._glyphs.times}{len(names)}" if len(names) > 1 else ""
            parts.append(f"{stem if len(set(names)) > 1 else names[0]}{pid}{count}")
        text = ", ".join(parts)
        if text and not worked:
            text = f"{text} (waited)"
        return self._cut(text, self._span_width - used)

    def _shares(self, functions: list[FunctionTotals]) -> list[Text]:
        """The functions with the most CPU time; where none was used, those that waited longest."""
        whole = sum(f.self_cpu_ns for f in functions)
        style = ""
        parts = [(f.self_cpu_ns, f.function) for f in functions]
        if whole <= 0:
            whole = sum(f.self_wall_ns for f in functions)
            parts = [(f.self_wall_ns, f.function) for f in functions]
            style = _QUIET
        lines = []
        for weight, function in parts[: self._limits.functions or None]:
            if whole <= 0 or weight < whole * _LEAST_SHARE:
                break
            share = f"{100 * weight / whole:3.0f}% "
            name = self._cut_name(function, self._function_width - len(share))
            lines.append(Text().append(share, _QUIET).append(name, style))
        return lines

    def _time(self, nanoseconds: int | None, style: str) -> Text:
        if not nanoseconds:
            return self._quiet(self._glyphs.none)
        return Text(duration(nanoseconds, self._glyphs.micro), style)

    def _quiet(self, *parts: str) -> Text:
        return Text("".join(parts), _QUIET)

    def _cut(self, text: str, width: int) -> str:
        """`text`, made harmless, with its end cut off where it is wider than `width` columns."""
        # Combining characters are zero columns wide, and a hostile text is as long as it likes.
        shown = visible(text[: _CHARACTERS_PER_COLUMN * width])
        if len(text) <= _CHARACTERS_PER_COLUMN * width and cell_len(shown) <= width:
            return shown
        width = max(width - len(self._glyphs.more), 0)
        while cell_len(shown) > width:
            shown = shown[:-1]
        return shown + self._glyphs.more

    def _cut_name(self, function: str, width: int) -> str:
        """The same for a qualified name, which loses its outer scopes first."""
        rest, dot, name = function.replace(".<locals>", "").rpartition(".")
        more = self._glyphs.more
        while dot:
            rest, dot, scope = rest.rpartition(".")
            longer = f"{scope}.{name}"
            # "<lambda>" and "<genexpr>" say nothing without the function that they are in.
            if cell_len(longer) + len(more) * bool(dot) > width and name[0:1] != "<":
                return self._cut(more + name, width)
            name = longer
        return self._cut(name, width)

    # --- the footer ------------------------------------------------------------------------------

    def _footer(self, shown: int) -> Text:
        report, dot = self._report, self._glyphs.dot
        lines = []
        read = (
            f"Read {_count(report.profile_files, 'profile')} and "
            f"{_count(report.span_files, 'span file')} "
            f"of {_count(len(report.processes), 'process', 'processes')}"
        )
        if report.roots:
            read += f"{dot}{shown:,} of {_count(len(report.roots), 'local root')} shown"
        lines.append(Text(read, _QUIET))
        total, share = report.total, report.on_cpu_share
        facts = [_count(total.samples, "sample")]
        if share is not None:
            facts.append(f"{_percent(share)} of {total.on_cpu:,} on a CPU have a span")
        lines.append(Text(dot.join(facts)))
        cpu = Text("CPU ").append(self._plain(total.cpu_ns), _CPU)
        cpu.append(f": {self._plain(report.traced.cpu_ns)} in spans, ")
        cpu.append(f"{self._plain(report.untraced.cpu_ns)} untraced")
        if report.unknown.samples:
            cpu.append(f", {self._plain(report.unknown.cpu_ns)} unknown")
        cpu.append(f"{dot}GIL wait ")
        cpu.append(self._plain(total.gil_wait_ns), _WAIT)
        lines.append(cpu)
        if any(node.record is None for root in report.roots[:shown] for node in root.walk()):
            lines.append(
                self._quiet(f"{_NOT_RECORDED}: not sampled by the tracer, or still running.")
            )
        for error in report.errors:
            lines.append(Text(f"Not read: {visible(str(error))}", _BAD))
        return Text("\n").join(lines)

    def _plain(self, nanoseconds: int) -> str:
        return duration(nanoseconds, self._glyphs.micro)


def visible(text: str) -> str:
    """`text` with everything escaped that could move the cursor, hide, or reorder what is shown."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode()
        for char in text
    )


def _sum(parts: Iterable[Totals]) -> Totals:
    totals = Totals()
    for part in parts:
        totals.add(part)
    return totals


def _weight(row: _Row) -> tuple[int, int]:
    return row.total.cpu_ns, row.duration_ns or 0


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _compact(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:.1f} M"


def _percent(share: float) -> str:
    # Rounding must not turn a loss into "100 %".
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def _pid(process: str) -> str:
    """The process id in ``HOST-PID-START``."""
    parts = process.rsplit("-", 2)
    return parts[1] if len(parts) == 3 else process
