# SPDX-License-Identifier: Apache-2.0
"""How processes end, fork and are killed: real ones, each with the real sampler."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.ground_truth import needs_sampler, read_profiles
from tests.support.processes import APP_PRELUDE, TIMEOUT_SECONDS, Run, environment, run_app

# Later versions refuse to sample, and are tested for exactly that.
samples = needs_sampler

# What a manual user writes, and a helper to say "now" to the test.
SETUP = """
import os, signal
from opentelemetry.sdk.trace import TracerProvider
from otel_proflink import ProflinkSpanProcessor
from otel_proflink import profiler as proflink
provider = TracerProvider()
processor = ProflinkSpanProcessor()
provider.add_span_processor(processor)
trace.set_tracer_provider(provider)

def work(name, seconds=0.1):
    with tracer.start_as_current_span("span of " + name) as span:
        unit(name, span, span_type="internal")(seconds)

def ready():
    print("ready", flush=True)
"""


def run(tmp_path: Path, body: str, **env: str) -> Run:
    return run_app(tmp_path, SETUP + body, **env)


def run_until_ready(
    tmp_path: Path, body: str, act: Callable[[subprocess.Popen[str]], None], **env: str
) -> Run:
    """Run an application up to its `ready()`, do something to it, and see how it ends."""
    app = tmp_path / "app.py"
    app.write_text(APP_PRELUDE + SETUP + body, encoding="utf-8")
    capture = tmp_path / "capture"
    with subprocess.Popen(
        [sys.executable, str(app)],
        cwd=tmp_path,
        env=environment(capture, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and so does what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first == "ready\n", (first, process.stderr and process.stderr.read())
            act(process)
            stdout, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            process.kill()
    return Run(process.returncode, stdout, stderr, capture)


def sent(number: signal.Signals) -> Callable[[subprocess.Popen[str]], None]:
    return lambda process: process.send_signal(number)


def functions(capture: Path, pid: int | None = None) -> set[str]:
    """Names of all functions in the profiles, or in those of one process."""
    if pid is not None:
        assert all(path.name.split("-")[-3].isdigit() for path in capture.glob("profile-*"))
        only = capture / str(pid)
        only.mkdir(exist_ok=True)
        for path in capture.glob(f"profile-*-{pid}-*-*.pb.gz"):
            (only / path.name).write_bytes(path.read_bytes())
        capture = only
    return {name for sample in read_profiles(capture) for name in sample.functions}


def span_names(capture: Path) -> set[str]:
    return {
        span["name"]
        for path in capture.glob("spans-*.json")
        for line in path.read_text().splitlines()
        for resource in json.loads(line)["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    }


def our_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if "otel-proflink" in line]


def only_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text


def remove_temporary(capture: Path) -> None:
    """Of a process that was killed in the middle of a write: hidden, and pruned by later ones."""
    for path in capture.glob(".*.tmp"):
        path.unlink()


def assert_nothing_half_written(capture: Path) -> None:
    for path in capture.iterdir():
        assert re.fullmatch(r"(profile|spans)-.+-\d+-\d+-\d+\.(pb\.gz|json)", path.name), path
        assert path.stat().st_mode & 0o777 == 0o600
    read_profiles(capture)
    span_names(capture)


# -- ends of a process ----------------------------------------------------------------------------


@samples
def test_interpreter_exit(tmp_path: Path) -> None:
    done = run(tmp_path, "work('unit_a')\nreport()\n")
    done.assert_clean()
    assert done.stderr == ""
    assert "unit_a" in functions(done.capture)
    assert span_names(done.capture) == {"span of unit_a"}
    assert_nothing_half_written(done.capture)
    done.verdict().assert_right()


@samples
def test_sys_exit(tmp_path: Path) -> None:
    done = run(tmp_path, "work('unit_a')\nsys.exit(3)\n")
    assert done.returncode == 3
    assert "unit_a" in functions(done.capture)


@samples
def test_an_exception_in_user_code(tmp_path: Path) -> None:
    done = run(tmp_path, "work('unit_a')\nwork('unit_b')\nraise LookupError('theirs')\n")
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("LookupError: theirs")
    assert {"unit_a", "unit_b"} <= functions(done.capture)
    assert span_names(done.capture) == {"span of unit_a", "span of unit_b"}


@samples
def test_an_exception_inside_a_span_and_a_pool(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
with tracer.start_as_current_span("outer"):
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(work, f"unit_{n}") for n in range(4)]
        raise LookupError("theirs")
""",
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert {f"unit_{n}" for n in range(4)} <= functions(done.capture)
    assert "outer" in span_names(done.capture)


