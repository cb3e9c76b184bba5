# SPDX-License-Identifier: Apache-2.0
"""Free-threaded CPython stays free-threaded, and what threads share in the linker holds."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable

import pytest
from opentelemetry import context as context_api
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import INVALID_SPAN, get_current_span, set_span_in_context, use_span

from otel_proflink import _linker, runtime_context
from tests.support.ground_truth import LinksOnly, linking

THREADS = 4

free_threaded = pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has the GIL"
)


def together(work: Callable[[int], None]) -> None:
    """Run `work(i)` in several threads that begin at the same time; what one raises is raised."""
    barrier = threading.Barrier(THREADS)
    failed: list[BaseException] = []

    def run(number: int) -> None:
        try:
            barrier.wait(30)
            work(number)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_a_build_knows_what_it_was_built_for() -> None:
    assert bool(sysconfig.get_config_var("Py_GIL_DISABLED")) == _linker.FREE_THREADED


@free_threaded
def test_our_modules_do_not_turn_the_gil_on() -> None:
    program = (
        "import sys\n"
        "from otel_proflink import _awaits, _linker, _sampler, ProflinkSpanProcessor, start\n"
        "_sampler.start(1000)\n"
        "assert sys._is_gil_enabled() is False\n"
        "_sampler.stop()\n"
    )
    environment = {"PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_names_that_many_threads_make_up() -> None:
    # Four generations of names, all threads with the same ones: each span must show its own.
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(LinksOnly())
    tracer = provider.get_tracer("names")
    wrong: list[str] = []

    def work(number: int) -> None:
        for i in range(6000):
            name = f"name {i // 2 if i % 2 else number * 100000 + i}"
            tracer.start_span(name)
            if i % 500 == 0:
                texts = _linker.span_names()
                if len(texts) > 3 * 8192 or not all(type(text) is str for text in texts.values()):
                    wrong.append(name)

    together(work)
    assert not wrong
    assert len(_linker.span_names()) <= 2 * 8192 + THREADS


def test_attach_and_detach_in_many_threads() -> None:
    before = _linker.live_links()

    def work(number: int) -> None:
        tracer = provider.get_tracer(f"tracer {number}")
        for i in range(3000):
            with tracer.start_as_current_span(f"{number}.{i % 50}") as span:
                link = _linker.current_link()
                assert link is not None
                assert link.span_id == span.get_span_context().span_id
            assert get_current_span() is INVALID_SPAN

    with linking(pool=False) as provider:
        together(work)
    assert _linker.live_links() <= before + THREADS


def test_the_hook_leaves_while_threads_attach() -> None:
    # Whoever attaches while the hook leaves must find its span, and get rid of it again.
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(LinksOnly())
    tracer = provider.get_tracer("leaving")
    stopping = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            try:
                for _ in range(1500):
                    runtime_context.install()
                    # A thread that was taking the hook out at that moment puts it back.
                    deadline = time.monotonic() + 30
                    while runtime_context.installed() is None:
                        assert time.monotonic() < deadline
                    runtime_context.uninstall()
            finally:
                stopping.set()
            return
        while not stopping.is_set():
            span = tracer.start_span("s")
            token = context_api.attach(set_span_in_context(span))
            assert get_current_span() is span
            with use_span(span):
                assert get_current_span() is span
            context_api.detach(token)
            assert get_current_span() is INVALID_SPAN

    try:
        together(work)
    finally:
        stopping.set()
        runtime_context.uninstall()
