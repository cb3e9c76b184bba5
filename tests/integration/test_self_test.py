# SPDX-License-Identifier: Apache-2.0
"""A layout that is not the running interpreter's is refused: cleanly, and whatever has moved.

As a micro release would move it, or an extension built for another one would expect it: each field
of the layout is put a word off, in a process of its own, because what a wrong layout may do is what
this is about.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from otel_proflink import _sampler
from otel_proflink._linker import FREE_THREADED
from tests.support.ground_truth import needs_sampler

pytestmark = needs_sampler

FIELDS = [
    *("interpreter_state.threads_head", "interpreter_state.threads_next_id"),
    *("thread.prev", "thread.next", "thread.interp", "thread.frame", "thread.native_thread_id"),
    *("thread.id", "thread.context", "thread.context_ver"),
    *("thread.datastack_chunk", "thread.datastack_top"),
    *("frame.code", "frame.previous", "frame.instruction", "frame.owner"),
    *("code.size", "code.units", "code.first_line"),
    *("code.filename", "code.qualname", "code.linetable"),
    *("context.context_vars", "context.hamt_root", "context.bitmap_pairs"),
    "context.array_children",
    # What is known by it is new in 3.13, and in 3.14 without the GIL; so are copies.
    *(["code.first_traceable"] if sys.version_info >= (3, 13 + FREE_THREADED) else []),
    *(["frame.copy", "code.copies"] if FREE_THREADED and sys.version_info >= (3, 14) else []),
]

PROGRAM = """
import sys
from otel_proflink import _sampler
from otel_proflink._linker import FREE_THREADED
by = int(sys.argv[1])
for field in sys.argv[2:]:
    _sampler.shift_layout(field, by)
    try:
        _sampler.start(100)
    except _sampler.SamplerError as reason:
        print(field, reason)
    else:
        print(field, "STARTED")
        _sampler.stop()
    _sampler.shift_layout(field, -by)
_sampler.start(100)
_sampler.stop()
"""


@pytest.mark.parametrize("by", [8, -8])
def test_a_moved_field_is_refused(by: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(by), *FIELDS],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(" ")[0] for line in lines] == FIELDS
    assert not [line for line in lines if line.endswith("STARTED")]


def test_fields_that_there_are_not() -> None:
    with pytest.raises(ValueError, match=r"thread\.nothing"):
        _sampler.shift_layout("thread.nothing", 8)
