# SPDX-License-Identifier: Apache-2.0
"""Celery: a worker's tasks; run as a program, the process that sends them and prints the results.

Broker and results are directories: `CELERY_DATA` says where.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import units
from celery import Celery

_data = Path(os.environ["CELERY_DATA"])
for _name in ("queue", "control", "results"):
    (_data / _name).mkdir(parents=True, exist_ok=True)

app = Celery("celery_app", broker="filesystem://", backend=(_data / "results").as_uri())
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(_data / "queue"),
        "data_folder_out": str(_data / "queue"),
        "control_folder": str(_data / "control"),
        "polling_interval": 0.1,
    },
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
)


@app.task(name="tasks.work")
def work(name: str) -> dict[str, Any]:
    return units.synchronous(name)


@app.task(name="tasks.other")
def other(name: str) -> dict[str, Any]:
    return units.synchronous(name)


def send(names: list[str]) -> None:
    """Send a task for each name under a span of its own, and print what the workers tell."""
    results = []
    for number, name in enumerate(names):
        with units.tracer.start_as_current_span(f"sender of {name}") as span:
            task = (work, other)[number % 2]
            results.append((task.name, span.get_span_context().trace_id, task.delay(name)))
    told = [
        {**result.get(timeout=60, interval=0.05), "task": task, "sender": sender}
        for task, sender, result in results
    ]
    print(json.dumps({"told": told}))


if __name__ == "__main__":
    send(sys.argv[1:])
