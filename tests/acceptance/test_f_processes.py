# SPDX-License-Identifier: Apache-2.0
"""Section F (fork and processes), and B8: the pool after a fork and under gevent's patches."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.children import CHILD_PRELUDE, MAIN, functions_by_pid
from tests.support.ground_truth import SAMPLED, needs_sampler
from tests.support.processes import APP_PRELUDE, Run, run_app

# CPython warns of forks in processes with threads.
QUIET = {"PYTHONWARNINGS": "ignore"}

FORKING = """
import os

def wait_for(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

"""


# Patched before anything else is imported, as an application does that means it.
PATCHED = f"""
from gevent import monkey
monkey.patch_all()
{APP_PRELUDE}
from opentelemetry.sdk.trace import TracerProvider
from otel_proflink import ProflinkInstrumentor
trace.set_tracer_provider(TracerProvider())
ProflinkInstrumentor().instrument()
"""


def run(tmp_path: Path, body: str, **env: str) -> Run:
    done = run_app(tmp_path, FORKING + body, zero_code=True, **QUIET, **env)
    done.assert_clean()
    return done


def run_patched(tmp_path: Path, body: str) -> Run:
    pytest.importorskip("gevent")
    done = run_app(tmp_path, PATCHED + FORKING + body, prelude=False, **QUIET)
    done.assert_clean()
    return done


def test_b8_pool_after_fork(tmp_path: Path) -> None:
    """A pool made before the fork is of no use to the child; one that it makes works."""
    done = run(
        tmp_path,
        """
def fan_out(pool, name, root, mid):
    futures = [pool.submit(unit(f"{name}_mid_{n}", mid, root, "web")) for n in range(3)]
    for future in futures:
        future.result()


with ThreadPoolExecutor(2) as early:
    early.submit(unit("before", None)).result()
    with tracer.start_as_current_span("GET", kind=trace.SpanKind.SERVER) as root:
        with tracer.start_as_current_span("mid") as mid:
            for name in ("child", "parent"):
                for n in range(3):
                    unit(f"{name}_mid_{n}", mid, root, "web")
            child = os.fork()
            with ThreadPoolExecutor(2) as pool:
                fan_out(pool, "parent" if child else "child", root, mid)
            if child:
                early.submit(unit("early", mid, root, "web")).result()
    if not child:
        sys.exit(0)
report(code=wait_for(child), child=child, parent=os.getpid())
""",
    )
    assert done.told["code"] == 0
    done.verdict().assert_right()
    by_pid = functions_by_pid(done.capture)
    assert {f"child_mid_{n}" for n in range(3)} <= by_pid[done.told["child"]]
    assert {f"parent_mid_{n}" for n in range(3)} <= by_pid[done.told["parent"]]


def test_b8_pool_under_gevent(tmp_path: Path) -> None:
    """Its workers are greenlets of one thread there, and switch in the middle of a task."""
    done = run_patched(
        tmp_path,
        """
import gevent


def task(burn, times=8):
    for _ in range(times):
        burn(0.02)
        gevent.sleep(0)


def with_spans(name, root):
    with tracer.start_as_current_span("one"), tracer.start_as_current_span("two") as two:
        task(unit(name, two, root, "web"))


with ThreadPoolExecutor(4) as pool:
    futures = []
    for request in range(3):
        with tracer.start_as_current_span("GET", kind=trace.SpanKind.SERVER) as root:
            with tracer.start_as_current_span("mid") as mid:
                futures.append(pool.submit(task, unit(f"mid_{request}", mid, root, "web")))
                futures.append(pool.submit(with_spans, f"deep_{request}", root))
            unit(f"main_{request}", root, None, "web")()
        futures.append(pool.submit(task, unit(f"untraced_{request}", None)))
    for future in futures:
        future.result()
    threads = {pool.submit(threading.get_native_id).result() for _ in range(4)}
report(threads=len(threads))
""",
    )
    assert done.told["threads"] == 1, "not patched"
    done.verdict().assert_right()


def test_b8_pool_under_gevent_after_fork(tmp_path: Path) -> None:
    done = run_patched(
        tmp_path,
        """
with tracer.start_as_current_span("GET", kind=trace.SpanKind.SERVER) as root:
    for name in ("child", "parent"):
        unit(name, root, None, "web")
    child = os.fork()
    with ThreadPoolExecutor(2) as pool:
        name = "parent" if child else "child"
        pool.submit(make(name), 0.15).result()
if not child:
    sys.exit(0)
report(code=wait_for(child))
""",
    )
    assert done.told["code"] == 0
    done.verdict().assert_right()


def test_f1_span_active_at_fork(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
with tracer.start_as_current_span("GET", kind=trace.SpanKind.SERVER) as root:
    with tracer.start_as_current_span("mid") as mid:
        unit("in_child", mid, root, "web")
        unit("root_in_child", root, None, "web")
        child = os.fork()
        if not child:
            make("in_child")(0.15)
            with tracer.start_as_current_span("child's own") as own:
                link = own._proflink_link
                assert link.local_root_span_id == root.get_span_context().span_id
        else:
            unit("in_parent", mid, root, "web")(0.15)
    if not child:
        make("root_in_child")(0.15)
if not child:
    sys.exit(0)
unit("after", None)()
report(code=wait_for(child), child=child, parent=os.getpid())
""",
    )
    assert done.told["code"] == 0
    done.verdict().assert_right()
    by_pid = functions_by_pid(done.capture)
    assert {"in_child", "root_in_child"} <= by_pid[done.told["child"]]
    assert "in_parent" not in by_pid[done.told["child"]]
    assert {"in_parent", "after"} <= by_pid[done.told["parent"]]


