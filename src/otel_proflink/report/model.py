# SPDX-License-Identifier: Apache-2.0
"""Joins the profiles and the spans of a capture directory by trace id and span id.

A capture is a heap of files of many processes, in which either side of a span may be missing:
a span nobody sampled has no samples; a span that was not sampled by the tracer, or that still ran
when the capture ended, has samples and no record. Both are shown for what they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from opentelemetry.trace import SpanKind

from ..span_type import ENDPOINT_TYPES, span_type_of
from . import CaptureError
from .pprof_reader import LabelSet, Profile, Stack, read_profile
from .spans_reader import SpanRecord, read_spans

__all__ = [
    "FunctionTotals",
    "Report",
    "SpanNode",
    "ThreadKey",
    "Totals",
    "build_report",
    "read_report",
    "sum_functions",
    "sum_threads",
    "to_document",
]

# The names that the exporters give to their files; HOST-PID-START is one run of one process.
_FILE: Final = re.compile(r"(profile|spans)-(.+-\d+-\d+)-\d+\.(?:pb\.gz|json)")

_RUNNING: Final = "running"
_GIL_WAIT: Final = "gil_wait"
_BLOCKED: Final = "blocked"
# The value of the label "link" on samples without a proven one.
_UNKNOWN: Final = "unknown"


# stack -> samples, CPU nanoseconds, wall nanoseconds
StackWeights: TypeAlias = dict[Stack, list[int]]


@dataclass(slots=True)
class Totals:
    """What samples add up to. Times are nanoseconds.

    Attributes:
        samples: number of samples.
        on_cpu: those of them taken on a CPU.
        cpu_ns: CPU time.
        wall_ns: thread time of any kind: with two threads, twice the time on the clock.
        gil_wait_ns: thread time spent ready to run, waiting for the GIL.
        blocked_ns: thread time spent waiting for anything else.
    """

    samples: int = 0
    on_cpu: int = 0
    cpu_ns: int = 0
    wall_ns: int = 0
    gil_wait_ns: int = 0
    blocked_ns: int = 0

    def add(self, other: Totals) -> None:
        """Adds `other` to these."""
        self.samples += other.samples
        self.on_cpu += other.on_cpu
        self.cpu_ns += other.cpu_ns
        self.wall_ns += other.wall_ns
        self.gil_wait_ns += other.gil_wait_ns
        self.blocked_ns += other.blocked_ns


@dataclass(slots=True)
class FunctionTotals:
    """One function's share of a span. Inclusive counts a recursive function once a sample."""

    function: str
    file: str
    samples: int = 0
    self_cpu_ns: int = 0
    self_wall_ns: int = 0
    inclusive_cpu_ns: int = 0
    inclusive_wall_ns: int = 0


class ThreadKey(NamedTuple):
    """One thread of one process."""

    process: str
    thread_id: int
    name: str


@dataclass(slots=True, eq=False)
class SpanNode:
    """A span with what was sampled under it, and its children.

    Attributes:
        trace_id: 32 lowercase hex digits.
        span_id: 16 lowercase hex digits.
        record: the span itself; None when the capture has only samples of it (it was not sampled
            by the tracer, or it still ran).
        span_type: the kind of work of its local root, empty when that is not known.
        endpoint: the name of its local root, empty for roots that have none.
        own: samples of this very span.
        total: `own` and all spans below.
        threads: what each thread did for this very span.
        stacks: stack -> samples, CPU and wall nanoseconds of this very span.
        children: spans below, by start time.
    """

    trace_id: str
    span_id: str
    record: SpanRecord | None = None
    span_type: str = ""
    endpoint: str = ""
    local_root_span_id: str = ""
    own: Totals = field(default_factory=Totals)
    total: Totals = field(default_factory=Totals)
    threads: dict[ThreadKey, Totals] = field(default_factory=dict)
    stacks: StackWeights = field(default_factory=dict)
    children: list[SpanNode] = field(default_factory=list)

    @property
    def functions(self) -> list[FunctionTotals]:
        """Functions of this very span, the most CPU time of their own first."""
        return sum_functions([self.stacks])

    @property
    def duration_ns(self) -> int | None:
        """How long it took; None when its end is not in the capture."""
        return self.record.end_ns - self.record.start_ns if self.record else None

    def walk(self) -> Iterator[SpanNode]:
        """This span and all below, parents first."""
        return (node for node, _ in self.walk_with_depth())

    def walk_with_depth(self) -> Iterator[tuple[SpanNode, int]]:
        """The same, each with its depth below this span. Safe on any depth."""
        pending = [(self, 0)]
        while pending:
            node, depth = pending.pop()
            yield node, depth
            pending.extend((child, depth + 1) for child in reversed(node.children))

    @property
    def tree_functions(self) -> list[FunctionTotals]:
        """Functions of this span and all below, the most CPU time of their own first."""
        return sum_functions(node.stacks for node in self.walk())

    @property
    def tree_threads(self) -> dict[ThreadKey, Totals]:
        """What each thread did for this span and all below."""
        return sum_threads(node.threads for node in self.walk())


