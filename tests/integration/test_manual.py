# SPDX-License-Identifier: Apache-2.0
"""The manual ways: the processor, the instrumentor, a profiler in hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ground_truth import needs_sampler
from tests.support.processes import run_app

PROVIDER = """
from opentelemetry.sdk.trace import TracerProvider

provider = TracerProvider()
trace.set_tracer_provider(provider)
"""

PROCESSOR = (
    PROVIDER
    + """
from otel_proflink import ProflinkSpanProcessor

provider.add_span_processor(ProflinkSpanProcessor())
"""
)

MAIN_THREAD = """
with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
    unit("in_root", root, None, "web")()
    with tracer.start_as_current_span("child") as child:
        unit("in_child", child, root, "web")()
unit("untraced", None)()
report()
"""

POOL = """
with ThreadPoolExecutor(2) as pool:
    with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
        with tracer.start_as_current_span("mid") as mid:
            pool.submit(unit("in_pool", mid, root, "web")).result()
    pool.submit(unit("untraced_task", None)).result()
"""


def test_the_processor_is_all_it_takes(tmp_path: Path) -> None:
    run = run_app(tmp_path, PROCESSOR + MAIN_THREAD)
    run.assert_clean()
    run.verdict().assert_right()
    assert run.spans


@needs_sampler
def test_the_processors_flush_and_shutdown_write(tmp_path: Path) -> None:
    body = """
import os
with tracer.start_as_current_span("root") as root:
    unit("first", root, None, "internal")()
assert provider.force_flush(10_000)
report(files=sorted(name for name in os.listdir(os.environ["OTEL_PROFLINK_OUTPUT_DIR"])))
with tracer.start_as_current_span("root") as root:
    unit("second", root, None, "internal")()
provider.shutdown()
report(files=sorted(name for name in os.listdir(os.environ["OTEL_PROFLINK_OUTPUT_DIR"])))
os._exit(0)  # no exit handler is to help
"""
    run = run_app(tmp_path, PROCESSOR + body)
    run.assert_clean()
    run.verdict().assert_right()
    assert len(run.profiles) == 2


def test_the_instrumentor_with_a_provider_of_ones_own(tmp_path: Path) -> None:
    body = """
from opentelemetry.sdk.trace import TracerProvider
from otel_proflink import ProflinkInstrumentor

provider = TracerProvider()
tracer = provider.get_tracer("app")
ProflinkInstrumentor().instrument(tracer_provider=provider)
"""
    run = run_app(tmp_path, body + POOL + MAIN_THREAD)
    run.assert_clean()
    run.verdict().assert_right()


@needs_sampler
def test_uninstrument_and_instrument_again(tmp_path: Path) -> None:
    body = """
from otel_proflink import ProflinkInstrumentor, ProflinkSpanProcessor, current_link
from otel_proflink import profiler, runtime_context

def linked():
    with ThreadPoolExecutor(1) as pool, tracer.start_as_current_span("root"):
        return pool.submit(current_link).result() is not None

seen = []
for _ in range(3):
    ProflinkInstrumentor().instrument()
    ProflinkInstrumentor().instrument()
    settle()
    seen.append([linked(), profiler.get() is not None, runtime_context.installed() is not None])
    with ThreadPoolExecutor(1) as pool, tracer.start_as_current_span("root") as root:
        pool.submit(unit(f"round_{len(seen)}", root, None, "internal")).result()
    ProflinkInstrumentor().uninstrument()
    seen.append([linked(), profiler.get() is not None, runtime_context.installed() is not None])
ours = [p for p in provider._active_span_processor._span_processors
        if isinstance(p, ProflinkSpanProcessor)]
report(seen=seen, processors=len(ours))
"""
    run = run_app(tmp_path, PROVIDER + body)
    assert run.returncode == 0, run.stderr
    assert run.told["seen"] == [[True, True, True], [False, False, False]] * 3
    assert run.told["processors"] == 1
    run.verdict().assert_right()


def test_processor_and_instrumentor_share_one_profiler(tmp_path: Path) -> None:
    body = """
from otel_proflink import ProflinkInstrumentor
ProflinkInstrumentor().instrument()
assert len(provider._active_span_processor._span_processors) == 1
"""
    run = run_app(tmp_path, PROCESSOR + body + POOL + MAIN_THREAD)
    run.assert_clean()
    run.verdict().assert_right()
    assert len(run.profiles) == 1


def test_uninstrument_leaves_the_users_own_processor_at_work(tmp_path: Path) -> None:
    body = """
from otel_proflink import ProflinkInstrumentor
ProflinkInstrumentor().instrument()
ProflinkInstrumentor().uninstrument()
"""
    run = run_app(tmp_path, PROCESSOR + body + MAIN_THREAD)
    run.assert_clean()
    run.verdict().assert_right()


@needs_sampler
@pytest.mark.parametrize("by", ["context manager", "start and stop"])
def test_a_profiler_in_hand(tmp_path: Path, by: str) -> None:
    if by == "context manager":
        body = """
import otel_proflink
profiler = otel_proflink.Profiler()
unit("never", None)  # made, not run
with profiler:
    assert profiler.running
    make("before")()
assert not profiler.running
report()
"""
    else:
        body = """
import otel_proflink
profiler = otel_proflink.start()
assert profiler.running
make("before")()
assert otel_proflink.stop()
assert not profiler.running
report()
"""
    run = run_app(tmp_path, PROVIDER + body)
    run.assert_clean()
    assert len(run.profiles) == 1


@pytest.mark.parametrize("variable", ["OTEL_PROFLINK_ENABLED", "OTEL_SDK_DISABLED"])
def test_the_processor_honours_the_switches(tmp_path: Path, variable: str) -> None:
    body = (
        MAIN_THREAD
        + """
from opentelemetry.context import _RUNTIME_CONTEXT
report(context=type(_RUNTIME_CONTEXT).__module__)
"""
    )
    value = "false" if variable == "OTEL_PROFLINK_ENABLED" else "true"
    run = run_app(tmp_path, PROCESSOR + body, **{variable: value})
    run.assert_clean()
    assert not run.capture.exists()
    assert run.told["context"] == "opentelemetry.context.contextvars_context"
