# SPDX-License-Identifier: Apache-2.0
"""Instructions of attach + detach, span start + end and a tick, by callgrind: a gate for CI.

Times on a busy machine differ by more than most regressions; counts repeat to a per mille. They are
held against those in `instructions.json`, and fail at 3 % more. Only against those of the very same
build: another interpreter, compiler or C library executes other instructions for the same work.
What the kernel does is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import otel_proflink
from benchmarks.instructions_program import MARK, SPAN_OFF, SPAN_ON, TRY_AGAIN

BASELINES = Path(__file__).with_suffix(".json")
TOLERANCE = 0.03
#: On a busy machine a thread may wake in the middle of the tick that is counted.
TRIES = 3
SPAN_OURS = f"{SPAN_ON}: our share"
#: cases that also execute OpenTelemetry's code
WITH_OPENTELEMETRY = frozenset({"attach + detach", SPAN_ON, SPAN_OURS})
#: told, but no gate: our share is the difference of two counts that each move by a percent, and
#: what reading a stack takes depends on the environment (seen: 7,546 and 8,475 in two of one build)
NOT_GATED = frozenset({SPAN_OURS, "tick, 1 thread that has run", "tick, 50 threads that have run"})

Counts = dict[str, int]
#: what must be the same: "build" for all cases, "libraries" for some, and what was counted
Baseline = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """One case held against its baseline."""

    case: str
    counted: int | None
    baseline: int | None
    result: str

    @property
    def failed(self) -> bool:
        """Whether it fails the gate."""
        return self.result in ("REGRESSION", "NOT COUNTED")


def compare(counts: Mapping[str, int], baseline: Mapping[str, int]) -> list[Verdict]:
    """Hold counts against a baseline: more than 3 % more of any is a regression.

    A case that only one of the two has is told: one that is not counted any more fails.
    """
    verdicts = []
    for case in [*baseline, *(each for each in counts if each not in baseline)]:
        counted, before = counts.get(case), baseline.get(case)
        if counted is None:
            result = "NOT COUNTED"
        elif before is None:
            result = "no baseline"
        elif case in NOT_GATED:
            result = "told, no gate"
        elif counted > before * (1 + TOLERANCE):
            result = "REGRESSION"
        elif counted < before * (1 - TOLERANCE):
            result = "fewer: update the baseline"
        else:
            result = "ok"
        verdicts.append(Verdict(case, counted, before, result))
    return verdicts


def per_repetition(sections: Sequence[tuple[str, int]], totals: Sequence[int]) -> Counts:
    """Counts of the cases, from those between two marks each.

    Args:
        sections: of each section its case and how often that was repeated in it.
        totals: instructions of each section.
    """
    counts: Counts = {}
    for case in dict.fromkeys(case for case, _ in sections):
        mine: dict[int, list[int]] = {}
        for (name, times), total in zip(sections, totals, strict=True):
            if name == case:
                mine.setdefault(times, []).append(total)
        (few, at_few), (many, at_many) = sorted(mine.items())
        counts[case] = round((median(at_many) - median(at_few)) / (many - few))
    return counts


def read_totals(directory: Path) -> list[int]:
    """Instructions between the marks, on the main thread.

    Callgrind writes a file at each mark. Those with an even number are of sections; the others are
    of what is between them.
    """
    totals = {}
    for path in directory.glob("out.*-01"):
        number = int(path.name.split(".")[1].partition("-")[0])
        found = re.search(r"^totals: (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if found is None:
            raise SystemExit(f"{path}: no totals")
        totals[number] = int(found.group(1))
    return [totals[number] for number in sorted(totals) if number % 2 == 0]


def count() -> Counts:
    """Run the program under callgrind."""
    with tempfile.TemporaryDirectory(prefix="proflink-instructions-") as name:
        directory = Path(name)
        sections = directory / "sections.json"
        command = [
            *("setarch", platform.machine(), "--addr-no-randomize"),
            *("valgrind", "--tool=callgrind", "--separate-threads=yes", f"--dump-before={MARK}"),
            *("--quiet", f"--callgrind-out-file={directory / 'out'}"),
            *(sys.executable, "-m", "benchmarks.instructions_program", str(sections)),
        ]
        env = {key: text for key, text in os.environ.items() if not key.startswith("OTEL_")}
        for tries in range(1, TRIES + 1):
            done = subprocess.run(command, env={**env, "PYTHONHASHSEED": "0"}, check=False)
            if done.returncode == 0:
                break
            if done.returncode != TRY_AGAIN or tries == TRIES:
                raise SystemExit(f"counting failed with status {done.returncode}")
            for path in directory.iterdir():
                path.unlink()
        cases = [(case, times) for case, times in json.loads(sections.read_text(encoding="utf-8"))]
        counts = per_repetition(cases, read_totals(directory))
    counts[SPAN_OURS] = counts[SPAN_ON] - counts[SPAN_OFF]
    return counts


def build() -> dict[str, str]:
    """All that decides what is executed for the same source."""
    core = Path(otel_proflink._sampler.__file__).with_name("libproflink_core.so")
    compilers = re.findall(rb"(?:GCC|clang)[^\0]*\d+\.\d+\.\d+", core.read_bytes())
    flags = re.search(r"^flags.*$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    return {
        "python": platform.python_version(),
        "python compiler": platform.python_compiler(),
        "compiler": compilers[0].decode() if compilers else "unknown",
        "C library": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        # The C library chooses its functions by it.
        "vectors": "avx2" if flags and " avx2" in flags.group() else "other",
    }


def libraries() -> dict[str, str]:
    """OpenTelemetry's packages that attach and span start + end run through."""
    return {name: version(name) for name in ("opentelemetry-api", "opentelemetry-sdk")}