@dataclass(slots=True)
class Report:
    """A capture, joined.

    Attributes:
        roots: local roots, the slowest first.
        traced: everything that carries a span.
        untraced: everything that carries none.
        unknown: samples whose span the sampler could not prove, one way or the other.
        untraced_stacks: stack -> samples, CPU and wall nanoseconds of what is untraced.
        untraced_threads: what each thread did under no span.
        profile_files: number of profiles read.
        span_files: number of span files read.
        processes: the processes (``HOST-PID-START``) the files are of.
        errors: files that could not be read.
    """

    roots: list[SpanNode] = field(default_factory=list)
    traced: Totals = field(default_factory=Totals)
    untraced: Totals = field(default_factory=Totals)
    unknown: Totals = field(default_factory=Totals)
    untraced_stacks: StackWeights = field(default_factory=dict)
    untraced_threads: dict[ThreadKey, Totals] = field(default_factory=dict)
    profile_files: int = 0
    span_files: int = 0
    processes: set[str] = field(default_factory=set)
    errors: list[CaptureError] = field(default_factory=list)

    @property
    def untraced_functions(self) -> list[FunctionTotals]:
        """Functions of what carries no span, the most CPU time of their own first."""
        return sum_functions([self.untraced_stacks])

    @property
    def total(self) -> Totals:
        """All samples."""
        totals = Totals()
        totals.add(self.traced)
        totals.add(self.untraced)
        totals.add(self.unknown)
        return totals

    @property
    def on_cpu_share(self) -> float | None:
        """The share (0..1) of on-CPU samples that carry a span; None without such samples."""
        on_cpu = self.total.on_cpu
        return self.traced.on_cpu / on_cpu if on_cpu else None


def read_report(
    directory: str | os.PathLike[str], *, exclude: Collection[str] = frozenset()
) -> Report:
    """Reads every capture file of a directory but those named in `exclude`.

    A file that cannot be read is left out and stands in `Report.errors`.

    Raises:
        CaptureError: the directory cannot be read, or has no capture file that can.
    """
    try:
        names = sorted(set(os.listdir(directory)) - set(exclude))
    except OSError as error:
        raise CaptureError(directory, error.strerror or str(error)) from error
    builder = _Builder()
    for name in names:
        match = _FILE.fullmatch(name)
        if match is None:
            continue
        kind, process = match[1], match[2]
        path = Path(directory, name)
        if not path.is_file():  # opening a pipe would wait for its other end
            continue
        try:
            if kind == "profile":
                builder.add_profile(read_profile(path), process)
            else:
                builder.add_spans(read_spans(path), process)
        except CaptureError as error:
            builder.report.errors.append(error)
    report = builder.finish()
    if not report.profile_files and not report.span_files:
        if report.errors:
            raise report.errors[0]
        raise CaptureError(directory, "no capture in it (no profile-*.pb.gz, no spans-*.json)")
    return report


