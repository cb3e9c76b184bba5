# SPDX-License-Identifier: Apache-2.0
"""The start-up self-test: does the sampler see what the interpreter says?

Python functions on purpose: they are the known call chain. Needs a few milliseconds, once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar
from types import CodeType, FrameType
from typing import TypeVar

from otel_proflink import _linker, _sampler
from otel_proflink.native_thread import original

Seen = tuple[list[tuple[str, str, int]], int]
T = TypeVar("T")

# Root nodes of a context's variables change their type between these sizes; 64 is in between and
# has child nodes of both types.
_SIZES = (1, 64, 2000)


# More calls than CPython needs before it specialises one.
_WARM = 200


def _refuse(what: str) -> _sampler.SamplerError:
    return _sampler.SamplerError(
        f"self-test failed on CPython {sys.version.split()[0]}: {what}; not sampling"
    )


def _expected(frame: FrameType | None) -> list[tuple[str, str, int]]:
    chain = []
    while frame is not None:
        chain.append((frame.f_code.co_qualname, frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return chain


def _leaf() -> tuple[Seen, list[tuple[str, str, int]]]:
    # One line: both ends of the comparison must see the same line number.
    return _sampler.observe(), _expected(sys._getframe())


def _généré_名前() -> Iterator[tuple[Seen, list[tuple[str, str, int]]]]:  # noqa: N802
    yield _leaf()


def _through_generator() -> tuple[Seen, list[tuple[str, str, int]]]:
    return next(_généré_名前())


class _Constructed:
    # A constructor that is called often is inlined; from 3.13 on that puts a frame of the
    # interpreter's own below it.
    def __init__(self, observing: bool) -> None:
        self.seen = _through_generator() if observing else None


def _through_constructor() -> tuple[Seen, list[tuple[str, str, int]]]:
    made = None
    for i in range(_WARM):
        made = _Constructed(i == _WARM - 1)
    assert made is not None  # for the type checker
    assert made.seen is not None
    return made.seen


def _through_c_code() -> tuple[Seen, list[tuple[str, str, int]]]:
    # sorted() calls its key function from C: an entry shim lies between the frames.
    seen = []
    sorted([0], key=lambda _: seen.append(_through_constructor()) or 0)  # type: ignore[func-returns-value]
    return seen[0]


def _through_dense_lines() -> tuple[Seen, list[tuple[str, str, int]]]:
    # So few instructions a line that an instruction read one off is on another line.
    function = _through_c_code
    one = 1
    seen = function()
    two = one
    one = two
    return seen


def _check_chain() -> None:
    (frames, _), expected = _through_dense_lines()
    for seen, known in zip(frames, expected, strict=False):
        # Other files' names may have been cut, or not be Unicode.
        if seen[0] != known[0] or seen[2] != known[2] or (known[1] == __file__ != seen[1]):
            raise _refuse(
                f"a frame of {known[0]} ({known[1]}:{known[2]}) was read as "
                f"{seen[0]} ({seen[1]}:{seen[2]})"
            )
    if _sampler.code_header_size() != CodeType.__basicsize__:
        raise _refuse("a code object's instructions are not where they should be")
    for code in (_check_chain.__code__, _leaf.__code__):
        if _sampler.code_units(code) != len(code.co_code) // 2:
            raise _refuse("a code object's length was not found")
    if len(frames) != len(expected) and len(expected) < 1000:
        raise _refuse(f"{len(frames)} frames were read of {len(expected)}")


def _in_context(variables: list[ContextVar[int]], size: int, function: Callable[[], T]) -> T:
    def fill() -> T:
        for variable in variables[:size]:
            variable.set(size)
        return function()

    return Context().run(fill)


def _check_contexts() -> None:
    # Differently named: equal names could share a hash, and then a node.
    variables = [ContextVar(f"proflink.self_test.{i}", default=0) for i in range(max(_SIZES))]

    def root_type() -> int:
        import contextvars

        return _sampler.root_node_type(contextvars.copy_context())

    bitmap = _in_context(variables, 1, root_type)
    array = _in_context(variables, max(_SIZES), root_type)
    if not bitmap or not array or bitmap == array:
        raise _refuse("the nodes of a context's variables were not recognised")
    _sampler.learn_node_types(bitmap, array)

    link = _linker.new_link(1 << 127 | 1, 1, 1, 1, "")
    for size in _SIZES:
        _, serial = _in_context(variables, size, _sampler.observe)
        if serial != 0:
            raise _refuse(f"a link was found in a context of {size} variables that has none")
        _, serial = _in_context(
            variables, size, lambda: _linker.call_linked(link, _sampler.observe)
        )
        if serial != link.serial:
            raise _refuse(f"the link in a context of {size} variables was not found")


def _check_context_version() -> None:
    before = _sampler.context_version()
    within = Context().run(_sampler.context_version)
    after = _sampler.context_version()
    # Once on the way in and once on the way out, at least.
    if not before < within < after < before + 100:
        raise _refuse("the version of a thread's context was not found")


def _check_threads() -> None:
    # A thread of its own, so that the list has two entries; started below `threading`, which
    # instrumentation may have wrapped.
    made = _sampler.threads_made()
    started, stop = original("_thread", "allocate_lock")(), original("_thread", "allocate_lock")()
    started.acquire()
    stop.acquire()

    def wait() -> None:
        started.release()
        stop.acquire()

    original("_thread", "start_new_thread")(wait, ())
    try:
        started.acquire()
        # Another thread may start or end right now: once more, then.
        if not any(_sampler.threads_agree() for _ in range(3)):
            raise _refuse("the list of threads was not found")
        if not made < _sampler.threads_made() < made + 1000:
            raise _refuse("the count of threads was not found")
    finally:
        stop.release()


def _check_other_thread() -> None:
    # Free-threaded from 3.14 on, only the first thread runs a code object's own instructions;
    # others get copies of them.
    failed: list[Exception] = []
    done = original("_thread", "allocate_lock")()
    done.acquire()

    def check() -> None:
        try:
            _check_chain()
        except Exception as error:
            failed.append(error)
        finally:
            done.release()

    original("_thread", "start_new_thread")(check, ())
    done.acquire()
    if failed:
        raise failed[0]


def run() -> None:
    """Raises `SamplerError` when this interpreter is not laid out as compiled in."""
    _check_contexts()
    _check_context_version()
    _check_chain()
    _check_threads()
    if _linker.FREE_THREADED:
        _check_other_thread()