@samples
def test_os_exit(tmp_path: Path) -> None:
    done = run(tmp_path, "work('unit_a')\nprocessor.force_flush()\nwork('unit_b')\nos._exit(5)\n")
    assert done.returncode == 5
    assert done.stderr == ""
    assert "unit_a" in functions(done.capture)
    assert_nothing_half_written(done.capture)


@samples
def test_threads_that_outlive_the_main_thread(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
def later():
    time.sleep(0.2)
    work("unit_late")

def for_ever():
    function = make("unit_daemon")
    while True:
        function(0.01)

threading.Thread(target=later, name="late").start()
threading.Thread(target=for_ever, daemon=True, name="daemon").start()
pool = ThreadPoolExecutor(2)
pool.submit(work, "unit_pool")
""",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {"unit_late", "unit_pool", "unit_daemon"} <= functions(done.capture)
    assert {"span of unit_late", "span of unit_pool"} == span_names(done.capture)
    names = {sample.labels.get("thread_name") for sample in read_profiles(done.capture)}
    assert {"late", "daemon"} <= names
    assert "otel-proflink-exporter" not in names


@samples
def test_exit_handlers_of_the_application(tmp_path: Path) -> None:
    done = run(tmp_path, "import atexit\natexit.register(work, 'unit_at_exit')\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert "unit_at_exit" in functions(done.capture)
    assert span_names(done.capture) == {"span of unit_at_exit"}


@samples
def test_a_provider_that_is_shut_down_by_hand(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "work('unit_a')\nprovider.shutdown()\n"
        "report(running=proflink.get() is not None, threads=threading.active_count())\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.told["running"] is False
    assert done.told["threads"] == 1
    assert "unit_a" in functions(done.capture)


@samples
def test_start_stop_loops(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
import faulthandler
faulthandler.enable()
processor.shutdown()
profiler = proflink.Profiler()
for n in range(20):
    profiler.start()
    assert profiler.running
    work(f"unit_{n}", 0.06)
    assert profiler.stop()
report()
""",
        OTEL_PROFLINK_EXPORT_INTERVAL="100",
    )
    done.assert_clean()
    assert functions(done.capture) >= {f"unit_{n}" for n in range(20)}
    assert len(span_names(done.capture)) == 20
    done.verdict().assert_right(min_samples=1)


@samples
def test_ending_while_other_threads_make_spans(tmp_path: Path) -> None:
    for _ in range(5):
        done = run(
            tmp_path,
            """
def storm():
    while True:
        with tracer.start_as_current_span("storm"):
            pass

for n in range(8):
    threading.Thread(target=storm, daemon=True).start()
time.sleep(0.2)
""",
            OTEL_PROFLINK_EXPORT_INTERVAL="100",
        )
        assert (done.returncode, our_lines(done.stderr)) == (0, []), done.stderr


