# SPDX-License-Identifier: Apache-2.0
"""Child processes by every start method: the label travels with the work, and they profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.children import METHODS, functions_by_pid
from tests.support.children import run_with_children as run
from tests.support.ground_truth import SAMPLED, needs_sampler, read_profiles

POOL = """
def main():
    parent = unit("parent_before", None)()
    with ProcessPoolExecutor(2, mp_context=mp.get_context(METHOD)) as pool:
        with tracer.start_as_current_span("GET", kind=SERVER) as root:
            children = {pool.submit(plain, expect("direct", root)).result()}
            with tracer.start_as_current_span("mid") as mid:
                futures = [pool.submit(plain, expect(f"mid_{n}", mid, root)) for n in range(3)]
                futures.append(pool.submit(plain, name=expect("named", mid, root)))
                mapped = pool.map(plain, [expect(f"map_{n}", mid, root) for n in range(3)],
                                  chunksize=2)
                unit("parent_during", mid, root, "web")()
                children |= {future.result() for future in futures} | set(mapped)
                expect_deep("deep", pool.submit(with_spans, "deep").result(), root)
                seen = pool.submit(outgoing).result()
            unit("parent_root", root, None, "web")()
        unit("untraced", None)
        children.add(pool.submit(plain, "untraced").result())
        idle = pool.submit(look).result()
    unit("parent_after", None)()
    report(children=sorted(children), pid=os.getpid(), seen=seen, idle=idle)
"""


@pytest.mark.parametrize("zero_code", [False, True], ids=["manual", "zero code"])
@pytest.mark.parametrize("method", METHODS)
def test_process_pool_executor(tmp_path: Path, method: str, zero_code: bool) -> None:
    done = run(tmp_path, f"METHOD = {method!r}\n{POOL}", zero_code=zero_code)
    told = done.told
    assert told["seen"] == [{}, {}]
    assert told["idle"] is None
    if SAMPLED:
        by_pid = functions_by_pid(done.capture)
        assert set(told["children"]) <= set(by_pid), "each child writes its own files"
        assert told["pid"] not in told["children"]
        work = {"direct", "deep", "untraced", "map_0", "map_1", "map_2", "mid_0"}
        assert not work & by_pid[told["pid"]]
        assert {"parent_before", "parent_during", "parent_root", "parent_after"} <= by_pid[
            told["pid"]
        ]
    done.verdict().assert_right()


@pytest.mark.parametrize("method", METHODS)
def test_links(tmp_path: Path, method: str) -> None:
    """What a profiler would see in the child, also where we do not sample."""
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
def deep():
    with tracer.start_as_current_span("one"), tracer.start_as_current_span("two"):
        return look()


def main():
    multiprocessing = mp.get_context(METHOD)
    queue = multiprocessing.Queue()
    found = []
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        with tracer.start_as_current_span("mid"):
            here = look()
            for function in look, deep:
                with ProcessPoolExecutor(1, mp_context=multiprocessing) as pool:
                    found.append(pool.submit(function).result())
                process = multiprocessing.Process(target=told, args=(queue, function))
                process.start()
                found.append(queue.get())
                process.join()
                with multiprocessing.Pool(1) as pool:
                    found.append(pool.apply(function))
    report(here=here, found=found)
""",
    )
    here, found = done.told["here"], done.told["found"]
    assert found[:3] == [here] * 3
    for trace_id, span_id, root, span_type in found[3:]:
        assert [trace_id, root, span_type] == [here[0], *here[2:]]
        assert span_id not in (here[1], here[2])


@needs_sampler
@pytest.mark.parametrize("method", METHODS)
def test_an_idle_worker_carries_no_label(tmp_path: Path, method: str) -> None:
    """Its process was started by, and under the span of, the one who submitted first."""
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
def main():
    with ProcessPoolExecutor(1, mp_context=mp.get_context(METHOD)) as pool:
        with tracer.start_as_current_span("GET", kind=SERVER) as root:
            child = pool.submit(plain, expect("work", root)).result()
        time.sleep(0.4)
    report(child=child)
""",
    )
    done.verdict().assert_right()
    own = done.capture / "child"
    own.mkdir()
    for path in done.capture.glob(f"profile-*-{done.told['child']}-*"):
        path.rename(own / path.name)
    waiting = [
        sample
        for sample in read_profiles(own)
        if "_process_worker" in sample.functions and "plain" not in sample.functions
    ]
    wall = sum(sample.values["wall"] for sample in waiting)
    assert wall > 300_000_000
    # The unpickling of the task and the sending of its result are the loop's, too. A tick may meet
    # the instant between the attach and the task's own frame: the callable that attaches has none.
    labelled = sum(sample.values["wall"] for sample in waiting if "trace_id" in sample.labels)
    assert labelled < 0.1 * wall, labelled


PROCESS = """
class Burner(mp.get_context(METHOD).Process):
    def __init__(self, name):
        super().__init__()
        self.what = name

    def run(self):
        plain(self.what)


