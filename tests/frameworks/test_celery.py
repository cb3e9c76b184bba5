# SPDX-License-Identifier: Apache-2.0
"""Celery's prefork pool, with a file-system broker: the sender's trace goes on in the worker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.ground_truth import read_profiles
from tests.support.servers import APPS, Reply, Server, program, server_environment

for _name in ("celery", "opentelemetry.instrumentation.celery"):
    pytest.importorskip(_name)

WORKER: Final = (
    *("celery", "--app", "celery_app", "worker", "--pool", "prefork", "--concurrency", "2"),
    *("--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "INFO"),
)


def send(directory: Path, count: int) -> list[dict[str, Any]]:
    """Send tasks from a process of its own, instrumented too; what the workers told of them."""
    names = [f"unit_{n}" for n in range(count)]
    done = subprocess.run(
        [
            str(program("opentelemetry-instrument")),
            *(str(program("python")), str(APPS / "celery_app.py"), *names),
        ],
        cwd=directory,
        env=server_environment(
            directory, directory / "capture-of-sender", CELERY_DATA=str(directory / "data")
        ),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["told"]
    assert len(told) == count
    return told


@pytest.mark.parametrize("recycled", [(), ("--max-tasks-per-child", "2")], ids=["", "recycled"])
def test_prefork(tmp_path: Path, recycled: tuple[str, ...]) -> None:
    env = {"CELERY_DATA": str(tmp_path / "data")}
    with Server(tmp_path, [*WORKER, *recycled], env=env) as server:
        server.wait_until(lambda: " ready." in server.output, "waited for the workers")
        told = send(tmp_path, 6)
        ended = server.stop(signal.SIGTERM)
    assert ended.returncode == 0, ended.output
    ended.assert_quiet()
    for each in told:
        assert each["trace_id"] == each["sender"], "the sender's trace does not go on"
    # Celery's instrumentation sets its attributes at the end: at start, it is a message.
    replies = [Reply.of(each, f"run/{each['task']}", "messaging") for each in told]
    ended.assert_right(replies)
    assert len({reply.pid for reply in replies}) >= (3 if recycled else 1)
    consumers = {int(s["spanId"], 16) for s in ended.spans() if s["name"].startswith("run/")}
    assert {reply.root for reply in replies} == consumers


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    """Celery takes every handler of SIGTERM away in its workers: with the setting, ours is back."""
    env = {"CELERY_DATA": str(tmp_path / "data"), "OTEL_PROFLINK_FLUSH_ON_SIGTERM": "true"}
    with Server(tmp_path, WORKER, env=env) as server:
        server.wait_until(lambda: " ready." in server.output, "waited for the workers")
        (told,) = send(tmp_path, 1)
        os.kill(told["pid"], signal.SIGTERM)
        server.wait_until(
            lambda: list(server.capture.glob(f"profile-*-{told['pid']}-*")),
            "waited for its profile",
        )
        # It died as it would have without us.
        server.wait_until(lambda: "(SIGTERM)" in server.output, "waited for its end")
    # No `stop`: such a death may leave the pool's queue locked, and Celery waiting for ever.
    found = {f for sample in read_profiles(server.capture) for f in sample.functions}
    assert set(told["truth"]) & found
