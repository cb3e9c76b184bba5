# SPDX-License-Identifier: Apache-2.0
"""``proflink report``: a capture directory as a table, or as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from ..report import CaptureError
from ..report.model import Report, read_report, to_document
from ..report.table import (
    DEFAULT_CHILDREN,
    DEFAULT_FUNCTIONS,
    DEFAULT_ROOTS,
    Limits,
    render,
)

# Where nothing says how wide the output is: a file, a pipe, a CI log.
_WIDTH_OF_A_FILE: Final = 100


@click.command()
@click.argument(
    "directory", type=click.Path(path_type=Path), default=Path("proflink-out"), metavar="[DIR]"
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=DEFAULT_ROOTS,
    show_default=True,
    help="Show this many local roots, the slowest; 0 shows all.",
)
@click.option(
    "--children",
    type=click.IntRange(min=0),
    default=DEFAULT_CHILDREN,
    show_default=True,
    help="Show this many rows below one span; 0 shows all.",
)
@click.option(
    "--functions",
    type=click.IntRange(min=0),
    default=DEFAULT_FUNCTIONS,
    show_default=True,
    help="Show this many functions of one span; 0 shows all.",
)
@click.option("--each", is_flag=True, help="Show each span, also siblings of the same name.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON with all spans and functions of the local roots instead of the table.",
)
def report(
    directory: Path, limit: int, children: int, functions: int, each: bool, as_json: bool
) -> None:
    """Show the slowest spans of the capture in DIR (default: proflink-out).

    A local root is the first span of a trace in one process. Its row sums up everything done for
    it, on any thread; the rows below tell which span it was done under. Siblings of the same name
    share a row (parse x8), with the longest one's duration.
    """
    try:
        found = read_report(directory)
    except CaptureError as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(to_document(found, limit=limit), indent=2))
        for unread in found.errors:
            click.echo(f"not read: {unread}", err=True)
    else:
        show(found, Limits(limit, children, functions, each))


def show(found: Report, limits: Limits | None = None) -> None:
    """Prints the table to standard output."""
    console = new_console()
    console.print(render(found, console, limits))


def new_console(*, stderr: bool = False) -> Console:
    """A console that takes every text for what it is: no markup, no emoji codes."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH_OF_A_FILE
    return console
