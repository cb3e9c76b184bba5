# SPDX-License-Identifier: Apache-2.0
"""gunicorn, two workers of each kind, with and without --preload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.support.servers import Reply, Server, ask_fastapi

pytest.importorskip("gunicorn")

FLASK: Final = {"/work/": "/work/<name>", "/other/": "/other/<name>"}
BIND: Final = ("--bind", "127.0.0.1:{port}")
TWO: Final = ("gunicorn", "--workers", "2")


def serve(directory: Path, words: tuple[str, ...], ask: Callable[[Server], list[Reply]]) -> None:
    with Server(directory, [*TWO, *words], BIND) as server:
        workers = server.wait_for_workers(2)
        replies = ask(server)
        ended = server.stop()
    assert ended.returncode == 0, ended.output
    ended.assert_quiet()
    ended.assert_right(replies)
    assert ended.pids() == workers


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
@pytest.mark.parametrize(
    "kind",
    [
        ("--worker-class", "sync"),
        ("--worker-class", "gthread", "--threads", "2"),
        ("--worker-class", "gevent"),
    ],
    ids=lambda kind: kind[1],
)
def test_flask(tmp_path: Path, kind: tuple[str, ...], preload: tuple[str, ...]) -> None:
    pytest.importorskip("opentelemetry.instrumentation.flask")
    pytest.importorskip("flask")
    if "gevent" in kind:
        pytest.importorskip("gevent")
    serve(tmp_path, (*kind, *preload, "flask_app:app"), lambda server: server.get(FLASK, "unit", 4))


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
def test_fastapi_in_uvicorns_worker(tmp_path: Path, preload: tuple[str, ...]) -> None:
    pytest.importorskip("opentelemetry.instrumentation.fastapi")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn_worker")
    kind = ("--worker-class", "uvicorn_worker.UvicornWorker")
    serve(tmp_path, (*kind, *preload, "fastapi_app:app"), ask_fastapi)


@pytest.mark.parametrize("start", ["auto", "now"])
@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
def test_set_up_by_the_application(tmp_path: Path, preload: tuple[str, ...], start: str) -> None:
    """Without `opentelemetry-instrument`: in each worker, or in the parent of all of them."""
    pytest.importorskip("opentelemetry.instrumentation.flask")
    command = [*TWO, *preload, "manual_app:app"]
    env = {"OTEL_PROFLINK_START": start}
    with Server(tmp_path, command, BIND, zero_code=False, env=env) as server:
        workers = server.wait_for_workers(2)
        replies = server.get(FLASK, "unit", 4)
        ended = server.stop()
    assert ended.returncode == 0, ended.output
    ended.assert_quiet()
    parent_samples = bool(preload) and start == "now"
    ended.assert_right(replies, parent_samples=parent_samples)
    assert ended.pids() - {ended.pid} == workers


def test_forks_under_load(tmp_path: Path) -> None:
    """Requests that call `os.fork` beside requests that burn, in the threads of one worker."""
    pytest.importorskip("opentelemetry.instrumentation.flask")
    command = ["gunicorn", "--workers", "1", "--threads", "6", "flask_app:app"]
    # DeprecationWarning: to fork beside threads is what is tested.
    with Server(tmp_path, command, BIND, env={"PYTHONWARNINGS": "ignore"}) as server:
        (worker,) = server.wait_for_workers(1)
        replies = server.get({"/work/": "/work/<name>", "/fork/": "/fork/<name>"}, "unit", 8, 6)
        ended = server.stop()
    assert ended.returncode == 0, ended.output
    ended.assert_quiet()
    forked = [reply for reply in replies if "child" in reply.more]
    assert len(forked) == 8
    assert [reply.more["status"] for reply in forked] == [0] * 8
    ended.assert_right([part for reply in replies for part in by_process(reply)])
    assert ended.pids() == {worker, *(reply.more["child"] for reply in forked)}


def by_process(reply: Reply) -> list[Reply]:
    """What a request that forked tells, told by each process for itself."""
    if "child" not in reply.more:
        return [reply]
    in_child = {unit: ids for unit, ids in reply.truth.items() if unit.endswith("_in_child")}
    others = {unit: ids for unit, ids in reply.truth.items() if unit not in in_child}
    return [
        replace(reply, truth=others),
        # The request never ends in the child, so its endpoint is not known there.
        replace(reply, truth=in_child, pid=reply.more["child"], endpoint=None),
    ]
