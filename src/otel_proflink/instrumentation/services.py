# SPDX-License-Identifier: Apache-2.0
"""Threads and processes that work for everybody: they carry the label of nobody.

A pool's worker, the thread that feeds a queue, an exporter's loop: each is started by whoever needs
it first, often in the middle of a request, and stays. To run it under that request's context would
book the waiting (and the spans) of all later ones on it, "huge traces being active for hours", as
the OpenTelemetry Java agent found out. What such a worker does for somebody is handed to it with
that one's context, by the other modules here.
"""

from __future__ import annotations

from typing import Any, Final

# Packages whose own threads and processes are of that kind. AnyIO and Trio keep workers in reserve.
_PACKAGES: Final = (
    "concurrent.futures",
    "multiprocessing",
    "logging.handlers",
    "opentelemetry.sdk",
    "otel_proflink",
    "anyio",
    "trio",
)


def is_service(worker: Any) -> bool:
    """Whether a `threading.Thread` or `multiprocessing.Process` about to start is of that kind.

    Told by where its target is defined; without a target, by where its class is.
    """
    target = worker._target
    module = getattr(type(worker) if target is None else target, "__module__", None)
    return isinstance(module, str) and any(
        module == package or module.startswith(f"{package}.") for package in _PACKAGES
    )
