# SPDX-License-Identifier: Apache-2.0
"""What is put into other people's classes for processes, and what is sent with their work."""

from __future__ import annotations

import asyncio
import functools
import multiprocessing
import multiprocessing.pool
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import wrapt
from opentelemetry import baggage
from opentelemetry.context import Context, get_current
from opentelemetry.instrumentation.utils import unwrap
from opentelemetry.trace import SpanKind, get_current_span

from otel_proflink import lifecycle
from otel_proflink._linker import PropagatedCall, current_link, new_link
from otel_proflink.instrumentation import (
    anyio_threads,
    arrival,
    modules,
    multiprocessing_process,
    process_pool,
    services,
    wrappers,
)
from otel_proflink.instrumentation.carrier import CarriedCall, carried, pack, unpack
from tests.support.ground_truth import attached, linking, remote_context

OWNERS = {
    ProcessPoolExecutor: ["submit"],
    BaseProcess: ["_after_fork"],
    multiprocessing.pool.Pool: ["apply_async", "_map_async", "imap", "imap_unordered"],
}


def inside() -> dict[tuple[type, str], Any]:
    return {(owner, name): vars(owner)[name] for owner, names in OWNERS.items() for name in names}


STOCK = inside()


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    yield
    modules.uninstrument()
    assert inside() == STOCK
    assert "__getstate__" not in vars(BaseProcess)


def look() -> Any:
    link = current_link()
    return link and (link.trace_id, link.span_id, link.local_root_span_id, link.span_type)


class Inline(ProcessPoolExecutor):
    """Takes what `submit` would send to a worker, and starts no process."""

    sent: Any = None

    def __init__(self) -> None:
        pass

    def take(self, *args: Any, **kwargs: Any) -> Any:
        self.submit(*args, **kwargs)
        return self.sent


