# SPDX-License-Identifier: Apache-2.0
"""A capture directory read back: its profiles joined with its spans."""

from __future__ import annotations

import os

__all__ = ["MAX_FILE_BYTES", "CaptureError"]

# One file of a capture, unpacked. A minute of sampling is far below a tenth of it; a gzip bomb is
# far above.
MAX_FILE_BYTES = 256 * 1024 * 1024


class CaptureError(Exception):
    """A file (or directory) of a capture that cannot be read, with the reason in plain words."""

    def __init__(self, file: str | os.PathLike[str], reason: str) -> None:
        super().__init__(os.fspath(file), reason)
        self.file = os.fspath(file)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"
