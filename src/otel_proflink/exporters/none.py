# SPDX-License-Identifier: Apache-2.0
"""No destination: samples are taken and counted, nothing is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Batch

if TYPE_CHECKING:
    from ..ended_span import EndedSpan
    from ..stats import DestinationStats


class NoneExporter:
    """The exporter of ``OTEL_PROFILES_EXPORTER=none``."""

    wants_profiles = False
    wants_spans = False

    def prepare(self) -> None:
        """Nothing to find out."""

    def encode_spans(self, spans: Sequence[EndedSpan]) -> bytes:
        """Nothing is kept."""
        return b""

    def export(self, batch: Batch) -> None:
        """Nothing is written."""

    def replace_profile(self, batch: Batch) -> bool:
        """Nothing was written, so nothing is replaced."""
        return False

    def stats(self) -> DestinationStats:
        """No counters."""
        return {}

    def shutdown(self) -> None:
        """Nothing is held."""
