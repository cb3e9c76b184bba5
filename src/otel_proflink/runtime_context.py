# SPDX-License-Identifier: Apache-2.0
"""Installing, finding and removing the context-runtime hook."""

from __future__ import annotations

from otel_proflink._linker import RuntimeContext


def installed() -> RuntimeContext | None:
    """The active runtime context if it is ours, pass-through or not; else None."""
    import opentelemetry.context as context_api

    active = context_api._RUNTIME_CONTEXT
    return active if isinstance(active, RuntimeContext) else None


def install() -> RuntimeContext:
    """Makes every attach publish a link; may be called at any time and more than once.

    The runtime context that was active stays behind ours: its tokens still detach, and contexts
    attached through it stay visible. Replacing the API's module global is what makes the hook
    visible to code that imported the API's functions by name.
    """
    import opentelemetry.context as context_api

    while True:
        hook = installed()
        if hook is None:
            hook = RuntimeContext(context_api._RUNTIME_CONTEXT)
            context_api._RUNTIME_CONTEXT = hook  # type: ignore[assignment]
        hook.linking = True
        # A pass-through may just have been leaving, on another thread.
        if installed() is hook:
            return hook


def uninstall() -> None:
    """Stops linking.

    The hook turns into a pass-through at once, and gives the API back to the runtime context
    behind it as soon as no context or token of ours is alive.
    """
    hook = installed()
    if hook is not None:
        hook.linking = False
        hook.try_leave()
