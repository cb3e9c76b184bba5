# SPDX-License-Identifier: Apache-2.0
"""The ``proflink`` command as a user runs it, and the demo held against its own ground truth."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.resources
import json
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from otel_proflink.cli import demo as demo_module
from otel_proflink.cli.main import command_group
from tests.support.ground_truth import SAMPLED, needs_sampler
from tests.support.pprof_schema import ProfileBuilder, decode, samples
from tests.support.processes import refusing

EXAMPLE = Path(__file__).parents[2] / "examples" / "thread_pool.py"
TRACE, ROOT, CHILD = "ab" * 16, "01" * 8, "02" * 8


def proflink(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The real command in a real process, its output in UTF-8."""
    return subprocess.run(
        [sys.executable, "-m", "otel_proflink.cli.main", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
        timeout=100,
        check=False,
    )


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command_group(), [str(argument) for argument in arguments])


@pytest.fixture
def capture(tmp_path: Path) -> Path:
    builder = ProfileBuilder()
    labels: dict[str, str | int] = {
        "trace_id": TRACE,
        "span_id": CHILD,
        "local_root_span_id": ROOT,
        "span_type": "web",
        "thread_name": "pool_0",
        "thread_id": 7,
        "thread_state": "running",
    }
    stack = [("Größe.parse", "/app/größe.py", 3)]
    builder.sample(stack, (5, 50_000_000, 50_000_000), labels)
    (tmp_path / "profile-h-1-1-1.pb.gz").write_bytes(builder.encode())
    spans = [
        {
            "traceId": TRACE,
            "spanId": span,
            "parentSpanId": parent,
            "flags": 0x101,
            "name": name,
            "kind": 2,
            "startTimeUnixNano": "1000",
            "endTimeUnixNano": "250001000",
            "attributes": [{"key": "http.route", "value": {"stringValue": "/[b]naïve[/b]"}}],
        }
        for span, parent, name in ((ROOT, "", "GET /naïve"), (CHILD, ROOT, "parse"))
    ]
    line = json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]})
    (tmp_path / "spans-h-1-1-1.json").write_text(line + "\n", encoding="utf-8")
    return tmp_path


# --- report ---------------------------------------------------------------------------------------


def test_report(capture: Path) -> None:
    done = proflink("report", capture)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1  GET /naïve" in done.stdout
    assert "100% Größe.parse" in done.stdout
    assert "250 ms   50.0 ms" in done.stdout
    assert max(map(len, done.stdout.splitlines())) == 100


@pytest.mark.parametrize("columns", [80, 120])
def test_report_follows_the_width_it_is_given(capture: Path, columns: int) -> None:
    done = proflink("report", capture, COLUMNS=str(columns))
    assert max(map(len, done.stdout.splitlines())) == columns


def test_report_in_an_encoding_that_lacks_the_names(capture: Path) -> None:
    done = proflink("report", capture, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "GET /na\\xefve" in done.stdout
    assert "`- parse" in done.stdout


def test_report_into_a_pipe_that_nobody_reads(capture: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "otel_proflink.cli.main", "report", str(capture)],
            stdout=closed,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert "Traceback" not in done.stderr


def test_report_takes_proflink_out_when_no_directory_is_given(
    capture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (capture / "proflink-out").symlink_to(capture)
    monkeypatch.chdir(capture)
    assert "GET /naïve" in invoke("report").output


def test_report_as_json(capture: Path) -> None:
    document = json.loads(proflink("report", "--json", capture).stdout)
    (root,) = document["local_roots"]
    assert root["endpoint"] == "/[b]naïve[/b]"
    assert [span["name"] for span in root["spans"]] == ["GET /naïve", "parse"]
    assert root["total"]["cpu_ns"] == 50_000_000
    assert root["spans"][1]["functions"][0]["function"] == "Größe.parse"


def test_report_limits(capture: Path) -> None:
    output = invoke("report", capture, "--limit", "1", "--children", "1", "--functions", "0").output
    assert "1 of 1 local root shown" in output
    assert invoke("report", capture, "--limit", "-1").exit_code == 2


def test_report_names_what_it_could_not_read(capture: Path) -> None:
    (capture / "profile-h-1-1-2.pb.gz").write_bytes(b"\x1f\x8bjunk")
    (capture / "spans-h-1-1-2.json").write_text('{"resourceSp')
    result = invoke("report", capture)
    assert result.exit_code == 0
    assert "GET /naïve" in result.output
    flat = " ".join(result.output.split())
    assert "profile-h-1-1-2.pb.gz: not a readable pprof profile" in flat
    assert "spans-h-1-1-2.json: line 1 is cut short" in flat
    as_json = proflink("report", "--json", capture)
    assert len(json.loads(as_json.stdout)["errors"]) == 2
    assert as_json.stderr.count("not read: ") == 2


def test_report_of_nothing(tmp_path: Path) -> None:
    for directory, reason in ((tmp_path, "no capture in it"), (tmp_path / "x", "No such file")):
        done = proflink("report", directory)
        assert (done.returncode, done.stdout) == (1, "")
        assert reason in done.stderr
        assert str(directory) in done.stderr
        assert len(done.stderr.splitlines()) == 1


# --- the command itself ---------------------------------------------------------------------------


def test_help_and_version() -> None:
    assert "report" in invoke("-h").output
    assert "--duration" in invoke("demo", "--help").output
    assert invoke("--version").output.startswith("otel-proflink, version ")
    assert invoke("nonsense").exit_code == 2


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_one_line_names_it(missing: str) -> None:
    program = f"import sys; sys.modules[{missing!r}] = None; import otel_proflink.cli.main as m"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; m.main()", "report"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == (
        f"proflink: the command line needs {missing}: pip install 'otel-proflink[cli]'\n"
    )


def test_another_missing_module_is_not_blamed_on_the_extra() -> None:
    program = "import sys; sys.modules['zlib'] = None; from otel_proflink.cli.main import main"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; main()"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "otel-proflink[cli]" not in done.stderr
    assert "zlib" in done.stderr


# --- demo -----------------------------------------------------------------------------------------


def test_demo_without_a_distro(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_module, "entry_points", lambda group: [])
    result = invoke("demo", "--output", tmp_path)
    assert result.exit_code == 1
    assert "needs opentelemetry-distro: pip install 'otel-proflink[zero-code]'" in result.output


@pytest.fixture
def some_distro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "entry_points", lambda group: ["one"])


