# SPDX-License-Identifier: Apache-2.0
"""Is this a process that only looks after worker processes?

Servers with worker processes run start-up hooks in the parent too. Sampling there shows nothing
but a loop of waits, and a fork of it has one thread more to think about; so it waits for the first
span, which such a parent never starts. A wrong "yes" costs the samples before the first span, a
wrong "no" the samples of an idle process: neither is worth more than a short table.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

# Options of the interpreter that take the next argument as their value.
_WITH_VALUE: Final = frozenset({"-W", "-X", "--check-hash-based-pycs"})
_MODULE_OPTION: Final = re.compile(r"-[A-Za-z]*m")
_COMMAND_OPTION: Final = re.compile(r"-[A-Za-z]*c")
# What multiprocessing starts beside the workers.
_HELPER: Final = re.compile(r"from multiprocessing\.(resource_tracker|forkserver) import")
_IN_PROCESS_POOLS: Final = frozenset({"solo", "threads", "gevent", "eventlet"})


def only_supervises(
    command_line: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    modules: Collection[str] | None = None,
    executable: str | None = None,
) -> bool:
    """Whether the command line is one of a known supervisor of worker processes.

    Args:
        command_line: the whole one, interpreter first; default ``sys.orig_argv``, which is filled
            in already while ``sitecustomize`` runs.
        environ: default ``os.environ``.
        modules: names of loaded modules, default ``sys.modules``.
        executable: the program that runs the interpreter, default ``sys.executable``.
    """
    env = os.environ if environ is None else environ
    line = sys.orig_argv if command_line is None else command_line
    # uWSGI embeds the interpreter: there is no command line of Python's, and no module `uwsgi`
    # either while `sitecustomize` runs.
    if "uwsgi" in (sys.modules if modules is None else modules):
        return True
    if not line:
        embedder = sys.executable if executable is None else executable
        return os.path.basename(embedder or "").startswith("uwsgi")
    program, arguments = _program(line)
    if program == "-c":
        return bool(arguments) and _HELPER.match(arguments[0].lstrip()) is not None
    judge = _SUPERVISORS.get(program)
    return judge is not None and judge(arguments, env)


def _program(line: Sequence[str]) -> tuple[str, list[str]]:
    """Name of what is run, ``-c`` for a command, and its arguments."""
    rest = list(line[1:])
    while rest:
        argument = rest.pop(0)
        if argument in _WITH_VALUE:
            del rest[:1]
        elif _COMMAND_OPTION.fullmatch(argument):
            return "-c", rest
        elif _MODULE_OPTION.fullmatch(argument):
            return (rest[0].partition(".")[0], rest[1:]) if rest else ("", [])
        elif not argument.startswith("-"):
            name = os.path.basename(argument)
            if name == "__main__.py":
                name = os.path.basename(os.path.dirname(argument))
            return name, rest
    return "", []


def _option(arguments: Sequence[str], *names: str) -> str | None:
    """The value of ``--name value``, ``--name=value`` or ``-nvalue``; the last one counts."""
    found = None
    for index, argument in enumerate(arguments):
        for name in names:
            if argument == name:
                found = arguments[index + 1] if index + 1 < len(arguments) else ""
            elif name.startswith("--") and argument.startswith(f"{name}="):
                found = argument[len(name) + 1 :]
            elif not name.startswith("--") and argument.startswith(name):
                found = argument[len(name) :].lstrip("=")
    return found


def _always(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    return True


def _uvicorn(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    workers = _option(arguments, "--workers") or environ.get("WEB_CONCURRENCY", "1")
    return "--reload" in arguments or workers not in ("", "1")


def _fastapi(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    return "dev" in arguments[:1] or _uvicorn(arguments, environ)


def _hypercorn(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    return _option(arguments, "--workers", "-w") != "0"


def _celery(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    pool = _option(arguments, "--pool", "-P")
    return "worker" in arguments and pool not in _IN_PROCESS_POOLS


def _flask(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    reloads = "--debug" in arguments or "--reload" in arguments
    reloads = reloads or environ.get("FLASK_DEBUG", "").lower() in ("1", "true", "yes")
    return "run" in arguments and reloads and environ.get("WERKZEUG_RUN_MAIN") != "true"


def _django(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    reloads = "runserver" in arguments and "--noreload" not in arguments
    return reloads and environ.get("RUN_MAIN") != "true"


def _rq(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    return "worker" in arguments or "worker-pool" in arguments


_Judge = Callable[[Sequence[str], Mapping[str, str]], bool]
_SUPERVISORS: Final[Mapping[str, _Judge]] = {
    "gunicorn": _always,
    "granian": _always,
    "dramatiq": _always,
    "uvicorn": _uvicorn,
    "fastapi": _fastapi,
    "hypercorn": _hypercorn,
    "celery": _celery,
    "flask": _flask,
    "django": _django,
    "django-admin": _django,
    "manage.py": _django,
    "rq": _rq,
}
