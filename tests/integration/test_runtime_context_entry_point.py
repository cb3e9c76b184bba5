# SPDX-License-Identifier: Apache-2.0
"""`OTEL_PYTHON_CONTEXT=proflink`: the API itself loads our runtime context."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.processes import run_app

FIRST_IMPORTS = [
    "import opentelemetry.context",
    "from opentelemetry import trace",
    "from opentelemetry import baggage",
    "import otel_proflink",
    "import otel_proflink._linker",
    "from otel_proflink import ProflinkSpanProcessor",
    "from otel_proflink import ProflinkInstrumentor",
    "from otel_proflink import current_link",
    "from opentelemetry.sdk.trace import TracerProvider",
    "from opentelemetry.instrumentation.instrumentor import BaseInstrumentor",
]

BODY = """
import json, sys
import opentelemetry.context as api
from opentelemetry import trace
from otel_proflink import current_link

print(json.dumps({"context": type(api._RUNTIME_CONTEXT).__module__}))
span = trace.NonRecordingSpan(trace.SpanContext(1, 2, False))
token = api.attach(trace.set_span_in_context(span))
assert current_link().span_id == 2
api.detach(token)
assert current_link() is None
"""


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_no_import_order_is_circular(tmp_path: Path, first: str) -> None:
    run = run_app(tmp_path, f"{first}\n{BODY}", prelude=False, OTEL_PYTHON_CONTEXT="proflink")
    run.assert_clean()
    assert run.stderr == ""
    assert run.told["context"] == "otel_proflink._linker"


def test_loading_the_context_does_not_load_the_sdk(tmp_path: Path) -> None:
    body = """
import json, sys
import opentelemetry.context
heavy = ("opentelemetry.sdk", "opentelemetry.trace", "opentelemetry.instrumentation")
print(json.dumps({"loaded": [name for name in heavy if name in sys.modules]}))
"""
    run = run_app(tmp_path, body, prelude=False, OTEL_PYTHON_CONTEXT="proflink")
    run.assert_clean()
    assert run.told["loaded"] == []


def test_processor_over_the_context_that_is_there_already(tmp_path: Path) -> None:
    body = """
from opentelemetry.sdk.trace import TracerProvider
from otel_proflink import ProflinkSpanProcessor
import opentelemetry.context as api

loaded = api._RUNTIME_CONTEXT
provider = TracerProvider()
trace.set_tracer_provider(provider)
with tracer.start_as_current_span("before") as before:
    provider.add_span_processor(ProflinkSpanProcessor())
    assert api._RUNTIME_CONTEXT is loaded
    unit("in_before", before, None, "")()
    with tracer.start_as_current_span("root", context=api.Context()) as root:
        unit("in_root", root, None, "internal")()
unit("untraced", None)()
report()
"""
    run = run_app(tmp_path, body, OTEL_PYTHON_CONTEXT="proflink")
    run.assert_clean()
    run.verdict().assert_right()


def test_profiler_alone_without_any_processor(tmp_path: Path) -> None:
    """Spans of a provider that has no processor of ours are linked when they are attached."""
    body = """
from opentelemetry.sdk.trace import TracerProvider
import otel_proflink

trace.set_tracer_provider(TracerProvider())
with otel_proflink.Profiler():
    with tracer.start_as_current_span("root") as root:
        unit("in_root", root, None, "")()
        with tracer.start_as_current_span("child") as child:
            unit("in_child", child, root, "")()
    unit("untraced", None)()
report()
"""
    run = run_app(tmp_path, body, OTEL_PYTHON_CONTEXT="proflink")
    run.assert_clean()
    run.verdict().assert_right()