@pytest.mark.usefixtures("some_distro")
def test_demo_without_a_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(demo_module.sysconfig, "get_path", lambda *_: str(tmp_path))
    result = invoke("demo", "--output", tmp_path)
    assert result.exit_code == 1
    assert f"no opentelemetry-instrument in {tmp_path}" in result.output
    assert "otel-proflink[zero-code]" in result.output


@pytest.fixture
def launcher(some_distro: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A launcher of the test's own, to be filled with a shell script."""
    path = tmp_path / "bin" / "opentelemetry-instrument"
    path.parent.mkdir()
    monkeypatch.setattr(demo_module, "find_launcher", lambda: path)
    return path


def script(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_demo_whose_example_fails_shows_why(launcher: Path, tmp_path: Path) -> None:
    script(launcher, "echo 'it \x1b[31mbroke' >&2; exit 3")
    result = invoke("demo", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "the example ended with status 3\nit \\x1b[31mbroke\n" in result.output


def test_demo_whose_example_is_killed(launcher: Path, tmp_path: Path) -> None:
    script(launcher, "kill -9 $$")
    assert "ended with signal 9" in invoke("demo", "--output", tmp_path / "out").output


def test_demo_whose_example_does_not_end(
    launcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(launcher, "exec sleep 60")
    monkeypatch.setattr(demo_module, "_GRACE_S", 0.5)
    result = invoke("demo", "--output", tmp_path / "out", "--duration", "0.5")
    assert result.exit_code == 1
    assert "did not end within 1 s" in result.output


def test_demo_whose_example_leaves_a_process_behind(launcher: Path, tmp_path: Path) -> None:
    script(launcher, "sleep 20 & exit 3")
    started = time.monotonic()
    assert "ended with status 3" in invoke("demo", "--output", tmp_path / "out").output
    assert time.monotonic() - started < 15


def test_demo_without_a_capture_tells_what_was_said(launcher: Path, tmp_path: Path) -> None:
    script(launcher, "echo 'otel_proflink: no sampling today' >&2")
    result = invoke("demo", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert "otel_proflink: no sampling today" in result.output
    assert "the example left no capture" in result.output


def test_demo_shows_this_run_only(launcher: Path, capture: Path) -> None:
    script(launcher, "exit 0")
    result = invoke("demo", "--output", capture)
    assert "GET /naïve" not in result.output
    assert result.exit_code == 1


def test_demo_into_a_place_where_it_cannot_write(launcher: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = invoke("demo", "--output", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "Not a directory" in result.output


def test_demo_environment_has_nothing_of_the_caller_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_SAMPLER", "OTEL_PROFLINK_ENABLED"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("OTEL_PROFLINK_SAMPLE_RATE", "500")
    env = demo_module.environment(tmp_path)
    assert {key: value for key, value in env.items() if key.startswith("OTEL_")} == {
        "OTEL_SERVICE_NAME": "proflink-demo",
        "OTEL_TRACES_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_PROFLINK_OUTPUT_DIR": str(tmp_path),
        "OTEL_PROFLINK_SAMPLE_RATE": "500",
    }


def test_the_example_of_an_installation_comes_before_a_checkout_s(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        assert demo_module.find_example(stack).name == "thread_pool.py"
        monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
        assert demo_module.find_example(stack) == EXAMPLE
        (tmp_path / "examples").mkdir()
        installed = tmp_path / "examples" / "thread_pool.py"
        installed.touch()
        assert demo_module.find_example(stack) == installed


def test_the_example_knows_nothing_of_us() -> None:
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    modules = {
        name.name if isinstance(node, ast.Import) else str(node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert not [module for module in modules if module.startswith("otel_proflink")]
    assert "opentelemetry" in modules


def ground_truth() -> dict[str, tuple[str, str]]:
    """function -> (span, request), or two empty texts: the table in the example's docstring."""
    document = ast.get_docstring(ast.parse(EXAMPLE.read_text(encoding="utf-8"))) or ""
    rule = next(line for line in document.splitlines() if line.startswith("---"))
    starts = [place for place, char in enumerate(rule) if rule[place - 1 : place + 1] in ("", " -")]
    starts[0] = 0
    truth = {}
    for line in document[document.index(rule) :].splitlines()[1:]:
        ends = [*starts[1:], len(line)]
        name, _, span, request = (line[a:b].strip() for a, b in zip(starts, ends, strict=True))
        truth[name] = ("", "") if span == "none" else (span, request)
    return truth


def test_the_example_s_table_is_complete() -> None:
    truth = ground_truth()
    assert truth["verify_signature"] == ("verify signature", "POST /invoices/{batch}")
    assert truth["compact_cache"] == truth["refresh_exchange_rates"] == ("", "")
    source = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    burners = {
        node.name
        for node in source.body
        if isinstance(node, ast.FunctionDef) and "_until(" in ast.unparse(node)
    } - {"_until"}
    assert burners == truth.keys()


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    if not SAMPLED:
        pytest.skip("no sampling on this version of Python")
    output = tmp_path_factory.mktemp("demo") / "out"
    done = proflink("demo", "--output", output, "--duration", "3", OTEL_PROFLINK_SAMPLE_RATE="1000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Running examples/thread_pool.py" in done.stderr
    return output, done.stdout


def demo_spans(output: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for path in output.glob("spans-*.json"):
        for line in path.read_text(encoding="utf-8").splitlines():
            for resource in json.loads(line)["resourceSpans"]:
                for scope in resource["scopeSpans"]:
                    for span in scope["spans"]:
                        found[span["traceId"], span["spanId"]] = span
    return found


def test_demo_ends_in_the_table(demo_run: tuple[Path, str]) -> None:
    output, shown = demo_run
    assert "POST /checkout" in shown
    assert f"proflink report {output}" in shown
    assert (output.stat().st_mode & 0o777) == 0o700
    for text in ("price_basket", "match rules", "shop-pool_", "No span", "refresh_exchange_r"):
        assert text in shown
    again = proflink("report", output).stdout
    assert shown.startswith(again.rstrip())


@needs_sampler
def test_demo_where_sampling_is_refused_says_why(tmp_path: Path) -> None:
    done = proflink("demo", "--output", tmp_path / "out", "--duration", "1", **refusing(tmp_path))
    assert done.returncode == 1
    assert "otel-proflink does not profile this process" in done.stderr
    assert "the example left no capture" in done.stderr
    assert "Traceback" not in done.stderr


def test_demo_against_its_ground_truth(demo_run: tuple[Path, str]) -> None:
    output, _ = demo_run
    truth = ground_truth()
    spans = demo_spans(output)
    seen: Counter[str] = Counter()
    missing: Counter[str] = Counter()
    wrong = []
    for path in output.glob("profile-*.pb.gz"):
        for sample in samples(decode(path.read_bytes())):
            function = next((f for f in sample.functions if f in truth), None)
            if function is None:
                continue
            name, request = truth[function]
            labels = sample.labels
            count = sample.values["samples"]
            running = labels["thread_state"] == "running"
            if running:
                seen[function] += count
            if "span_id" not in labels:
                if running and name:
                    missing[function] += count
                continue
            span = spans.get((labels["trace_id"], labels["span_id"]))
            root = spans.get((labels["trace_id"], labels["local_root_span_id"]))
            is_root = root is not None and not root.get("parentSpanId")
            told = (span and span["name"], root and root["name"], is_root, labels["span_type"])
            if told != (name, request, True, "web") or labels["endpoint"] != request.split()[1]:
                wrong.append((function, told, labels))
    assert not wrong
    assert {function for function in truth if not seen[function]} == set()
    traced = sum(count for function, count in seen.items() if truth[function][0])
    assert sum(missing.values()) <= 0.005 * traced, missing


def test_the_wheel_s_entry_point() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="proflink")
    assert script.value == "otel_proflink.cli.main:main"