def main():
    context = mp.get_context(METHOD)
    queue = context.Queue()

    def child(*arguments):
        process = context.Process(target=told, args=(queue, *arguments))
        process.start()
        return process

    children = []
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        with tracer.start_as_current_span("mid") as mid:
            children.append(child(plain, expect("target", mid, root)))
            children.append(child(with_spans, "deep"))
            burner = Burner(expect("subclass", mid, root))
            burner.start()
            children.append(burner)
            unit("parent_during", mid, root, "web")()
            children.append(child(outgoing))
        answers = [queue.get() for _ in range(3)]
        for process in children:
            process.join()
    expect_deep("deep", next(a for a in answers if isinstance(a, tuple) and isinstance(a[0], int)),
                root)
    unit("untraced", None)
    children.append(child(plain, "untraced"))
    queue.get()
    children[-1].join()
    unit("parent_after", None)()
    report(codes=[p.exitcode for p in children], pid=os.getpid(),
           children=[p.pid for p in children], seen=[a for a in answers if a == ({}, {})])
"""


@pytest.mark.parametrize("zero_code", [False, True], ids=["manual", "zero code"])
@pytest.mark.parametrize("method", METHODS)
def test_multiprocessing_process(tmp_path: Path, method: str, zero_code: bool) -> None:
    done = run(tmp_path, f"METHOD = {method!r}\n{PROCESS}", zero_code=zero_code)
    told = done.told
    assert told["codes"] == [0] * 5
    assert told["seen"] == [[{}, {}]]
    done.verdict().assert_right()
    by_pid = functions_by_pid(done.capture)
    first, deep, burner, _, untraced = told["children"]
    assert "target" in by_pid[first]
    assert "deep" in by_pid[deep]
    assert "subclass" in by_pid[burner]
    assert "untraced" in by_pid[untraced]
    # A forked child knows its parent's functions by the frames that it was forked in.
    assert "parent_after" in by_pid[told["pid"]]
    assert not {"target", "deep", "subclass", "untraced"} & by_pid[told["pid"]]


@pytest.mark.parametrize("method", METHODS)
def test_the_label_ends_with_run(tmp_path: Path, method: str) -> None:
    """What multiprocessing does at the end of a child is nobody's work."""
    done = run(
        tmp_path,
        f"METHOD = {method!r}\n"
        + """
from multiprocessing.util import Finalize


def note(name):
    with open(name, "w") as file:
        json.dump(look(), file)


def child():
    Finalize(None, note, ("after",), exitpriority=10)
    note("during")


def main():
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        process = mp.get_context(METHOD).Process(target=child)
        process.start()
        process.join()
    report(root=root.get_span_context().span_id,
           links=[json.load(open(name)) for name in ("during", "after")])
""",
    )
    during, after = done.told["links"]
    root = done.told["root"]
    assert during[1:] == [root, root, "web"]
    assert after is None


MULTIPROCESSING_POOL = """
def pair(name, seconds):
    return plain(name, seconds)


def main():
    with tracer.start_as_current_span("GET", kind=SERVER) as root:
        pool = mp.get_context(METHOD).Pool(2)
        with tracer.start_as_current_span("mid") as mid:
            names = iter([expect(f"work_{n}", mid, root) for n in range(12)])
            take = lambda count: [next(names) for _ in range(count)]
            children = {pool.apply(plain, take(1))}
            pending = [pool.apply_async(func=plain, args=take(1)),
                       pool.map_async(plain, take(2), chunksize=2)]
            children |= {*pool.map(plain, take(2)), *pool.imap(plain, take(2)),
                         *pool.imap_unordered(plain, take(2), chunksize=2),
                         *pool.starmap(pair, [(name, 0.12) for name in take(2)])}
            for result in pending:
                result.get()
            expect_deep("deep", pool.apply(with_spans, ("deep",)), root)
            seen = pool.apply(outgoing)
        unit("parent_root", root, None, "web")()
    unit("untraced", None)
    children.add(pool.apply(plain, ("untraced",)))
    idle = pool.apply(look)
    pool.close()
    pool.join()
    report(children=sorted(children), pid=os.getpid(), seen=seen, idle=idle, left=list(names))
"""


@pytest.mark.parametrize("method", METHODS)
def test_multiprocessing_pool(tmp_path: Path, method: str) -> None:
    done = run(tmp_path, f"METHOD = {method!r}\n{MULTIPROCESSING_POOL}")
    told = done.told
    assert told["seen"] == [{}, {}]
    assert told["idle"] is None
    assert told["left"] == []
    done.verdict().assert_right()
    assert set(told["children"]) <= set(functions_by_pid(done.capture))


def test_thread_pool_of_multiprocessing(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
from multiprocessing.pool import ThreadPool


def main():
    with tracer.start_as_current_span("GET", kind=SERVER) as root, ThreadPool(2) as pool:
        pool.map(plain, [expect(f"map_{n}", root) for n in range(3)])
        with tracer.start_as_current_span("mid") as mid:
            pool.apply(plain, (expect("apply", mid, root),))
            token = context.attach(context.Context())
            pool.apply(unit("untraced", None))
            context.detach(token)
    report()
""",
    )
    done.verdict().assert_right()
