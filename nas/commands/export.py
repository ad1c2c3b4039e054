"""`nas export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nas.commands.options import JsonOption, emit, reporter

EXAMPLES = """Examples:

nas export runs/default --to vllm                         the run's healed child, into runs/default/export/vllm

nas export child --to llamacpp --out child.gguf           a directory, as one GGUF file

nas export child --to sglang --no-portable                no FFN of zeros beside an attention that stands alone"""

ChildArgument = Annotated[Path, typer.Argument(help="A child's directory; or a run: its healed child, else its child.")]


def export(
    child: ChildArgument,
    to: Annotated[str, typer.Option(help="Engine: vllm, sglang, trtllm, llamacpp, mlx, exllamav3 or transformers.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory to write (llamacpp: a .gguf file); CHILD-ENGINE if not given.")
    ] = None,
    portable: Annotated[
        bool, typer.Option(help="Give an attention that stands alone an FFN of zeros, which llama.cpp needs.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write a child in the form that one engine loads, and say what every engine makes of it."""
    from blocks.engines import ENGINES, engine_of, in_words
    from blocks.errors import ConfigError

    engine = engine_of(to, "--to")
    if not portable and engine.ffn_after_attention:
        raise ConfigError(f"--no-portable: {engine.title} needs an FFN beside every attention; leave the option out")

    from nas.export import default_out, export_child, open_child

    opened = open_child(child)
    target = out or default_out(child, opened, to)
    made = export_child(opened, to, target, reporter(as_json), portable)
    if as_json:
        return emit(made, as_json)
    before, after = made["layers"].values()
    typer.echo(f"{target} written: {after} layers" + (f" of {before}" if after != before else "") + ", the same logits")
    for change in made["changes"]:
        typer.echo(f"  {in_words(**change)}")
    print_verdicts(made["engines"])
    typer.echo(f"{ENGINES[to].title}: {made['load']}")


def print_verdicts(engines: dict[str, dict[str, Any]]) -> None:
    """The table of `nas export` and `nas check`."""
    from rich.console import Console
    from rich.table import Table

    from blocks.engines import in_words

    table = Table(box=None, pad_edge=False)
    table.add_column("engine", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    colours = {"ok": "green", "ok with": "yellow", "unsupported": "red"}
    for name, found in engines.items():
        details = {
            "ok": "ok",
            "ok with": "ok with " + "; ".join(in_words(**change) for change in found["changes"]),
            "unsupported": "unsupported because " + "; ".join(found["because"]),
        }
        table.add_row(name, f"[{colours[found['status']]}]{details[found['status']]}[/]")
    Console().print(table)