@pytest.fixture
def sending(monkeypatch: pytest.MonkeyPatch) -> Iterator[Inline]:
    """`submit` instrumented over one that keeps what it gets."""
    pool = Inline()

    def submit(self: Any, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        pool.sent = fn, args, kwargs
        return Future()

    with monkeypatch.context() as patch, linking():
        patch.setattr(ProcessPoolExecutor, "submit", submit)
        process_pool.instrument()
        yield pool
        process_pool.uninstrument()


# -- submit ---------------------------------------------------------------------------------------


def test_without_a_context_the_function_itself_is_sent(sending: Inline) -> None:
    assert sending.take(look, 1, a=2) == (look, (1,), {"a": 2})


def test_with_a_context_it_is_sent_with_its_carrier(sending: Inline) -> None:
    with attached(remote_context(1, 2)):
        first, *rest = sending.take(look, 1, fn=2)
        named, *none = sending.take(fn=look)
        assert (rest, none) == ([(1,), {"fn": 2}], [(), {}])
        for sent in (first, named):
            assert type(sent) is CarriedCall
            assert sent.function is look
        with pytest.raises(TypeError, match="fn"):
            sending.take()


def test_wrappers_of_others_do_not_wrap_it_twice(sending: Inline) -> None:
    def foreign(wrapped: Callable[..., Any], _pool: Any, args: Any, kwargs: Any) -> Any:
        return wrapped(*args, **kwargs)

    wrapt.wrap_function_wrapper(ProcessPoolExecutor, "submit", foreign)
    process_pool.instrument()
    with attached(remote_context(1, 2)):
        sent, _, _ = sending.take(look)
        assert sent.function is look
        assert carried(sent) is sent
        process_pool.uninstrument()
        assert sending.take(look)[0] is look
    unwrap(ProcessPoolExecutor, "submit")


def test_the_submitters_context_is_not_touched(sending: Inline) -> None:
    context = baggage.set_baggage("tenant", "acme", remote_context(1, 2))
    content = dict(context)
    with attached(context):
        sending.take(look)
        assert get_current() is context
    assert dict(context) == content


def test_what_cannot_be_pickled_fails_as_ever() -> None:
    def failure(function: Any) -> tuple[type, str]:
        with pytest.raises(Exception) as raised:  # noqa: PT011 - which one is Python's choice
            pickle.dumps(function)
        return type(raised.value), str(raised.value)

    with linking(), attached(remote_context(1, 2)):
        for function in (lambda: 1, functools.partial(look, threading.Lock())):
            sent = carried(function)
            assert type(sent) is CarriedCall
            assert failure(sent) == failure(function)


# -- carrier and arrival --------------------------------------------------------------------------


def arrive(function: Callable[..., Any]) -> Any:
    """What becomes of `function` on its way through a pickle, where nothing is attached."""
    with attached(Context()):
        return pickle.loads(pickle.dumps(function))


def test_it_arrives_as_a_native_call_under_its_senders_link() -> None:
    with (
        linking() as provider,
        provider.get_tracer("t").start_as_current_span("root", kind=SpanKind.SERVER) as root,
        provider.get_tracer("t").start_as_current_span("mid") as mid,
    ):
        sent = carried(look)
        own = mid.get_span_context()
        expected = own.trace_id, own.span_id, root.get_span_context().span_id, "web"
        with attached(Context()):
            call = arrive(sent)
            assert type(call) is PropagatedCall
            assert call() == expected
            assert call() == expected, "a chunk of a map calls it more than once"
            assert look() is None


def test_arguments_result_and_exception_are_unchanged() -> None:
    with linking(), attached(remote_context(1, 2)):
        call = arrive(carried(divmod))
        assert call(7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            call(1, 0)
        here = carried(divmod)
        assert here(7, 2) == (3, 1), "where it does not leave this process it is the function"


def test_the_record_stays_out_of_the_baggage_that_user_code_sees() -> None:
    with (
        linking() as provider,
        provider.get_tracer("t").start_as_current_span("root"),
        attached(baggage.set_baggage("tenant", "acme")),
    ):
        carrier = pack(get_current())
        assert carrier is not None
        assert "proflink" not in str(carrier["headers"])
        assert "proflink.local_root_span_id" in baggage.get_all(unpack(carrier))
        assert dict(arrive(carried(baggage.get_all))()) == {"tenant": "acme"}


def test_a_remote_span_has_no_local_root_to_send() -> None:
    with linking(), attached(remote_context(1, 2)):
        carrier = pack(get_current())
    assert carrier is not None
    assert carrier["record"] == {}
    assert carrier["ids"] == (1, 2, 1)


@pytest.mark.parametrize(
    "headers",
    [{"b3": "a format that nobody reads here"}, {"traceparent": f"00-{7:032x}-{8:016x}-01"}],
    ids=["unread", "another's"],
)
def test_the_ids_decide_whatever_the_headers_say(headers: dict[str, str]) -> None:
    with linking(), attached(remote_context(5, 6)):
        carrier = pack(get_current())
    assert carrier is not None
    carrier["headers"] = headers
    span = get_current_span(unpack(carrier)).get_span_context()
    assert (span.trace_id, span.span_id, span.is_remote) == (5, 6, True)


def test_nothing_to_carry_no_carrier() -> None:
    assert lifecycle.engine() is None
    assert pack(Context()) is None


def test_a_carrier_is_plain_data() -> None:
    """It must be readable before anything of ours is imported."""
    with linking(), attached(remote_context(1, 2)):
        data = pickle.dumps(pack(get_current()), protocol=5)
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read())['ids'], 'otel_proflink'"
    done = subprocess.run(
        [sys.executable, "-c", f"{code} in sys.modules)"],
        input=data,
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode().strip() == "(1, 2, 1) False"


def test_work_survives_an_arrival_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with linking(), attached(remote_context(1, 2)):
        sent = carried(look)
    monkeypatch.setitem(sys.modules, "otel_proflink.instrumentation.carrier", None)
    assert pickle.loads(pickle.dumps(sent)) is look


def test_work_survives_a_propagator_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from opentelemetry import propagate

    class Broken:
        def inject(self, *_args: object, **_kwargs: object) -> None:
            raise LookupError("broken")

    monkeypatch.setattr(propagate, "_HTTP_TEXT_FORMAT", Broken(), raising=False)
    monkeypatch.setattr(propagate, "inject", Broken().inject)
    with linking(), attached(remote_context(1, 2)):
        assert carried(look) is look


def test_receiving_in_the_senders_own_process_changes_nothing() -> None:
    with linking(), attached(remote_context(1, 2)):
        arrive(carried(look))
    assert inside() == STOCK


IN_A_CHILD = """
import sys
from otel_proflink.instrumentation import arrival
light = [m for m in sys.modules if m.startswith(("opentelemetry.", "otel_proflink."))]
call = arrival.receive_call(
    divmod,
    {"pid": 1, "headers": {"traceparent": "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"},
     "ids": (int("ab" * 16, 16), int("cd" * 8, 16), 1), "record": {}, "settings": None},
)
from concurrent.futures import ThreadPoolExecutor
from otel_proflink import runtime_context
assert "opentelemetry.sdk" not in sys.modules  # it takes longer to import than all the rest
print(light, type(call).__name__, call(7, 2), runtime_context.installed() is not None,
      "otel_proflink" in ThreadPoolExecutor.submit.__code__.co_filename,
      "multiprocessing" in sys.modules, "concurrent.futures.process" in sys.modules)
"""


def test_a_child_that_has_never_heard_of_us() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, check=True
    )
    modules_of_ours = ["otel_proflink.instrumentation", "otel_proflink.instrumentation.arrival"]
    assert done.stdout.strip() == f"{modules_of_ours} PropagatedCall (3, 1) True True False False"


# -- processes ------------------------------------------------------------------------------------


def test_a_process_is_pickled_with_a_carrier_only_where_there_is_something_to_carry() -> None:
    process = multiprocessing.get_context("spawn").Process(target=look)
    multiprocessing_process.instrument()
    multiprocessing_process.instrument()
    assert "_after_fork" not in process.__getstate__()
    with linking(), attached(remote_context(1, 2)):
        hook = process.__getstate__()["_after_fork"]
        assert hook.func is arrival.begin_process
        assert hook.args[0]["ids"] == (1, 2, 1)
        assert "_after_fork" not in vars(process), "the object itself stays as it is"
        worker = multiprocessing.get_context("spawn").Process(target=multiprocessing.pool.worker)
        assert "_after_fork" not in worker.__getstate__(), "a pool's worker works for everybody"
        multiprocessing_process.uninstrument()
        assert "_after_fork" not in process.__getstate__()


class Slotted(BaseProcess):
    __slots__ = ("mine",)

    def __init__(self) -> None:
        super().__init__()
        self.mine = 7


def test_a_process_with_slots() -> None:
    multiprocessing_process.instrument()
    with linking(), attached(remote_context(1, 2)):
        state, slots = Slotted().__getstate__()
    assert "_after_fork" in state
    assert slots == {"mine": 7}


def test_who_works_for_everybody() -> None:
    def of(target: Any) -> bool:
        return services.is_service(threading.Thread(target=target))

    assert of(multiprocessing.pool.worker)
    assert of(multiprocessing.pool.Pool._handle_workers)  # type: ignore[attr-defined]
    assert not of(look)
    assert not of(functools.partial(look))
    assert not services.is_service(threading.Timer(1, look))
    assert not services.is_service(threading.Thread())


# -- coming and going -----------------------------------------------------------------------------


def test_everything_on_off_twice_and_again() -> None:
    for _ in range(2):
        modules.instrument()
        on = inside()
        assert not [key for key in on if on[key] is STOCK[key]]
        modules.instrument()
        assert inside() == on
        modules.uninstrument()
        assert inside() == STOCK
        modules.uninstrument()


def test_nothing_is_imported_for_it_and_imports_are_met() -> None:
    code = """
import sys
from otel_proflink.instrumentation import modules
modules.instrument()
names = ["concurrent.futures.process", "multiprocessing.process", "multiprocessing.pool", "anyio"]
print([name for name in names if name in sys.modules])
import multiprocessing.pool
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.process import BaseProcess
ours = lambda function: "otel_proflink" in function.__code__.co_filename
print(ours(ProcessPoolExecutor.submit), ours(multiprocessing.pool.Pool.imap),
      ours(BaseProcess._after_fork), ours(BaseProcess.__getstate__))
modules.uninstrument()
print(ours(ProcessPoolExecutor.submit), ours(multiprocessing.pool.Pool.imap),
      ours(BaseProcess._after_fork), "__getstate__" in vars(BaseProcess))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[]",
        "True True True True",
        "False False False False",
    ]


def test_an_import_that_comes_after_switching_off_finds_nothing() -> None:
    code = """
from otel_proflink.instrumentation import modules
modules.instrument()
modules.uninstrument()
from concurrent.futures import ProcessPoolExecutor
print("otel_proflink" in ProcessPoolExecutor.submit.__code__.co_filename)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_module_that_is_not_as_expected_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wrap(_module: object) -> None:
        raise AttributeError("it has changed")

    wrappers.when_imported("json", wrap)
    assert "json is not as expected" in caplog.text


def test_anyios_calls_are_propagated_ones() -> None:
    pytest.importorskip("anyio")
    from anyio import to_thread
    from anyio._backends._asyncio import AsyncIOBackend

    name = "run_sync_in_worker_thread"
    stock = vars(AsyncIOBackend)[name]

    async def main() -> tuple[bool, Any]:
        context = get_current()
        # A propagated call runs under a copy; AnyIO's own copying of variables keeps the object.
        return await to_thread.run_sync(lambda: (get_current() is context, look()))

    with linking(), attached(remote_context(1, 2)):
        anyio_threads.instrument()
        assert vars(AsyncIOBackend)[name] is not stock
        assert asyncio.run(main()) == (False, (1, 2, 2, ""))
        anyio_threads.uninstrument()
        assert asyncio.run(main()) == (True, (1, 2, 2, ""))
    assert vars(AsyncIOBackend)[name] is stock


def test_a_link_survives_a_pickle() -> None:
    link = new_link(1, 2, 1, 3, "web")
    assert pickle.loads(pickle.dumps(link)) == link
