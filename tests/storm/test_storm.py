# SPDX-License-Identifier: Apache-2.0
"""The project's highest risk: a label paired with another span's frames.

Spans of 50 us, each with a function of its own, back to back, sampled at 1 kHz and above: no
sample may carry a wrong span, none a caller/callee pair that the program does not have.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from otel_proflink import _sampler

SECONDS = "2"


@pytest.fixture(scope="module", autouse=True)
def _sampling_supported() -> None:
    try:
        _sampler.self_test()
    except _sampler.SamplerError as reason:
        pytest.skip(str(reason))


def storm(kind: str, rate: int, *options: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.storm.back_to_back_spans", "--kind", kind]
    command += ["--rate", str(rate), "--seconds", SECONDS, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    seen: dict[str, int] = json.loads(result.stdout)
    return seen


@pytest.mark.parametrize("one_cpu", [False, True], ids=["all_cpus", "one_cpu"])
@pytest.mark.parametrize("rate", [1000, pytest.param(4000, marks=pytest.mark.once)])
@pytest.mark.parametrize("kind", ["plain", "nested", "threads", "asyncio"])
def test_no_wrong_label(kind: str, rate: int, one_cpu: bool) -> None:
    seen = storm(kind, rate, *(["--one-cpu"] if one_cpu else []))
    assert seen["wrong"] == 0, seen
    assert seen["bad_pair"] == 0, seen
    # A span is attached whenever one of these functions runs: no label would be a wrong one too.
    assert seen["unlabelled"] == 0, seen
    # It must not get there by giving up: most samples are right ones, in spite of the storm.
    assert seen["right"] > 200, f"too few samples: {seen}"
    assert seen["unreadable"] < seen["right"], f"too few samples: {seen}"


@pytest.mark.parametrize("one_cpu", [False, True], ids=["all_cpus", "one_cpu"])
@pytest.mark.parametrize("kind", ["plain", "nested", "threads", "asyncio"])
def test_no_wrong_label_from_timers(kind: str, one_cpu: bool) -> None:
    """Timers tick with the kernel: some 250 times per CPU second, whatever rate is asked for."""
    options = ["--engine", "cpu_timer", *(["--one-cpu"] if one_cpu else [])]
    seen = storm(kind, 250, *options)
    assert seen["wrong"] == 0, seen
    assert seen["bad_pair"] == 0, seen
    assert seen["unlabelled"] == 0, seen
    assert seen["signals"] > 100, f"too few samples: {seen}"
    assert seen["right"] > 100, f"too few samples: {seen}"
    assert seen["unreadable"] * 20 < seen["right"], seen
