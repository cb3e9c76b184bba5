# SPDX-License-Identifier: Apache-2.0
"""Tasks with a known label each, for any async library, and labels as OpenTelemetry tells them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Final

from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span, get_current_span

from tests.support.ground_truth import MIN_SAMPLES, GroundTruth, Label, Verdict

Checkpoint = Callable[[], Awaitable[object]]

#: What a task of `Tasks` runs under.
KINDS: Final = ("root", "child", "nested", "inherited", "none")


@dataclass
class Tasks:
    """Work for many tasks that share one event loop and take turns on it.

    Attributes:
        truth: where functions come from and expectations go.
        outer: the span under which the tasks are made; each of them inherits its context.
        checkpoint: lets other tasks run: `asyncio.sleep(0)`, `trio.lowlevel.checkpoint`.
        turns: how often a task gives way while it is under one span.
        seconds: CPU between two of them.
    """

    truth: GroundTruth
    outer: Span
    checkpoint: Checkpoint
    turns: int = 4
    seconds: float = 0.005

    async def burn(self, expectation: Label | None) -> None:
        """Burn in turns, under the context that is current in the caller."""
        unit = self.truth.unit(expectation, self.seconds)
        for _ in range(self.turns):
            unit()
            await self.checkpoint()

    async def run(self, index: int) -> None:
        """The task number `index`: all kinds come up in turn."""
        span_of = self.truth.tracer.start_as_current_span
        kind = KINDS[index % len(KINDS)]
        if kind == "root":
            with span_of("own root", context=Context()) as root:
                await self.burn(Label.of(root))
        elif kind == "child":
            with span_of("child") as child:
                await self.burn(Label.of(child, self.outer))
        elif kind == "nested":
            with span_of("one"), span_of("two"):
                await self.checkpoint()
                with span_of("three") as three:
                    await self.burn(Label.of(three, self.outer))
        elif kind == "inherited":
            await self.burn(Label.of(self.outer))
        else:
            token = attach(Context())
            await self.burn(None)
            detach(token)


class Current:
    """What the label here and now has to be: the span that `get_current_span()` returns.

    Local roots are no part of OpenTelemetry's context, so they are told once, by `knows`.
    """

    def __init__(self) -> None:
        self._labels: dict[int, Label] = {}

    def knows(self, span: Span, root: Span | None = None, span_type: str = "internal") -> Span:
        """Remember the local root of `span`, itself if there is no other."""
        self._labels[span.get_span_context().span_id] = Label.of(span, root, span_type)
        return span

    def label(self) -> Label | None:
        """The label of the current span; None without one."""
        context = get_current_span().get_span_context()
        return self._labels[context.span_id] if context.is_valid else None


def assert_right(
    verdict: Verdict, *, min_total: int | None = None, max_unknown: float = 0.005
) -> None:
    """Nothing wrong, hardly anything unknown, and samples of most functions.

    On a busy machine the sampler comes late now and then, by more CPU than some functions burn.

    Args:
        min_total: on-CPU samples that all functions must have together; `MIN_SAMPLES` for each of
            them if it is not said.
        max_unknown: share of the samples of labelled work that may carry no label.
    """
    total = MIN_SAMPLES * len(verdict.counts) if min_total is None else min_total
    verdict.assert_right(min_samples=0, min_total=total, max_unknown=max_unknown)
    unseen = [name for name, counts in verdict.counts.items() if not counts.total]
    assert len(unseen) <= max(2, 0.25 * len(verdict.counts)), f"too few samples: none of {unseen}"


@contextlib.contextmanager
def pinned_to_one_cpu() -> Iterator[None]:
    """All threads of the process share one CPU: the sampler preempts what it looks at."""
    before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
    for thread in before:
        os.sched_setaffinity(thread, {min(before[thread])})
    try:
        yield
    finally:
        for thread in _threads():
            os.sched_setaffinity(thread, before.get(thread, before[os.getpid()]))


def _threads() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/task")]
