"""`nas fuse`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nas.commands.options import (
    DEFAULT_RUN,
    BatchOption,
    ContextOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    OutputOption,
    PromptOption,
    RunOption,
    TpOption,
    WeightDtypeOption,
    emit,
    open_run_and_parent,
    pick_device,
    reporter,
    run_flag,
    settings_of,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

EXAMPLES = """Examples:

nas fuse                                                  the run's child: runs/default/fused and fusion.json

nas fuse --max-kl 0.05 --replace                          ... and heal the fused child with nas distill

nas fuse --child healed                                   the healed child: runs/default/healed-fused

nas fuse children/half --parent smollm2 --data python-docs       any child, into children/half-fused

nas fuse --clock H200 --tp 8 --sync-us 12                 estimated for one of eight GPUs; an all-reduce takes 12 us

nas fuse --dry-run --json                                 what would be measured; for machines"""


def fuse(
    path: Annotated[Path | None, typer.Argument(help="A child's directory, instead of a run.")] = None,
    run: RunOption = DEFAULT_RUN,
    child: Annotated[str, typer.Option(help="Of the run: child (before healing) or healed.")] = "child",
    replace: Annotated[
        bool, typer.Option("--replace", help="Heal the fused child: it becomes child/, the other child-unfused/.")
    ] = False,
    parent: Annotated[str | None, typer.Option(help="With PATH: the parent, as for nas score.")] = None,
    data: Annotated[str | None, typer.Option(help="With PATH: text, as for nas score.")] = None,
    out: Annotated[Path | None, typer.Option(help="With PATH: where the fused child goes; PATH-fused.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(help="Nats per token that all fusions together may add to the KL to the parent.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="FFNs in one run at most.")] = None,
    per_length: Annotated[int | None, typer.Option(help="Runs of each length that are measured in a stretch.")] = None,
    include_last: Annotated[
        bool | None, typer.Option("--include-last", help="Fuse the last FFN of a stretch, too.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens for dependencies and KLs.")] = None,
    clock: Annotated[
        str | None,
        typer.Option(help="device (measure here), or A100, H100, H200, ...: a datasheet; measured if there is a GPU."),
    ] = None,
    sync_us: Annotated[
        float | None, typer.Option(help="Microseconds of one all-reduce, once an FFN; with --tp above 1.")
    ] = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    prompt: PromptOption = None,
    output: OutputOption = None,
    tp: TpOption = None,
    weight_dtype: WeightDtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Fuse FFNs that follow one another without attention into one wide FFN, where that is faster and hurts little."""
    arguments = locals()
    from dataclasses import asdict

    from blocks.errors import ConfigError
    from blocks.ranks import require_one_process
    from nas.costs import Scenario
    from nas.fusion import FusionConfig, plan_fusion
    from nas.fusion_run import run_fuse, scenario_of, task_of, unfused
    from nas.turns import alone

    require_one_process("nas fuse")
    place = pick_device(device)
    given = {name: value for name, value in settings_of(FusionConfig, arguments).items() if value is not None}
    config = FusionConfig(**({"tokens": 4096} if place.type == "cpu" else {}) | given)
    asked = {name: value for name, value in settings_of(Scenario, arguments).items() if value is not None}
    if path is not None:
        from nas.fusion_path import fuse_path

        if replace or child != "child":
            raise ConfigError("--replace and --child are of a run; with a child's directory leave them out")
        return show_fusion(
            fuse_path(path, parent, data, out, config, Scenario(**asked), place, reporter(as_json), dry_run),
            as_json,
            dry_run,
        )
    if parent is not None or data is not None or out is not None:
        raise ConfigError("--parent, --data and --out go with a child's directory; a run has its own")
    opened_run, opened = open_run_and_parent(run)
    scenario = Scenario(**asdict(scenario_of(unfused(opened_run))) | asked)
    if dry_run:
        task = task_of(opened_run, child)
        return emit(plan_fusion(task.source, task.out, config, scenario, place.type == "cuda"), as_json)
    with alone(run):
        result = run_fuse(opened_run, opened, child, config, scenario, place, reporter(as_json), replace)
    later = f"nas fuse --replace{run_flag(run)}, to heal the fused child" if child == "child" else ""
    show_fusion(result, as_json, False, f"nas distill{run_flag(run)}" if replace else later)


