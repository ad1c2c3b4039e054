"""`nas report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.commands.options import DEFAULT_RUN, JsonOption, RunOption, emit

EXAMPLES = """Examples:

nas report                                                runs/default/report.html: maps, Pareto fronts, tables

nas report --run runs/8b --out 8b.html                    the page elsewhere, to send to someone

nas report --json                                         the numbers behind every figure, for machines"""


def report(
    run: RunOption = DEFAULT_RUN,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page; report.html in the run if not given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the run as one HTML page (no script, no network) and as report.json."""
    from nas.report import write_report

    made = write_report(run, out)
    if as_json:
        return emit(made, as_json)
    typer.echo(f"{out or run / 'report.html'} written, its numbers in {run / 'report.json'}")
    for name, note in made["notes"].items():
        typer.echo(f"  no {name}: {note}")
