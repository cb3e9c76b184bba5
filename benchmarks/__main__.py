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
from typing import Any

from benchmarks._paired import interval, markdown, number, verdict

#: module -> heading
BENCHMARKS = {
    "attach_detach": "attach + detach",
    "span": "span start + end",
    "throughput": "span throughput",
    "submit": "pool submit + result",
    "slowdown": "sampling",
    "memory_start": "memory and start",
}
#: What is between these lines of a document is ours.
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


# Of one benchmark: "machine", a sentence, and "rows".
Result = dict[str, Any]


def run(name: str, quick: bool) -> Result:
    """Run one benchmark."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json"]
    if quick:
        command.append("--quick")
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {"machine": machine(quick), "rows": json.loads(done.stdout)}


def machine(quick: bool) -> str:
    """The machine in neutral words, and how busy it was."""
    return (
        f"{len(os.sched_getaffinity(0))}-core {platform.system()} VM ({platform.machine()}), "
        f"{platform.python_implementation()} {platform.python_version()}, "
        f"{datetime.now(UTC):%Y-%m-%d}, load average at the end {os.getloadavg()[0]:.1f}"
        f"{', few rounds' if quick else ''}"
    )


def summary(results: dict[str, Result]) -> str:
    """Everything that has a bar."""
    lines = [
        "| what | bar | measured | 95 % interval | | best peer |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        lines += [
            f"| {BENCHMARKS[name]}: {row['case']} | {row['bar']} "
            f"| {number(row['value'])} {row['unit']} | {interval(row)} | {verdict(row)} "
            f"| {row['peer']} |"
            for row in result["rows"]
            if row["bar"]
        ]
    return "\n".join(lines)


def document(results: dict[str, Result]) -> str:
    """All tables."""
    parts = ["### Figures beside their bars", summary(results)]
    for name, result in results.items():
        parts.append(f"### {BENCHMARKS[name].capitalize()}")
        parts.append(f"`python -m benchmarks.{name}` ({result['machine']})")
        parts.append(markdown(result["rows"]))
    return "\n\n".join(parts) + "\n"


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
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="results; those of other benchmarks in it stay"
    )
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    results: dict[str, Result] = {}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text(encoding="utf-8"))
    for name in options.names or BENCHMARKS:
        results[name] = run(name, options.quick)
        if options.json:
            text = json.dumps(results, ensure_ascii=False, indent=1)
            options.json.write_text(text, encoding="utf-8")
    text = document({name: results[name] for name in BENCHMARKS if name in results})
    if options.write:
        insert(options.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
