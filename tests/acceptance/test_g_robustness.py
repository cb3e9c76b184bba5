# SPDX-License-Identifier: Apache-2.0
"""Section G: what else is in a process, and what is done to it. Judged by the exported profile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.ground_truth import needs_sampler, read_profiles
from tests.support.processes import APP_PRELUDE, Run, environment, run_app

pytestmark = needs_sampler

SET_UP = """
import faulthandler, os, signal
from opentelemetry.sdk.trace import TracerProvider
from otel_proflink import Profiler, ProflinkSpanProcessor
provider = TracerProvider()
trace.set_tracer_provider(provider)


def begin():
    processor = ProflinkSpanProcessor()
    provider.add_span_processor(processor)
    settle()
    return processor


def work(tag):
    with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
        unit(f"root_{tag}", root, None, "web")(0.15)
        with tracer.start_as_current_span("child") as child:
            unit(f"child_{tag}", child, root, "web")(0.15)
    unit(f"untraced_{tag}")(0.1)
"""


def run(tmp_path: Path, body: str, **env: str) -> Run:
    done = run_app(tmp_path, SET_UP + body, **env)
    done.assert_clean()
    done.verdict().assert_right()
    return done


def test_faulthandler_before_during_and_after(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
faulthandler.enable(open("dump", "w"))
processor = begin()
work("before")
faulthandler.disable()
work("without")
faulthandler.enable(open("dump", "w"))
faulthandler.dump_traceback(open("trace", "w"))
work("during")
provider.shutdown()
faulthandler.disable()
faulthandler.enable(open("dump", "w"))
report()
""",
    )
    assert (tmp_path / "dump").read_text() == ""
    assert "most recent call first" in (tmp_path / "trace").read_text()


def test_a_crash_is_still_faulthandlers(tmp_path: Path) -> None:
    """SIGSEGV belongs to the application: we have no handler of it, before or after a start."""
    done = run_app(
        tmp_path,
        SET_UP
        + """
faulthandler.enable(open("dump", "w"))
begin()
work("crash")
report()
os.kill(os.getpid(), signal.SIGSEGV)
""",
    )
    assert done.returncode == -11
    assert "Segmentation fault" in (tmp_path / "dump").read_text()


def test_a_handler_of_sigsegv_that_comes_later(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
begin()
caught = []
signal.signal(signal.SIGSEGV, lambda number, frame: caught.append(number))
work("first")
os.kill(os.getpid(), signal.SIGSEGV)
work("second")
report(caught=len(caught))
""",
    )
    assert done.told["caught"] == 1


def test_fork_with_faulthandler(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
faulthandler.enable(open("dump", "w"))
begin()
work("parent")
for n in range(3):
    child = os.fork()
    if child == 0:
        settle()
        work(f"forked_{n}")
        with open("truth", "w") as file:
            json.dump(TRUTH, file)
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    with open("truth") as file:
        TRUTH.update(json.load(file))
report()
""",
    )
    assert (tmp_path / "dump").read_text() == ""


def test_stopped_and_started_in_turns(tmp_path: Path) -> None:
    """Stopped twice, started twice, stopped while nothing runs."""
    run(
        tmp_path,
        """
profiler = Profiler()
provider.add_span_processor(ProflinkSpanProcessor(profiler))
settle()
work("first")
for _ in range(10):
    profiler.stop()
    profiler.stop()
    profiler.start()
    profiler.start()
settle()
work("second")
profiler.stop()
tracer.start_span("while stopped").end()
profiler.start()
settle()
work("third")
profiler.stop()
report()
""",
    )


def test_forty_threads(tmp_path: Path) -> None:
    run(
        tmp_path,
        """
begin()
def one(number):
    with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
        unit(f"thread_{number}", root, None, "web")(0.15)
threads = [threading.Thread(target=one, args=(n,)) for n in range(45)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
report()
""",
    )


@pytest.mark.parametrize("engine", ["sweep", "cpu_timer"])
@pytest.mark.parametrize("limit", [1, 2, 5, 64])
def test_frame_limit(tmp_path: Path, limit: int, engine: str) -> None:
    """Both ends are kept, and how many frames are missing between them is said."""
    done = run(
        tmp_path,
        """
begin()
def descend(function, depth):
    return descend(function, depth - 1) if depth else function(0.4)
with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
    descend(unit("deepest", root, None, "web"), 200)
report()
""",
        OTEL_PROFLINK_MAX_FRAMES=str(limit),
        OTEL_PROFLINK_ENGINE=engine,
    )
    deep = [
        sample
        for sample in read_profiles(done.capture)
        if sample.functions and sample.functions[0] == "deepest"
    ]
    assert deep
    for sample in deep:
        names = sample.functions
        assert len(names) == limit + 1
        place = (limit + 1) // 2
        assert names[place].endswith("frames omitted]")
        # 201 of descend(), deepest() and the module.
        assert int(names[place].strip("[").split()[0]) == 203 - limit
        if limit > 1:
            assert names[-1] == "<module>"


EMBEDDING = r"""
#include <Python.h>
int main(int argc, char** argv) {
    FILE* app = argc == 2 ? fopen(argv[1], "r") : NULL;
    Py_InitializeEx(0);
    if (app == NULL || PyRun_SimpleFileEx(app, argv[1], 1) != 0) return 1;
    return Py_FinalizeEx() == 0 ? 0 : 2;
}
"""


def test_an_embedded_interpreter(tmp_path: Path) -> None:
    """No command line of Python's, no `sys.executable` of its own; ended by Py_FinalizeEx."""
    shared = sysconfig.get_config_var("Py_ENABLE_SHARED")
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    if shutil.which("cc") is None or not shared or not library.exists():
        pytest.skip("needs a C compiler and a shared libpython")
    (tmp_path / "embed.c").write_text(EMBEDDING)
    (tmp_path / "app.py").write_text(
        # As an embedder does that uses a virtual environment.
        f"import site\nsite.addsitedir({sysconfig.get_path('purelib')!r})\n"
        + APP_PRELUDE
        + SET_UP
        + """
begin()
work("embedded")
provider.shutdown()
report()
"""
    )
    subprocess.run(
        ["cc", "embed.c", "-o", "embed", f"-I{sysconfig.get_path('include')}", str(library)],
        cwd=tmp_path,
        check=True,
    )
    capture = tmp_path / "capture"
    ended = subprocess.run(
        [tmp_path / "embed", "app.py"],
        cwd=tmp_path,
        env=environment(
            capture, LD_LIBRARY_PATH=os.fspath(library.parent), PYTHONHOME=sys.base_prefix
        ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    done = Run(ended.returncode, ended.stdout, ended.stderr, capture)
    done.assert_clean()
    done.verdict().assert_right()
    assert json.loads(ended.stdout.splitlines()[-1])["truth"]
