# SPDX-License-Identifier: Apache-2.0
"""Spans a second beside 0, 1 and 4 CPU-bound threads that want the GIL: on / off."""

from __future__ import annotations

import threading

from benchmarks._paired import (
    Bar,
    Estimate,
    Rounds,
    Row,
    Side,
    across_processes,
    arguments,
    estimate,
    measure,
    report,
)
from benchmarks._setup import Everything, Scratch, tracer_with
from benchmarks.span import current

BARS = {
    "1": Bar(0.98, "least", "0.40 to 0.45 (ddtrace)"),
    "4": Bar(0.98, "least", "0.11 to 0.17 (ddtrace)"),
}


class Hogs:
    """Threads of pure Python that never block."""

    def __init__(self, count: int) -> None:
        self._stop = False
        self._threads = [threading.Thread(target=self._spin, daemon=True) for _ in range(count)]

    def _spin(self) -> None:
        number = 0
        while not self._stop:
            number = (number * 31 + 7) % 1_000_003

    def __enter__(self) -> Hogs:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()


def measure_all() -> dict[str, Rounds]:
    """On and off beside 0, 1 and 4 of them."""
    results = {}
    with Scratch() as output:
        everything = Everything(output)
        sides = [
            Side("off", current(tracer_with())),
            Side("on", current(everything.tracer), everything.on, everything.off),
        ]
        for count in (0, 1, 4):
            with Hogs(count):
                # Our exporter thread looks for spans once a second, and beside four threads a
                # cycle of the GIL takes 25 ms: a block has room for either.
                results[str(count)] = measure(sides, rounds=4, block_s=2.0, settle_s=0.05)
    return results


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    results = across_processes(measure_all, processes=2 if options.quick else 6, options=options)
    rows = []
    for count, rounds in results.items():
        rate = {side: 1 / rounds.typical(side, "wall") for side in ("off", "on")}
        rows.append(
            Row(
                f"{count} background threads, on / off",
                # Throughput is the inverse of the time that a span takes.
                rounds.ratio("off", "on", "wall"),
                "×",
                BARS.get(count),
                f"{rate['on']:,.0f} spans/s, off {rate['off']:,.0f}",
            )
        )
        if count != "0":
            rows.append(
                Row(
                    f"{count} background threads, the thread's share of the time, on / off",
                    share(rounds),
                    "×",
                    note="1 if no turn of the GIL is lost: the rest is the CPU of the spans",
                )
            )
    report(rows, as_json=options.json)


def share(rounds: Rounds) -> Estimate:
    """How much of the wall time the thread of the spans got, on over off."""
    got = {
        side: [
            cpu / wall
            for cpu, wall in zip(
                rounds.values(side, "thread_cpu"), rounds.values(side, "wall"), strict=True
            )
        ]
        for side in ("off", "on")
    }
    return estimate([on / off for on, off in zip(got["on"], got["off"], strict=True)])


if __name__ == "__main__":
    main()
