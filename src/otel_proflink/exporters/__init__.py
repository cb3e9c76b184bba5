# SPDX-License-Identifier: Apache-2.0
"""Destinations of what was sampled: one module each, behind the small interface of ``base``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Batch, Exporter, ExportError

if TYPE_CHECKING:
    from ..config import Config

__all__ = ["Batch", "ExportError", "Exporter", "create_exporter"]


def create_exporter(config: Config, *, start_unix_s: int) -> Exporter:
    """Make the exporter that `config` names, for a profiler that started at `start_unix_s`."""
    # Imported here so that a process pays only for the destination that it uses.
    if config.exporter == "none":
        from .none import NoneExporter

        return NoneExporter()
    from .file import CaptureDirectory

    directory = CaptureDirectory(
        config.output_dir,
        start_unix_s=start_unix_s,
        max_bytes=config.output_max_bytes,
        max_age_s=config.output_max_age_s,
    )
    if config.exporter == "pprof":
        from .pprof import PprofExporter

        return PprofExporter(directory)
    from .spans_json import CaptureExporter

    return CaptureExporter(directory)
