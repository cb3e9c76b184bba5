# SPDX-License-Identifier: Apache-2.0
"""Paired blocks: sides take turns within one run, and only their ratios are believed.

A busy or throttled machine moves both halves of a pair alike. Each round runs every side once, in
an order that changes from round to round; a figure is the median over the rounds, with a bootstrap
95 % interval and the spread (interquartile range) of the rounds.

Where two sides run different code, the place that each lands at in memory counts too: the stock
runtime context takes 232 or 265 ns, depending on the process. Hence `across_processes`, where a
round is a process.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

RESAMPLES: Final = 2000
# Enough to fill inline caches that the side before has left pointing elsewhere.
_WARM_UP_SHARE: Final = 0.02


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        name: how tables call it.
        run: does the work `n` times; this is timed. It may return figures of its own, by name,
            which take the place of the harness's.
        enter: puts the side in place; not timed.
        leave: takes it away; not timed. It may return more figures.
    """

    name: str
    run: Callable[[int], Mapping[str, float] | None]
    enter: Callable[[], object] = _nothing
    leave: Callable[[], Mapping[str, float] | None] = _nothing


@dataclass(frozen=True)
class Estimate:
    """A median over rounds, with its bootstrap 95 % interval and the rounds' spread."""

    value: float
    low: float
    high: float
    spread: float
    rounds: int


@dataclass(frozen=True)
class Bar:
    """A figure to reach.

    Attributes:
        limit: the figure.
        sense: `most`, `least`, or `none found`: the interval must not lie above `limit` as a whole.
        peer: the best that was measured of comparable profilers, in words.
    """

    limit: float
    sense: Literal["most", "least", "none found"] = "most"
    peer: str = ""

    def met(self, found: Estimate) -> bool:
        """Whether `found`, rounded as it is shown, reaches it."""
        if self.sense == "none found":
            return round(found.low, 3) <= self.limit
        value = round(found.value, 3)
        return value >= self.limit if self.sense == "least" else value <= self.limit

    def __str__(self) -> str:
        if self.sense == "none found":
            return self.sense
        return f"{'≥' if self.sense == 'least' else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    case: str
    estimate: Estimate
    unit: str
    bar: Bar | None = None
    note: str = ""

    def as_json(self) -> dict[str, object]:
        """A plain dict; the bar as text, with its verdict."""
        return {
            "case": self.case,
            **asdict(self.estimate),
            "unit": self.unit,
            "bar": str(self.bar) if self.bar else "",
            "met": self.bar.met(self.estimate) if self.bar else None,
            "peer": self.bar.peer if self.bar else "",
            "note": self.note,
        }


class Rounds:
    """The figures of all rounds: `rounds[side][i][figure]`.

    Figures of the harness, per repetition and in seconds: `wall`, `thread_cpu` (of the calling
    thread) and `process_cpu` (of all threads, the sampler's too).
    """

    def __init__(self, sides: Iterable[str]) -> None:
        self._figures: dict[str, list[dict[str, float]]] = {name: [] for name in sides}

    def add(self, side: str, figures: dict[str, float]) -> None:
        """Append the figures of one block."""
        self._figures[side].append(figures)

    def medians(self) -> dict[str, dict[str, float]]:
        """The median of each figure of each side."""
        return {
            side: {figure: self.typical(side, figure) for figure in blocks[0]}
            for side, blocks in self._figures.items()
        }

    def values(self, side: str, figure: str) -> list[float]:
        """One figure of one side, round by round."""
        return [block[figure] for block in self._figures[side]]

    def ratio(self, side: str, base: str, figure: str) -> Estimate:
        """`side` over `base`, pair by pair."""
        pairs = zip(self.values(side, figure), self.values(base, figure), strict=True)
        return estimate([ours / theirs for ours, theirs in pairs])

    def difference(self, side: str, base: str, figure: str, scale: float = 1.0) -> Estimate:
        """`side` less `base`, pair by pair, times `scale`."""
        pairs = zip(self.values(side, figure), self.values(base, figure), strict=True)
        return estimate([(ours - theirs) * scale for ours, theirs in pairs])

    def typical(self, side: str, figure: str) -> float:
        """The median of one figure."""
        return statistics.median(self.values(side, figure))


