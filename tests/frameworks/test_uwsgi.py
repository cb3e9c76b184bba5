# SPDX-License-Identifier: Apache-2.0
"""uWSGI: it embeds the interpreter, and forks its workers in C."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.servers import Server

for _name in ("flask", "opentelemetry.instrumentation.flask"):
    pytest.importorskip(_name)

FLASK: Final = {"/work/": "/work/<name>", "/other/": "/other/<name>"}
BIND: Final = ("--http-socket", "127.0.0.1:{port}", "--module", "flask_app:app")
COMMAND: Final = (
    *("uwsgi", "--master", "--processes", "2", "--enable-threads"),
    # Let workers finish their request, and run Python's exit handlers, which a busy one does not.
    *("--hook-master-start", "unix_signal:15 gracefully_kill_them_all"),
)


# uWSGI 2.0.31, profiled or not: Python waits for what `PyOS_BeforeFork` would have done.
hangs = pytest.mark.skipif(sys.version_info >= (3, 13), reason="uWSGI's own: it hangs with this")


@pytest.mark.parametrize(
    "words",
    [
        pytest.param((), id="untold"),
        pytest.param(("--py-call-osafterfork",), marks=hangs, id="osafterfork"),
        pytest.param(("--py-call-uwsgi-fork-hooks",), id="fork-hooks"),
        pytest.param(("--py-call-uwsgi-fork-hooks", "--lazy-apps"), id="lazy-apps"),
        pytest.param(("--py-call-uwsgi-fork-hooks", "--threads", "2"), id="threads"),
    ],
)
def test_workers(tmp_path: Path, words: tuple[str, ...]) -> None:
    """With either option by which uWSGI tells Python that it has forked, and with none."""
    with Server(tmp_path, [*COMMAND, *words], BIND) as server:
        workers = server.wait_for_workers(2)
        replies = server.get(FLASK, "unit", 4)
        ended = server.stop()
    assert ended.returncode == 0, ended.output
    ended.assert_quiet()
    ended.assert_right(replies)
    assert ended.pids() == workers
