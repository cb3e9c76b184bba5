# SPDX-License-Identifier: Apache-2.0
"""The native sampler as the rest of the package sees it, and what loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from .stats import SamplerStats


class Capture(Protocol):
    """One swapped profile; it owns its native memory. See ``_sampler.pyi``."""

    @property
    def sample_count(self) -> int:
        """Samples in it."""

    @property
    def memory_bytes(self) -> int:
        """Bytes that it takes up."""

    def local_roots(self) -> dict[int, str]:
        """Local root span id -> span type, of the links in it."""

    def encode_pprof(
        self,
        *,
        endpoints: Mapping[int, str],
        thread_names: Mapping[int, str],
        span_names: Mapping[int, str] | None = None,
        tasks: Mapping[int, tuple[str, int]] | None = None,
    ) -> bytes:
        """An uncompressed pprof ``Profile`` message."""


class Sampler(Protocol):
    """The functions of ``_sampler``."""

    @property
    def SamplerError(self) -> type[Exception]:  # noqa: N802 - the name in the native module
        """Raised by `start`, with the reason in plain words."""

    def set_max_frames(self, frames: int) -> None:
        """Keep so many frames of a stack, from the next start on."""

    def start(self, rate_hz: float, awaits: bool = False, engine: str = "auto") -> None:
        """Begin to sample."""

    def stop(self) -> None:
        """Stop; harmless when stopped."""

    def running(self) -> bool:
        """Whether the native thread runs."""

    def ignore_thread(self, native_id: int) -> None:
        """Do not sample this thread."""

    def unignore_thread(self, native_id: int) -> None:
        """Undo `ignore_thread`."""

    def swap(self) -> Capture | None:
        """Everything since the last swap."""

    def fill(self) -> float:
        """How full the current profile's tables are, 0 to 1."""

    def set_budget(self, share: float) -> None:
        """What sampling may cost from the next start on: share of one CPU, 0 = no limit."""

    def stats(self) -> SamplerStats:
        """Native counters. Any thread; waits for nobody."""

    def memory_bytes(self) -> int:
        """What the tables take up. Takes longer than `stats`; waits for nobody."""


class SamplerUnavailableError(Exception):
    """There is no native sampler for this interpreter; the text says why."""


def load_sampler() -> Sampler:
    """The native sampler.

    Raises:
        SamplerUnavailableError: the extension module is missing or cannot be loaded.
    """
    try:
        from . import _sampler
    except ImportError as error:
        raise SamplerUnavailableError(f"its native part cannot be loaded ({error})") from error
    return cast("Sampler", _sampler)
