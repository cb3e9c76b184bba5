# SPDX-License-Identifier: Apache-2.0
"""Labels checked against the truth, through the exported profile.

Every unit of work runs a function of its own, generated for it, under one known context. Whatever
the exported profile says of a sample in that function can therefore be told right from wrong: by
the innermost generated frame, with no look at any state of ours.

    with GroundTruth(tmp_path) as truth:
        with truth.tracer.start_as_current_span("root") as root:
            truth.burn(Label.of(root))
        truth.burn(None)
    truth.verdict().assert_right()
"""

from __future__ import annotations

import contextlib
import linecache
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import pytest
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags, set_span_in_context

from otel_proflink import runtime_context
from otel_proflink._linker import SpanHooks
from otel_proflink.config import Config
from otel_proflink.instrumentation import thread_pool
from otel_proflink.profiler import Profiler
from otel_proflink.span_processor import ProflinkSpanProcessor
from tests.support.pprof_schema import DecodedSample, decode, samples

LINK_LABELS: Final = frozenset(
    {"trace_id", "span_id", "local_root_span_id", "span_type", "endpoint"}
)

# What a test asks for unless it says otherwise. A busy thread at 1000 Hz gives 40 samples in 40 ms;
# a tenth of that is there on a machine that is busy with other things, too.
BURN_SECONDS: Final = 0.04
MIN_SAMPLES: Final = 4

# Attributes that make a root a web request by OpenTelemetry's semantic conventions.
WEB: Final[Mapping[str, Any]] = {"http.request.method": "GET", "url.path": "/"}


# The interpreters whose layouts the sampler knows; on others it refuses, and only links.
SAMPLED: Final = (3, 11) <= sys.version_info[:2] <= (3, 15)
needs_sampler = pytest.mark.skipif(not SAMPLED, reason="this Python is linked, not sampled")


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY: Final = _Any()


@dataclass(frozen=True)
class Label:
    """What a sample must say. `endpoint`: a text, None for "no such label", or ANY."""

    trace_id: int
    span_id: int
    local_root_span_id: int
    span_type: str = ""
    endpoint: str | _Any | None = ANY

    @classmethod
    def of(
        cls,
        span: Span,
        root: Span | None = None,
        span_type: str = "internal",
        endpoint: str | _Any | None = ANY,
    ) -> Label:
        own = span.get_span_context()
        top = (root or span).get_span_context()
        return cls(own.trace_id, own.span_id, top.span_id, span_type, endpoint)

    def allows(self, labels: Mapping[str, str]) -> bool:
        # By text, not by number: leading zeros and lower case are part of the format.
        return (
            labels.get("trace_id") == f"{self.trace_id:032x}"
            and labels.get("span_id") == f"{self.span_id:016x}"
            and labels.get("local_root_span_id") == f"{self.local_root_span_id:016x}"
            and labels.get("span_type", "") == self.span_type
            and (self.endpoint is ANY or labels.get("endpoint") == self.endpoint)
        )


Expectation = Label | None | frozenset[Label]


@dataclass
class Counts:
    """On-CPU samples of one generated function."""

    right: int = 0
    wrong: int = 0
    unknown: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return self.right + self.wrong + self.unknown


@dataclass
class Verdict:
    """The counts of every function of which something was expected."""

    counts: dict[str, Counts]
    expected: Mapping[str, Expectation]

    def total(self, names: Iterable[str] | None = None) -> Counts:
        picked = [self.counts[name] for name in (self.counts if names is None else names)]
        return Counts(
            sum(c.right for c in picked),
            sum(c.wrong for c in picked),
            sum(c.unknown for c in picked),
        )

    def assert_right(
        self,
        *,
        min_samples: int = MIN_SAMPLES,
        min_total: int = 1,
        max_unknown: float = 0.005,
    ) -> None:
        """Fail unless nothing is wrong, hardly anything unknown, and enough was seen.

        Args:
            min_samples: on-CPU samples that each function must have; 0 where units are too short.
            min_total: on-CPU samples that all of them must have together.
            max_unknown: share of the samples of labelled work that may carry no label.
        """
        assert self.counts, "nothing was expected of any function"
        wrong = {name: c for name, c in self.counts.items() if c.wrong}
        detail = {
            name: (self.expected[name], c.wrong, c.examples) for name, c in list(wrong.items())[:5]
        }
        assert not wrong, f"wrong labels (expected, how many, examples): {detail}"
        poor = {name: c.total for name, c in self.counts.items() if c.total < min_samples}
        assert not poor, f"too few samples: functions with fewer than {min_samples}: {poor}"
        total = self.total()
        assert total.total >= min_total, f"too few samples: {total.total}, wanted {min_total}"
        labelled = self.total(n for n in self.counts if self.expected[n] is not None)
        assert labelled.unknown <= max_unknown * labelled.total, (
            f"{labelled.unknown} of {labelled.total} samples of labelled work carry no label"
        )


class Registry:
    """Generates functions and remembers what is expected of their samples."""

    def __init__(self) -> None:
        self.expected: dict[str, Expectation] = {}
        self._made = 0
        self._lock = threading.Lock()

    def function(self, what: str = "burn", inner: int = 200) -> Callable[[float], int]:
        """Make a function that stays in its own frame for so many seconds of its thread's CPU time.

        Args:
            what: start of its name.
            inner: turns of the loop between two looks at the clock (200: some 10 us).
        """
        with self._lock:
            self._made += 1
            name = f"{what}_{self._made:05d}"
        source = (
            f"def {name}(seconds):\n"
            "    end = clock() + seconds\n"
            "    x = 1\n"
            "    while clock() < end:\n"
            f"        for i in range({inner}):\n"
            "            x = (x * 33 + i) % 65521\n"
            "    return x\n"
        )
        filename = f"<generated {name}>.py"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        scope: dict[str, Any] = {"clock": time.thread_time}
        exec(compile(source, filename, "exec"), scope)
        made: Callable[[float], int] = scope[name]
        return made

    def expect(self, function: Callable[..., object], expectation: Expectation) -> None:
        self.expected[function.__name__] = expectation


