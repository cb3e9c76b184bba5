# SPDX-License-Identifier: Apache-2.0
"""FastAPI in uvicorn: one process, and two below a supervisor.

uvicorn ends by sending itself the signal that it was sent, with the handlers of before in place.
"""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.support.servers import Server, ask_fastapi

for _name in ("uvicorn", "fastapi", "opentelemetry.instrumentation.fastapi"):
    pytest.importorskip(_name)

BIND: Final = ("--host", "127.0.0.1", "--port", "{port}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_one_process(tmp_path: Path, number: signal.Signals) -> None:
    with Server(tmp_path, ["uvicorn", "fastapi_app:app"], BIND) as server:
        server.wait_for_workers(1)
        replies = ask_fastapi(server)
        ended = server.stop(number)
    assert ended.returncode in (-number, 128 + number, 0), ended.output
    ended.assert_quiet()
    ended.assert_right(replies)
    assert ended.pids() == {ended.pid}


def test_two_workers(tmp_path: Path) -> None:
    command = ["uvicorn", "fastapi_app:app", "--workers", "2"]
    with Server(tmp_path, command, BIND) as server:
        workers = server.wait_for_workers(2)
        replies = ask_fastapi(server)
        ended = server.stop()
    assert ended.returncode in (0, -signal.SIGTERM), ended.output
    ended.assert_quiet()
    ended.assert_right(replies)
    assert ended.pids() == workers


def test_a_request_that_ends_while_it_shuts_down(tmp_path: Path) -> None:
    """The last export comes after the graceful shutdown, not with the signal."""
    with (
        Server(tmp_path, ["uvicorn", "fastapi_app:app"], BIND) as server,
        ThreadPoolExecutor(1) as client,
    ):
        server.wait_for_workers(1)
        answer = client.submit(server.get, {"/slow/": "/slow/{name}"}, "last", 1)
        server.wait_until((tmp_path / "began").exists, "waited for the request")
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: "Shutting down" in server.output, "waited for the signal")
        (tmp_path / "go").touch()
        replies = answer.result()
        ended = server.wait()
    assert ended.returncode == -signal.SIGTERM
    ended.assert_quiet()
    ended.assert_right(replies)
