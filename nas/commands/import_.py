"""`nas import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nas.commands.options import (
    DEFAULT_RUN,
    BatchOption,
    ContextOption,
    JsonOption,
    KvDtypeOption,
    OutputOption,
    PromptOption,
    TpOption,
    WeightDtypeOption,
    emit,
    run_flag,
    settings_of,
)

EXAMPLES = """Examples:

nas import Llama-3_3-Nemotron-Super-49B-v1 --run runs/super    a published checkpoint: counted, drawn, and loadable again

nas import config.json --batch 8 --context 131072 --json       its configuration alone: exact counts for a scenario

nas import config.json --clock H100 --tp 4                     times from a datasheet, too"""


def import_(
    source: Annotated[Path, typer.Argument(help="Directory of a nemotron-nas checkpoint, or its config.json.")],
    run: Annotated[
        Path | None, typer.Option(help="The run directory; beside runs/default, of the source's name, if not given.")
    ] = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    prompt: PromptOption = None,
    output: OutputOption = None,
    tp: TpOption = None,
    weight_dtype: WeightDtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    reserve_gb: Annotated[float | None, typer.Option(help="GB kept free beside weights and KV cache.")] = None,
    clock: Annotated[
        str | None, typer.Option(help="A profile of `nas bench`, or a datasheet (H100, ...), to price time as well.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a published child: exact counts, a map, its price; with weights, a checkpoint that current transformers load."""
    arguments = locals()
    from nas.config import build
    from nas.costs import Scenario
    from nas.importing import run_import

    scenario = build(Scenario, {}, settings_of(Scenario, arguments), "cpu")
    run = run or DEFAULT_RUN.with_name(_name(source.resolve()))
    show_import(run_import(source, run, scenario, clock), run, as_json)


def _name(source: Path) -> str:
    """What to call the run: the directory's name, or that of a file that is not called config.json."""
    if source.suffix != ".json":
        return source.name
    return source.parent.name if source.name == "config.json" else source.stem


def show_import(found: dict[str, Any], run: Path, as_json: bool) -> None:
    """An imported child: the map, counts, and where its checkpoint lies."""
    if as_json:
        return emit({"run": str(run), "architecture": found}, True)
    from rich.console import Console

    from nas.importing import import_lines

    Console().print(import_lines(found, Console().width))
    if found["child"]:
        typer.echo(f"{run / found['child']} has its weights (links) with model code for the installed transformers")
    typer.echo(f"draw it again: nas show{run_flag(run)}")
