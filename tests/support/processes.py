# SPDX-License-Identifier: Apache-2.0
"""Real processes: an application written by a test, run as a user would run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.ground_truth import (
    SAMPLED,
    Expectation,
    Label,
    Verdict,
    read_profiles,
    verify,
)

TIMEOUT_SECONDS: Final = 60

# An application has no business with this package, so it brings its own generated functions, and
# prints what it knows: for each of them, what it ran under.
APP_PRELUDE: Final = '''
import json, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from opentelemetry import context, trace

TRUTH = {}
tracer = trace.get_tracer("app")


def make(name):
    source = (
        f"def {name}(seconds=0.06):\\n"
        "    end = clock() + seconds\\n"
        "    x = 1\\n"
        "    while clock() < end:\\n"
        "        for i in range(200):\\n"
        "            x = (x * 33 + i) % 65521\\n"
        "    return x\\n"
    )
    scope = {"clock": time.thread_time}
    exec(compile(source, f"<generated {name}>", "exec"), scope)
    return scope[name]


def settle():
    """Give the sampler's thread time to come up: on a busy machine that may take some slices."""
    time.sleep(0.1)


def unit(name, span=None, root=None, span_type=""):
    """A function that burns CPU; it is to run under `span`, or under none."""
    if not TRUTH:
        settle()
    if span is None:
        TRUTH[name] = None
    else:
        own = span.get_span_context()
        top = (root or span).get_span_context()
        TRUTH[name] = [own.trace_id, own.span_id, top.span_id, span_type]
    return make(name)


def report(**more):
    """Tell the test: JSON integers of any size, on one line."""
    print(json.dumps({"truth": TRUTH, **more}), flush=True)

'''


@dataclass(frozen=True)
class Run:
    """A process that has ended."""

    returncode: int
    stdout: str
    stderr: str
    capture: Path

    @property
    def told(self) -> dict[str, Any]:
        """What the application printed by `report`."""
        lines = [line for line in self.stdout.splitlines() if line.startswith("{")]
        assert lines, f"the application told nothing\n{self.stdout}\n{self.stderr}"
        told: dict[str, Any] = json.loads(lines[-1])
        return told

    @property
    def profiles(self) -> list[Path]:
        return sorted(self.capture.glob("profile-*.pb.gz"))

    @property
    def spans(self) -> list[Path]:
        return sorted(self.capture.glob("spans-*.json"))

    def verdict(self) -> Verdict:
        """Hold the capture against what the application said it had done."""
        if not SAMPLED:
            pytest.skip("this Python is linked, not sampled")
        expected: dict[str, Expectation] = {
            name: None if truth is None else Label(*truth)
            for name, truth in self.told["truth"].items()
        }
        return verify(read_profiles(self.capture), expected)

    def assert_clean(self) -> None:
        """Fail on a bad exit, or on anything an application's owner would find in the log."""
        assert self.returncode == 0, f"exit {self.returncode}\n{self.stdout}\n{self.stderr}"
        for sign in ("Traceback", "ERROR", "CRITICAL", "Failed to"):
            assert sign not in self.stderr, self.stderr


def run_app(
    directory: Path,
    body: str,
    *,
    zero_code: bool = False,
    prelude: bool = True,
    **env: str,
) -> Run:
    """Write an application into `directory` and run it to its end.

    Args:
        directory: working directory; the capture goes to `capture` in it.
        body: source, after `APP_PRELUDE` unless `prelude` is false.
        zero_code: run it under `opentelemetry-instrument`.
        env: environment variables on top of ours; an empty text removes one.
    """
    app = directory / "app.py"
    app.write_text((APP_PRELUDE if prelude else "") + body, encoding="utf-8")
    capture = directory / "capture"
    command = [sys.executable, str(app)]
    if zero_code:
        launcher = Path(sys.executable).with_name("opentelemetry-instrument")
        command = [str(launcher), *command]
    done = subprocess.run(
        command,
        cwd=directory,
        env=environment(capture, **env),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    return Run(done.returncode, done.stdout, done.stderr, capture)


def refusing(directory: Path) -> dict[str, str]:
    """Environment variables under which `opentelemetry-instrument` finds a foreign interpreter.

    By an entry point of OpenTelemetry's own that runs before any instrumentation is loaded.
    """
    package = directory / "refusing"
    info = package / "refusing-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: refusing\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[opentelemetry_pre_instrument]\nrefusing = refusing:refuse\n"
    )
    (package / "refusing.py").write_text(
        "def refuse():\n"
        "    from otel_proflink import _sampler\n"
        "    _sampler.shift_layout('thread.context', 8)\n"
    )
    return {"PYTHONPATH": str(package)}


def environment(capture: Path, **more: str) -> dict[str, str]:
    """An environment in which nothing of the caller's OpenTelemetry settings is left."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    env.update(
        OTEL_TRACES_EXPORTER="none",
        OTEL_METRICS_EXPORTER="none",
        OTEL_LOGS_EXPORTER="none",
        OTEL_PROFLINK_OUTPUT_DIR=str(capture),
        OTEL_PROFLINK_SAMPLE_RATE="1000",
    )
    env.update(more)
    return {key: value for key, value in env.items() if value}