def build_report(
    profiles: Iterable[tuple[str, Profile]], spans: Iterable[tuple[str, Iterable[SpanRecord]]]
) -> Report:
    """Joins profiles and spans that are in memory, each with the process it is of.

    Raises:
        CaptureError: a profile lacks one of our sample types.
    """
    builder = _Builder()
    for process, records in spans:
        builder.add_spans(records, process)
    for process, profile in profiles:
        builder.add_profile(profile, process)
    return builder.finish()


def to_document(report: Report, *, limit: int = 0) -> dict[str, object]:
    """A report as JSON-ready data, with the `limit` slowest local roots (0: all of them).

    Spans stand in tree order in one flat list, each with its depth, so that no depth of nesting is
    too much for a JSON reader. Times are nanoseconds.
    """
    return {
        "version": 1,
        "processes": sorted(report.processes),
        "profile_files": report.profile_files,
        "span_files": report.span_files,
        "errors": [str(error) for error in report.errors],
        "total": asdict(report.total),
        "traced": asdict(report.traced),
        "untraced": asdict(report.untraced),
        "unknown": asdict(report.unknown),
        "on_cpu_share_with_span": report.on_cpu_share,
        "untraced_functions": [asdict(function) for function in report.untraced_functions],
        "local_root_count": len(report.roots),
        "local_roots": [_root_document(root) for root in report.roots[: limit or None]],
    }


def _root_document(root: SpanNode) -> dict[str, object]:
    return {
        "trace_id": root.trace_id,
        "span_id": root.span_id,
        "endpoint": root.endpoint,
        "span_type": root.span_type,
        "service": root.record.service if root.record else "",
        "duration_ns": root.duration_ns,
        "total": asdict(root.total),
        "spans": [_span_document(node, depth) for node, depth in root.walk_with_depth()],
    }


def _span_document(node: SpanNode, depth: int) -> dict[str, object]:
    record = node.record
    return {
        "depth": depth,
        "span_id": node.span_id,
        "parent_span_id": record.parent_span_id if record else "",
        "recorded": record is not None,
        "name": record.name if record else "",
        "kind": record.kind if record else "",
        "failed": record.failed if record else False,
        "start_unix_ns": record.start_ns if record else None,
        "duration_ns": node.duration_ns,
        "own": asdict(node.own),
        "total": asdict(node.total),
        "threads": [{**key._asdict(), **asdict(totals)} for key, totals in node.threads.items()],
        "functions": [asdict(function) for function in node.functions],
    }


def sum_threads(parts: Iterable[dict[ThreadKey, Totals]]) -> dict[ThreadKey, Totals]:
    """What each thread did for some spans together."""
    threads: dict[ThreadKey, Totals] = {}
    for part in parts:
        for key, totals in part.items():
            threads.setdefault(key, Totals()).add(totals)
    return threads


def sum_functions(weights: Iterable[StackWeights]) -> list[FunctionTotals]:
    """Functions of the stacks of some spans, the most CPU time of their own first (then wall time).

    Made when asked for: of the thousands of spans of a capture, few are looked at.
    """
    sums: dict[tuple[str, str], FunctionTotals] = {}
    for stack, (count, cpu, wall) in chain.from_iterable(stacks.items() for stacks in weights):
        if not stack.frames:
            continue
        for function, file in {(frame.function, frame.file) for frame in stack.frames}:
            entry = sums.get((function, file))
            if entry is None:
                entry = sums[function, file] = FunctionTotals(function, file)
            entry.samples += count
            entry.inclusive_cpu_ns += cpu
            entry.inclusive_wall_ns += wall
        leaf = sums[stack.frames[0].function, stack.frames[0].file]
        leaf.self_cpu_ns += cpu
        leaf.self_wall_ns += wall
    return sorted(
        sums.values(),
        key=lambda f: (-f.self_cpu_ns, -f.self_wall_ns, -f.inclusive_cpu_ns, f.function, f.file),
    )


