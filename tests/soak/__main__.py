# SPDX-License-Identifier: Apache-2.0
"""The soak: everything at once, sampled fast, for as long as wanted.

    python -m tests.soak --seconds 1800

Starts the load in a process of its own, judges its profiles as they are exported, and watches that
it goes on. Prints one line of JSON; the exit status is 0 if nothing was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from tests.soak.judge import Judge

# Without a sign of life for this long, or a kind of work without a step: it hangs.
SILENCE_S = 90.0
STANDSTILL_S = 180.0
MAX_CPU_ERROR = 0.02
MAX_WALL_ERROR = 0.01
# Of a thread that hardly ran, one sample more or less is more than that; and what it burns after
# the last profile in which it was caught running is carried to one that does not come.
CPU_SLACK_NS = 30_000_000
# Address space is taken per interval, and tables of names grow: neither without end.
MAX_GROWTH_KIB = 65_536


class Load:
    """The sampled process, and what it says."""

    def __init__(self, command: list[str], errors: IO[bytes]) -> None:
        # One thread for linear algebra: others are none of Python's, and not sampled.
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env)
        self.told: dict[str, Any] = {}
        self.children_failed = 0
        self._heard = time.monotonic()
        self._steps: list[int] = []
        self._moved: list[float] = []
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._heard = time.monotonic()
            said = json.loads(line)
            steps = said.pop("steps", None)
            if isinstance(steps, list):
                moved = self._moved or [self._heard] * len(steps)
                before = self._steps or [-1] * len(steps)
                self._moved = [
                    self._heard if now != then else at
                    for now, then, at in zip(steps, before, moved, strict=True)
                ]
                self._steps = steps
            elif steps is not None:
                said["steps"] = steps
            self.children_failed += "child_status" in said
            self.told.update(said)

    def hangs(self) -> str | None:
        """What hangs, if anything does."""
        now = time.monotonic()
        if now > self._heard + SILENCE_S:
            return "no sign of life"
        still = [i for i, at in enumerate(self._moved) if now > at + STANDSTILL_S]
        return f"no step of {[self.told['kinds'][i] for i in still]}" if still else None

    def finish(self) -> None:
        self.process.wait()
        self._listener.join()


def watch(load: Load, directory: Path, judge: Judge) -> str | None:
    """Judge what is exported until the load ends. Returns what hung."""
    hung = None
    while True:
        ended = load.process.poll() is not None
        for path in sorted(directory.glob("profile-*.pb.gz")):
            pid = int(path.name.split("-")[-3])
            judge.read(path.read_bytes(), main_process=pid == load.process.pid)
            path.unlink()
        if ended:
            load.finish()
            return hung
        hung = hung or load.hangs()
        if hung is not None:
            load.process.send_signal(signal.SIGABRT)  # faulthandler writes all stacks
        time.sleep(0.2)


def totals(judge: Judge, told: dict[str, Any]) -> dict[str, float]:
    """How far the weights are from the clocks: relative errors, the worst thread's and of all."""
    threads = {int(tid): ns for tid, ns in told["threads"].items()}
    wall = told["wall_ns"]
    # The sampler and the exporter are not sampled.
    python = told["process_cpu_ns"] - told["stats"]["sampler_cpu_ns"]
    python -= told["stats"]["exporter_cpu_ns"]
    cpu_of_all = sum(judge.cpu_ns[tid] for tid in threads) / sum(threads.values()) - 1
    wall_of_all = sum(judge.wall_ns[tid] for tid in threads) / (wall * len(threads)) - 1
    return {
        "cpu_error": cpu_of_all,
        "cpu_error_worst": max(
            (judge.cpu_ns[tid] / ns - 1 for tid, ns in threads.items() if ns > wall / 100),
            key=abs,
            default=0.0,
        ),
        "wall_error": wall_of_all,
        "wall_error_worst": max((judge.wall_ns[tid] / wall - 1 for tid in threads), key=abs),
        # Less than 1: what threads burn before the first look at them, and after the last.
        "cpu_of_process": sum(judge.cpu_ns.values()) / python,
    }


def judge_totals(judge: Judge, told: dict[str, Any]) -> None:
    wall = told["wall_ns"]
    for tid, clock in told["threads"].items():
        name, sampled = told["names"][tid], judge.cpu_ns[int(tid)]
        if abs(sampled - clock) > MAX_CPU_ERROR * clock + CPU_SLACK_NS:
            judge.fault("CPU of a thread", (name, sampled, clock))
        sampled = judge.wall_ns[int(tid)]
        if abs(sampled - wall) > MAX_WALL_ERROR * wall + CPU_SLACK_NS:
            judge.fault("wall time of a thread", (name, sampled, wall))
    errors = totals(judge, told)
    if abs(errors["cpu_error"]) > MAX_CPU_ERROR:
        judge.fault("CPU of all threads", errors)
    if abs(errors["wall_error"]) > MAX_WALL_ERROR:
        judge.fault("wall time of all threads", errors)
    if errors["cpu_of_process"] > 1 + MAX_CPU_ERROR:
        judge.fault("more CPU than the process burnt", errors)
    if told["hung_children"]:
        judge.fault("a forked child hung", told["forks"])
    if not told["flushed"]:
        judge.fault("not all was exported", told["stats"])
    for counter in ("table_overflows", "exports_failed", "exports_dropped", "exporter_errors"):
        if told["stats"].get(counter):
            judge.fault(counter, told["stats"][counter])
    if told["settled_kib"] and told["kib"] > told["settled_kib"] + MAX_GROWTH_KIB:
        judge.fault("memory grows", (told["settled_kib"], told["kib"]))
    idle = [kind for kind, steps in told["steps"].items() if steps == 0]
    if idle:
        judge.fault("a kind of work without a step", idle)


def soak(seconds: float, rate: float, engine: str) -> dict[str, Any]:
    """Run it. Returns what was seen; `faults` is empty if nothing was wrong."""
    judge = Judge()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as where, tempfile.TemporaryFile() as errors:
        command = [sys.executable, "-m", "tests.soak.load", "--seconds", str(seconds)]
        command += ["--rate", str(rate), "--engine", engine, "--directory", where]
        load = Load(command, errors)
        try:
            hung = watch(load, Path(where), judge)
        finally:
            load.process.kill()
        errors.seek(0)
        stderr = errors.read().decode(errors="replace")
    told = load.told
    if hung is not None:
        judge.fault("it hung", hung)
    if load.process.returncode != 0:
        judge.fault("bad exit", load.process.returncode)
    if load.children_failed:
        judge.fault("bad exit of a forked child", told["child_status"], load.children_failed)
    if stderr.strip():
        judge.fault("it complained", stderr[-4000:])
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "engine": engine,
        "rate_hz": rate,
        "seconds": round(time.monotonic() - began, 1),
    }
    if "final" in told:
        judge_totals(judge, told)
        result["totals"] = {key: round(x, 5) for key, x in totals(judge, told).items()}
        result |= {key: told[key] for key in ("units", "forks", "steps", "settled_kib", "kib")}
        result["stats"] = told["stats"]
    result |= {
        "missing": told.get("missing"),
        "seen": dict(judge.seen),
        "faults": dict(judge.faults),
        "examples": judge.examples,
    }
    return result


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--rate", type=float, default=1000)
    options.add_argument("--engine", choices=["sweep", "cpu_timer"], default="sweep")
    arguments = options.parse_args()
    result = soak(arguments.seconds, arguments.rate, arguments.engine)
    print(json.dumps(result))
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