def show_fusion(found: dict[str, Any], as_json: bool, dry_run: bool, later: str = "") -> None:
    """The table of runs, what is fused and what to do next."""
    if as_json or dry_run:
        return emit(found, as_json)
    from rich.console import Console

    if found["proposals"]:
        Console().print(fusion_table(found))
    typer.echo("\n".join([*decisions(found), *fusion_lines(found)]))
    if found["runs"]:
        typer.echo(f"{found['fused']} written" + (f"; next: {later}" if later else ""))


def fusion_table(found: dict[str, Any]) -> RenderableType:
    """One row a proposal."""
    from rich import box
    from rich.table import Table

    clock, s, before = found["clock"], found["scenario"], found["kl"]["before"]
    about = f"{clock['device']}{' (an estimate)' if clock['estimate'] else ''}, batch {s['batch']}"
    title = f"FFNs in sequence -> fused, by {about}\nKL to the parent before: {before:.4f} nats a token"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in (
        "layers",
        "FFNs",
        "depen-\ndency",
        "KL to\nparent",
        "KL to\nunfused",
        "prefill\nms",
        "decode\nms",
        "kept",
    ):
        table.add_column(name, justify="left" if name in ("layers", "kept") else "right", no_wrap=True)
    for row in found["proposals"]:
        table.add_row(
            f"{row['run'][0]}-{row['run'][-1]}",
            str(row["length"]),
            f"{row['dependency']:.2g}",
            f"{row['kl']:.4f}",
            f"{row['kl_to_unfused']:.4f}",
            f"{row['prefill_ms']:.3g} -> {row['fused_prefill_ms']:.3g}",
            f"{row['decode_ms']:.3g} -> {row['fused_decode_ms']:.3g}",
            "yes" if row["kept"] else "no",
        )
    return table


def decisions(found: dict[str, Any]) -> list[str]:
    """Why each run was kept or not, those of the same reason in one line."""
    groups: dict[str, list[str]] = {}
    for row in found["proposals"]:
        why = ("kept: " if row["kept"] else "not: ") + row["why"]
        groups.setdefault(why, []).append(f"{row['run'][0]}-{row['run'][-1]}")
    return [f"{', '.join(runs)} {why}" for why, runs in groups.items()]


def fusion_lines(found: dict[str, Any]) -> list[str]:
    """What came of it, in words."""
    if not found["stretches"]:
        return ["nothing to fuse: no two layers without attention follow one another"]
    if not found["proposals"]:
        return ["nothing to fuse: of two FFNs in sequence the last is left out (--include-last takes it, too)"]
    if not found["runs"]:
        return ["nothing was fused: see why above; a higher --max-kl allows more"]
    kl, times, heldout = found["kl"], found["times"], found["heldout"]
    runs = ", ".join(f"{run[0]}-{run[-1]}" for run in found["runs"])
    lines = [
        f"fused {runs}: KL {kl['before']:.4f} -> {kl['after']:.4f} on {found['tokens']:,} calibration tokens, "
        f"{heldout['unfused']['kl']:.4f} -> {heldout['fused']['kl']:.4f} on {heldout['tokens']:,} held-out ones",
        f"the FFNs concerned: prefill {times['prefill_ms']:.4g} -> {times['fused_prefill_ms']:.4g} ms, "
        f"decode {times['decode_ms']:.4g} -> {times['fused_decode_ms']:.4g} ms, a request "
        f"{times['request_ms']:.5g} -> {times['fused_request_ms']:.5g} ms" + " (estimate)" * found["clock"]["estimate"],
    ]
    return lines
