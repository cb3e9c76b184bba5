# SPDX-License-Identifier: Apache-2.0
"""Memory that may not be read the usual way, and a /proc that tells little or nothing.

What is taken away is taken away for real, in a process of its own; what its profile then says is
held against what the application did.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ground_truth import needs_sampler, read_profiles
from tests.support.processes import Run, run_app

pytestmark = needs_sampler

ROOT = Path(__file__).resolve().parents[2]

# After `processes.APP_PRELUDE`. `skip` ends the application: what it could not do is not tested.
SET_UP = """
import os
from opentelemetry.sdk.trace import TracerProvider
from otel_proflink import ProflinkSpanProcessor, _sampler, current_link
from otel_proflink.profiler import get
from tests.support import refusals


def attempt(refuse, *arguments):
    try:
        refuse(*arguments)
    except refusals.NotAllowedError as reason:
        report(skipped=str(reason))
        os._exit(0)


def profile():
    provider = TracerProvider()
    trace.set_tracer_provider(provider)
    processor = ProflinkSpanProcessor()
    provider.add_span_processor(processor)
    settle()
    return processor


def linked():
    link = current_link()
    return link and [link.trace_id, link.span_id]


def work(tag, seconds=0.15):
    '''Under a root, under its child in a worker, and under none.'''
    with tracer.start_as_current_span("root", kind=trace.SpanKind.SERVER) as root:
        unit(f"root_{tag}", root, None, "web")(seconds)
        with tracer.start_as_current_span("child") as child:
            own = child.get_span_context()
            assert linked() == [own.trace_id, own.span_id]
            function = unit(f"child_{tag}", child, root, "web")
            ours = context.get_current()
            def run():
                token = context.attach(ours)
                function(seconds)
                context.detach(token)
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
    unit(f"untraced_{tag}", None)(seconds)


def tell(**more):
    running = get()
    stats = running.stats() if running else {}
    report(reader=_sampler.reader(), running=running is not None, stats=stats, **more)

"""


@pytest.fixture
def anybodys(tmp_path: Path) -> Iterator[Path]:
    """A directory that the application can still write to when it is nobody."""
    directory = Path(tempfile.mkdtemp(prefix="proflink-test-"))
    (directory / "capture").mkdir()
    for each in (directory, directory / "capture"):
        each.chmod(0o777)
    yield directory
    shutil.rmtree(directory)


def run(directory: Path, body: str) -> Run:
    done = run_app(directory, SET_UP + body, PYTHONPATH=os.fspath(ROOT))
    done.assert_clean()
    if "skipped" in done.told:
        pytest.skip(done.told["skipped"])
    return done


def complaints(done: Run) -> list[str]:
    return [line for line in done.stderr.splitlines() if "otel-proflink" in line]


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_process_vm_readv_is_refused(tmp_path: Path, error: str) -> None:
    done = run(
        tmp_path,
        f"attempt(refusals.refuse_process_vm_readv, {error!r})\nprofile()\nwork('w')\ntell()\n",
    )
    assert done.told["reader"] == "/proc/self/mem"
    assert done.told["stats"]["snapshots"] > 0
    assert done.stderr == ""
    done.verdict().assert_right()


def test_it_is_refused_once_the_profiler_runs(tmp_path: Path) -> None:
    """As by an application that reads its settings first and then locks itself in."""
    done = run(
        tmp_path,
        """
profile()
work("before")
before = _sampler.reader()
attempt(refusals.refuse_process_vm_readv, "EPERM")
work("after")
tell(before=before)
""",
    )
    assert (done.told["before"], done.told["reader"]) == ("process_vm_readv", "/proc/self/mem")
    assert done.told["stats"]["read_errors"] == 0
    done.verdict().assert_right()


NOTHING_WORKS = {
    "no proc": "attempt(refusals.empty_proc)\n",
    "not dumpable": (
        # What is imported late is imported now: nobody may not read where it lies.
        "profile().shutdown()\nrefusals.be_nobody()\nattempt(refusals.set_dumpable, False)\n"
    ),
}


@pytest.mark.parametrize("how", NOTHING_WORKS)
def test_nothing_works(anybodys: Path, how: str) -> None:
    """One line in the log; the application and its links go on."""
    done = run(
        anybodys,
        NOTHING_WORKS[how]
        + """
attempt(refusals.refuse_process_vm_readv, "EPERM")
processor = ProflinkSpanProcessor()
own_provider = TracerProvider()
own_provider.add_span_processor(processor)
tracer = own_provider.get_tracer("app")
again = ProflinkSpanProcessor()
with tracer.start_as_current_span("root") as root:
    mine = root.get_span_context()
    link = linked()