def verify(read: Iterable[DecodedSample], expected: Mapping[str, Expectation]) -> Verdict:
    """Hold the on-CPU samples of a profile against what is expected of each function."""
    counts = {name: Counts() for name in expected}
    for sample in read:
        if sample.values["cpu"] <= 0:
            continue
        name = next((f for f in sample.functions if f in counts), None)
        if name is not None:
            _count(counts[name], sample, expected[name])
    return Verdict(counts, expected)


def _count(counts: Counts, sample: DecodedSample, expectation: Expectation) -> None:
    weight = sample.values["samples"]
    labels = {key: text for key, text in sample.labels.items() if key in LINK_LABELS}
    if expectation is None:
        right = not labels
    elif not labels:
        counts.unknown += weight
        return
    elif isinstance(expectation, Label):
        right = expectation.allows(labels)
    else:
        right = any(label.allows(labels) for label in expectation)
    if right:
        counts.right += weight
        return
    counts.wrong += weight
    if len(counts.examples) < 3:
        counts.examples.append(labels)


def read_profiles(directory: Path) -> list[DecodedSample]:
    """All samples of all profiles in a capture directory, by an independent decoder."""
    return [
        sample
        for path in sorted(directory.glob("profile-*.pb.gz"))
        for sample in samples(decode(path.read_bytes()))
    ]


class GroundTruth(Registry):
    """A profiler that writes into `directory`, a tracer provider linked to it, and the pool.

    Everything is on inside the `with` block; leaving it writes the profile.
    """

    def __init__(
        self,
        directory: Path,
        *,
        rate_hz: float = 1000.0,
        pool: bool = True,
        processors: Iterable[SpanProcessor] = (),
        **settings: Any,
    ) -> None:
        super().__init__()
        self.directory = directory
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.tracer = self.provider.get_tracer("ground-truth")
        self.profiler = Profiler(
            Config(
                **{
                    "exporter": "pprof",
                    "output_dir": str(directory),
                    "sample_rate_hz": rate_hz,
                    "start": "now",
                    **settings,
                }
            )
        )
        self._pool = pool
        self._processors = processors

    def __enter__(self) -> Self:
        if not SAMPLED:
            pytest.skip("this Python is linked, not sampled")
        self.start()
        self.provider.add_span_processor(ProflinkSpanProcessor(self.profiler))
        for processor in self._processors:
            self.provider.add_span_processor(processor)
        runtime_context.install()
        if self._pool:
            thread_pool.instrument()
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._pool:
            thread_pool.uninstrument()
        self.profiler.stop()
        runtime_context.uninstall()

    def start(self) -> None:
        """Start the profiler, and wait for its first ticks: on a busy machine they may be late."""
        assert self.profiler.start().running, "the profiler does not run: its log line says why"
        begin = self.profiler.stats()["ticks"]
        deadline = time.monotonic() + 10
        while self.profiler.stats()["ticks"] < begin + 2:
            assert time.monotonic() < deadline, "the sampler does not tick"
            time.sleep(0.001)

    def burn(self, expectation: Expectation, seconds: float = BURN_SECONDS) -> None:
        """Burn CPU here and now, in a function made for it, under the context that is current."""
        function = self.function()
        self.expect(function, expectation)
        function(seconds)

    def unit(self, expectation: Expectation, seconds: float = BURN_SECONDS) -> Callable[[], int]:
        """Return work to be done elsewhere: a callable without parameters."""
        function = self.function()
        self.expect(function, expectation)
        # The generated frame must be the one that is called: no lambda under another label.
        function.__defaults__ = (seconds,)  # type: ignore[attr-defined]
        return function  # type: ignore[return-value]

    def samples(self) -> list[DecodedSample]:
        return read_profiles(self.directory)

    def verdict(self) -> Verdict:
        return verify(self.samples(), self.expected)


class LinksOnly(SpanHooks, SpanProcessor):
    """Our processor's native half by itself: links, no profiler."""


@contextlib.contextmanager
def linking(
    *, pool: bool = True, processors: Iterable[SpanProcessor] = ()
) -> Iterator[TracerProvider]:
    """Links and the pool's propagation, without sampling."""
    runtime_context.install()
    provider = TracerProvider(shutdown_on_exit=False)
    for processor in (LinksOnly(), *processors):
        provider.add_span_processor(processor)
    if pool:
        thread_pool.instrument()
    try:
        yield provider
    finally:
        if pool:
            thread_pool.uninstrument()
        runtime_context.uninstall()


def remote_context(trace_id: int, span_id: int, base: Context | None = None) -> Context:
    """A context whose span lives in another process: no local span object, no processor saw it."""
    flags = TraceFlags(TraceFlags.SAMPLED)
    span = NonRecordingSpan(SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags))
    return set_span_in_context(span, Context() if base is None else base)


@contextlib.contextmanager
def attached(context: Context) -> Iterator[Context]:
    token = attach(context)
    try:
        yield context
    finally:
        detach(token)


def tally(read: Iterable[DecodedSample]) -> Counter[str]:
    """On-CPU samples by innermost function: what to look at when a test fails."""
    counter: Counter[str] = Counter()
    for sample in read:
        if sample.values["cpu"] > 0 and sample.stack:
            counter[sample.functions[0]] += sample.values["samples"]
    return counter
