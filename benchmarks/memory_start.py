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

from benchmarks._paired import Bar, Row, Rounds, arguments, report

MEMORY = Bar(10)  # MB
START = Bar(60)  # ms

# %s: what the quick start adds. Memory is the proportional set size: what is shared with other
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
%s
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
    "processor": """
from otel_proflink import ProflinkSpanProcessor
provider.add_span_processor(ProflinkSpanProcessor())
""",
    "instrumentor": """
from otel_proflink import ProflinkInstrumentor
ProflinkInstrumentor().instrument(tracer_provider=provider)
""",
}


def figures(way: str, seconds: float) -> dict[str, float]:
    """What one process tells about itself."""
    with tempfile.TemporaryDirectory(prefix="proflink-benchmark-") as directory:
        done = subprocess.run(
            [sys.executable, "-c", _APPLICATION % _WAYS[way], str(seconds)],
            cwd=directory,
            stdout=subprocess.PIPE,
            check=True,
        )
    told: dict[str, float] = json.loads(done.stdout)
    return told


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    seconds, count = (1.0, 5) if options.quick else (5.0, 20)
    rounds = Rounds(_WAYS)
    for way in _WAYS:
        figures(way, 0.0)  # files cached, bytecode compiled
    for number in range(count):
        for way in _WAYS if number % 2 == 0 else reversed(_WAYS):
            rounds.add(way, figures(way, seconds))
    rows = []
    for way, title in (
        ("processor", "`ProflinkSpanProcessor`"),
        ("instrumentor", "`ProflinkInstrumentor`"),
    ):
        rows += [
            Row(
                f"added import + start time, {title}",
                rounds.difference(way, "off", "wall", 1000),
                "ms",
                START,
                f"CPU {rounds.difference(way, 'off', 'cpu', 1000).value:.1f} ms; "
                f"without us {rounds.typical('off', 'wall') * 1000:.0f} ms",
            ),
            Row(
                f"added memory after the start, {title}",
                rounds.difference(way, "off", "memory"),
                "MB",
                MEMORY,
                f"without us {rounds.typical('off', 'memory'):.1f} MB",
            ),
            Row(
                f"added memory after {seconds:g} s of work, {title}",
                rounds.difference(way, "off", "later"),
                "MB",
                MEMORY,
                f"without us {rounds.typical('off', 'later'):.1f} MB",
            ),
        ]
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
