# SPDX-License-Identifier: Apache-2.0
"""Numbered units of work whose source, names and span ids all follow from the number.

So whoever reads a profile can tell right from wrong by the number in a function's name alone: the
program that ran the unit need not be asked, and may be another process.

A unit is two functions, `outer_N` calling `made_N`, in a file of their own, compiled for one call
and freed after it. `N % 4` spans are open around it, each inside the last; their ids hold N.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import IdGenerator

from otel_proflink._linker import SpanHooks

# A str holds one, two or four bytes a character; these names need each of them.
_SUFFIXES = ("", "_é", "_文", "_\U00020000")
# After so many units their names come again: CPython 3.12 and 3.13 keep every name for good, and
# what grows should be ours to explain.
_NUMBERS = 1 << 14
_PADDINGS = 7


def names(number: int) -> tuple[str, str]:
    """Of the two functions, the caller first."""
    suffix = _SUFFIXES[number // 4 % len(_SUFFIXES)]
    return f"outer_{number}{suffix}", f"made_{number}{suffix}"


def file_name(number: int) -> str:
    return f"unit_{number}.py"


def number_of(file: str) -> int | None:
    """The unit whose file this is; None for other files."""
    if file.startswith("unit_") and file.endswith(".py") and file[5:-3].isdecimal():
        return int(file[5:-3])
    return None


def source(number: int) -> str:
    outer, made = names(number)
    padding = "\n" * (number % _PADDINGS)
    return (
        f"def {outer}(seconds):\n{padding}    {made}(seconds)\n"
        f"def {made}(seconds):\n{padding}    end = clock() + seconds\n"
        "    while clock() < end: pass\n"
    )


def fault_of_label(number: int, labels: Mapping[str, str]) -> str | None:
    """What is wrong with the link labels of a sample in this unit; None: nothing."""
    depth = number % 4
    if depth == 0:
        return "a label without a span" if "span_id" in labels else None
    span, root = int(labels["span_id"], 16), int(labels["local_root_span_id"], 16)
    if span >> 32 != number:
        return "another unit's span"
    if root >> 32 != number or int(labels["trace_id"], 16) >> 64 != root:
        return "another local root"
    if (span - root) & 0xFFFFFFFF != depth - 1:
        return "another span of the unit"
    return None


class _UnitIds(IdGenerator):
    """Span ids hold the unit's number, trace ids the id of their first span."""

    def __init__(self) -> None:
        self._next = threading.local()
        self._base = itertools.count(8, 8)

    def announce(self, number: int) -> None:
        """The calling thread starts the spans of this unit next."""
        self._next.span_id = number << 32 | next(self._base) & 0xFFFFFFFF

    def more(self, span: trace.Span) -> None:
        """The calling thread starts a child of this span next."""
        self._next.span_id = span.get_span_context().span_id + 1

    def generate_trace_id(self) -> int:
        return int(self._next.span_id) << 64 | 1

    def generate_span_id(self) -> int:
        span_id: int = self._next.span_id
        return span_id


class _LinksOnly(SpanHooks, SpanProcessor):
    """The processor's native half: links."""


class Units:
    """Makes units and runs them."""

    def __init__(self) -> None:
        provider = TracerProvider(shutdown_on_exit=False, id_generator=_UnitIds())
        provider.add_span_processor(_LinksOnly())
        self._ids: _UnitIds = provider.id_generator  # type: ignore[assignment]
        self._tracer = provider.get_tracer("soak")
        self._numbers = itertools.count(1)
        self.made = 0

    def make(self) -> tuple[int, Callable[[float], None]]:
        """A new unit: its number, and its outer function, which takes seconds of CPU."""
        self.made += 1
        number = next(self._numbers) % _NUMBERS
        scope: dict[str, Callable[..., None]] = {"clock": time.thread_time}  # type: ignore[dict-item]
        exec(compile(source(number), file_name(number), "exec"), scope)
        return number, scope[names(number)[0]]

    @contextlib.contextmanager
    def spans(self, number: int) -> Iterator[None]:
        """The spans that belong around a unit."""
        with contextlib.ExitStack() as stack:
            for depth in range(number % 4):
                if depth == 0:
                    self._ids.announce(number)
                else:
                    self._ids.more(trace.get_current_span())
                stack.enter_context(self._tracer.start_as_current_span("unit"))
            yield

    def run_unit(self, seconds: float = 0.0003) -> None:
        """Make a unit, run it within its spans, and let go of its code."""
        number, outer = self.make()
        with self.spans(number):
            call_unit(outer, seconds)


def call_unit(outer: Callable[[float], None], seconds: float = 0.0003) -> None:
    """The one caller of all units."""
    outer(seconds)