@samples
def test_flushing_from_everywhere_at_the_end(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
import atexit
work("unit_a")
atexit.register(provider.force_flush)
atexit.register(provider.shutdown)
atexit.register(proflink.stop)
atexit.register(lambda: [threading.Thread(target=processor.force_flush)])
threading.Thread(target=processor.force_flush).start()
provider.shutdown()
processor.shutdown()
processor.force_flush()
""",
    )
    assert done.returncode == 0
    assert our_lines(done.stderr) == []
    assert "unit_a" in functions(done.capture)


# -- signals --------------------------------------------------------------------------------------

WAIT = "work('unit_a')\nready()\nwhile True:\n    time.sleep(0.05)\n"


@samples
def test_sigterm_by_default_loses_at_most_one_interval(tmp_path: Path) -> None:
    def act(process: subprocess.Popen[str]) -> None:
        time.sleep(0.5)
        process.terminate()

    done = run_until_ready(tmp_path, WAIT, act, OTEL_PROFLINK_EXPORT_INTERVAL="100")
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    assert "unit_a" in functions(done.capture)
    remove_temporary(done.capture)
    assert_nothing_half_written(done.capture)


@samples
def test_sigterm_with_the_flush_setting(tmp_path: Path) -> None:
    done = run_until_ready(
        tmp_path, WAIT, sent(signal.SIGTERM), OTEL_PROFLINK_FLUSH_ON_SIGTERM="true"
    )
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
    assert "unit_a" in functions(done.capture)
    assert span_names(done.capture) == {"span of unit_a"}
    assert_nothing_half_written(done.capture)


OWN_HANDLER = """
def on_term(number, frame):
    print("theirs", flush=True)
    sys.exit(7)

"""


@pytest.mark.parametrize("flush", ["true", "false"])
@samples
def test_sigterm_with_an_application_that_exits_on_it(tmp_path: Path, flush: str) -> None:
    body = OWN_HANDLER + "signal.signal(signal.SIGTERM, on_term)\n" + WAIT
    done = run_until_ready(
        tmp_path, body, sent(signal.SIGTERM), OTEL_PROFLINK_FLUSH_ON_SIGTERM=flush
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "theirs\n", "")
    assert "unit_a" in functions(done.capture)


@samples
def test_sigterm_chains_to_the_handler_of_before(tmp_path: Path) -> None:
    app = """
import signal
seen = []
signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
"""
    body = """
work('unit_a')
ready()
while not seen:
    time.sleep(0.01)
print("theirs", seen, len(os.listdir(os.environ["OTEL_PROFLINK_OUTPUT_DIR"])), flush=True)
os._exit(0)
"""
    path = tmp_path / "early.py"
    path.write_text(app)
    done = run_until_ready(
        tmp_path,
        "proflink.stop()\nfrom early import seen\nproflink.start()\n" + body,
        sent(signal.SIGTERM),
        OTEL_PROFLINK_FLUSH_ON_SIGTERM="true",
    )
    assert (done.returncode, done.stderr) == (0, "")
    # Both parts of the capture were there before the application's own handler ran.
    assert done.stdout.startswith("theirs [15]")
    assert "unit_a" in functions(done.capture)


@samples
def test_sigterm_in_the_middle_of_busy_work(tmp_path: Path) -> None:
    """The handler runs on the main thread, between any two of its instructions."""
    body = """
def storm():
    while True:
        work("unit_other", 0.001)

for n in range(3):
    threading.Thread(target=storm, daemon=True).start()
work("unit_a")
ready()
while True:
    processor.force_flush()
    work("unit_b", 0.001)
"""
    for _ in range(3):
        done = run_until_ready(
            tmp_path, body, sent(signal.SIGTERM), OTEL_PROFLINK_FLUSH_ON_SIGTERM="true"
        )
        assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")
        assert "unit_a" in functions(done.capture)


@samples
def test_sigint(tmp_path: Path) -> None:
    done = run_until_ready(tmp_path, WAIT, sent(signal.SIGINT))
    assert done.returncode == -signal.SIGINT
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "unit_a" in functions(done.capture)
    assert span_names(done.capture) == {"span of unit_a"}


@samples
def test_sigkill_leaves_whole_files(tmp_path: Path) -> None:
    def act(process: subprocess.Popen[str]) -> None:
        time.sleep(0.5)
        process.kill()

    done = run_until_ready(tmp_path, WAIT, act, OTEL_PROFLINK_EXPORT_INTERVAL="100")
    assert done.returncode == -signal.SIGKILL
    assert "unit_a" in functions(done.capture)
    remove_temporary(done.capture)
    assert_nothing_half_written(done.capture)


# -- refusals -------------------------------------------------------------------------------------


LINKED = """
from otel_proflink import current_link
with tracer.start_as_current_span("s") as span:
    linked = current_link().span_id == span.get_span_context().span_id
"""


@samples
def test_an_unwritable_output_directory(tmp_path: Path) -> None:
    (tmp_path / "blocker").write_text("a file")
    done = run(
        tmp_path,
        "work('unit_a')\nprocessor.force_flush()\nwork('unit_b')\nreport()\n",
        OTEL_PROFLINK_OUTPUT_DIR=str(tmp_path / "blocker" / "out"),
        OTEL_PROFLINK_EXPORT_INTERVAL="100",
    )
    assert done.returncode == 0
    assert done.told
    line = only_line(done.stderr)
    assert "otel-proflink cannot write to" in line
    assert "blocker" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_without_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = run(tmp_path, "work('unit_a')\n", OTEL_PROFLINK_OUTPUT_DIR=str(locked))
    assert done.returncode == 0
    line = only_line(done.stderr)
    assert "Permission denied" in line


def test_a_bad_setting(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "proflink.start()\n"
        + LINKED
        + "report(linked=linked, running=proflink.get() is not None)\n",
        OTEL_PROFLINK_SAMPLE_RATE="fast",
    )
    assert done.returncode == 0
    assert done.told["linked"] is True
    assert done.told["running"] is False
    line = only_line(done.stderr)
    assert "OTEL_PROFLINK_SAMPLE_RATE='fast'" in line
    assert "1 to 10000" in line
    assert not done.capture.exists()


@pytest.mark.parametrize("variable", ["OTEL_PROFLINK_ENABLED=false", "OTEL_SDK_DISABLED=true"])
def test_switched_off(tmp_path: Path, variable: str) -> None:
    name, _, value = variable.partition("=")
    done = run(
        tmp_path,
        "work('unit_a')\nreport(threads=threading.active_count())\n",
        **{name: value},
    )
    assert (done.returncode, our_lines(done.stderr)) == (0, [])
    assert done.told["threads"] == 1
    assert not done.capture.exists()


@samples
def test_an_interpreter_that_is_laid_out_otherwise(tmp_path: Path) -> None:
    moved = """
from otel_proflink import _sampler
_sampler.shift_layout("thread.context", 8)
"""
    done = run_app(tmp_path, moved + SETUP + LINKED + "report(linked=linked)\n")
    assert done.returncode == 0
    assert done.told["linked"] is True
    line = only_line(done.stderr)
    assert "otel-proflink does not profile this process: the frames or the context" in line
    assert not done.capture.exists()


# -- forks ----------------------------------------------------------------------------------------


@samples
def test_fork(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
work("unit_before")
with tracer.start_as_current_span("active") as active:
    unit("unit_child", active, span_type="internal")
    unit("unit_parent", active, span_type="internal")
    child = os.fork()
    if child == 0:
        make("unit_child")(0.15)
    else:
        make("unit_parent")(0.15)
if child == 0:
    sys.exit(0)
_, status = os.waitpid(child, 0)
work("unit_after")
report(child=child, parent=os.getpid(), status=status)
""",
    )
    done.assert_clean()
    told = done.told
    assert told["status"] == 0
    in_child = functions(done.capture, told["child"])
    in_parent = functions(done.capture, told["parent"])
    assert "unit_child" in in_child
    assert not {"unit_before", "unit_parent", "unit_after"} & in_child
    assert {"unit_before", "unit_parent", "unit_after"} <= in_parent
    assert "unit_child" not in in_parent
    done.verdict().assert_right()


