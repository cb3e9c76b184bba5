# SPDX-License-Identifier: Apache-2.0
"""``proflink demo``: the thread pool example under ``opentelemetry-instrument``, then its table."""

from __future__ import annotations

import importlib.resources
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from typing import IO, Final

import click
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..report import CaptureError
from ..report.model import read_report
from ..report.table import visible
from .report import new_console, show

_EXAMPLE: Final = "thread_pool.py"
_SERVICE: Final = "proflink-demo"
# To start, to finish the last requests and to write the capture, on a busy machine.
_GRACE_S: Final = 60.0
_STDERR_LINES: Final = 15
_INSTALL: Final = "pip install 'otel-proflink[zero-code]'"
# The one setting of the caller that the demo follows.
_KEPT: Final = frozenset({"OTEL_PROFLINK_SAMPLE_RATE"})


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("proflink-out"),
    show_default=True,
    metavar="DIR",
    help="Capture directory.",
)
@click.option(
    "--duration",
    type=click.FloatRange(min=0.5, max=3600),
    default=6.0,
    show_default=True,
    metavar="S",
    help="Serve requests for this many seconds.",
)
def demo(output: Path, duration: float) -> None:
    """Profile a small shop, with no line of code changed, and show its slowest requests.

    Runs examples/thread_pool.py under opentelemetry-instrument: requests that hand their work to a
    thread pool, and work that no request is to blame for.
    """
    launcher = find_launcher()
    output = output.absolute()
    try:
        output.mkdir(mode=0o700, parents=True, exist_ok=True)
        older = frozenset(os.listdir(output))
    except OSError as error:
        raise click.ClickException(f"{output}: {error.strerror or error}") from None
    with ExitStack() as stack:
        example = find_example(stack)
        command = [str(launcher), sys.executable, str(example), "--duration", f"{duration:g}"]
        complaints = _run(command, environment(output), duration)
    for line in complaints:
        click.secho(visible(line), fg="yellow", err=True)
    try:
        found = read_report(output, exclude=older)
    except CaptureError as error:
        raise click.ClickException(f"the example left no capture: {error}") from None
    show(found)
    click.echo(f"The capture is in {output}; to see it again: proflink report {output}")


def find_launcher() -> Path:
    """``opentelemetry-instrument`` of this very interpreter.

    Raises:
        click.ClickException: it, or a distro for it to load, is missing.
    """
    # Without a configurator it starts the application, and no tracing at all.
    if not entry_points(group="opentelemetry_configurator"):
        raise click.ClickException(f"the demo needs opentelemetry-distro: {_INSTALL}")
    folders = [
        Path(sys.executable).parent,
        Path(sysconfig.get_path("scripts")),
        Path(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user"))),
    ]
    for folder in folders:
        launcher = folder / "opentelemetry-instrument"
        if launcher.is_file():
            return launcher
    raise click.ClickException(f"no opentelemetry-instrument in {folders[0]}: {_INSTALL}")


def find_example(stack: ExitStack) -> Path:
    """The example as a file, for as long as `stack` is open: installed with us, or a checkout's.

    Raises:
        click.ClickException: neither is there.
    """
    package = importlib.resources.files(__package__.partition(".")[0])
    installed = package / "examples" / _EXAMPLE
    if installed.is_file():
        return stack.enter_context(importlib.resources.as_file(installed))
    # src/otel_proflink/cli/demo.py of a checkout
    checkout = Path(__file__).parents[3] / "examples" / _EXAMPLE
    if checkout.is_file():
        return checkout
    raise click.ClickException(f"examples/{_EXAMPLE} is not part of this installation")


def environment(output: Path) -> dict[str, str]:
    """The caller's environment, with nothing left in it that would make another demo of this."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("OTEL_") or name in _KEPT
    }
    env.update(
        OTEL_SERVICE_NAME=_SERVICE,
        OTEL_TRACES_EXPORTER="none",
        OTEL_METRICS_EXPORTER="none",
        OTEL_LOGS_EXPORTER="none",
        OTEL_PROFLINK_OUTPUT_DIR=str(output),
    )
    return env


class _Requests:
    """Counts the requests that the example has served: it prints a line for each."""

    def __init__(self) -> None:
        self.count = 0

    def follow(self, stream: IO[str]) -> None:
        """Counts until the stream ends; for a thread of its own."""
        for _ in stream:
            self.count += 1

    def __str__(self) -> str:
        return f"{self.count} requests" if self.count else "starting"


def _run(command: list[str], env: dict[str, str], duration: float) -> list[str]:
    """Runs the example to its end; returns what it complained about.

    Raises:
        click.ClickException: it could not be started, failed, or did not end.
    """
    requests = _Requests()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace") as errors:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                encoding="utf-8",
                errors="backslashreplace",
            )
        except OSError as error:
            raise click.ClickException(f"{command[0]}: {error.strerror or error}") from None
        assert process.stdout is not None
        reader = threading.Thread(target=requests.follow, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            _watch(process, requests, duration)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            reader.join(timeout=2)
            if not reader.is_alive():  # else something holds the pipe, and close() would wait too
                process.stdout.close()
        errors.seek(0)
        complaints = [line for line in errors.read().splitlines() if line.strip()]
    if process.returncode != 0:
        how = f"status {process.returncode}"
        if process.returncode < 0:
            how = f"signal {-process.returncode}"
        said = "\n".join(map(visible, complaints[-_STDERR_LINES:]))
        raise click.ClickException(f"the example ended with {how}\n{said}".rstrip())
    return complaints


def _watch(process: subprocess.Popen[str], requests: _Requests, duration: float) -> None:
    started = time.monotonic()
    console = new_console(stderr=True)
    title = f"Running examples/{_EXAMPLE}"
    if not console.is_terminal:
        console.print(f"{title} under opentelemetry-instrument for {duration:g} s")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}", markup=False, style="bright_black"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title, total=duration, doing="starting")
        while True:
            try:
                process.wait(timeout=0.1)
                return
            except subprocess.TimeoutExpired:
                elapsed = time.monotonic() - started
            progress.update(task, completed=min(elapsed, duration), doing=str(requests))
            if elapsed > duration + _GRACE_S:
                raise click.ClickException(f"the example did not end within {elapsed:.0f} s")