running = get() is not None
report(running=running, linked=link == [mine.trace_id, mine.span_id])
""",
    )
    assert done.told["linked"]
    assert not done.told["running"]
    second = {"no proc": "ENOENT", "not dumpable": "EACCES"}[how]
    assert complaints(done) == [
        "otel-proflink does not profile this process: memory cannot be read without faults "
        f"(process_vm_readv: EPERM, /proc/self/mem: {second}). Linking and the application go on"
    ]
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_not_dumpable(anybodys: Path) -> None:
    """The files that say what a thread does are root's; what anybody may read still tells sleep."""
    done = run(
        anybodys,
        """
processor = profile()
unit("first", None)(0.05)
processor.shutdown()
refusals.be_nobody()
attempt(refusals.set_dumpable, False)
own_provider = TracerProvider()
own_provider.add_span_processor(ProflinkSpanProcessor())
tracer = own_provider.get_tracer("app")
settle()
sleeper = threading.Thread(target=time.sleep, args=(0.8,), name="sleeper")
sleeper.start()
work("w")
sleeper.join()
tell()
""",
    )
    assert done.told["reader"] == "process_vm_readv"
    assert done.told["stats"]["state_guesses"] == 1
    assert complaints(done) == []
    done.verdict().assert_right()
    states: Counter[str] = Counter()
    for sample in read_profiles(done.capture):
        if sample.labels.get("thread_name") == "sleeper":
            states[sample.labels["thread_state"]] += sample.values["wall"]
    assert states["blocked"] > 0.9 * sum(states.values()), states


def test_no_proc(tmp_path: Path) -> None:
    done = run(tmp_path, "attempt(refusals.empty_proc)\nprofile()\nwork('w')\ntell()\n")
    assert done.told["reader"] == "process_vm_readv"
    assert done.told["stats"]["state_guesses"] == 1
    assert complaints(done) == []
    done.verdict().assert_right()


@pytest.mark.parametrize("refused", [False, True], ids=["process_vm_readv", "file"])
def test_the_application_closes_all_files(tmp_path: Path, refused: bool) -> None:
    """As daemons do. The numbers of ours are then its own files': not to be read, nor closed."""
    done = run(
        tmp_path,
        f"REFUSED = {refused}\n"
        + """
if REFUSED:
    attempt(refusals.refuse_process_vm_readv, "EPERM")
profile()
work("before")
with tracer.start_as_current_span("span"):
    unit("busy", trace.get_current_span(), None, "internal")(0.1)
    numbers = [int(n) for n in os.listdir("/proc/self/fd")]
    os.closerange(3, 1000)
    theirs = [os.open("app.py", os.O_RDONLY) for _ in range(40)]
work("after")
# Threads that end and a profiler that stops close what they have open.
get().stop()
for each in theirs:
    assert os.read(each, 8) == b"\\nimport "
report(open_before=len(numbers))
""",
    )
    assert complaints(done) == []
    done.verdict().assert_right()


def test_many_threads_that_map_memory(tmp_path: Path) -> None:
    """Reads of our memory wait for whoever changes its map: for a moment, never for good."""
    done = run(
        tmp_path,
        """
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_some():
    # All of it in the kernel, without the GIL: mapped, written to, unmapped.
    for _ in range(20):
        where = libc.mmap(None, 1 << 18, 3, 0x22 | 0x8000, -1, 0)
        libc.munmap(where, 1 << 18)


profile()
barrier = threading.Barrier(9)


def mapper(number):
    with tracer.start_as_current_span("mapper", kind=trace.SpanKind.SERVER) as span:
        name = f"mapper_{number}"
        function = unit(name, span, None, "web")
        scope = {"clock": time.thread_time, "map_some": map_some}
        exec(
            f"def {name}(seconds):\\n"
            "    end = clock() + seconds\\n"
            "    while clock() < end:\\n"
            "        map_some()\\n",
            scope,
        )
        barrier.wait()
        scope[name](0.4)


threads = [threading.Thread(target=mapper, args=(n,)) for n in range(8)]
for thread in threads:
    thread.start()
before = get().stats()
began = time.monotonic()
barrier.wait()
for thread in threads:
    thread.join()
after = get().stats()
tell(seconds=time.monotonic() - began, did={key: after[key] - before[key] for key in after})
""",
    )
    done.verdict().assert_right()
    did = done.told["did"]
    # At 1000 Hz. The kernel lets readers of the map wait while others change it: 50 to 100 ticks a
    # second are left here. Only a sampler that hangs has none.
    assert did["ticks"] > 0.01 * 1000 * done.told["seconds"], did
    assert did["give_ups"] <= 0.05 * did["snapshots"], did
