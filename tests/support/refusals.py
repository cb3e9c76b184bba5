# SPDX-License-Identifier: Apache-2.0
"""What a container, a kernel or the application itself may take away from a process.

For applications under test: nothing of pytest or of ours is imported.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_CLONE_NEWNS: Final = 0x20000
_MS_REC_PRIVATE: Final = 0x4000 | 0x40000

#: system call numbers: process_vm_readv, seccomp
_NUMBERS: Final = {"x86_64": (310, 317), "aarch64": (270, 277)}

#: Somebody without any rights, also in the numbers of most containers.
NOBODY: Final = 65534


class NotAllowedError(Exception):
    """This cannot be taken away here; the text says why."""


def _check(result: int, what: str) -> None:
    if result != 0:
        raise NotAllowedError(f"{what}: {errno.errorcode[ctypes.get_errno()]}")


def refuse_process_vm_readv(error: str) -> None:
    """A seccomp filter, for all threads: from now on the call fails with `error` (``EPERM``)."""
    if platform.machine() not in _NUMBERS:
        raise NotAllowedError(f"system call numbers of {platform.machine()} are not known here")
    number, seccomp = _NUMBERS[platform.machine()]
    instructions = [
        (0x20, 0, 0, 0),  # load the number of the system call
        (0x15, 0, 1, number),  # is it this one?
        (0x06, 0, 0, 0x00050000 | getattr(errno, error)),  # SECCOMP_RET_ERRNO
        (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
    ]
    code = b"".join(struct.pack("HBBI", *each) for each in instructions)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(instructions), ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    flags = ctypes.c_ulong(_SECCOMP_FILTER_FLAG_TSYNC)
    mode = ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER)
    _check(_libc.syscall(ctypes.c_long(seccomp), mode, flags, program), "seccomp")


def empty_proc() -> None:
    """An empty /proc, for this process alone. Before it has other threads."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None), "mount /")
    _check(_libc.mount(b"tmpfs", b"/proc", b"tmpfs", ctypes.c_ulong(0), None), "mount /proc")
    assert not os.listdir("/proc")


def be_nobody() -> None:
    """If root, become somebody whom /proc's permissions hold for. Imports may fail from now on."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def set_dumpable(dumpable: bool) -> None:
    """Whether the process is dumpable; if not, its files in /proc are root's.

    Raises:
        NotAllowedError: they can be read all the same.
    """
    _check(_libc.prctl(PR_SET_DUMPABLE, int(dumpable), 0, 0, 0), "dumpable")
    if not dumpable:
        try:
            Path("/proc/self/syscall").read_bytes()
        except PermissionError:
            return
        raise NotAllowedError("files in /proc do not become root's here")