def estimate(values: Sequence[float]) -> Estimate:
    """The median of `values` and how well it is known."""
    source = random.Random(0)  # the same rounds give the same interval
    medians = sorted(
        statistics.median(source.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    spread = 0.0
    if len(values) > 1:
        quarters = statistics.quantiles(values, n=4)
        spread = quarters[2] - quarters[0]
    return Estimate(
        value=statistics.median(values),
        low=medians[int(RESAMPLES * 0.025)],
        high=medians[int(RESAMPLES * 0.975) - 1],
        spread=spread,
        rounds=len(values),
    )


def measure(sides: Sequence[Side], *, rounds: int, block_s: float, settle_s: float = 0.0) -> Rounds:
    """Run every side once a round; all of them do the same number of repetitions.

    Args:
        sides: the first is what the length of a block is calibrated with.
        rounds: how often.
        block_s: seconds that a block of the first side shall last.
        settle_s: seconds to wait between `enter` and the work.
    """
    results = Rounds(side.name for side in sides)
    repetitions = _calibrate(sides[0], block_s)
    gc.collect()
    for number in range(rounds):
        first = number % len(sides)
        order = [*sides[first:], *sides[:first]]
        # Reversed every other time, so that each side follows each other side equally often.
        for side in order if number // len(sides) % 2 == 0 else reversed(order):
            results.add(side.name, _block(side, repetitions, settle_s))
    return results


def _block(side: Side, repetitions: int, settle_s: float) -> dict[str, float]:
    side.enter()
    if settle_s:
        time.sleep(settle_s)
    side.run(max(1, int(repetitions * _WARM_UP_SHARE)))
    wall, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
    own = side.run(repetitions)
    figures = {
        "wall": (time.perf_counter() - wall) / repetitions,
        "thread_cpu": (time.thread_time() - thread) / repetitions,
        "process_cpu": (time.process_time() - process) / repetitions,
    }
    figures.update(own or {})
    figures.update(side.leave() or {})
    return figures


def _calibrate(side: Side, block_s: float) -> int:
    side.enter()
    repetitions, took = 1, 0.0
    while True:
        began = time.perf_counter()
        side.run(repetitions)
        took = time.perf_counter() - began
        if took >= block_s / 4:
            break
        repetitions *= 4 if took < block_s / 40 else 2
    side.leave()
    return max(1, int(repetitions * block_s / took))


def across_processes(
    measure_all: Callable[[], Mapping[str, Rounds]], *, processes: int, options: argparse.Namespace
) -> dict[str, Rounds]:
    """Run `measure_all` in this many fresh processes; the medians of each are one round.

    Only for modules run by `python -m`, which must come here first thing, in every process.

    Returns:
        By case, what all processes found.
    """
    if options.child:
        json.dump({case: found.medians() for case, found in measure_all().items()}, sys.stdout)
        raise SystemExit
    module = sys.modules["__main__"].__spec__
    assert module is not None
    command = [sys.executable, "-m", module.name, "--child"]
    if options.quick:
        command.append("--quick")
    results: dict[str, Rounds] = {}
    for _ in range(processes):
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        for case, sides in json.loads(done.stdout).items():
            rounds = results.setdefault(case, Rounds(sides))
            for side, figures in sides.items():
                rounds.add(side, figures)
    return results


# -- command line ---------------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.Namespace:
    """The options that all benchmarks share."""
    summary = (description or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--quick", action="store_true", help="few rounds: wide intervals")
    parser.add_argument("--json", action="store_true", help="rows as JSON on standard output")
    parser.add_argument("--engine", default="auto", help="of the sampler: sweep or cpu_timer")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def report(rows: Sequence[Row], *, as_json: bool) -> None:
    """Print the rows, as JSON or as a Markdown table."""
    if as_json:
        json.dump([row.as_json() for row in rows], sys.stdout, ensure_ascii=False, indent=1)
        print()
    else:
        print(markdown([row.as_json() for row in rows]))


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows, as `Row.as_json` gives them, as a Markdown table."""
    lines = [
        "| case | measured | 95 % interval | spread | rounds | bar | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        case = f"{row['case']} — {row['note']}" if row["note"] else row["case"]
        lines.append(
            f"| {case} | {number(row['value'])} {row['unit']} | {interval(row)} "
            f"| {number(row['spread'])} | {row['rounds']} | {row['bar']} | {verdict(row)} |"
        )
    return "\n".join(lines)


def verdict(row: Mapping[str, Any]) -> str:
    """Whether the bar is met, "" where there is none."""
    return {True: "met", False: "**missed**", None: ""}[row["met"]]


def interval(row: Mapping[str, Any]) -> str:
    """The interval of a row."""
    return f"{number(row['low'])} to {number(row['high'])}"


def number(value: float) -> str:
    """Three decimals, or one for large figures."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"
