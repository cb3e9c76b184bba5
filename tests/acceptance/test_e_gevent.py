# SPDX-License-Identifier: Apache-2.0
"""Section E: gevent, monkey-patched, each time in a process of its own.

gevent starts greenlets in an empty context, so what a greenlet attaches is all there is to it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.async_truth import assert_right
from tests.support.ground_truth import needs_sampler
from tests.support.processes import APP_PRELUDE, Run, run_app

pytest.importorskip("gevent")

pytestmark = needs_sampler

# patch_all comes first, as gevent's documentation wants it.
PATCHED = (
    "from gevent import monkey\nmonkey.patch_all()\n"
    + APP_PRELUDE
    + """
import contextvars
import gevent
import gevent.pool
import gevent.threadpool
from opentelemetry.sdk.trace import TracerProvider
from otel_proflink import ProflinkInstrumentor

provider = TracerProvider()
trace.set_tracer_provider(provider)
ProflinkInstrumentor().instrument(tracer_provider=provider)


def burn(name, span=None, root=None, turns=4, seconds=0.005):
    function = unit(name, span, root, "internal" if span else "")
    for _ in range(turns):
        function(seconds)
        gevent.sleep(0)


def own(name):
    with tracer.start_as_current_span(name, context=context.Context()) as root:
        burn(f"{name}_root", root)
        with tracer.start_as_current_span("child") as child:
            burn(f"{name}_child", child, root)
        burn(f"{name}_again", root)
    burn(f"{name}_after")

"""
)


def run(directory: Path, body: str) -> Run:
    done = run_app(directory, PATCHED + body, prelude=False)
    done.assert_clean()
    return done


@pytest.mark.parametrize("count", [5, 200])
def test_e7_spawned_greenlets(tmp_path: Path, count: int) -> None:
    done = run(
        tmp_path,
        f"""
def one(index):
    with tracer.start_as_current_span("one") as span:
        burn(f"one_{{index}}", span)

with tracer.start_as_current_span("main") as main:
    gevent.joinall([gevent.spawn(one, index) for index in range({count})], raise_error=True)
    burn("main_again", main)
report()
""",
    )
    verdict = done.verdict()
    assert len(verdict.counts) == count + 1
    assert_right(verdict, min_total=5 * count)


def test_pools_and_kinds_of_greenlets(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
with tracer.start_as_current_span("main") as main:
    greenlets = [gevent.spawn(own, f"spawn_{n}") for n in range(5)]
    greenlets += [gevent.spawn_later(0.01 * n, own, f"later_{n}") for n in range(3)]
    greenlets.append(gevent.Greenlet.spawn(own, "class"))
    # An empty context: never the span of whoever spawned it.
    greenlets.append(gevent.spawn(burn, "bare_spawn"))
    burn("main_meanwhile", main)
    gevent.joinall(greenlets, raise_error=True)
    pool = gevent.pool.Pool(3)
    pool.map(own, [f"pool_map_{n}" for n in range(6)])
    list(pool.imap_unordered(own, [f"pool_imap_{n}" for n in range(6)]))
    pool.spawn(burn, "bare_pool").get()
    group = gevent.pool.Group()
    group.spawn(own, "group")
    group.join(raise_error=True)
    burn("main_again", main)
burn("after")
report()
""",
    )
    assert_right(done.verdict(), min_total=300)


def test_a_context_given_to_a_greenlet(tmp_path: Path) -> None:
    """What an application does that wants its greenlets under the span that spawned them."""
    done = run(
        tmp_path,
        """
def carried(run, *args):
    made = gevent.Greenlet(run, *args)
    made.gr_context = contextvars.copy_context()
    made.start()
    return made

def work(name, main):
    burn(f"{name}_main", main)
    with tracer.start_as_current_span("own") as span:
        burn(f"{name}_own", span, main)
        carried(burn, f"{name}_deeper", span, main).join()
    burn(f"{name}_main_again", main)

with tracer.start_as_current_span("main") as main:
    gevent.joinall([carried(work, f"work_{n}", main) for n in range(10)], raise_error=True)
report()
""",
    )
    assert_right(done.verdict(), min_total=150)


def test_real_threads_of_a_gevent_thread_pool(tmp_path: Path) -> None:
    """Each has a hub of its own; gevent carries no context to it."""
    done = run(
        tmp_path,
        """
pool = gevent.threadpool.ThreadPool(3)
with tracer.start_as_current_span("main") as main:
    results = [pool.spawn(own, f"native_{n}") for n in range(6)]
    results.append(pool.spawn(burn, "bare_native"))
    burn("main_meanwhile", main)
    for result in results:
        result.get()
    gevent.get_hub().threadpool.apply(own, ("of_the_hub",))
    # The submitted context, by hand.
    here = contextvars.copy_context()
    pool.apply(here.run, (burn, "native_carried", main))
burn("after")
report()
""",
    )
    # Several real threads share the GIL: a unit's few milliseconds may fall between two samples.
    done.verdict().assert_right(min_samples=0, min_total=150)


def test_b8_patched_thread_pool_executor(tmp_path: Path) -> None:
    """Its workers are greenlets of one thread; the submitted context travels as ever."""
    done = run(
        tmp_path,
        """
def task(name, main):
    burn(f"{name}_submitted", main)
    with tracer.start_as_current_span("own") as span:
        burn(f"{name}_own", span, main)
        with tracer.start_as_current_span("deeper") as deeper:
            burn(f"{name}_deeper", deeper, main)

threads = set()
with ThreadPoolExecutor(4) as pool:
    with tracer.start_as_current_span("main") as main:
        futures = [pool.submit(task, f"pool_{n}", main) for n in range(10)]
        burn("main_meanwhile", main)
        [future.result() for future in futures]
        threads.update(pool.map(lambda _: threading.get_native_id(), range(8)))
    pool.submit(burn, "bare_pool").result()
    burn("after")
report(threads=len(threads))
""",
    )
    assert done.told["threads"] == 1
    assert_right(done.verdict(), min_total=150)


def test_patched_threads(tmp_path: Path) -> None:
    """`threading.Thread` is a greenlet here: unlabelled until it attaches something."""
    done = run(
        tmp_path,
        """
with tracer.start_as_current_span("main") as main:
    threads = [threading.Thread(target=own, args=(f"thread_{n}",)) for n in range(5)]
    threads.append(threading.Thread(target=burn, args=("bare_thread",)))
    [thread.start() for thread in threads]
    burn("main_meanwhile", main)
    [thread.join() for thread in threads]
burn("after")
report()
""",
    )
    assert_right(done.verdict(), min_total=80)
