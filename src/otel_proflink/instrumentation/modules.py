# SPDX-License-Identifier: Apache-2.0
"""All that is wrapped, switched on and off together."""

from __future__ import annotations

from otel_proflink.instrumentation import (
    anyio_threads,
    arrival,
    multiprocessing_pool,
    multiprocessing_process,
    process_pool,
    thread_pool,
    threads,
)

_MODULES = (
    thread_pool,
    threads,
    process_pool,
    multiprocessing_process,
    multiprocessing_pool,
    anyio_threads,
)


def instrument() -> None:
    """Wrap everything. Does nothing where it is wrapped already."""
    arrival.prepared = True
    for module in _MODULES:
        module.instrument()


def uninstrument() -> None:
    """Take our wrappers out, and nobody else's."""
    for module in _MODULES:
        module.uninstrument()
