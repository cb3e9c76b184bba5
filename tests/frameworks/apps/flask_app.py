# SPDX-License-Identifier: Apache-2.0
"""Flask, as its own documentation would have it: nothing in here knows of profiling."""

from __future__ import annotations

import os
from typing import Any

import units
from flask import Flask
from opentelemetry import trace

app = Flask(__name__)


@app.get("/work/<name>")
def work(name: str) -> dict[str, Any]:
    return units.synchronous(name)


@app.get("/other/<name>")
def other(name: str) -> dict[str, Any]:
    return units.synchronous(name)


@app.get("/fork/<name>")
def fork(name: str) -> dict[str, Any]:
    """A request that forks: its span is current in both processes."""
    work = units.Work(name)
    in_child, meanwhile = work.unit("in_child"), work.unit("meanwhile")
    child = os.fork()
    if child == 0:
        try:
            in_child()
            trace.get_tracer_provider().force_flush()  # type: ignore[attr-defined]
            os._exit(0)
        finally:
            os._exit(1)
    meanwhile()
    _, status = os.waitpid(child, 0)
    work.unit("later")()
    return work.told() | {"child": child, "status": status}