def differences(baselines: Sequence[Baseline], here: Mapping[str, str]) -> str:
    """Why none of the baselines is of this build; empty if one is."""
    if any(each["build"] == here for each in baselines):
        return ""
    minor = here["python"].rpartition(".")[0]
    like = [each for each in baselines if each["build"]["python"].rpartition(".")[0] == minor]
    if not like:
        return f"no baseline for CPython {minor}"
    other = like[0]["build"]
    told = [f"{key} {other[key]}, here {here[key]}" for key in here if other[key] != here[key]]
    return "counts of another build cannot be compared; the baseline is of " + "; ".join(told)


def why_not(baselines: Sequence[Baseline]) -> str:
    """Why nothing can be counted or compared here; empty if it can."""
    for tool in ("valgrind", "setarch"):
        if shutil.which(tool) is None:
            return f"no {tool}"
    return differences(baselines, build())


def table(verdicts: Sequence[Verdict]) -> str:
    """As Markdown."""

    def number(value: int | None) -> str:
        return "" if value is None else f"{value:,}"

    lines = ["| instructions of | counted | baseline | |", "|---|---:|---:|---|"]
    for each in verdicts:
        counted, before = number(each.counted), number(each.baseline)
        lines.append(f"| {each.case} | {counted} | {before} | {each.result} |")
    return "\n".join(lines)


def main() -> int:
    """Count, and compare or update."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--update", action="store_true", help="make these counts the baseline")
    parser.add_argument(
        "--why-not", action="store_true", help="only say why there is nothing to compare, and fail"
    )
    options = parser.parse_args()
    baselines: list[Baseline] = json.loads(BASELINES.read_text(encoding="utf-8"))
    reason = why_not(baselines)
    if options.why_not:
        print(reason)
        return 1 if reason else 0
    if shutil.which("valgrind") is None or shutil.which("setarch") is None:
        print(f"not counted: {reason}")
        return 2
    counts = count()
    here = build()
    if options.update:
        entry = {"build": here, "libraries": libraries(), "counts": counts}
        minor = here["python"].rpartition(".")[0]
        kept = [
            each
            for each in baselines
            if each["build"]["python"].rpartition(".")[0] != minor
            or each["build"]["compiler"] != here["compiler"]
        ]
        text = json.dumps([*kept, entry], indent=2)
        BASELINES.write_text(text + "\n", encoding="utf-8")
    if reason:
        print(table(compare(counts, counts if options.update else {})))
        print("" if options.update else f"not compared: {reason}")
        return 0
    baseline = next(each for each in baselines if each["build"] == here)
    expected: Counts = dict(baseline["counts"])
    if baseline["libraries"] != libraries():
        print(
            f"{', '.join(sorted(WITH_OPENTELEMETRY))}: not compared, the baseline is with "
            f"{baseline['libraries']}, this is with {libraries()}"
        )
        expected = {case: n for case, n in expected.items() if case not in WITH_OPENTELEMETRY}
    # What is not ours is there to be subtracted.
    expected.pop(SPAN_OFF, None)
    counts.pop(SPAN_OFF)
    verdicts = compare(counts, expected)
    print(table(verdicts))
    return 1 if any(each.failed for each in verdicts) and not options.update else 0


if __name__ == "__main__":
    sys.exit(main())
