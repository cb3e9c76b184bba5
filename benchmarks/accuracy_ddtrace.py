# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.accuracy_scenarios` beside ddtrace, which wants to be imported before anything else.

OpenTelemetry's API asks for ddtrace's runtime context when it is itself imported. By hand, not by
`ddtrace.auto` or `ddtrace-run`: with these, 4.16 takes no or few samples of a pool's threads here.
"""

from __future__ import annotations

import os
import sys

_DIRECTORY, _SINK = sys.argv[3], sys.argv[5]

os.environ.update(
    OTEL_PYTHON_CONTEXT="ddcontextvars_context",
    DD_TRACE_OTEL_ENABLED="true",
    DD_TRACE_AGENT_URL=_SINK,
    DD_INSTRUMENTATION_TELEMETRY_ENABLED="false",
    DD_REMOTE_CONFIGURATION_ENABLED="false",
    DD_TRACE_STARTUP_LOGS="false",
    DD_PROFILING_OUTPUT_PPROF=os.path.join(_DIRECTORY, "ddtrace"),
    DD_PROFILING_MEMORY_ENABLED="false",
    DD_PROFILING_HEAP_ENABLED="false",
    DD_PROFILING_LOCK_ENABLED="false",
    DD_PROFILING_TIMELINE_ENABLED="false",
    # At a fixed rate: as it comes, it adapts to 1 % of the CPU.
    _DD_PROFILING_STACK_ADAPTIVE_SAMPLING_ENABLED="false",
)

import ddtrace  # type: ignore[import-not-found]  # noqa: E402
from ddtrace.opentelemetry import TracerProvider  # type: ignore[import-not-found]  # noqa: E402
from opentelemetry.trace import set_tracer_provider  # noqa: E402

ddtrace.patch(futures=True, asyncio=True, gevent=True)
set_tracer_provider(TracerProvider())

from benchmarks.accuracy_scenarios import main  # noqa: E402

if __name__ == "__main__":
    main()
