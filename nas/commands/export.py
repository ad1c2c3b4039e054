"""`nas export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nas.commands.options import DeviceOption, JsonOption, emit, pick_device, reporter

EXAMPLES = """Examples:

nas export runs/default --to vllm                         the run's healed child, into runs/default/export/vllm

nas export child --to llamacpp --out child.gguf           a directory, as one GGUF file

nas export child --to sglang --no-portable                no FFN of zeros beside an attention that stands alone

nas export runs/default --to vllm --quantizer gptq        a child with precisions, its weights rounded by GPTQ on the run's text

nas export runs/default --to llamacpp --no-pack           the same child in bf16, whatever its precisions"""

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
    pack: Annotated[
        bool, typer.Option(help="Round the weights of a child with precisions; --no-pack writes them in bf16.")
    ] = True,
    quantizer: Annotated[
        str, typer.Option(help="How weights are rounded: to the nearest code, or by gptq, on the run's text.")
    ] = "nearest",
    run: Annotated[
        Path | None,
        typer.Option(help="Run whose fit text calibrates (gptq, nvfp4); the one that the child is of, if not given."),
    ] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a child in the form that one engine loads, and say what every engine makes of it."""
    from blocks.engines import ENGINES, engine_of, in_words
    from blocks.errors import ConfigError

    engine = engine_of(to, "--to")
    if not portable and engine.ffn_after_attention:
        raise ConfigError(f"--no-portable: {engine.title} needs an FFN beside every attention; leave the option out")

    from nas.export import default_out, export_child, open_child
    from nas.packed_export import Packing

    packing = Packing(quantizer, run, str(pick_device(device)))
    opened = open_child(child)
    target = out or default_out(child, opened, to)
    made = export_child(opened, to, target, reporter(as_json), portable, packing, pack)
    if as_json:
        return emit(made, as_json)
    before, after = made["layers"].values()
    how = f"rounded by {quantizer}" if quantizer == "gptq" else "rounded to nearest"
    typer.echo(
        f"{target} written: {after} layers"
        + (f" of {before}" if after != before else "")
        + (f", {how}" if made["packed"] else ", the same logits")
    )
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
