# SPDX-License-Identifier: Apache-2.0
"""What is instrumented, one module each; `ProflinkInstrumentor` switches all of it on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from otel_proflink.instrumentation.instrumentor import (
        ProflinkInstrumentor as ProflinkInstrumentor,
    )

__all__ = ["ProflinkInstrumentor"]


# Lazy (PEP 562): a child process imports modules of this package to read what was sent to it, and
# may have no use for the SDK.
def __getattr__(name: str) -> object:
    if name != "ProflinkInstrumentor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from otel_proflink.instrumentation.instrumentor import ProflinkInstrumentor

    return ProflinkInstrumentor
