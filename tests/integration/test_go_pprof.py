# SPDX-License-Identifier: Apache-2.0
"""Go's `pprof`, the reader that most people have, reads what we write."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind

from otel_proflink import Profiler, ProflinkSpanProcessor, _sampler
from otel_proflink.config import Config

GO = shutil.which("go")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    try:
        _sampler.self_test()
    except _sampler.SamplerError as reason:
        pytest.skip(str(reason))
    config = Config(output_dir=str(tmp_path / "out"), sample_rate_hz=500)
    provider = TracerProvider()
    processor = ProflinkSpanProcessor(Profiler(config))
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("go")
    attributes = {"http.route": "/größe/{id}"}
    with tracer.start_as_current_span("request", kind=SpanKind.SERVER, attributes=attributes):
        burn_for_go()
    assert trace.get_current_span() is trace.INVALID_SPAN
    processor.force_flush()
    provider.shutdown()
    files = sorted((tmp_path / "out").glob("profile-*.pb.gz"))
    return files[0]


def burn_for_go() -> None:
    end = time.thread_time() + 0.3
    while time.thread_time() < end:
        pass


def go_pprof(option: str, file: Path) -> str:
    environment = os.environ | {"GOTOOLCHAIN": "local", "GOPROXY": "off"}
    command = [str(GO), "tool", "pprof", option, str(file)]
    # The first call compiles pprof.
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    ).stdout


@pytest.mark.timeout(400)
@pytest.mark.skipif(GO is None, reason="go is not installed")
def test_go_reads_samples_and_labels(profile: Path) -> None:
    raw = go_pprof("-raw", profile)
    assert "samples/count cpu/nanoseconds[dflt] wall/nanoseconds" in raw
    assert "burn_for_go" in raw
    tags = go_pprof("-tags", profile)
    for label in ("span_id", "trace_id", "local_root_span_id", "thread_state", "thread_name"):
        assert f"{label}: Total" in tags
    assert "/größe/{id}" in tags
    top = go_pprof("-top", profile)
    assert "burn_for_go" in top
    assert "<module>" in top
    assert "<unknown>" not in top
