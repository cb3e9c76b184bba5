# SPDX-License-Identifier: Apache-2.0
"""Added memory, and added time to import and start: pairs of processes with and without us.

Each process is a small application: it imports OpenTelemetry's SDK, makes a provider, and makes
spans in a pool for a while. The other one of the pair also does what the quick start says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from benchmarks._paired import Bar, Rounds, Row, arguments, report

MEMORY = Bar(10, peer="33")  # MB
START = Bar(60, peer="400 to 900")  # ms

# Memory is the proportional set size: what is shared with other
# processes counts in part.
_APPLICATION = """
import time
began = time.perf_counter(), time.process_time()
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

def memory_mb():
    with open("/proc/self/smaps_rollup") as rollup:
        lines = dict(line.split(":") for line in rollup.read().splitlines()[1:])
    return int(lines["Pss"].split()[0]) / 1024

def work(count):
    for _ in range(count):
        with tracer.start_as_current_span("work"):
            sum(i * i for i in range(200))

provider = TracerProvider()
trace.set_tracer_provider(provider)
{more}
tracer = trace.get_tracer("benchmark")
with tracer.start_as_current_span("first"):
    pass
start = time.perf_counter() - began[0], time.process_time() - began[1]
memory = memory_mb()
deadline = time.monotonic() + float(sys.argv[1])
with ThreadPoolExecutor(4) as pool:
    while time.monotonic() < deadline:
        with tracer.start_as_current_span("request"):
            for future in [pool.submit(work, 25) for _ in range(4)]:
                future.result()
        time.sleep(0.05)
json.dump({"wall": start[0], "cpu": start[1], "memory": memory, "later": memory_mb()}, sys.stdout)
"""

_WAYS = {
    "off": "",
    # What `opentelemetry-instrument` has imported before it comes to us.
    "off, instrumented": """
import opentelemetry.instrumentation.instrumentor, opentelemetry.instrumentation.utils, wrapt
""",
    "processor": """
from otel_proflink import ProflinkSpanProcessor
provider.add_span_processor(ProflinkSpanProcessor())
""",
    "instrumentor": """
import opentelemetry.instrumentation.instrumentor, opentelemetry.instrumentation.utils, wrapt
from otel_proflink import ProflinkInstrumentor
ProflinkInstrumentor().instrument(tracer_provider=provider)
""",
}


def figures(way: str, seconds: float) -> dict[str, float]:
    """What one process tells about itself."""
    with tempfile.TemporaryDirectory(prefix="proflink-benchmark-") as directory:
        done = subprocess.run(
            [sys.executable, "-c", _APPLICATION.replace("{more}", _WAYS[way]), str(seconds)],
            cwd=directory,
            stdout=subprocess.PIPE,
            check=True,
        )
    told: dict[str, float] = json.loads(done.stdout)
    return told


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    seconds, count = (1.0, 5) if options.quick else (3.0, 12)
    rounds = Rounds(_WAYS)
    for way in _WAYS:
        figures(way, 0.0)  # files cached, bytecode compiled
    for number in range(count):
        for way in _WAYS if number % 2 == 0 else reversed(_WAYS):
            rounds.add(way, figures(way, seconds))
    rows = []
    for way, base, title in (
        ("processor", "off", "`ProflinkSpanProcessor`"),
        ("instrumentor", "off, instrumented", "`ProflinkInstrumentor`"),
    ):
        rows += [
            Row(
                f"added import + start time, wall, {title}",
                rounds.difference(way, base, "wall", 1000),
                "ms",
                START,
                f"without us {rounds.typical(base, 'wall') * 1000:.0f} ms",
            ),
            Row(
                f"added import + start time, CPU, {title}",
                rounds.difference(way, base, "cpu", 1000),
                "ms",
                START,
                f"without us {rounds.typical(base, 'cpu') * 1000:.0f} ms",
            ),
            Row(
                f"added memory after the start, {title}",
                rounds.difference(way, base, "memory"),
                "MB",
                MEMORY,
                f"without us {rounds.typical(base, 'memory'):.1f} MB",
            ),
            Row(
                f"added memory after {seconds:g} s of work, {title}",
                rounds.difference(way, base, "later"),
                "MB",
                MEMORY,
                f"without us {rounds.typical(base, 'later'):.1f} MB",
            ),
        ]
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
