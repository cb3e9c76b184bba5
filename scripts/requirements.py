#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Prints requirements that pyproject.toml states, one a line, for `pip install -r`.

    requirements.py build      the build's
    requirements.py GROUP      a dependency group's, together with the package's own, extras too:
                               only what is resolved together is sure to fit together
    requirements.py --oldest   constraints: the lower bounds of the build's and of the package's own
                               as exact versions

Exists because `pip install --group` is newer than the pip of many a virtual environment.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import tomllib
from pathlib import Path

# scikit-build-core asks for these two by itself, but only of an isolated build.
_BUILD_TOOLS = ["cmake>=3.24", "ninja"]
# Released in step with opentelemetry-instrumentation, so the oldest set has to pin them together.
_IN_STEP = "opentelemetry-instrumentation"
# Not for free-threaded CPython 3.13: without wheels, or (greenlet 3.2) with one that has the GIL
# come back.
_NEEDS_GIL = ("gevent", "greenlet", "uvloop")
_LOWER_BOUND = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([A-Za-z0-9._]+)$")


def _oldest(requirement: str) -> str:
    match = _LOWER_BOUND.match(requirement)
    if match is None:
        raise SystemExit(f"pyproject.toml: {requirement!r} is not of the form NAME>=VERSION")
    return f"{match[1]}=={match[2]}"


def _installable(requirements: list[str]) -> list[str]:
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return requirements
    return [line for line in requirements if not line.startswith(_NEEDS_GIL)]


def main(arguments: list[str]) -> None:
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
    build: list[str] = settings["build-system"]["requires"]
    groups: dict[str, list[str]] = settings["dependency-groups"]
    own: list[str] = [*settings["project"]["dependencies"]]
    for extra in settings["project"]["optional-dependencies"].values():
        own += extra
    match arguments:
        case ["build"]:
            lines = [*build, *_BUILD_TOOLS]
        case ["--oldest"]:
            in_step = [line for line in groups["test"] if line.startswith(_IN_STEP)]
            lines = [_oldest(line) for line in [*build, *own, *in_step]]
        case [group] if group in groups:
            lines = _installable([*groups[group], *own])
        case _:
            raise SystemExit(f"{__doc__}\nGROUP is one of: {', '.join(groups)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