class _Bucket:
    """Samples of one profile with one set of labels."""

    __slots__ = ("cpu_ns", "key", "on_cpu", "samples", "stacks", "wall_ns")

    def __init__(self, key: tuple[str, str] | None, stacks: StackWeights) -> None:
        self.key = key
        self.stacks = stacks
        self.samples = self.on_cpu = self.cpu_ns = self.wall_ns = 0


class _Builder:
    def __init__(self) -> None:
        self.report = Report()
        self._nodes: dict[tuple[str, str], SpanNode] = {}
        self._processes: dict[tuple[str, str], str] = {}

    # --- the spans -------------------------------------------------------------------------------

    def add_spans(self, records: Iterable[SpanRecord], process: str) -> None:
        self.report.span_files += 1
        self.report.processes.add(process)
        for record in records:
            key = record.trace_id, record.span_id
            node = self._node(key)
            if node.record is None:  # two processors may have written the same span
                node.record = record
                self._processes[key] = process

    def _node(self, key: tuple[str, str]) -> SpanNode:
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = SpanNode(*key)
        return node

    # --- the samples -----------------------------------------------------------------------------

    def add_profile(self, profile: Profile, process: str) -> None:
        count_at = profile.value_index("samples", "count")
        cpu_at = profile.value_index("cpu", "nanoseconds")
        wall_at = profile.value_index("wall", "nanoseconds")
        self.report.profile_files += 1
        self.report.processes.add(process)
        buckets: dict[LabelSet, _Bucket] = {}
        for stack, values, labels in profile.samples:
            bucket = buckets.get(labels)
            if bucket is None:
                bucket = buckets[labels] = self._bucket(labels)
            count, cpu, wall = values[count_at], values[cpu_at], values[wall_at]
            bucket.samples += count
            bucket.cpu_ns += cpu
            bucket.wall_ns += wall
            if cpu > 0:
                bucket.on_cpu += count
            seen = bucket.stacks.get(stack)
            if seen is None:
                bucket.stacks[stack] = [count, cpu, wall]
            else:
                seen[0] += count
                seen[1] += cpu
                seen[2] += wall
        for labels, bucket in buckets.items():
            self._sum_up(labels, bucket, process)

    def _bucket(self, labels: LabelSet) -> _Bucket:
        key = self._key(labels.strings)
        if key is not None:
            return _Bucket(key, self._nodes[key].stacks)
        # What is under an unknown span is no more known to be under none.
        unknown = labels.strings.get("link") == _UNKNOWN
        return _Bucket(key, {} if unknown else self.report.untraced_stacks)

    def _sum_up(self, labels: LabelSet, bucket: _Bucket, process: str) -> None:
        text = labels.strings
        state = text.get("thread_state", "")
        totals = Totals(
            samples=bucket.samples,
            # A profile of someone else's has no states; there, what used CPU was on a CPU.
            on_cpu=bucket.samples if state == _RUNNING else 0 if state else bucket.on_cpu,
            cpu_ns=bucket.cpu_ns,
            wall_ns=bucket.wall_ns,
            gil_wait_ns=bucket.wall_ns if state == _GIL_WAIT else 0,
            blocked_ns=bucket.wall_ns if state == _BLOCKED else 0,
        )
        report = self.report
        if bucket.key is None and text.get("link") == _UNKNOWN:
            report.unknown.add(totals)
            return
        if bucket.key is None:
            report.untraced.add(totals)
            threads = report.untraced_threads
        else:
            node = self._nodes[bucket.key]
            report.traced.add(totals)
            node.own.add(totals)
            threads = node.threads
        thread = ThreadKey(process, labels.numbers.get("thread_id", 0), text.get("thread_name", ""))
        threads.setdefault(thread, Totals()).add(totals)

    def _key(self, text: dict[str, str]) -> tuple[str, str] | None:
        span_id = text.get("span_id", "").lower()
        if not span_id:
            return None
        key = text.get("trace_id", "").lower(), span_id
        node = self._node(key)
        node.local_root_span_id = text.get("local_root_span_id", "").lower()
        node.span_type = text.get("span_type", "") or node.span_type
        node.endpoint = text.get("endpoint", "") or node.endpoint
        return key

    # --- the tree --------------------------------------------------------------------------------

    def finish(self) -> Report:
        """The report; the builder is used up."""
        self.report.roots = self._link()
        return self.report

    def _link(self) -> list[SpanNode]:
        parents: dict[tuple[str, str], tuple[str, str]] = {}
        pending = list(self._nodes)
        while pending:
            key = pending.pop()
            node = self._nodes[key]
            parent = self._parent(key, node)
            if parent is None or parent == key:
                continue
            parents[key] = parent
            missing = parent not in self._nodes
            above = self._node(parent)
            if above.record is None and not above.own.samples:
                # The capture has it only by name. Its children may know where it belongs.
                if not above.local_root_span_id and node.local_root_span_id:
                    above.local_root_span_id = node.local_root_span_id
                    missing = True
                if missing:
                    pending.append(parent)
        _cut_rings(parents)
        roots = []
        for key, node in self._nodes.items():
            if key in parents:
                self._nodes[parents[key]].children.append(node)
            else:
                roots.append(node)
        for root in roots:
            self._settle(root)
        roots.sort(key=_slowness, reverse=True)
        return roots

    def _parent(self, key: tuple[str, str], node: SpanNode) -> tuple[str, str] | None:
        """The span that this one stands under in the tree of its local root, if any.

        The labels of samples tell local roots for certain; without samples the record has to do.
        """
        root = node.local_root_span_id
        if root == node.span_id:
            return None
        record = node.record
        if record is not None and record.parent_span_id:
            parent = key[0], record.parent_span_id
            remote = record.parent_is_remote
            if remote is None:
                # The file does not say. A parent that another process wrote was remote.
                owner = self._processes.get(parent)
                remote = None if owner is None else owner != self._processes[key]
            if remote and not root:
                return None
            if parent in self._nodes or remote is False:
                return parent
        return (key[0], root) if root else None

    def _settle(self, root: SpanNode) -> None:
        """Everything that depends on the tree: totals, order of children, type and endpoint."""
        order = list(root.walk())
        for node in reversed(order):
            node.total.add(node.own)
            for child in node.children:
                node.total.add(child.total)
            node.children.sort(key=_start)
        record = root.record
        span_type = root.span_type or next((n.span_type for n in order if n.span_type), "")
        if not span_type and record is not None:
            span_type = span_type_of(_kind(record), record.attributes)
        endpoint = next((node.endpoint for node in order if node.endpoint), "")
        if record is not None and span_type in ENDPOINT_TYPES:
            # The root itself knows best; a sample may have been written before the route was known.
            route = record.attributes.get("http.route")
            endpoint = route if isinstance(route, str) and route else record.name
        for node in order:
            node.span_type = span_type
            node.endpoint = endpoint
            node.local_root_span_id = root.span_id


def _kind(record: SpanRecord) -> SpanKind:
    return SpanKind.__members__.get(record.kind.upper(), SpanKind.INTERNAL)


def _cut_rings(parents: dict[tuple[str, str], tuple[str, str]]) -> None:
    """Only a broken file makes a span its own ancestor. It shall not vanish: it becomes a root."""
    done: set[tuple[str, str]] = set()
    for start in list(parents):
        path: dict[tuple[str, str], None] = {}
        key = start
        while key in parents and key not in done:
            if key in path:
                del parents[key]
                break
            path[key] = None
            key = parents[key]
        done.update(path)


def _start(node: SpanNode) -> tuple[bool, int]:
    return (False, node.record.start_ns) if node.record else (True, 0)


def _slowness(root: SpanNode) -> tuple[int, int]:
    duration = root.duration_ns
    if duration is None:
        # Still running, or never recorded: at least as long as its busiest thread worked for it.
        duration = max(map(attrgetter("wall_ns"), root.tree_threads.values()), default=0)
    return duration, root.total.cpu_ns
