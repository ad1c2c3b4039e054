"""`nas score`."""

from __future__ import annotations

from typing import Annotated

import typer

from nas.commands.options import (
    DEFAULT_RUN,
    ActivationsOption,
    DeviceOption,
    DryRunOption,
    JsonOption,
    RecipeOption,
    RestartOption,
    RunOption,
    WeightsOption,
    emit,
    empty,
    pick_device,
    reporter,
    run_flag,
    settings_of,
)

EXAMPLES = """Examples:

nas score                                                 the embedded SmolLM2-135M on Python's documentation

nas score --parent meta-llama/Llama-3.1-8B --data wiki.parquet --run runs/8b

nas score --method both                                   every candidate exactly too; prints the rank correlation

nas score --weights streamed --activations host           a parent larger than the GPU, layer by layer

torchrun --nproc-per-node 8 -m -- nas score --run runs/8b     sequences shared out over 8 GPUs

nas score --precisions bf16,fp8,nvfp4                     number formats, too, for `nas search --precisions`

nas score --dry-run --json                                the plan: memory, bytes, FLOPs, time; for machines"""


def score(
    parent: Annotated[
        str | None, typer.Option(help="Hugging Face directory or hub id, GGUF file, or embedded name (smollm2).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Text: .txt, .jsonl, .parquet, a directory of them (.md and .rst too), a datasets id[:config][:split], or python-docs."
        ),
    ] = None,
    run: RunOption = DEFAULT_RUN,
    space: Annotated[
        str | None, typer.Option(help="Search space: default, quick, keep_or_skip, or a YAML file.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Engine that must serve the child: vllm, sglang, trtllm, llamacpp, mlx, exllamav3 or transformers."
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="one-pass (guard set exact), exact, or both.")] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text in .jsonl, .parquet and datasets.")
    ] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    fit_tokens: Annotated[int | None, typer.Option(help="Most tokens for fitting candidates.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Most tokens for scores.")] = None,
    heldout_tokens: Annotated[int | None, typer.Option(help="Most tokens kept for measuring children.")] = None,
    split: Annotated[
        str | None, typer.Option(help="document, or sequence (leaks; only to compare with published setups).")
    ] = None,
    label_samples: Annotated[int | None, typer.Option(help="Labels drawn per token for one-pass scores.")] = None,
    exact_tokens: Annotated[int | None, typer.Option(help="Calibration tokens for exact scores.")] = None,
    exact_share: Annotated[
        float | None,
        typer.Option(
            help="Share of candidates drawn at random into the guard set, beside skips and ends; 1 takes all."
        ),
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="One-pass estimator: tok, seq, or fisher (the published diagonal one).")
    ] = None,
    auto_tokens: Annotated[
        bool | None,
        typer.Option(
            "--auto-tokens", help="Stop scoring when the chosen architectures stay the same (or as good to 1 %)."
        ),
    ] = None,
    bld_tokens: Annotated[
        int | None, typer.Option(help="Tokens of block-local distillation after the closed-form fit; 0 is none.")
    ] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="Of fits and one-pass scores: float32 or bfloat16; sums are fp32 or better.")
    ] = None,
    library: Annotated[
        str | None, typer.Option(help="Fitted candidates: keep on disk, rebuild when needed, or auto (by size).")
    ] = None,
    precisions: Annotated[
        str | None, typer.Option(help="Score number formats, too (a search does what is missing): bf16,fp8,nvfp4.")
    ] = None,
    verify_additivity: Annotated[
        bool,
        typer.Option("--verify-additivity", help="Compare structure + precision with joint true KLs of single layers."),
    ] = False,
    weights: WeightsOption = None,
    activations: ActivationsOption = None,
    fit: Annotated[str | None, typer.Option(help="fitted, or cut (published initialisation, for comparison).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split, the labels and the guard set.")] = None,
    recipe: RecipeOption = None,
    device: DeviceOption = None,
    restart: RestartOption = False,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Build, fit and score the candidates of every layer of a parent."""
    arguments = locals()
    from contextlib import nullcontext

    from blocks.errors import ConfigError
    from blocks.ranks import join
    from nas.config import DataConfig, RunConfig, ScoreConfig, build, load_recipe
    from nas.engine_config import EngineConfig

    (ranks, place), sections = join(pick_device(device)), load_recipe(recipe)
    engine = build(EngineConfig, sections, settings_of(EngineConfig, arguments), place.type)
    read = build(DataConfig, sections, settings_of(DataConfig, arguments, source=data), place.type)
    how = build(ScoreConfig, sections, settings_of(ScoreConfig, arguments), place.type)
    run_flags = settings_of(RunConfig, arguments, data=read, score=how)
    config = build(RunConfig, sections, run_flags, place.type)

    from blocks.parent import open_parent
    from nas.run import create_run, find_run
    from nas.score import run_score
    from nas.turns import alone
    from search_spaces import load_space

    loaded_space = load_space(config.space, config.target)
    if precisions is not None:
        from nas.precisions import parse_precisions, require_served

        require_served(config.target, parse_precisions(precisions))
    elif verify_additivity:
        raise ConfigError("--verify-additivity compares precisions; add --precisions fp8,nvfp4")
    opened = open_parent(config.parent)
    if dry_run:
        from nas.plan import plan_score

        if not restart:
            find_run(run, config, opened.fingerprint)
        caps = {"fit": config.data.fit_tokens, "calibration": config.data.calibration_tokens}
        plan = plan_score(config, opened, loaded_space, place, engine, ranks, caps, config.data.sequence_length, None)
        return emit(plan.to_json(), as_json) if as_json else typer.echo("\n".join(plan.lines()))
    if restart and ranks.main:
        empty(run)
    with alone(run) if ranks.main else nullcontext():
        opened_run = ranks.agree(create_run(run, config, opened.fingerprint) if ranks.main else None)
        summary = run_score(opened_run, opened, place, reporter(as_json or not ranks.main), engine, ranks)
        ranks.leave()
        if not ranks.main:
            return
        if precisions is not None:
            from nas.additivity import score_and_check
            from nas.config import SearchConfig

            search = {"budget": 1.0, "precisions": precisions}
            tokens = build(SearchConfig, sections, search, place.type).precision_tokens
            told = score_and_check(opened_run, opened, place, reporter(as_json), precisions, tokens, verify_additivity)
            summary = {**summary, "precisions": told}
    if as_json:
        return emit(summary, as_json)
    from nas.show import correlation_line

    if precisions is not None:
        from nas.additivity import additivity_lines

        typer.echo("\n".join(additivity_lines(summary["precisions"])))
    typer.echo(f"{correlation_line(summary)}\n{run / 'scores.csv'} written in {summary['seconds']:.0f} s")
    typer.echo(f"next: nas search --budget-gb GB{run_flag(run)}   (or --budget 0.6)")
