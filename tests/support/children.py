# SPDX-License-Identifier: Apache-2.0
"""Applications with child processes, and what their captures say of each process."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.support.pprof_schema import decode, samples
from tests.support.processes import Run, run_app

METHODS: Final = ("fork", "forkserver", "spawn")

# After `processes.APP_PRELUDE`. Everything up to MAIN is executed in children of spawn and
# forkserver, too. `plain` and `with_spans` are what they are to do.
CHILD_PRELUDE: Final = '''
import multiprocessing as mp
import os
from concurrent.futures import ProcessPoolExecutor
from opentelemetry import baggage
from opentelemetry.sdk.trace import TracerProvider
from otel_proflink import current_link

SERVER = trace.SpanKind.SERVER
if type(trace.get_tracer_provider()).__name__ == "ProxyTracerProvider":
    trace.set_tracer_provider(TracerProvider())


def plain(name, seconds=0.12):
    """Burn CPU under whatever is current here."""
    settle()
    make(name)(seconds)
    return os.getpid()


def with_spans(name):
    """Burn CPU two spans deep; returns what the samples must say but for root and type."""
    settle()
    with tracer.start_as_current_span("one"), tracer.start_as_current_span("two") as two:
        make(name)(0.12)
        own = two.get_span_context()
        return own.trace_id, own.span_id


def told(queue, function, *arguments):
    queue.put(function(*arguments))


def outgoing():
    """What user code and its requests see of our record: nothing."""
    from opentelemetry.baggage.propagation import W3CBaggagePropagator
    carrier = {}
    W3CBaggagePropagator().inject(carrier)
    return dict(baggage.get_all()), carrier


def look():
    link = current_link()
    return link and (link.trace_id, link.span_id, link.local_root_span_id, link.span_type)


def expect(name, span, root=None, span_type="web"):
    unit(name, span, root, span_type)
    return name


def expect_deep(name, ids, root, span_type="web"):
    TRUTH[name] = [*ids, root.get_span_context().span_id, span_type]

'''

# For an application that instruments itself, and only itself: its children know nothing of us.
INSTRUMENT: Final = """
if __name__ == "__main__":
    from otel_proflink import ProflinkInstrumentor
    ProflinkInstrumentor().instrument()
"""

MAIN: Final = """
if __name__ == "__main__":
    main()
"""


def functions_by_pid(capture: Path) -> dict[int, set[str]]:
    """Process id -> names of all functions in its profiles."""
    found: dict[int, set[str]] = {}
    for path in capture.glob("profile-*.pb.gz"):
        names = found.setdefault(int(path.name.split("-")[-3]), set())
        for sample in samples(decode(path.read_bytes())):
            names.update(sample.functions)
    return found


# CPython warns of forks in processes with threads, the exporter's and the pool's own among them.
QUIET: Final = {"PYTHONWARNINGS": "ignore"}


def run_with_children(tmp_path: Path, main: str, *, zero_code: bool = False, **env: str) -> Run:
    """Run `main()`, which is in the source text `main`, to an end without complaints."""
    set_up = "" if zero_code else INSTRUMENT
    done = run_app(
        tmp_path, CHILD_PRELUDE + main + set_up + MAIN, zero_code=zero_code, **QUIET, **env
    )
    done.assert_clean()
    return done
