# SPDX-License-Identifier: Apache-2.0
"""Child processes: other propagators, sudden ends, failures, profilers of their own."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from opentelemetry import propagate

from tests.support.children import CHILD_PRELUDE, MAIN, METHODS, QUIET, functions_by_pid
from tests.support.children import run_with_children as run
from tests.support.ground_truth import needs_sampler
from tests.support.processes import run_app


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_child_that_reads_other_headers(tmp_path: Path, method: str) -> None:
    """The parent's set-up does not run in it, nor does its choice of a propagator."""
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
from opentelemetry import propagate
from opentelemetry.propagators.textmap import TextMapPropagator


class Odd(TextMapPropagator):
    fields = {"odd"}

    def extract(self, carrier, context=None, getter=None):
        return context or {}

    def inject(self, carrier, context=None, setter=None):
        carrier["odd"] = "1"


def main():
    propagate.set_global_textmap(Odd())
    with ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD)) as pool:
        with tracer.start_as_current_span("GET", kind=SERVER) as root:
            pool.submit(plain, expect("work", root)).result()
            expect_deep("deep", pool.submit(with_spans, "deep").result(), root)
    report()
""",
    )
    done.verdict().assert_right()


@pytest.mark.skipif(
    '"none"' not in inspect.getsource(propagate), reason="this API knows no propagator `none`"
)
@pytest.mark.parametrize("method", METHODS)
def test_no_propagator_no_label(tmp_path: Path, method: str) -> None:
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
def main():
    with ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD)) as pool:
        with tracer.start_as_current_span("GET", kind=SERVER):
            unit("work", None)
            pool.submit(plain, "work").result()
    report()
""",
        OTEL_PROPAGATORS="none",
    )
    done.verdict().assert_right()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_baggage_travels_and_stays(tmp_path: Path, method: str) -> None:
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
def main():
    token = context.attach(baggage.set_baggage("tenant", "acme"))
    queue = mp.get_context(METHOD).Queue()
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        with ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD)) as pool:
            pooled = pool.submit(outgoing).result()
        process = mp.get_context(METHOD).Process(target=told, args=(queue, outgoing))
        process.start()
        started = queue.get()
        process.join()
    report(pooled=pooled, started=started)
""",
    )
    expected = [{"tenant": "acme"}, {"baggage": "tenant=acme"}]
    assert (done.told["pooled"], done.told["started"]) == (expected, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_span_that_is_remote_here_is_no_local_root_there(tmp_path: Path, method: str) -> None:
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
def own_root():
    before = look()
    with tracer.start_as_current_span("own", kind=SERVER) as own:
        with tracer.start_as_current_span("inner"):
            return before, look(), own.get_span_context().span_id


def main():
    from opentelemetry.propagate import extract
    remote = extract({"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"})
    with ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD)) as pool:
        token = context.attach(remote)
        before, inner, own = pool.submit(own_root).result()
    report(before=before, inner=inner, own=own)
""",
    )
    trace_id, span_id = int("ab" * 16, 16), int("cd" * 8, 16)
    assert done.told["before"] == [trace_id, span_id, span_id, ""]
    assert done.told["inner"][0] == trace_id
    assert done.told["inner"][2] == done.told["own"]


@needs_sampler
@pytest.mark.parametrize("method", METHODS)
def test_children_write_where_their_parent_does(tmp_path: Path, method: str) -> None:
    """A relative directory is taken from where the parent started, not from where it is."""
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
def main():
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        process = mp.get_context(METHOD).Process(target=plain, args=(expect("work", root),))
        process.start()
        process.join()
    report(child=process.pid)
""",
        OTEL_PROFLINK_OUTPUT_DIR="capture",
    )
    done.verdict().assert_right()
    assert "work" in functions_by_pid(done.capture)[done.told["child"]]
    assert not list((tmp_path / "elsewhere").iterdir())


@needs_sampler
@pytest.mark.parametrize("method", METHODS)
def test_a_profiler_that_is_started_in_the_child(tmp_path: Path, method: str) -> None:
    """Without any of our hooks in the parent: it is flushed all the same."""
    done = run_app(
        tmp_path,
        CHILD_PRELUDE
        + f"METHOD = {method!r}\n"
        + """
def own_profiler():
    from otel_proflink import ProflinkInstrumentor
    ProflinkInstrumentor().instrument()
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        make("work")(0.2)


def main():
    process = mp.get_context(METHOD).Process(target=own_profiler)
    process.start()
    process.join()
    report(child=process.pid, code=process.exitcode)
"""
        + MAIN,
        **QUIET,
    )
    done.assert_clean()
    assert done.told["code"] == 0
    assert "work" in functions_by_pid(done.capture)[done.told["child"]]


@needs_sampler
def test_a_child_that_stopped_its_profiler_keeps_it_stopped(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
def stop():
    import otel_proflink
    otel_proflink.stop()


def main():
    with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
        with tracer.start_as_current_span("GET", kind=SERVER) as root:
            pool.submit(stop).result()
            unit("work", None)
            pid = pool.submit(plain, "work").result()
    report(child=pid)
""",
    )
    assert not list(done.capture.glob(f"profile-*-{done.told['child']}-*-1.pb.gz"))
    assert "work" not in functions_by_pid(done.capture).get(done.told["child"], set())


@needs_sampler
def test_a_pool_whose_workers_are_terminated_flushes_on_sigterm(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
def main():
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        with mp.get_context("spawn").Pool(1) as pool:  # leaves by terminate()
            child = pool.apply(plain, (expect("work", root),))
    report(child=child)
""",
        OTEL_PROFLINK_FLUSH_ON_SIGTERM="true",
    )
    done.verdict().assert_right()


@pytest.mark.parametrize("method", METHODS)
def test_failures_stay_what_they_are(tmp_path: Path, method: str) -> None:
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
class Theirs(Exception):
    pass


def fail():
    raise Theirs("theirs", 1)


def failure(future):
    error = future.exception()
    return type(error).__name__, [str(a) for a in error.args], str(error.__cause__)


def leave():
    os._exit(3)


def main():
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        with ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD)) as pool:
            theirs = failure(pool.submit(fail))
            local = failure(pool.submit(lambda: 1))
            unpicklable = failure(pool.submit(plain, threading.Lock()))
            late = pool.submit(look).result()
        with ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD)) as pool:
            broken = failure(pool.submit(leave))[0]
        with mp.get_context(METHOD).Pool(1) as pool:
            try:
                pool.apply(fail)
            except Theirs as error:
                pooled = [str(argument) for argument in error.args]
    report(theirs=theirs, local=local, unpicklable=unpicklable, late=late, broken=broken,
           pooled=pooled)
""",
    )
    told = done.told
    name, arguments, cause = told["theirs"]
    assert (name, arguments) == ("Theirs", ["theirs", "1"])
    assert "raise Theirs" in cause
    assert "instrumentation" not in cause, "no Python frame of ours in what the application logs"
    assert told["local"][0] in ("PicklingError", "AttributeError")
    assert "<lambda>" in told["local"][1][0]
    assert told["unpicklable"][0] == "TypeError"
    assert told["late"] is not None
    assert told["broken"] == "BrokenProcessPool"
    assert told["pooled"] == ["theirs", "1"]
