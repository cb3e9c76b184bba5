# SPDX-License-Identifier: Apache-2.0
"""The capture directory: files that are private from their first byte and never half-written."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Literal

from .base import ExportError

Kind = Literal["profile", "spans"]

_SUFFIX: Final[dict[Kind, str]] = {"profile": "pb.gz", "spans": "json"}
# Only names that we could have written are ever counted against the caps, or removed.
_OURS: Final = re.compile(
    r"(?:profile-[\w.-]+-\d+-\d+-\d+\.pb\.gz|spans-[\w.-]+-\d+-\d+-\d+\.json)", re.ASCII
)
_TEMPORARY: Final = re.compile(rf"\.(?:{_OURS.pattern})\.tmp", re.ASCII)
# A temporary file lives for milliseconds. One this old was left by a process that was killed.
_STALE_TEMPORARY_S: Final = 3600
_MAX_HOST_LENGTH: Final = 64

_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_EXCL and O_NOFOLLOW: nobody who can write to the directory makes us write through a link of
# theirs, or into a file that they hold open.
_CREATE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class CaptureDirectory:
    """Writes ``profile-HOST-PID-START-N.pb.gz`` and ``spans-HOST-PID-START-N.json``.

    START is the Unix time, in seconds, at which the profiler started; N counts its flushes. When
    such files exist already (a container's process 1, started twice within a second) START is the
    next free second.

    Args:
        path: the directory, created with mode 0700 when it is missing.
        start_unix_s: see above.
        max_bytes: size cap of our own files there, of all processes; 0 = none.
        max_age_s: age cap of our own files there; 0 = none.
    """

    def __init__(self, path: str, *, start_unix_s: int, max_bytes: int, max_age_s: int) -> None:
        # Absolute from the start: the application may change its working directory.
        self.path = os.path.abspath(path)
        self.files_dropped = 0
        self._start = start_unix_s
        self._start_is_free = False
        self._host = _safe_host(os.uname().nodename)
        self._pid = os.getpid()
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s

    def name(self, kind: Kind, sequence: int) -> str:
        """The file name of one part of one batch."""
        return f"{self._stem(kind)}{sequence}.{_SUFFIX[kind]}"

    def prepare(self) -> None:
        """Create the directory and see whether files can be created in it.

        Raises:
            ExportError: they cannot.
        """
        with _reported(self.path), self._opened() as directory:
            # access() would answer for the file mode only, not for a read-only or full file system.
            probe = f".{self.name('profile', 0)}.tmp"
            with suppress(FileNotFoundError):
                os.unlink(probe, dir_fd=directory)
            os.close(os.open(probe, _CREATE_FLAGS, 0o600, dir_fd=directory))
            os.unlink(probe, dir_fd=directory)

    def write(self, kind: Kind, sequence: int, data: bytes) -> str:
        """Write one file: complete under its name, or not there at all.

        Returns:
            The file's name.

        Raises:
            ExportError: with the reason.
        """
        with _reported(self.path), self._opened() as directory:
            name = self.name(kind, sequence)
            self._write(directory, name, data)
            return name

    def replace(self, kind: Kind, sequence: int, data: bytes) -> bool:
        """Like `write`, but only if the file is still there.

        Someone may have moved the older one away (a shipper does): a second file with nearly the
        same samples would count them twice.
        """
        with _reported(self.path), self._opened() as directory:
            name = self.name(kind, sequence)
            try:
                os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                return False
            self._write(directory, name, data)
            return True

    def prune(self, keep: Collection[str]) -> None:
        """Apply the age cap and the size cap, oldest first; files named in `keep` always stay.

        Other processes may write, and prune, in the same directory at the same time.
        """
        if not self._max_bytes and not self._max_age_s:
            return
        now = time.time()
        files: list[tuple[float, int, str]] = []
        # Caps that cannot be applied are no reason to report a failed export.
        with suppress(OSError), self._opened() as directory:
            with os.scandir(directory) as entries:
                for entry in entries:
                    ours = _OURS.fullmatch(entry.name) is not None
                    if not ours and _TEMPORARY.fullmatch(entry.name) is None:
                        continue
                    with suppress(OSError):
                        info = entry.stat(follow_symlinks=False)
                        if not stat.S_ISREG(info.st_mode):
                            continue
                        if ours:
                            files.append((info.st_mtime, info.st_size, entry.name))
                        elif now - info.st_mtime > _STALE_TEMPORARY_S:
                            os.unlink(entry.name, dir_fd=directory)
            files.sort()
            total = sum(size for _, size, _ in files)
            for modified, size, name in files:
                too_old = self._max_age_s and now - modified > self._max_age_s
                too_much = self._max_bytes and total > self._max_bytes
                if not too_old and not too_much:
                    break
                if name in keep:
                    continue
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=directory)
                    self.files_dropped += 1
                total -= size

    def _stem(self, kind: Kind) -> str:
        return f"{kind}-{self._host}-{self._pid}-{self._start}-"

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """A descriptor of the directory: every step of one write happens in the same one."""
        try:
            directory = os.open(self.path, _DIRECTORY_FLAGS)
        except FileNotFoundError:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            directory = os.open(self.path, _DIRECTORY_FLAGS)
        try:
            if not self._start_is_free:
                self._find_free_start(directory)
            yield directory
        finally:
            os.close(directory)

    def _find_free_start(self, directory: int) -> None:
        names = os.listdir(directory)
        while any(name.startswith((self._stem("profile"), self._stem("spans"))) for name in names):
            self._start += 1
        self._start_is_free = True

    def _write(self, directory: int, name: str, data: bytes) -> None:
        temporary = f".{name}.tmp"
        # A leftover of this very process: the name holds host, pid and start.
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        descriptor = os.open(temporary, _CREATE_FLAGS, 0o600, dir_fd=directory)
        try:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
            # No fsync: the rename protects from a crash of this process, which is what happens to
            # profiled processes. After a crash of the machine the last capture is no great loss,
            # while an fsync may hold up every writer on the disk for seconds.
            os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=directory)
            raise


@contextmanager
def _reported(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            reason = "it, or a part of its path, is not a directory"
        raise ExportError(f"cannot write to {path}: {reason}") from error


def _safe_host(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:_MAX_HOST_LENGTH].lstrip(".-") or "host"
