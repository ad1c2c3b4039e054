"""`nas check`."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.commands.export import ChildArgument, print_verdicts
from nas.commands.options import JsonOption, emit

EXAMPLES = """Examples:

nas check runs/default                                    files against configuration, and every engine's verdict

nas check child --engine vllm --engine sglang             status 1 if one of these cannot serve it

nas check child --json"""


def check(
    child: ChildArgument,
    engine: Annotated[list[str] | None, typer.Option(help="An engine that must serve it; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a child's files to the last tensor, and say which engines load it, and with which changes."""
    from blocks.engines import engine_of

    for name in engine or []:
        engine_of(name, "--engine")

    from nas.export import open_child, verdicts

    opened = open_child(child)
    found = {name: v.to_json(opened.weight_bytes) for name, v in verdicts(opened).items()}
    asked = {name: found[name] for name in (engine or found)}
    if as_json:
        parameters = opened.shape.parameters(opened.architecture)
        layers = opened.architecture.to_list()
        emit(
            {
                "child": str(opened.path),
                "layers": layers,
                "parameters": parameters,
                "packed": opened.packed,
                "engines": asked,
            },
            as_json,
        )
    else:
        packed = ", packed" if opened.packed else ""
        typer.echo(
            f"{opened.path}: {len(opened.architecture)} layers{packed}, tensors and configuration as they must be"
        )
        print_verdicts(asked)
        if any(v["status"] == "ok with" for v in asked.values()):
            rounds = opened.architecture.rounded
            but = "; packing rounds weights as the architecture says, nothing else changes a logit"
            typer.echo(
                f"`ok with`: nas export {child} --to ENGINE does it" + (but if rounds else ", without changing a logit")
            )
    if engine and any(v["status"] == "unsupported" for v in asked.values()):
        raise typer.Exit(1)
