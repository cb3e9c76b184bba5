# SPDX-License-Identifier: Apache-2.0
"""Runs all benchmarks, each in a process of its own, and writes their tables as Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks._paired import markdown

#: module -> heading
BENCHMARKS = {
    "attach_detach": "attach + detach",
    "span": "Span start + end",
    "throughput": "Spans a second beside threads that want the GIL",
    "submit": "Thread pool: submit + result",
    "slowdown": "Application slowdown, sampler CPU and yield",
    "memory_start": "Memory, import and start",
}
#: What is between these lines of a document is ours.
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def machine(quick: bool) -> str:
    """The machine in neutral words, and how busy it was."""
    busy = os.getloadavg()[0]
    kind = "few rounds (`--quick`)" if quick else "all rounds"
    cpus = len(os.sched_getaffinity(0))
    return (
        f"{cpus}-core {platform.system()} VM ({platform.machine()}), "
        f"{platform.python_implementation()} {platform.python_version()}, "
        f"{datetime.now(UTC):%Y-%m-%d}, {kind}; load average at the end {busy:.1f}."
    )


def section(name: str, quick: bool) -> str:
    """One benchmark's heading, command and table."""
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{name}",
        "--json",
        *(["--quick"] if quick else []),
    ]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    shown = f"python -m benchmarks.{name}"
    return f"### {BENCHMARKS[name]}\n\n`{shown}`\n\n{markdown(json.loads(done.stdout))}\n"


def insert(document: Path, text: str) -> None:
    """Put `text` between the two marks of `document`.

    Raises:
        ValueError: a mark is missing.
    """
    old = document.read_text(encoding="utf-8")
    head, tail = old.index(BEGIN) + len(BEGIN), old.index(END)
    document.write_text(f"{old[:head]}\n\n{text}\n{old[tail:]}", encoding="utf-8")


def main() -> None:
    """Run, and print or insert."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=" ".join(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="few rounds: wide intervals")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="put the tables into FILE (docs/benchmarks.md)"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    sections = [section(name, options.quick) for name in options.names or BENCHMARKS]
    text = f"{machine(options.quick)}\n\n" + "\n".join(sections)
    if options.write:
        insert(options.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
