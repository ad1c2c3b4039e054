"""`nas distill`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

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

nas distill --recipe stages.yaml                          block-local, distillation, then longer text (docs/formats.md)

nas distill --qad-tokens 4000000                          a child with precisions: its master weights first, then as it is served

torchrun --nproc-per-node 8 -m -- nas distill --run runs/70b --sharding full   both models sharded over 8 GPUs

nas distill --run runs/8b                                 stopped? the same command goes on where it was

nas distill --dry-run                                     steps, memory by what takes it, FLOPs"""


def distill(
    tokens: Annotated[int | None, typer.Option(help="Training tokens in all.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; left out, lower for a child that is hardly hurt.")
    ] = None,
    batch_sequences: Annotated[int | None, typer.Option(help="Sequences per optimizer step.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences per forward pass; memory only.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; master weights are fp32 either way.")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="Steps between held-out evaluations.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="kl (to the parent), jsd, ce (the text itself) or bld (layer by layer).")
    ] = None,
    cosine: Annotated[
        float | None, typer.Option(help="Weight of 1 - cosine between the residual streams of child and parent.")
    ] = None,
    qad: Annotated[
        bool | None,
        typer.Option(
            "--qad/--no-qad",
            help="Train a child with precisions as it is served, which is the default, or its master weights.",
        ),
    ] = None,
    qad_tokens: Annotated[
        int | None,
        typer.Option(help="Train its master weights first, and it as it is served on so many of the tokens."),
    ] = None,
    qad_learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate of that second stage; asks for it, too, on a quarter of the tokens."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Of training as it is served: parent, or healed (the weights that it starts from, as they are)."
        ),
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, or muon for the matrices inside layers.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, wsd or constant.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Text to train on, as for nas score; the run's own if not given.")
    ] = None,
    general: Annotated[
        str | None, typer.Option(help="Other text, as for nas score, measured beside the held-out text.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="Evaluations without a lower held-out KL after which healing ends; 0 is never.")
    ] = None,
    sharding: Annotated[
        str | None, typer.Option(help="Over several ranks: none (DDP, a copy on each) or full (FSDP2, shards).")
    ] = None,
    checkpoint_activations: Annotated[
        bool | None,
        typer.Option("--checkpoint-activations", help="Recompute activations: less memory, a third slower."),
    ] = None,
    track: Annotated[str | None, typer.Option(help="Besides metrics.jsonl: tensorboard or wandb.")] = None,
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
    from contextlib import nullcontext

    from blocks.ranks import join
    from distill.config import DistillConfig
    from nas.config import load_recipe
    from nas.heal_stages import build_stages

    ranks, place = join(pick_device(device))
    flags = settings_of(DistillConfig, arguments, device=None)  # where: by `place`
    own: dict[str, Any] = {"qad_tokens": qad_tokens, "qad_learning_rate": qad_learning_rate}
    stages = build_stages(load_recipe(recipe), flags, place.type, **own, **child_of(run))

    from nas.heal import run_distill
    from nas.set_aside import forget_healing
    from nas.turns import alone

    opened_run, parent = open_run_and_parent(run)
    if dry_run:
        from blocks.spec import Architecture
        from nas.plan import plan_distill

        architecture = Architecture.load(opened_run.path("architecture.json"))
        return emit(plan_distill(stages, parent, architecture, place, ranks.count), as_json)
    told = reporter(as_json or not ranks.main)
    with alone(run) if ranks.main else nullcontext():
        if restart and ranks.main:
            forget_healing(opened_run, told)
        ranks.wait()
        result = run_distill(opened_run, parent, stages, place, told, ranks)
    ranks.leave()
    if result is None or not ranks.main:
        return
    if as_json:
        return emit(result, as_json)
    from rich.console import Console

    from nas.show import results

    Console().print(results(result))
    typer.echo(f"{run / 'healed'} written; see it all: nas show{run_flag(run)}")


def child_of(run: Path) -> dict[str, Any]:
    """What stages depend on, if the run has a child: whether its matrices have other formats than bf16, and its hidden size."""
    from blocks.spec import Architecture

    file = run / "architecture.json"
    if not file.is_file():
        return {}
    rounded, shape = bool(Architecture.load(file).rounded), json.loads(file.read_text()).get("shape")
    return {"rounded": rounded} | ({"width": shape["hidden_size"]} if shape else {})
