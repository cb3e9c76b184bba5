# SPDX-License-Identifier: Apache-2.0
"""The gate on instruction counts: what fails it, what it makes of callgrind's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import instructions

COUNTS = {"attach": 1000, "tick": 50_000}


def results(counts: dict[str, int]) -> dict[str, tuple[str, bool]]:
    return {v.case: (v.result, v.failed) for v in instructions.compare(counts, COUNTS)}


@pytest.mark.parametrize(
    ("attach", "expected"),
    [
        (1000, ("ok", False)),
        (1030, ("ok", False)),
        (1031, ("REGRESSION", True)),
        (1050, ("REGRESSION", True)),
        (970, ("ok", False)),
        (969, ("fewer: update the baseline", False)),
    ],
)
def test_three_per_cent(attach: int, expected: tuple[str, bool]) -> None:
    assert results({**COUNTS, "attach": attach}) == {"attach": expected, "tick": ("ok", False)}


def test_what_is_not_counted_any_more_fails() -> None:
    assert results({"attach": 1000})["tick"] == ("NOT COUNTED", True)


def test_a_new_case_has_no_baseline() -> None:
    assert results({**COUNTS, "new": 1})["new"] == ("no baseline", False)


def test_what_surrounds_the_repetitions_cancels() -> None:
    sections = [("a", 10), ("a", 20), ("b", 0), ("b", 1), ("b", 1), ("b", 1)]
    totals = [500 + 10 * 7, 500 + 20 * 7, 300, 300 + 9, 300 + 8, 300 + 90]
    assert instructions.per_repetition(sections, totals) == {"a": 7, "b": 9}


def test_sections_are_every_second_file(tmp_path: Path) -> None:
    for number in range(1, 13):
        (tmp_path / f"out.{number}-01").write_text(f"version: 1\nsummary: 1\n\ntotals: {number}\n")
        (tmp_path / f"out.{number}-02").write_text("totals: 999\n")
    (tmp_path / "out-01").write_text("totals: 999\n")
    assert instructions.read_totals(tmp_path) == [2, 4, 6, 8, 10, 12]


def test_counts_of_another_build_are_not_compared() -> None:
    here = instructions.build()
    assert instructions.differences([{"build": here}], here) == ""
    other = {**here, "compiler": "GCC: 4.2.1"}
    told = instructions.differences([{"build": other}], here)
    assert "cannot be compared" in told
    assert "GCC: 4.2.1" in told
    assert instructions.differences([], here).startswith("no baseline for CPython 3.")


def test_the_committed_baseline_has_what_is_gated() -> None:
    baselines = json.loads(instructions.BASELINES.read_text(encoding="utf-8"))
    assert baselines
    for each in baselines:
        assert set(each["build"]) == set(instructions.build())
        assert set(each["counts"]) > instructions.WITH_OPENTELEMETRY
        assert sum(case.startswith("tick") for case in each["counts"]) == 3


def test_what_depends_on_the_environment_is_told_only() -> None:
    case = next(iter(instructions.NOT_GATED))
    verdict, *_ = instructions.compare({case: 2000}, {case: 1000})
    assert not verdict.failed
