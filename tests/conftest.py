# SPDX-License-Identifier: Apache-2.0
"""Every test function runs in a `contextvars.Context` of its own: what it leaves attached stays.

On free-threaded CPython without a GIL: not even one that some module has had come back.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Iterator

import pytest

_gil_at_start = getattr(sys, "_is_gil_enabled", lambda: True)()


# What these test is the kernel's, or Python code that reads files: the interpreter's version says
# nothing of it.
_ONCE = {
    "test_cli.py",
    "test_cpu_budget.py",
    "test_go_pprof.py",
    "test_instructions.py",
    "test_memory_ladder.py",
    "test_pprof_reader.py",
    "test_report_model.py",
    "test_report_table.py",
    "test_self_metrics.py",
    "test_spans_reader.py",
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in _ONCE:
            item.add_marker("once")


@pytest.fixture(scope="session", autouse=True)
def _gil_stays_off() -> Iterator[None]:
    yield
    if not _gil_at_start:
        assert not sys._is_gil_enabled(), "a module has turned the GIL on"  # type: ignore[attr-defined]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    contextvars.Context().run(pyfuncitem.obj, **arguments)
    return True
