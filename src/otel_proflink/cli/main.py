# SPDX-License-Identifier: Apache-2.0
"""The entry point of the ``proflink`` command. Importable without the extra ``cli``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import click

# What the extra brings.
_NEEDED: Final = frozenset({"click", "rich"})


def main() -> None:
    """Runs the command line; exits with a status of 0, 1 (it failed) or 2 (used wrongly)."""
    # Names in a capture are any Unicode, the terminal's encoding may not be.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    try:
        group = command_group()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
        sys.exit(f"proflink: the command line needs {missing}: pip install 'otel-proflink[cli]'")
    group.main(prog_name="proflink")


def command_group() -> click.Group:
    """The command with its subcommands.

    Raises:
        ModuleNotFoundError: the extra ``cli`` is not installed.
    """
    import click

    from .. import __version__
    from .demo import demo
    from .report import report

    group = click.Group(
        "proflink",
        commands=[report, demo],
        help="Profiles that know their OpenTelemetry spans.",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    return click.version_option(__version__, prog_name="otel-proflink")(group)


if __name__ == "__main__":
    main()
