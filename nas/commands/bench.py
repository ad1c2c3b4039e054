"""`nas bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nas.commands.options import (
    BatchOption,
    ContextOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    KvDtypeOption,
    OutputOption,
    PromptOption,
    RecipeOption,
    TpOption,
    WeightDtypeOption,
    emit,
    pick_device,
    reporter,
    settings_of,
)

EXAMPLES = """Examples:

nas bench                                                 the candidates of runs/default on this device

nas bench --run runs/8b --batch 16 --prompt 1024 --output 512

nas bench --shape config.json --out profiles/h200.json    a Hugging Face config.json alone, no weights needed

nas bench --dry-run --json                                what would be measured; for machines"""


def bench(
    run: Annotated[Path | None, typer.Option("--run", help="The run whose candidates to measure.")] = None,
    parent: Annotated[str | None, typer.Option(help="Instead: a parent, as for nas score.")] = None,
    shape: Annotated[Path | None, typer.Option(help="Instead: a Hugging Face config.json; no weights needed.")] = None,
    space: Annotated[str | None, typer.Option(help="Search space; the run's own, or default.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Engine that must serve the child: vllm, sglang, trtllm, llamacpp, mlx, exllamav3 or transformers."
        ),
    ] = None,
    architecture: Annotated[
        Path | None, typer.Option(help="An architecture.json to assemble and check; the run's own, or a made half.")
    ] = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    prompt: PromptOption = None,
    output: OutputOption = None,
    weight_dtype: WeightDtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    tp: TpOption = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds to take medians over.")] = None,
    out: Annotated[Path | None, typer.Option(help="The profile to write; profiles/DEVICE-DIGEST.json.")] = None,
    recipe: RecipeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Measure how long every candidate takes on this device, into a profile file that travels."""
    arguments = locals()
    import sys

    from blocks.ranks import require_one_process
    from nas.bench import effort_for, run_bench
    from nas.bench_command import bench_table, check_lines, default_out, find_subject, plan
    from nas.config import build, load_recipe
    from nas.costs import Scenario

    require_one_process("nas bench")
    place = pick_device(device)
    scenario = build(Scenario, load_recipe(recipe), settings_of(Scenario, arguments), place.type)
    effort = effort_for(place, repeats)
    subject = find_subject(scenario, run, parent, shape, space, target, architecture)
    out = out or default_out(subject, scenario, place)
    if dry_run:
        return emit(plan(subject, scenario, place, effort, out), as_json)
    about = {"command": " ".join(["nas", *sys.argv[1:]]), "of": subject.name, "space": subject.space.name}
    measured = run_bench(
        subject.shape, scenario, subject.specs(), subject.children, place, effort, reporter(as_json), out, about
    )
    if as_json:
        return emit(measured.to_json(), as_json)
    from rich.console import Console

    Console().print(bench_table(measured))
    typer.echo("\n".join([*check_lines(measured), f"{out} written"]))
