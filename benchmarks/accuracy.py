# SPDX-License-Identifier: Apache-2.0
"""How many samples carry the right span, and how right the CPU totals of spans are.

Each scenario runs in a process of its own, in which every unit of work has a function of its own:
what the exported profile says of a sample in it is right or wrong. Other profilers run the same
scenarios right after ours, if asked for; they need an environment of their own with
`opentelemetry-sdk`, the profiler, the libraries of the scenarios and `zstandard`:

    python -m benchmarks.accuracy --profilers ddtrace,pyroscope --peer-python peers/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from benchmarks.accuracy_scenarios import SCENARIOS
from benchmarks.accuracy_score import Score, score

OURS = "proflink"
TIMERS = "cpu_timer"  # ours with that engine
PEERS = (TIMERS, "ddtrace", "pyroscope")
TIMEOUT_S = 180.0
QUICK = 0.2


@dataclass(frozen=True)
class Bar:
    """What a scenario has to reach; unknown is below 1 % in any case.

    Attributes:
        right: share of right spans and right local roots.
        wrong: samples that may be wrong.
        cpu_share: least share of the burnt CPU that is charged to the right span.
        cpu_error: most error of the spans' CPU totals.
    """

    right: float
    wrong: int | None = None
    cpu_share: float | None = None
    cpu_error: float | None = None

    def met(self, found: Score) -> bool:
        """Whether all of it is reached."""
        return (
            min(found.right_share or 0, found.root_share or 0) >= self.right
            and (self.wrong is None or found.wrong <= self.wrong)
            and found.unknown_share < 0.01
            and (self.cpu_share is None or found.cpu_share >= self.cpu_share)
            and (self.cpu_error is None or (found.cpu_error or 0) <= self.cpu_error)
        )

    def __str__(self) -> str:
        parts = [f"≥ {self.right * 100:g} % right"]
        if self.wrong is not None and self.right < 1:
            parts.append(f"{self.wrong} wrong")
        if self.cpu_share is not None:
            parts.append(f"≥ {self.cpu_share * 100:g} % of the CPU")
        if self.cpu_error is not None:
            parts.append(f"error ≤ {self.cpu_error * 100:g} %")
        return ", ".join(parts)


def bar_of(scenario: str) -> Bar:
    """The bar of one scenario."""
    if "ms tasks" in scenario:
        return Bar(1.0, 0, cpu_share=0.97)
    if scenario.startswith(("main", "pool")):
        return Bar(1.0, 0)
    if scenario.startswith(("greenlet", "gevent")):
        return Bar(0.999)
    return Bar(0.999, 0, cpu_error=0.05 if "totals" in scenario else None)


def rate_of(scenario: str) -> float:
    """Samples per second to ask for. Short tasks are the test at the rate of production."""
    return 100.0 if "ms tasks" in scenario else 1000.0


class Sink:
    """A server on this machine that takes whatever agents and collectors take, and keeps it."""

    def __init__(self) -> None:
        bodies: list[bytes] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if "push" in self.path:
                    bodies.append(body)
                self._answer()

            do_PUT = do_POST  # noqa: N815

            def do_GET(self) -> None:
                self._answer()

            def _answer(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *arguments: object) -> None:
                pass

        self.bodies = bodies
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Sink:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass(frozen=True)
class Result:
    """One scenario under one profiler: its score, or why there is none."""

    scenario: str
    profiler: str
    where: str
    rate_hz: float
    score: Score | None
    reason: str = ""

    def as_json(self) -> dict[str, object]:
        """A plain dict."""
        found = self.score
        bar = bar_of(self.scenario)
        return {
            "scenario": self.scenario,
            "profiler": self.profiler,
            "where": self.where,
            "rate_hz": self.rate_hz,
            **(asdict(found) if found else {"reason": self.reason}),
            "bar": str(bar) if self.profiler in (OURS, TIMERS) else "",
            "met": bar.met(found) if found and self.profiler in (OURS, TIMERS) else None,
        }

    def as_markdown(self) -> str:
        """A line of the table."""
        begin = f"| {self.scenario} | {self.profiler} | {self.where} "
        found = self.score
        if found is None:
            return f"{begin}| — | | | | | | | {self.reason} | |"
        bar = bar_of(self.scenario)
        ours = self.profiler in (OURS, TIMERS)
        figures = [
            f"{found.samples}",
            percent(found.right_share),
            percent(found.root_share),
            f"{found.wrong}",
            percent(found.unknown_share),
            percent(found.cpu_share, 1),
            percent(found.cpu_error, 1),
            str(bar) if ours else "",
            ("met" if bar.met(found) else "**missed**") if ours else "",
        ]
        return begin + "| " + " | ".join(figures) + " |"


HEADER = (
    "| scenario | profiler | CPUs | samples | right span | right local root | wrong | unknown "
    "| CPU on the right span | error of CPU totals | bar | |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|"
)


def percent(share: float | None, digits: int = 2) -> str:
    """A share; a dash for what a profiler does not have."""
    return "—" if share is None else f"{share * 100:.{digits}f} %"


def run(scenario: str, profiler: str, python: str, where: str, effort: float) -> Result:
    """Run one scenario under one profiler, in a process of its own."""
    rate_hz = rate_of(scenario)
    reason = ""
    found = None
    with tempfile.TemporaryDirectory(prefix="proflink-accuracy-") as name, Sink() as sink:
        module = "accuracy_ddtrace" if profiler == "ddtrace" else "accuracy_scenarios"
        command = [python, "-m", f"benchmarks.{module}"]
        command += [scenario, profiler, name, str(rate_hz), sink.url, str(effort)]
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OTEL_", "DD_"))}
        try:
            ended = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
            if ended.returncode:
                lines = ended.stderr.strip().splitlines() or ["no word"]
                reason = f"exit status {ended.returncode}: {lines[-1][:120]}"
            else:
                found = score(Path(name), profiler, sink.bodies, rate_hz)
        except subprocess.TimeoutExpired:
            reason = f"not done after {TIMEOUT_S:.0f} s"
        except (ValueError, OSError) as error:
            reason = str(error)
    return Result(scenario, profiler, where, rate_hz, found, reason)


def results(
    names: Sequence[str], profilers: dict[str, str], efforts: float, cpus: Sequence[str]
) -> list[Result]:
    """Run all of it; profilers take turns within each scenario."""
    found = []
    every_cpu = os.sched_getaffinity(0)
    for where in cpus:
        # What is started from here inherits it: the profiler's own threads, too.
        os.sched_setaffinity(0, {min(every_cpu)} if where == "one" else every_cpu)
        for name in names:
            for profiler, python in profilers.items():
                began = time.monotonic()
                found.append(run(name, profiler, python, where, efforts))
                took = time.monotonic() - began
                print(f"{took:4.0f} s {found[-1].as_markdown()}", file=sys.stderr, flush=True)
    os.sched_setaffinity(0, every_cpu)
    return found


def table(found: Sequence[Result]) -> str:
    """All results as a Markdown table."""
    return "\n".join([HEADER, *(result.as_markdown() for result in found)])


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="scenarios: " + "; ".join(SCENARIOS),
    )
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help="or how it begins")
    parser.add_argument("--quick", action="store_true", help="a fifth of the work")
    parser.add_argument("--one-cpu", action="store_true", help="pinned to one CPU")
    parser.add_argument("--both", action="store_true", help="on all CPUs, then pinned to one")
    parser.add_argument(
        "--profilers", default="", metavar="NAMES", help=f"more, by commas: {','.join(PEERS)}"
    )
    parser.add_argument(
        "--peer-python", default=sys.executable, metavar="PATH", help="interpreter that has them"
    )
    parser.add_argument("--markdown", action="store_true", help="a table in Markdown (default)")
    parser.add_argument("--json", action="store_true", help="JSON instead")
    options = parser.parse_args()
    peers = [name for name in options.profilers.split(",") if name and name != OURS]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"no such profiler: {', '.join(sorted(unknown))}")
    wanted = options.scenarios or [""]
    names = [name for name in SCENARIOS if name.startswith(tuple(wanted))]
    if not names:
        parser.error("no such scenario")
    cpus = ["all", "one"] if options.both else ["one"] if options.one_cpu else ["all"]
    profilers = {OURS: sys.executable} | dict.fromkeys(peers, options.peer_python)
    if TIMERS in profilers:
        profilers[TIMERS] = sys.executable
    found = results(names, profilers, QUICK if options.quick else 1.0, cpus)
    if options.json:
        json.dump([result.as_json() for result in found], sys.stdout, indent=1)
        print()
    else:
        print(table(found))


if __name__ == "__main__":
    main()
