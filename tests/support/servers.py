# SPDX-License-Identifier: Apache-2.0
"""Real servers: started as a user would start them, asked over HTTP, ended by a signal.

    with Server(tmp_path, ["gunicorn", "-w", "2", "flask_app:app"], bind="-b") as server:
        server.wait_for_workers(2)
        replies = server.get("/work/unit_1", "/work/unit_2")
        ended = server.stop()

Nothing is read of the package's state: what is right comes from the replies (the application's own
word on what ran under which span), what is found from the exported files.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import pytest

from tests.support.ground_truth import (
    MIN_SAMPLES,
    Expectation,
    Label,
    Verdict,
    read_profiles,
    verify,
)
from tests.support.processes import environment

APPS: Final = Path(__file__).parents[1] / "frameworks" / "apps"
START_SECONDS: Final = 60
REPLY_SECONDS: Final = 60
STOP_SECONDS: Final = 60
_POLL_SECONDS: Final = 0.05

# A trace that a caller begins: the server's span is the local root, its parent is remote.
CALLER_TRACE_ID: Final = 0xCA11E4


@dataclass(frozen=True)
class Reply:
    """What an application tells of one request, and what it must be labelled with."""

    pid: int
    trace_id: int
    root: int
    truth: Mapping[str, Sequence[int]]
    endpoint: str | None
    span_type: str
    more: Mapping[str, Any]

    @classmethod
    def of(cls, told: Mapping[str, Any], endpoint: str, span_type: str) -> Self:
        """From the JSON that `tests/frameworks/apps/units.py` makes."""
        return cls(
            told["pid"], told["trace_id"], told["root"], told["truth"], endpoint, span_type, told
        )

    def kinds(self) -> dict[str, str]:
        """Of each unit: what it is, whatever the request."""
        return {unit: unit.removeprefix(self.more["name"] + "_") for unit in self.truth}

    def expected(self) -> dict[str, Expectation]:
        return {
            unit: Label(trace, span, root, self.span_type, self.endpoint)
            for unit, (trace, span, root) in self.truth.items()
        }


@dataclass(frozen=True)
class Ended:
    """A server that has ended."""

    returncode: int
    pid: int
    output: str
    capture: Path

    def pids(self) -> set[int]:
        """The processes that wrote anything."""
        assert self.capture.exists(), f"nothing was written\n{self.output}"
        return {int(path.name.split("-")[-3]) for path in self.capture.iterdir()}

    def functions(self, pid: int) -> set[str]:
        """Names of all functions in the profiles of one process."""
        return {f for s in read_profiles(self._part(pid)) for f in s.functions}

    def spans(self) -> Iterator[dict[str, Any]]:
        """All spans of the capture, as OTLP JSON."""
        for path in sorted(self.capture.glob("spans-*.json")):
            for line in path.read_text(encoding="utf-8").splitlines():
                for resource in json.loads(line)["resourceSpans"]:
                    for scope in resource["scopeSpans"]:
                        yield from scope["spans"]

    def _part(self, pid: int) -> Path:
        part = self.capture.parent / f"capture-{pid}"
        part.mkdir(exist_ok=True)
        for path in self.capture.glob(f"profile-*-{pid}-*-*.pb.gz"):
            shutil.copy(path, part)
        return part

    def assert_quiet(self) -> None:
        """Fail on anything that an owner of the server would find in the log because of us."""
        for sign in ("otel-proflink", "otel_proflink", "Failed to auto initialize", "Error "):
            lines = [line for line in self.output.splitlines() if sign in line]
            # gunicorn's own, about a socket that its uvicorn worker has closed already
            lines = [line for line in lines if "Error while closing socket" not in line]
            assert not lines, self.output

    def assert_right(self, replies: Sequence[Reply], *, parent_samples: bool = False) -> Verdict:
        """Hold every sample of every request against what the application said of it.

        Nothing wrong, under 1 % unknown; units only in the profile of the process that ran them;
        the spans in the capture under the ids that the samples bear; no file at all of a process
        that only supervises.

        Args:
            replies: of all requests that are to be looked at.
            parent_samples: whether the process that was started, when it has answered no request,
                is to write a profile of its own; else it must not write anything.
        """
        expected = {unit: label for reply in replies for unit, label in reply.expected().items()}
        assert len(expected) == sum(len(reply.truth) for reply in replies), "units are not unique"
        verdict = verify(read_profiles(self.capture), expected)
        verdict.assert_right(min_samples=0, max_unknown=0.01)
        # By kind: on a machine with more to do than it can, the sampler may sleep through a unit.
        kinds = {unit: kind for reply in replies for unit, kind in reply.kinds().items()}
        for kind in set(kinds.values()):
            units = [unit for unit in expected if kinds[unit] == kind]
            seen = verdict.total(units).total
            assert seen >= MIN_SAMPLES * len(units), f"too few samples: {seen} of {kind}"
        workers = {reply.pid for reply in replies}
        for pid in workers:
            found = self.functions(pid) & set(expected)
            assert found, f"too few samples: none of process {pid}"
            assert found <= {u for r in replies if r.pid == pid for u in r.truth}, f"process {pid}"
        assert workers <= self.pids()
        if self.pid not in workers:
            assert (self.pid in self.pids()) is parent_samples, "the supervisor's profile"
            assert not self.functions(self.pid) & set(expected)
        spans = {(int(s["traceId"], 16), int(s["spanId"], 16)) for s in self.spans()}
        told = {(ids[0], ids[1]) for reply in replies for ids in reply.truth.values()}
        assert told <= spans, "samples bear ids of spans that are not in the capture"
        return verdict


@dataclass
class Server:
    """A server under `opentelemetry-instrument`, with one application of `tests/frameworks/apps`.

    Args:
        directory: working directory, and home; the capture goes to `capture` in it.
        command: what to run; the first word is a program of this Python's environment.
        bind: words that come after it; ``{port}`` stands for the port.
        zero_code: run it under `opentelemetry-instrument`.
        env: environment variables on top of ours; an empty text removes one.
    """

    directory: Path
    command: Sequence[str]
    bind: Sequence[str] = ()
    zero_code: bool = True
    env: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] = field(init=False)
    port: int = field(init=False, default=0)
    _gone: bool = field(init=False, default=False)

    @property
    def capture(self) -> Path:
        return self.directory / "capture"

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return (self.directory / "server.log").read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Self:
        self.port = _free_port()
        words = [*self.command, *(word.format(port=self.port) for word in self.bind)]
        words[0] = str(program(words[0]))
        if self.zero_code:
            words.insert(0, str(program("opentelemetry-instrument")))
        with (self.directory / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                words,
                cwd=self.directory,
                env=server_environment(self.directory, self.capture, **self.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A group of its own: whatever happens, none of its processes stays behind.
                start_new_session=True,
            )
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._gone:
            # Not waited for, or not the last of its group: the group's id is still ours.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait_until(self, condition: Any, what: str) -> None:
        """Poll `condition()` until it holds; fail when the server ends, or after a minute."""
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            assert self.process.poll() is None, f"the server ended:\n{self.output}"
            assert time.monotonic() < deadline, f"{what} in vain:\n{self.output}"
            time.sleep(_POLL_SECONDS)

    def fetch(self, path: str) -> dict[str, Any]:
        """One GET request; the JSON of its response."""
        number = next(_requests)
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            headers={"traceparent": f"00-{CALLER_TRACE_ID:024x}{number:08x}-{number:016x}-01"},
        )
        try:
            with _opener.open(request, timeout=REPLY_SECONDS) as response:
                told: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{path}: {error}\n{error.read().decode()}\n{self.output}")
        if "trace_id" in told:
            # The caller's trace goes on: else the samples would be right of a trace of its own.
            assert told["trace_id"] == (CALLER_TRACE_ID << 32) | number, "the trace is not ours"
        return told

    def wait_for_workers(self, count: int, path: str = "/work/warm") -> set[int]:
        """Make requests until so many processes have answered; returns their process ids.

        Their samplers have started then. One after another may be answered by one worker for ever,
        so some are made at a time.
        """
        pids: set[int] = set()
        lock = threading.Lock()

        def ask() -> None:
            try:
                told = self.fetch(f"{path}_{next(_requests)}")
            except (urllib.error.URLError, ConnectionError):
                return  # it does not listen yet
            with lock:
                pids.add(told["pid"])

        def enough() -> bool:
            with ThreadPoolExecutor(2 * count) as pool:
                list(pool.map(lambda _: ask(), range(2 * count if count > 1 else 1)))
            return len(pids) >= count

        self.wait_until(enough, f"waited for {count} workers")
        return pids

    def get(
        self, endpoints: Mapping[str, str], prefix: str, count: int, at_once: int = 4
    ) -> list[Reply]:
        """Make requests, `at_once` at a time.

        Args:
            endpoints: of each path to be asked for, without the unit's name: its endpoint.
            prefix: start of the units' names.
            count: requests for each path.
        """
        asked = [
            (f"{path}{prefix}_{path.strip('/')}_{n}", endpoint)
            for n in range(count)
            for path, endpoint in endpoints.items()
        ]
        with ThreadPoolExecutor(at_once) as pool:
            told = list(pool.map(lambda each: self.fetch(each[0]), asked))
        return [
            Reply.of(each, endpoint, "web") for each, (_, endpoint) in zip(told, asked, strict=True)
        ]

    def told_late(self, endpoint: str, count: int) -> list[Reply]:
        """Wait until the application has left so many files on work done after its responses."""
        self.wait_until(lambda: len(list(self.directory.glob("told-*.json"))) >= count, "waited")
        told = [json.loads(path.read_text()) for path in self.directory.glob("told-*.json")]
        return [Reply.of(each, endpoint, "web") for each in told]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> Ended:
        """Send a signal to the process that was started, and wait for it and all of its own."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> Ended:
        """Wait for the end of the process that was started, and of all of its own."""
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it does not end:\n{self.output}")
        deadline = time.monotonic() + STOP_SECONDS
        while _group_exists(self.process.pid):
            assert time.monotonic() < deadline, f"a worker stays behind:\n{self.output}"
            time.sleep(_POLL_SECONDS)
        self._gone = True
        return Ended(self.process.returncode, self.process.pid, self.output, self.capture)


_requests: Final = itertools.count(1)
# No proxy of the machine's: it is not asked for 127.0.0.1.
_opener: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def program(name: str) -> Path:
    """A program of this Python's environment; the test is skipped where it is not installed."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed")
    return path


def server_environment(directory: Path, capture: Path, **more: str) -> dict[str, str]:
    """`processes.environment`, with our applications on the path and nothing at home."""
    bin_directory = str(Path(sys.executable).parent)
    return environment(
        capture,
        PATH=os.pathsep.join([bin_directory, os.environ.get("PATH", "")]),
        PYTHONPATH=str(APPS),
        HOME=str(directory),
        **more,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def ask_fastapi(server: Server) -> list[Reply]:
    """Every kind of handler of `fastapi_app`, and what its background tasks leave behind."""
    background = {"/background/": "/background/{name}"}
    replies = server.get({"/async/": "/async/{name}", "/work/": "/work/{name}"}, "unit", 4)
    server.get(background, "late", 2)
    return [*replies, *server.told_late("/background/{name}", 4)]
