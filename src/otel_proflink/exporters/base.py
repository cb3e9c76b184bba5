# SPDX-License-Identifier: Apache-2.0
"""What the profiler hands to a destination, and what it expects of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..ended_span import EndedSpan
    from ..stats import DestinationStats


class ExportError(Exception):
    """A batch did not reach its destination; the text says why in plain words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one flush exports.

    Attributes:
        sequence: number of the batch, unique in one run of the profiler. Exporting the same number
            again puts the newer content in the place of the older.
        profile: an uncompressed pprof ``Profile`` message, or None.
        spans: what `Exporter.encode_spans` made, or None.
    """

    sequence: int
    profile: bytes | None = None
    spans: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes that the batch holds."""
        return len(self.profile or b"") + len(self.spans or b"")


class Exporter(Protocol):
    """One destination. Called from the profiler's exporter thread only, one call at a time."""

    #: whether profiles / spans are wanted: nothing is encoded for a destination that drops it.
    wants_profiles: bool
    wants_spans: bool

    def prepare(self) -> None:
        """Find out early whether the destination can be used.

        Raises:
            ExportError: not now. `export` may still succeed later.
        """

    def encode_spans(self, spans: Sequence[EndedSpan]) -> bytes:
        """Turn ended spans into bytes that can be joined with those of other calls."""

    def export(self, batch: Batch) -> None:
        """Bring `batch` to the destination, all of it or nothing that a reader could see.

        Raises:
            ExportError: it failed; the same batch may be tried again.
        """

    def replace_profile(self, batch: Batch) -> bool:
        """Put `batch.profile` in the place of the one exported under the same sequence.

        Returns:
            False when there is nothing left to replace, or the destination cannot do it.

        Raises:
            ExportError: it failed; the older content is still there.
        """

    def stats(self) -> DestinationStats:
        """Counters of this destination. Any thread."""

    def shutdown(self) -> None:
        """Let go of everything; nothing is called afterwards."""
