# SPDX-License-Identifier: Apache-2.0
"""Django: its development server, and its WSGI application in gunicorn."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Final

import pytest

from tests.support.servers import APPS, Server

for _name in ("django", "opentelemetry.instrumentation.django"):
    pytest.importorskip(_name)

ENDPOINTS: Final = {"/work/": "work/<str:name>", "/other/": "other/<str:name>"}
SETTINGS: Final = {"DJANGO_SETTINGS_MODULE": "django_app"}


@pytest.mark.parametrize(
    ("number", "setting"),
    [(signal.SIGINT, "false"), (signal.SIGTERM, "true")],
    ids=["SIGINT", "SIGTERM"],
)
def test_runserver(tmp_path: Path, number: signal.Signals, setting: str) -> None:
    """It handles Ctrl-C itself; SIGTERM kills it, so that takes the setting that asks for it."""
    command = ["python", str(APPS / "django_app.py"), "runserver", "--noreload"]
    env = SETTINGS | {"OTEL_PROFLINK_FLUSH_ON_SIGTERM": setting}
    with Server(tmp_path, command, ["127.0.0.1:{port}"], env=env) as server:
        server.wait_for_workers(1)
        replies = server.get(ENDPOINTS, "unit", 3)
        ended = server.stop(number)
    assert ended.returncode == (0 if number == signal.SIGINT else -number), ended.output
    ended.assert_quiet()
    ended.assert_right(replies)
    assert ended.pids() == {ended.pid}


def test_gunicorn(tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    command = ["gunicorn", "--workers", "2", "--threads", "2", "django_app:application"]
    with Server(tmp_path, command, ["--bind", "127.0.0.1:{port}"], env=SETTINGS) as server:
        workers = server.wait_for_workers(2)
        replies = server.get(ENDPOINTS, "unit", 4)
        ended = server.stop()
    assert ended.returncode == 0, ended.output
    ended.assert_quiet()
    ended.assert_right(replies)
    assert ended.pids() == workers
