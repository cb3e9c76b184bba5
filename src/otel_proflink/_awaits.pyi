# SPDX-License-Identifier: Apache-2.0
"""Types of the Cython module; see the docstrings in `_awaits.pyx`."""

import contextvars
from typing import Any

from ._linker import Link

_Seen = tuple[list[tuple[str, str, int, int | None]], Link, int]

def look(task: Any) -> _Seen | None: ...
def book(seen: list[_Seen], wait_ns: int) -> None: ...
def learn_task_layout(task: Any, context: contextvars.Context) -> bool: ...
