# SPDX-License-Identifier: Apache-2.0
"""Every test function runs in a `contextvars.Context` of its own: what it leaves attached stays."""

from __future__ import annotations

import contextvars

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool:
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    contextvars.Context().run(pyfuncitem.obj, **arguments)
    return True
