# SPDX-License-Identifier: Apache-2.0
"""`opentelemetry-instrument python app.py` with an application that knows nothing of us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.ground_truth import needs_sampler
from tests.support.processes import refusing, run_app

# A request handler that fans out to a pool, nested spans, a child span and a nested submit in the
# worker, an untraced thread, an untraced task after a traced one, a call to another service.
APP = """
from opentelemetry.baggage.propagation import W3CBaggagePropagator

HEADERS = []


def call_other_service():
    carrier = {}
    W3CBaggagePropagator().inject(carrier)
    HEADERS.append(carrier)


def plain(burn):
    call_other_service()
    return burn()


def with_child(name, root):
    with tracer.start_as_current_span("child") as child:
        unit(name + "_one", child, root, "web")()
        with tracer.start_as_current_span("grandchild") as grandchild:
            unit(name + "_two", grandchild, root, "web")()


def nested(name, root, inner):
    inner.submit(unit(name, trace.get_current_span(), root, "web")).result()


background = threading.Thread(target=unit("background", None), args=(0.3,))
background.start()
with ThreadPoolExecutor(4) as pool, ThreadPoolExecutor(2) as inner:
    for request in range(3):
        with tracer.start_as_current_span("GET", kind=trace.SpanKind.SERVER) as root:
            root.set_attribute("http.route", "/orders")
            futures = [pool.submit(plain, unit(f"direct_{request}_{i}", root, None, "web"))
                       for i in range(3)]
            with tracer.start_as_current_span("mid") as mid:
                futures.append(pool.submit(plain, unit(f"mid_{request}", mid, root, "web")))
                futures.append(pool.submit(with_child, f"child_{request}", root))
                futures.append(pool.submit(nested, f"nested_{request}", root, inner))
            for future in futures:
                future.result()
        pool.submit(unit(f"untraced_{request}", None)).result()
background.join()
unit("main_untraced", None)()
report(headers=HEADERS)
"""


def test_everything_comes_up_by_itself(tmp_path: Path) -> None:
    run = run_app(tmp_path, APP, zero_code=True)
    run.assert_clean()
    run.verdict().assert_right(min_total=500)
    assert set(map(json.dumps, run.told["headers"])) == {"{}"}, "nothing of ours goes out"
    # Spans are captured, too, though OTEL_TRACES_EXPORTER says none.
    assert len(run.profiles) == 1
    assert len(run.spans) == 1
    names = {
        span["name"]
        for line in run.spans[0].read_text().splitlines()
        for resource in json.loads(line)["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    }
    assert names == {"GET", "mid", "child", "grandchild"}


def test_the_command_line_chooses_the_context(tmp_path: Path) -> None:
    """`OTEL_PYTHON_CONTEXT` covers the time before instrumentors run."""
    run = run_app(tmp_path, APP, zero_code=True, OTEL_PYTHON_CONTEXT="proflink")
    run.assert_clean()
    run.verdict().assert_right(min_total=500)


OFF = """
from opentelemetry.context import _RUNTIME_CONTEXT

with ThreadPoolExecutor(1) as pool, tracer.start_as_current_span("root"):
    pool.submit(make("work")).result()
report(
    ours=[m for m in sys.modules if m.startswith("otel_proflink.") and m.endswith("profiler")],
    context=type(_RUNTIME_CONTEXT).__module__,
    submit=ThreadPoolExecutor.submit.__module__ + "." + ThreadPoolExecutor.submit.__code__.co_name,
    source=ThreadPoolExecutor.submit.__code__.co_filename,
    threads=sorted(t.name for t in threading.enumerate() if "proflink" in t.name),
)
"""


@pytest.mark.parametrize(
    "switch",
    [
        {"OTEL_PYTHON_DISABLED_INSTRUMENTATIONS": "proflink"},
        {"OTEL_PROFLINK_ENABLED": "false"},
        {"OTEL_SDK_DISABLED": "true"},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_each_switch_turns_all_of_it_off(tmp_path: Path, switch: dict[str, str]) -> None:
    run = run_app(tmp_path, OFF, zero_code=True, **switch)
    run.assert_clean()
    assert not run.capture.exists()
    told = run.told
    assert told["context"] == "opentelemetry.context.contextvars_context"
    assert told["submit"] == "concurrent.futures.thread.submit"
    assert "otel_proflink" not in told["source"]
    assert told["threads"] == []


@needs_sampler
def test_the_switches_are_what_makes_the_difference(tmp_path: Path) -> None:
    run = run_app(tmp_path, OFF, zero_code=True)
    run.assert_clean()
    assert run.profiles
    assert run.told["context"] == "otel_proflink._linker"
    assert "otel_proflink" in run.told["source"]
    # And the one that looks at waiting tasks, if anything that is installed has imported asyncio.
    assert set(run.told["threads"]) - {"otel-proflink-awaits"} == {"otel-proflink-exporter"}


@needs_sampler
def test_a_python_that_is_not_sampled_is_linked_and_told_so_once(tmp_path: Path) -> None:
    run = run_app(tmp_path, OFF, zero_code=True, **refusing(tmp_path))
    run.assert_clean()
    (line,) = run.stderr.splitlines()
    assert "otel-proflink does not profile this process" in line
    assert run.told["context"] == "otel_proflink._linker"
    assert not run.capture.exists()


@pytest.mark.parametrize(
    ("variable", "value"),
    [("OTEL_PROFLINK_SAMPLE_RATE", "fast"), ("OTEL_PROFLINK_EXPORT_INTERVAL", "-1")],
)
def test_a_bad_setting_is_one_clear_log_line(tmp_path: Path, variable: str, value: str) -> None:
    run = run_app(tmp_path, OFF, zero_code=True, **{variable: value})
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, run.stderr
    assert variable in lines[0]
    assert value in lines[0]
    assert not run.capture.exists()
    assert run.told["context"] == "otel_proflink._linker", "linking goes on"


def test_an_application_that_sets_its_own_provider(tmp_path: Path) -> None:
    """No configurator: a proxy provider at first, the application's own one later."""
    body = """
from opentelemetry.sdk.trace import TracerProvider

assert type(trace.get_tracer_provider()).__name__ == "ProxyTracerProvider"
trace.set_tracer_provider(TracerProvider())
with ThreadPoolExecutor(2) as pool, tracer.start_as_current_span("root") as root:
    pool.submit(unit("in_pool", root, None, "")).result()
unit("untraced", None)()
report()
"""
    run = run_app(tmp_path, body, zero_code=True, OTEL_PYTHON_CONFIGURATOR="no_such_configurator")
    assert run.returncode == 0, run.stderr
    run.verdict().assert_right()
