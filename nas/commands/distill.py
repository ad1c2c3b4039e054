"""`nas distill`."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.commands.options import (
    DEFAULT_RUN,
    DeviceOption,
    DryRunOption,
    JsonOption,
    RecipeOption,
    RestartOption,
    RunOption,
    emit,
    open_run_and_parent,
    pick_device,
    reporter,
    run_flag,
    settings_of,
)

EXAMPLES = """Examples:

nas distill                                               sensible numbers for this device

nas distill --tokens 20000000 --batch-sequences 32 --sequence-length 1024

nas distill --run runs/8b                                 stopped? the same command goes on where it was"""


def distill(
    tokens: Annotated[int | None, typer.Option(help="Training tokens in all.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_sequences: Annotated[int | None, typer.Option(help="Sequences per optimizer step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences per forward pass; memory only.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; master weights are fp32 either way.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between held-out evaluations.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    seed: Annotated[int | None, typer.Option(help="Order of the training sequences.")] = None,
    run: RunOption = DEFAULT_RUN,
    recipe: RecipeOption = None,
    device: DeviceOption = None,
    restart: RestartOption = False,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Heal the child by distilling from the parent, and write it."""
    arguments = locals()
    from blocks.ranks import require_one_process
    from distill.config import DistillConfig
    from nas.config import build, load_recipe

    require_one_process("nas distill")
    place = pick_device(device)
    flags = settings_of(DistillConfig, arguments, device="cpu" if place.type == "cpu" else None)
    config = build(DistillConfig, load_recipe(recipe), flags, place.type)

    from nas.heal import forget_healing, run_distill

    opened_run, parent = open_run_and_parent(run)
    if dry_run:
        from nas.plan import plan_distill

        parameters = opened_run.read("architecture.json", "search")["cost"]["parameters"]
        return emit(plan_distill(config, parent.shape, parameters), as_json)
    if restart:
        forget_healing(opened_run)
    result = run_distill(opened_run, parent, config, place, reporter(as_json))
    if as_json:
        return emit(result, as_json)
    from rich.console import Console

    from nas.show import results

    Console().print(results(result))
    typer.echo(f"{run / 'healed'} written; see it all: nas show{run_flag(run)}")