@samples
def test_a_forked_child_does_not_send_what_the_parent_sampled(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
work("unit_before")
child = os.fork()
if child == 0:
    os._exit(0 if processor.force_flush() else 1)
_, status = os.waitpid(child, 0)
report(child=child, parent=os.getpid(), status=status)
""",
    )
    done.assert_clean()
    assert done.told["status"] == 0
    assert "unit_before" not in functions(done.capture, done.told["child"])
    assert not list(done.capture.glob(f"spans-*-{done.told['child']}-*"))
    assert "unit_before" in functions(done.capture, done.told["parent"])


@pytest.mark.parametrize("kind", ["process", "pool"])
@samples
def test_children_of_multiprocessing(tmp_path: Path, kind: str) -> None:
    use = {
        "process": """
    children = [context_of.Process(target=work, args=(f"unit_{n}",)) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    report(codes=[child.exitcode for child in children])
""",
        "pool": """
    from concurrent.futures import ProcessPoolExecutor
    with ProcessPoolExecutor(2, mp_context=context_of) as pool:
        list(pool.map(work, [f"unit_{n}" for n in range(3)]))
    report(codes=[0, 0, 0])
""",
    }[kind]
    done = run(
        tmp_path,
        "import multiprocessing\ncontext_of = multiprocessing.get_context('fork')\n"
        "work('unit_parent')\nif True:" + use,
        PYTHONWARNINGS="ignore",
    )
    done.assert_clean()
    assert done.told["codes"] == [0, 0, 0]
    assert {"unit_0", "unit_1", "unit_2", "unit_parent"} <= functions(done.capture)
    assert span_names(done.capture) >= {"span of unit_0", "span of unit_1", "span of unit_2"}


@samples
def test_forks_under_load(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
def storm():
    while True:
        with tracer.start_as_current_span("storm"):
            pass

for n in range(4):
    threading.Thread(target=storm, daemon=True).start()
bad = []
for n in range(40):
    child = os.fork()
    if child == 0:
        with tracer.start_as_current_span("child"):
            make("unit_child")(0.01)
        if n % 3 == 0:
            os._exit(0)
        if n % 3 == 1:
            processor.force_flush()
            os._exit(0)
        sys.exit(0)
    if n % 4 == 0:
        processor.force_flush()
    _, status = os.waitpid(child, 0)
    if status:
        bad.append((n, status))
report(bad=bad)
""",
        PYTHONWARNINGS="ignore",
        OTEL_PROFLINK_EXPORT_INTERVAL="100",
    )
    assert done.returncode == 0, done.stderr
    assert done.told["bad"] == []
    assert our_lines(done.stderr) == []
    assert "unit_child" in functions(done.capture)


@samples
def test_a_fork_of_a_fork(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
if os.fork() == 0:
    if os.fork() == 0:
        work("unit_grandchild")
        sys.exit(0)
    _, status = os.wait()
    work("unit_child")
    sys.exit(status)
_, status = os.wait()
report(status=status)
""",
    )
    done.assert_clean()
    assert done.told["status"] == 0
    assert {"unit_child", "unit_grandchild"} <= functions(done.capture)


@samples
def test_a_supervisor_samples_nothing_and_its_workers_do(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
supervisor = proflink.get() is not None
children = []
for n in range(2):
    child = os.fork()
    if child == 0:
        work(f"unit_{n}")
        sys.exit(0)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
report(supervisor=supervisor, threads=threading.active_count(), codes=codes, pid=os.getpid())
""",
        OTEL_PROFLINK_START="first_span",
    )
    done.assert_clean()
    assert done.told["supervisor"] is False
    assert done.told["threads"] == 1
    assert done.told["codes"] == [0, 0]
    assert {"unit_0", "unit_1"} <= functions(done.capture)
    assert not list(done.capture.glob(f"*-{done.told['pid']}-*"))


def test_processes_started_from_a_profiled_one(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
import subprocess
codes = [
    subprocess.run([sys.executable, "-c", "pass"], check=False).returncode,
    subprocess.run(["true"], preexec_fn=lambda: None, check=False).returncode,
    os.waitstatus_to_exitcode(os.system("true")),
]
report(codes=codes)
""",
        PYTHONWARNINGS="ignore",
    )
    done.assert_clean()
    assert done.told["codes"] == [0, 0, 0]


@samples
def test_sigterm_in_a_forked_child(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
read_end, write_end = os.pipe()
child = os.fork()
if child == 0:
    work("unit_child")
    os.write(write_end, b"x")
    while True:
        time.sleep(0.05)
os.read(read_end, 1)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
report(status=os.waitstatus_to_exitcode(status))
""",
        OTEL_PROFLINK_FLUSH_ON_SIGTERM="true",
    )
    done.assert_clean()
    assert done.told["status"] == -signal.SIGTERM
    assert "unit_child" in functions(done.capture)


@samples
def test_a_fork_in_c_that_python_is_not_told_of(tmp_path: Path) -> None:
    """What uWSGI can do: no `os.register_at_fork` hook runs in the child.

    CPython, not told either, still thinks of the thread that forked by the thread id of the parent:
    only threads that the child starts can be sampled.
    """
    done = run(
        tmp_path,
        """
import ctypes
work("unit_before")
child = ctypes.PyDLL(None).fork()
if child == 0:
    processor.force_flush()
    thread = threading.Thread(target=work, args=("unit_child",))
    thread.start()
    thread.join()
    os._exit(0 if processor.force_flush() else 1)
_, status = os.waitpid(child, 0)
work("unit_after")
report(child=child, parent=os.getpid(), status=status)
""",
    )
    done.assert_clean()
    assert done.told["status"] == 0
    assert "unit_child" in functions(done.capture, done.told["child"])
    assert "unit_before" not in functions(done.capture, done.told["child"])
    assert {"unit_before", "unit_after"} <= functions(done.capture, done.told["parent"])


# -- endpoints ------------------------------------------------------------------------------------


@samples
def test_an_unfinished_request_gets_its_endpoint_later(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
from opentelemetry.trace import SpanKind
with tracer.start_as_current_span("GET", kind=SpanKind.SERVER) as span:
    make("unit_slow")(0.1)
    processor.force_flush()
    span.set_attribute("http.route", "/slow/{id}")
processor.force_flush()
""",
    )
    done.assert_clean()
    found = {
        sample.labels.get("endpoint")
        for sample in read_profiles(done.capture)
        if "unit_slow" in sample.functions
    }
    assert found == {"/slow/{id}"}


# -- gevent ---------------------------------------------------------------------------------------


@samples
def test_under_gevent_the_exporter_is_a_real_thread(tmp_path: Path) -> None:
    pytest.importorskip("gevent")
    app = tmp_path / "patched.py"
    app.write_text(
        "from gevent import monkey\nmonkey.patch_all()\n" + APP_PRELUDE + SETUP + "import gevent\n"
        """
gevent.joinall([gevent.spawn(work, f"unit_{n}") for n in range(3)])
make("unit_busy")(0.5)  # yields to nobody
files = len(os.listdir(os.environ["OTEL_PROFLINK_OUTPUT_DIR"]))
threading.Thread(target=work, args=("unit_late",)).start()
report(files=files, tasks=len(os.listdir("/proc/self/task")))
""",
        encoding="utf-8",
    )
    capture = tmp_path / "capture"
    ended = subprocess.run(
        [sys.executable, str(app)],
        cwd=tmp_path,
        env=environment(capture, OTEL_PROFLINK_EXPORT_INTERVAL="100"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    done = Run(ended.returncode, ended.stdout, ended.stderr, capture)
    done.assert_clean()
    assert done.told["files"] >= 3, "it wrote while the only greenlet that ran was busy"
    assert {"unit_0", "unit_1", "unit_2", "unit_busy", "unit_late"} <= functions(capture)
    names = {sample.labels.get("thread_name") for sample in read_profiles(capture)}
    assert "MainThread" in names
    assert len(span_names(capture)) == 4
