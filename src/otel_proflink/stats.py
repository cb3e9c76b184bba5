# SPDX-License-Identifier: Apache-2.0
"""What the profiler knows of itself, key by key: the results of `Profiler.stats`.

All values are whole numbers. What is called a count goes up only, from zero at each start.
"""

from __future__ import annotations

from typing import TypedDict


class SamplerStats(TypedDict, total=False):
    """The native sampler's part, as of its last tick.

    Attributes:
        ticks: count of looks at all threads.
        late_ticks: count of ticks that began more than half a period late.
        snapshots: count of threads read. Threads that have not run since are not read again.
        retries: count of readings thrown away because the thread ran on meanwhile.
        give_ups: count of samples without a stack, ``[unreadable]``, because all readings were.
        unknown_labels: count of samples whose span could not be told; those without a stack too.
        read_errors: count of reads of memory that was not there (any more).
        table_overflows: count of things that a profile had no room for.
        cpu_not_sampled_ns: nanoseconds of CPU burnt by threads that ended before any sample
            caught them running.
        threads: threads that are sampled now.
        sampler_cpu_ns: nanoseconds of CPU that the sampler's thread burnt.
        period_ns: nanoseconds between two ticks now; longer than the sample rate says while that
            is what ``OTEL_PROFLINK_MAX_OVERHEAD`` takes.
        state_guesses: 1 when the kernel does not tell what threads wait for, else 0.
        cpu_timer: 1 when CPU is sampled by timers (docs/engines.md), else 0.
        stood_back: count of times that somebody else took SIGPROF.
        signals: count of the timers' signals.
        signal_overruns: count of expiries without a signal of their own.
        signals_dropped: count of expiries that no sample could be made of.
        signal_ns: nanoseconds of the application's CPU that went into handling them.
        timers_refused: count of timers that the kernel refused (``RLIMIT_SIGPENDING``).
        silent_threads: count of threads that burnt CPU but got no signal: they block it.
    """

    ticks: int
    late_ticks: int
    snapshots: int
    retries: int
    give_ups: int
    unknown_labels: int
    read_errors: int
    table_overflows: int
    cpu_not_sampled_ns: int
    threads: int
    sampler_cpu_ns: int
    period_ns: int
    state_guesses: int
    cpu_timer: int
    stood_back: int
    signals: int
    signal_overruns: int
    signals_dropped: int
    signal_ns: int
    timers_refused: int
    silent_threads: int


class ExportStats(TypedDict, total=False):
    """The exporter thread's part.

    Attributes:
        exports_ok: count of batches that reached their destination.
        exports_failed: count of attempts that failed; the batch is tried again.
        exports_dropped: count of batches given up.
        endpoint_fixups: count of files written again with endpoints that came late.
        exporter_errors: count of mistakes of ours, each logged.
        exporter_cpu_ns: nanoseconds of CPU that the exporter's thread burnt.
        spans_dropped: count of ended spans that found no room in the queue to the capture.
    """

    exports_ok: int
    exports_failed: int
    exports_dropped: int
    endpoint_fixups: int
    exporter_errors: int
    exporter_cpu_ns: int
    spans_dropped: int


class DestinationStats(TypedDict, total=False):
    """What the configured destination counts; none counts everything.

    Attributes:
        files_dropped: count of files removed by the capture directory's caps.
    """

    files_dropped: int


class RunStats(SamplerStats, ExportStats, DestinationStats, total=False):
    """What one run of the profiler counts."""


class ProfilerStats(RunStats, total=False):
    """All of it; empty when nothing runs.

    Attributes:
        memory_bytes: bytes of memory that the sampler's tables, the links, and a capture that waits
            for its endpoints take up now.
    """

    memory_bytes: int
