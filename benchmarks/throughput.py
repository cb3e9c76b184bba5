# SPDX-License-Identifier: Apache-2.0
"""Spans a second beside 0, 1 and 4 CPU-bound threads that want the GIL: on / off."""

from __future__ import annotations

import threading

from benchmarks._paired import Bar, Row, Side, arguments, measure, report
from benchmarks._setup import Everything, Scratch, tracer_with
from benchmarks.span import current

BAR = Bar(0.98, at_least=True)


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


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__)
    rows = []
    with Scratch() as output:
        everything = Everything(output)
        sides = [
            Side("off", current(tracer_with())),
            Side("on", current(everything.tracer), everything.on, everything.off),
        ]
        for hogs in (0, 1, 4):
            with Hogs(hogs):
                rounds = measure(
                    sides,
                    rounds=8 if options.quick else 40,
                    # A turn of the GIL is 5 ms, so beside four threads a cycle is 25 ms.
                    block_s=0.5 if hogs < 4 else 1.0,
                    settle_s=0.05,
                )
            rate = {side.name: 1 / rounds.typical(side.name, "wall") for side in sides}
            rows.append(
                Row(
                    f"{hogs} background threads",
                    # Throughput is the inverse of the time that a span takes.
                    rounds.ratio("off", "on", "wall"),
                    "×",
                    BAR if hogs else None,
                    f"{rate['on']:,.0f} spans/s, off {rate['off']:,.0f}",
                )
            )
    report(rows, as_json=options.json)


if __name__ == "__main__":
    main()