def test_f2_forks_under_load(tmp_path: Path) -> None:
    """Threads that attach, start spans and submit while others fork: 40 children, none lost."""
    done = run(
        tmp_path,
        """
from otel_proflink import profiler

over = threading.Event()


def storm(pool):
    while not over.is_set():
        with tracer.start_as_current_span("storm"):
            with tracer.start_as_current_span("inner"):
                pool.submit(int).result()


def child_of(number):
    # A pool, spans and a fork of its own: all must be usable.
    with ThreadPoolExecutor(1) as pool, tracer.start_as_current_span("child"):
        pool.submit(make("in_child"), 0.01).result()
    if number % 5 == 0:
        grandchild = os.fork()
        if grandchild:
            return wait_for(grandchild)
    return 0


with ThreadPoolExecutor(4) as pool:
    threads = [threading.Thread(target=storm, args=(pool,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    codes = []
    for number in range(40):
        with tracer.start_as_current_span("forks"):
            child = os.fork()
        if not child:
            code = child_of(number)
            if number % 2 and not profiler.stop():
                code = 1
            # Not by sys.exit: the parent's pool, which would be shut down on the way, may be
            # locked by a thread that does not exist here.
            os._exit(code)
        codes.append(wait_for(child))
    over.set()
    for thread in threads:
        thread.join()
report(codes=codes)
""",
        OTEL_PROFLINK_EXPORT_INTERVAL="100",
    )
    assert done.told["codes"] == [0] * 40
    if SAMPLED:
        assert "in_child" in set().union(*functions_by_pid(done.capture).values())


POOLS_UNDER_LOAD = """
over = threading.Event()


def storm():
    while not over.is_set():
        with tracer.start_as_current_span("storm"):
            pass


def double(number):
    with tracer.start_as_current_span("double"):
        return 2 * number


def main():
    threads = [threading.Thread(target=storm) for _ in range(2)]
    for thread in threads:
        thread.start()
    sums = []
    for _ in range(ROUNDS):
        with tracer.start_as_current_span("GET", kind=SERVER):
            with ProcessPoolExecutor(2, mp_context=mp.get_context(METHOD)) as pool:
                sums.append(sum(pool.map(double, range(10))))
    over.set()
    for thread in threads:
        thread.join()
    report(sums=sums)
"""


@pytest.mark.parametrize(("method", "rounds"), [("fork", 10), ("forkserver", 5), ("spawn", 3)])
def test_f2_process_pools_exit(tmp_path: Path, method: str, rounds: int) -> None:
    done = run(
        tmp_path,
        CHILD_PRELUDE + f"METHOD, ROUNDS = {method!r}, {rounds}\n" + POOLS_UNDER_LOAD + MAIN,
        OTEL_PROFLINK_EXPORT_INTERVAL="100",
    )
    assert done.told["sums"] == [90] * rounds


@needs_sampler
def test_f3_the_child_is_fresh_and_the_parent_undisturbed(tmp_path: Path) -> None:
    """Nothing of the parent's is sent twice; its sampler goes on through many forks."""
    done = run(
        tmp_path,
        """
from otel_proflink import profiler

with tracer.start_as_current_span("GET", kind=trace.SpanKind.SERVER) as root:
    unit("before", root, None, "web")(0.2)
    ticks = profiler.get().stats()["ticks"]
    read_end, write_end = os.pipe()
    children = []
    for number in range(20):
        child = os.fork()
        if not child:
            # Locks of the parent's are nobody's here, whatever its threads were doing.
            begin = profiler.get().stats()["ticks"]
            flushed = profiler.get().flush()
            os.write(write_end, json.dumps([begin, flushed]).encode().ljust(40))
            os._exit(0)
        children.append(child)
        make("before")(0.005)
    codes = [wait_for(child) for child in children]
    told = [json.loads(os.read(read_end, 40)) for _ in children]
    make("before")(0.2)
    more = profiler.get().stats()["ticks"] - ticks
    link = root._proflink_link
unit("after", None)()
report(codes=codes, told=told, children=children, parent=os.getpid(), ticks=ticks, more=more)
""",
    )
    told = done.told
    assert told["codes"] == [0] * 20
    assert all(flushed for _, flushed in told["told"])
    # A fresh sampler counts from zero.
    assert all(begin < told["ticks"] for begin, _ in told["told"])
    assert told["more"] > 0
    by_pid = functions_by_pid(done.capture)
    assert {"before", "after"} <= by_pid[told["parent"]]
    for child in told["children"]:
        assert not {"before", "after"} & by_pid.get(child, set())
    done.verdict().assert_right()
