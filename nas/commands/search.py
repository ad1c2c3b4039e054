"""`nas search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nas.commands.options import (
    DEFAULT_RUN,
    BatchOption,
    ContextOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    KvDtypeOption,
    OutputOption,
    PromptOption,
    RecipeOption,
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

EXAMPLES = """Examples:

nas search --budget-gb 80                                 weights + KV cache within 80 GB

nas search --budget-gb 80 --batch 16 --context 32768      for 16 sequences of 32k tokens

nas search --budget 0.6                                   60 % of the parent's attention, FFN and KV bytes

nas search --budget-gb 80 --min-throughput 900 --clock profiles/h200.json      memory and speed together

nas search --max-latency-ms 400,15 --clock H100           to the first token, per output token; a datasheet's estimate

nas search --budget 0.35 --precisions bf16,fp8,nvfp4 --kv-dtype bf16,fp8      number formats searched beside structure

nas search --budget 0.35 --precisions bf16,fp8,nvfp4 --quantizer gptq      the same, every child rounded by GPTQ

nas search --sweep 0.9:0.5:0.05                           a child for each of these budgets

nas search --budget 0.5 --storage mysql://host/nas        the same command on each machine: they share the work

nas search --scores library.csv --budget-gb 80            a score table alone, no parent (docs/tables.md)"""


def search(
    budget_gb: Annotated[
        str | None, typer.Option(help="Weights + KV cache + reserve, in GB (1e9 bytes): 80, or a range 60:80.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="Instead: share of the parent's attention + FFN weights + KV cache.")
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(help="Instead: a family of children at shares FROM:TO:STEP, such as 0.9:0.5:0.05.")
    ] = None,
    max_params: Annotated[str | None, typer.Option(help="Parameters at most, or a range 40e9:50e9.")] = None,
    max_kv_gb: Annotated[str | None, typer.Option(help="KV cache of the scenario at most, in GB, or a range.")] = None,
    min_throughput: Annotated[
        str | None,
        typer.Option(help="Generated tokens a second of the whole batch at least, or a range; needs --clock."),
    ] = None,
    max_latency_ms: Annotated[
        str | None,
        typer.Option(
            help="A whole request at most; or TTFT,TPOT: to the first token, per output token; needs --clock."
        ),
    ] = None,
    clock: Annotated[
        str | None,
        typer.Option(help="Where times come from: a profile of `nas bench`, or A100, H100, H200, B200, L40S, RTX4090."),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="A score table alone (docs/tables.md): no parent, no child, the arithmetic only."),
    ] = None,
    batch: BatchOption = None,
    context: ContextOption = None,
    prompt: PromptOption = None,
    output: OutputOption = None,
    tp: TpOption = None,
    weight_dtype: WeightDtypeOption = None,
    kv_dtype: KvDtypeOption = None,
    reserve_gb: Annotated[float | None, typer.Option(help="GB kept free for activations and the like.")] = None,
    precisions: Annotated[
        str | None,
        typer.Option(help="Number formats of matrices to choose from: bf16,fp8,nvfp4,nvfp4a16,int4,int4-g32,int8."),
    ] = None,
    quantizer: Annotated[
        str | None,
        typer.Option(
            help="How what has a precision is rounded: nearest, or gptq: better and slower; nas distill goes on from it."
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(help="True KLs in all.")] = None,
    verify: Annotated[int | None, typer.Option(help="Near-optima of the table among them.")] = None,
    verify_tokens: Annotated[int | None, typer.Option(help="Calibration tokens for true KL.")] = None,
    path_steps: Annotated[int | None, typer.Option(help="Steps of the path to the budget; 0 is no path.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help="What proposes further children: swap (ours), tpe, nsga2 or random.")
    ] = None,
    prune: Annotated[bool | None, typer.Option(help="Give up proposals that are surely worse half-way.")] = None,
    finalists: Annotated[
        int | None, typer.Option(help="Diverse children healed a little before the last choice; 1 is none.")
    ] = None,
    heal_tokens: Annotated[int | None, typer.Option(help="Tokens that the last two finalists are healed on.")] = None,
    refit: Annotated[bool | None, typer.Option(help="The closed-form refit sweep of assembled children.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna storage URL that workers share; the run's study.journal if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of proposals and random baselines.")] = None,
    run: RunOption = DEFAULT_RUN,
    recipe: RecipeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Choose one candidate per layer that meets the limits and hurts least, and assemble the child."""
    arguments = locals()
    from blocks.ranks import require_one_process
    from nas.config import SearchConfig, build, load_recipe
    from nas.costs import Scenario

    require_one_process("nas search")
    sections = load_recipe(recipe)
    place = pick_device(device)
    config = build(SearchConfig, sections, settings_of(SearchConfig, arguments), place.type)
    scenario = build(Scenario, sections, settings_of(Scenario, arguments), place.type)
    if scores is not None:
        from nas.precisions import parse_precisions
        from nas.table_search import run_table_search

        run = DEFAULT_RUN.with_name(scores.stem) if run == DEFAULT_RUN else run
        said = precisions is not None or "precisions" in sections.get("search", {})
        formats = parse_precisions(config.precisions) if said else None
        return show_search(run_table_search(scores, config, scenario, run, dry_run, formats), run, as_json, dry_run)

    from nas.heal_stages import build_stage
    from nas.search import run_search
    from nas.search_problem import choose_kv_dtype, load_candidates, with_scored_kv_dtypes

    opened_run, parent = open_run_and_parent(run)
    if dry_run:
        from nas.plan import plan_search

        share = config.shares[-1] if config.sweep else None
        scored = with_scored_kv_dtypes(opened_run, config, scenario)
        if scored != scenario:
            dtypes = f"KV cache in {scored.kv_dtype} alone, of {scenario.kv_dtype}"
            typer.echo(f"  planned with a {dtypes}: the search has yet to score the rest", err=True)
        scenario = choose_kv_dtype(opened_run, parent.shape, config, scored, reporter(as_json), share)
        candidates = load_candidates(opened_run, parent.shape, config, scenario, share)
        return emit(plan_search(config, scenario, parent.shape, candidates), as_json)
    healing = build_stage(sections.get("distill", {}), {}, place.type, parent.shape.hidden_size)
    if config.sweep:
        from nas.family import run_family

        return show_family(run_family(opened_run, parent, config, scenario, place, reporter(as_json), healing), as_json)
    show_search(run_search(opened_run, parent, config, scenario, place, reporter(as_json), healing), run, as_json)


def show_search(found: dict[str, Any], run: Path, as_json: bool, dry_run: bool = False) -> None:
    """What a search found: the map, the limits, the table."""
    if as_json or dry_run:
        return emit(found, as_json)
    from rich.console import Console

    from nas.show import search_lines

    Console().print(search_lines(found, Console().width))
    if "heldout" in found:
        typer.echo(f"{run / 'child'} written; next: nas distill{run_flag(run)}")
    typer.echo(f"see it: nas report{run_flag(run)}")


def show_family(family: dict[str, Any], as_json: bool) -> None:
    """The members of a family, a line each."""
    if as_json:
        return emit(family, as_json)
    from rich.console import Console

    from nas.show import family_table

    Console().print(family_table(family))
