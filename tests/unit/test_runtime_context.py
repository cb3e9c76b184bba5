# SPDX-License-Identifier: Apache-2.0
"""The hook put over, and taken off, a runtime context in the middle of its work."""

from __future__ import annotations

import contextvars
import gc
from collections.abc import Iterator

import opentelemetry.context as context_api
import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.context.contextvars_context import ContextVarsRuntimeContext
from opentelemetry.trace import NonRecordingSpan, SpanContext

from otel_proflink import runtime_context
from otel_proflink._linker import RuntimeContext, current_link


@pytest.fixture(autouse=True)
def _stock() -> Iterator[None]:
    """Each test starts from a stock runtime context, in a fresh `contextvars.Context`."""
    before = context_api._RUNTIME_CONTEXT
    context_api._RUNTIME_CONTEXT = ContextVarsRuntimeContext()
    gc.collect()
    yield
    context_api._RUNTIME_CONTEXT = before


def spanned(number: int) -> Context:
    return trace.set_span_in_context(
        NonRecordingSpan(SpanContext(1, number, is_remote=False)), Context()
    )


def test_is_a_runtime_context() -> None:
    assert isinstance(RuntimeContext(), context_api._RuntimeContext)
    assert isinstance(RuntimeContext().delegate, ContextVarsRuntimeContext)


def test_install_twice_is_one_hook() -> None:
    hook = runtime_context.install()
    assert runtime_context.install() is hook
    assert runtime_context.installed() is hook
    assert isinstance(hook.delegate, ContextVarsRuntimeContext)


def test_older_contexts_stay_visible_and_their_tokens_detach() -> None:
    outer = spanned(1)
    older = context_api.attach(outer)
    runtime_context.install()
    assert context_api.get_current() is outer
    inner = spanned(2)
    newer = context_api.attach(inner)
    assert context_api.get_current() is inner
    context_api.detach(newer)
    assert context_api.get_current() is outer
    context_api.detach(older)
    assert context_api.get_current() == {}


def test_current_is_the_very_object_that_was_attached() -> None:
    runtime_context.install()
    context = spanned(1)
    token = context_api.attach(context)
    assert context_api.get_current() is context
    context_api.detach(token)


def test_a_token_of_another_context_fails_as_stock() -> None:
    hook = runtime_context.install()
    token = contextvars.Context().run(hook.attach, spanned(1))
    with pytest.raises(ValueError, match="different Context"):
        hook.detach(token)


@pytest.mark.parametrize("token", [None, "token", 5])
def test_what_is_no_token_fails_as_stock(token: object) -> None:
    hook = runtime_context.install()
    with pytest.raises(TypeError):
        hook.detach(token)  # type: ignore[arg-type]


def test_a_failed_detach_leaves_the_label_true() -> None:
    runtime_context.install()
    foreign = contextvars.Context().run(context_api.attach, spanned(1))
    token = context_api.attach(spanned(2))
    context_api.detach(foreign)  # the API swallows and logs it
    link = current_link()
    assert link is not None
    assert link.span_id == 2
    context_api.detach(token)


def test_removed_with_nothing_alive_it_is_gone() -> None:
    stock = context_api._RUNTIME_CONTEXT
    hook = runtime_context.install()
    token = context_api.attach(spanned(1))
    context_api.detach(token)
    del token
    gc.collect()
    if hook.alive:
        pytest.skip("another test's threads still hold contexts of ours")
    runtime_context.uninstall()
    assert context_api._RUNTIME_CONTEXT is stock


def test_removed_in_the_middle_it_passes_through_until_nothing_is_alive() -> None:
    stock = context_api._RUNTIME_CONTEXT
    hook = runtime_context.install()
    if hook.alive:
        pytest.skip("another test's threads still hold contexts of ours")
    outer = spanned(1)
    token = context_api.attach(outer)
    runtime_context.uninstall()
    assert context_api._RUNTIME_CONTEXT is hook
    assert context_api.get_current() is outer
    inner = spanned(2)
    newer = context_api.attach(inner)
    assert context_api.get_current() is inner
    assert current_link() is None, "a pass-through publishes nothing"
    context_api.detach(newer)
    assert context_api.get_current() is outer
    context_api.detach(token)
    del token, newer
    gc.collect()
    if hook.alive == 0:
        token = context_api.attach(Context())
        context_api.detach(token)
        assert context_api._RUNTIME_CONTEXT is stock
    assert context_api.get_current() == {}


def test_installed_again_it_links_again() -> None:
    runtime_context.install()
    token = context_api.attach(spanned(1))
    runtime_context.uninstall()
    runtime_context.install()
    second = context_api.attach(spanned(2))
    link = current_link()
    assert link is not None
    assert link.span_id == 2
    context_api.detach(second)
    context_api.detach(token)


def test_over_a_foreign_runtime_context() -> None:
    class Foreign(context_api._RuntimeContext):
        def __init__(self) -> None:
            self.stack: list[Context] = [Context()]

        def attach(self, context: Context) -> object:  # type: ignore[override]
            self.stack.append(context)
            return len(self.stack) - 1

        def get_current(self) -> Context:
            return self.stack[-1]

        def detach(self, token: object) -> None:
            del self.stack[token:]  # type: ignore[misc]

    foreign = Foreign()
    context_api._RUNTIME_CONTEXT = foreign
    outer = spanned(1)
    older = context_api.attach(outer)
    hook = runtime_context.install()
    assert hook.delegate is foreign
    assert context_api.get_current() is outer
    newer = context_api.attach(spanned(2))
    context_api.detach(newer)
    context_api.detach(older)
    assert context_api.get_current() == {}


def test_another_runtime_context_put_over_ours() -> None:
    hook = runtime_context.install()

    class Over(context_api._RuntimeContext):
        def attach(self, context: Context) -> object:  # type: ignore[override]
            return hook.attach(context)

        def get_current(self) -> Context:
            return hook.get_current()

        def detach(self, token: object) -> None:
            hook.detach(token)  # type: ignore[arg-type]

    over = Over()
    context_api._RUNTIME_CONTEXT = over
    token = context_api.attach(spanned(3))
    link = current_link()
    assert link is not None
    assert link.span_id == 3
    runtime_context.uninstall()  # not ours to take away
    assert context_api._RUNTIME_CONTEXT is over
    context_api.detach(token)


def test_a_generator_left_suspended_with_a_span() -> None:
    runtime_context.install()

    def suspended() -> Iterator[None]:
        token = context_api.attach(spanned(5))
        try:
            yield
        finally:
            context_api.detach(token)

    generator = suspended()
    next(generator)
    link = current_link()
    assert link is not None
    assert link.span_id == trace.get_current_span().get_span_context().span_id == 5
    generator.close()
    assert current_link() is None
