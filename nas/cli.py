"""The `nas` command. Only this file knows the terminal; heavy imports happen inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    name="nas",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Turn a trained Llama into a smaller, faster child that fits a budget.

Three steps, each going on from the last one's run directory:

  [bold]nas score[/bold]                    build, fit and score the candidates of every layer
  [bold]nas search --budget-gb 80[/bold]    choose one per layer for a budget; assemble the child
  [bold]nas distill[/bold]                  heal the child by distilling from the parent

Then [bold]nas show[/bold] draws the run. Every command can be stopped and started again; what is done is not done twice.""",
)

RunOption = Annotated[Path, typer.Option("--run", help="The run directory.")]
RecipeOption = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML file with sections run, data, score, search, scenario, distill, engine."),
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N; a GPU if there is one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]
RestartOption = Annotated[
    bool,
    typer.Option("--restart", help="Start anew: `score` empties the run directory, `distill` removes what it made."),
]
WeightsOption = Annotated[
    str | None, typer.Option(help="The parent's weights: resident on the device, streamed from disk, or auto.")
]
ActivationsOption = Annotated[
    str | None, typer.Option(help="Residual streams on the device, in host memory, on disk, or auto.")
]
DEFAULT_RUN = Path("runs/default")


@app.command(
    epilog="""Examples:

nas score                                                 the embedded SmolLM2-135M on Python's documentation

nas score --parent meta-llama/Llama-3.1-8B --data wiki.parquet --run runs/8b

nas score --method both                                   every candidate exactly too; prints the rank correlation

nas score --weights streamed --activations host           a parent larger than the GPU, layer by layer

torchrun --nproc-per-node 8 -m -- nas score --run runs/8b     sequences shared out over 8 GPUs

nas score --dry-run --json                                the plan: memory, bytes, FLOPs, time; for machines"""
)
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
    target: Annotated[str | None, typer.Option(help="Engine that must serve the child: vllm or transformers.")] = None,
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
    from blocks.ranks import join
    from nas.config import DataConfig, RunConfig, ScoreConfig, build, load_recipe
    from nas.engine_config import EngineConfig

    (ranks, place), sections = join(pick_device(device)), load_recipe(recipe)
    engine = build(EngineConfig, sections, {"weights": weights, "activations": activations}, place.type)
    data_flags = {
        "source": data,
        "text_column": text_column,
        "sequence_length": sequence_length,
        "fit_tokens": fit_tokens,
        "calibration_tokens": calibration_tokens,
        "heldout_tokens": heldout_tokens,
        "split": split,
        "seed": seed,
    }
    score_flags = {
        "method": method,
        "fit": fit,
        "label_samples": label_samples,
        "exact_tokens": exact_tokens,
        "exact_share": exact_share,
        "estimator": estimator,
        "auto_tokens": auto_tokens,
        "bld_tokens": bld_tokens,
        "compute_dtype": compute_dtype,
        "library": library,
        "seed": seed,
    }
    run_flags = {
        "parent": parent,
        "space": space,
        "target": target,
        "data": build(DataConfig, sections, data_flags, place.type),
        "score": build(ScoreConfig, sections, score_flags, place.type),
    }
    config = build(RunConfig, sections, run_flags, place.type)

    from blocks.parent import open_parent
    from nas.run import create_run
    from nas.score import run_score
    from search_spaces import load_space

    loaded_space = load_space(config.space, config.target)
    opened = open_parent(config.parent)
    if dry_run:
        from nas.plan import plan_score

        caps = {"fit": config.data.fit_tokens, "calibration": config.data.calibration_tokens}
        plan = plan_score(config, opened, loaded_space, place, engine, ranks, caps, config.data.sequence_length, None)
        return emit(plan.to_json(), as_json) if as_json else typer.echo("\n".join(plan.lines()))
    if restart and ranks.main:
        empty(run)
    opened_run = create_run(run, config, opened.fingerprint) if ranks.main else None
    opened_run = ranks.agree(opened_run)
    summary = run_score(opened_run, opened, place, reporter(as_json or not ranks.main), engine, ranks)
    ranks.leave()
    if not ranks.main:
        return
    if as_json:
        return emit(summary, as_json)
    from nas.show import correlation_line

    typer.echo(f"{correlation_line(summary)}\n{run / 'scores.csv'} written in {summary['seconds']:.0f} s")
    typer.echo(f"next: nas search --budget-gb GB{run_flag(run)}   (or --budget 0.6)")


@app.command(
    epilog="""Examples:

nas search --budget-gb 80                                 weights + KV cache within 80 GB

nas search --budget-gb 80 --batch 16 --context 32768      for 16 sequences of 32k tokens

nas search --budget 0.6                                   60 % of the parent's attention, FFN and KV bytes

nas search --budget-gb 80 --min-throughput 900 --clock profiles/h200.json      memory and speed together

nas search --max-latency-ms 400,15 --clock H100           to the first token, per output token; a datasheet's estimate

nas search --sweep 0.9:0.5:0.05                           a child for each of these budgets

nas search --budget 0.5 --storage mysql://host/nas        the same command on each machine: they share the work

nas search --scores library.csv --budget-gb 80            a score table alone, no parent (docs/tables.md)"""
)
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
    batch: Annotated[int | None, typer.Option(help="Sequences served at once.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of KV cache per sequence.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a request's prompt; half of the context.")] = None,
    output: Annotated[int | None, typer.Option(help="Tokens generated for a request; the rest of the context.")] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs that share each layer: heads and channels must divide.")] = None,
    weight_dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; the child is written in it.")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    reserve_gb: Annotated[float | None, typer.Option(help="GB kept free for activations and the like.")] = None,
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
    from blocks.ranks import require_one_process
    from distill.config import DistillConfig
    from nas.config import SearchConfig, build, load_recipe
    from nas.costs import Scenario

    require_one_process("nas search")
    sections = load_recipe(recipe)
    search_flags = {
        "budget_gb": budget_gb,
        "budget": budget,
        "sweep": sweep,
        "max_params": max_params,
        "max_kv_gb": max_kv_gb,
        "min_throughput": min_throughput,
        "max_latency_ms": max_latency_ms,
        "clock": clock,
        "trials": trials,
        "verify": verify,
        "verify_tokens": verify_tokens,
        "path_steps": path_steps,
        "sampler": sampler,
        "prune": prune,
        "finalists": finalists,
        "heal_tokens": heal_tokens,
        "refit": refit,
        "storage": storage,
        "seed": seed,
    }
    scenario_flags = {
        "batch": batch,
        "context": context,
        "prompt": prompt,
        "output": output,
        "tp": tp,
        "weight_dtype": weight_dtype,
        "kv_dtype": kv_dtype,
        "reserve_gb": reserve_gb,
    }
    place = pick_device(device)
    config = build(SearchConfig, sections, search_flags, place.type)
    scenario = build(Scenario, sections, scenario_flags, place.type)
    if scores is not None:
        from nas.table_search import run_table_search

        run = DEFAULT_RUN.with_name(scores.stem) if run == DEFAULT_RUN else run
        return show_search(run_table_search(scores, config, scenario, run, dry_run), run, as_json, dry_run)

    from nas.search import load_candidates, run_search

    opened_run, parent = open_run_and_parent(run)
    if dry_run:
        from nas.plan import plan_search

        share = config.shares[-1] if config.sweep else None
        candidates = load_candidates(opened_run, parent.shape, config, scenario, share)
        return emit(plan_search(config, scenario, parent.shape, candidates), as_json)
    healing = build(DistillConfig, sections, {"device": "cpu" if place.type == "cpu" else None}, place.type)
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


@app.command(
    epilog="""Examples:

nas distill                                               sensible numbers for this device

nas distill --tokens 20000000 --batch-sequences 32 --sequence-length 1024

nas distill --run runs/8b                                 stopped? the same command goes on where it was"""
)
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
    from blocks.ranks import require_one_process
    from distill.config import DistillConfig
    from nas.config import build, load_recipe

    require_one_process("nas distill")
    place = pick_device(device)
    flags = {
        "tokens": tokens,
        "learning_rate": learning_rate,
        "batch_sequences": batch_sequences,
        "micro_batch": micro_batch,
        "sequence_length": sequence_length,
        "compute_dtype": compute_dtype,
        "eval_every": eval_every,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
        "device": "cpu" if place.type == "cpu" else None,
    }
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


@app.command(
    epilog="""Examples:

nas bench                                                 the candidates of runs/default on this device

nas bench --run runs/8b --batch 16 --prompt 1024 --output 512

nas bench --shape config.json --out profiles/h200.json    a Hugging Face config.json alone, no weights needed

nas bench --dry-run --json                                what would be measured; for machines"""
)
def bench(
    run: Annotated[Path | None, typer.Option("--run", help="The run whose candidates to measure.")] = None,
    parent: Annotated[str | None, typer.Option(help="Instead: a parent, as for nas score.")] = None,
    shape: Annotated[Path | None, typer.Option(help="Instead: a Hugging Face config.json; no weights needed.")] = None,
    space: Annotated[str | None, typer.Option(help="Search space; the run's own, or default.")] = None,
    target: Annotated[str | None, typer.Option(help="Engine that must serve the child: vllm or transformers.")] = None,
    architecture: Annotated[
        Path | None, typer.Option(help="An architecture.json to assemble and check; the run's own, or a made half.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences served at once.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of KV cache per sequence.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a request's prompt; half of the context.")] = None,
    output: Annotated[int | None, typer.Option(help="Tokens generated for a request; the rest of the context.")] = None,
    weight_dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="bfloat16, float16 or float32.")] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs that share each layer; the time is one GPU's.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds to take medians over.")] = None,
    out: Annotated[Path | None, typer.Option(help="The profile to write; profiles/DEVICE-DIGEST.json.")] = None,
    recipe: RecipeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Measure how long every candidate takes on this device, into a profile file that travels."""
    import sys

    from blocks.ranks import require_one_process
    from nas.bench import effort_for, run_bench
    from nas.bench_command import bench_table, check_lines, default_out, find_subject, plan
    from nas.config import build, load_recipe
    from nas.costs import Scenario

    require_one_process("nas bench")
    place = pick_device(device)
    flags = {"batch": batch, "context": context, "prompt": prompt, "output": output, "tp": tp}
    flags |= {"weight_dtype": weight_dtype, "kv_dtype": kv_dtype}  # type: ignore[dict-item]
    scenario = build(Scenario, load_recipe(recipe), flags, place.type)
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


@app.command(
    epilog="""Examples:

nas show

nas show --run runs/8b --json"""
)
def show(run: RunOption = DEFAULT_RUN, as_json: JsonOption = False) -> None:
    """Print a run: candidates, scores, architecture map, budget, results, and where everything lies."""
    from nas.table_search import read_table_run

    if (found := read_table_run(run)) is not None:  # of a score table alone: there is no parent to open
        return emit({"run": str(run), "architecture": found}, True) if as_json else show_search(found, run, False)
    opened_run, parent = open_run_and_parent(run)
    if as_json:
        made = {"scores": "score.json", "architecture": "architecture.json", "results": "results.json"}
        content = {name: opened_run.read(file, "score") for name, file in made.items() if opened_run.has(file)}
        if content.get("results", {}).get("search") != content.get("architecture", {}).get("key"):
            content.pop("results", None)  # of an earlier search: not this child's
        return emit({"run": str(run), "parent": opened_run.config.parent} | content, as_json)
    from rich.console import Console

    from nas.show import render_run

    render_run(opened_run, parent.shape, Console())


@app.command(
    epilog="""Examples:

nas report                                                runs/default/report.html: maps, Pareto fronts, tables

nas report --run runs/8b --out 8b.html                    the page elsewhere, to send to someone

nas report --json                                         the numbers behind every figure, for machines"""
)
def report(
    run: RunOption = DEFAULT_RUN,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page; report.html in the run if not given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the run as one HTML page (no script, no network) and as report.json."""
    from nas.report import write_report

    made = write_report(run, out)
    if as_json:
        return emit(made, as_json)
    typer.echo(f"{out or run / 'report.html'} written, its numbers in {run / 'report.json'}")
    for name, note in made["notes"].items():
        typer.echo(f"  no {name}: {note}")


def pick_device(name: str | None) -> torch.device:
    """The torch device of a flag. Raises ConfigError for one that is not there."""
    import torch

    from blocks.errors import ConfigError

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: not a device; write cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: not supported; write cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def open_run_and_parent(directory: Path) -> tuple[Any, Any]:
    """A run and its parent. Raises CheckpointError if the parent's files changed since."""
    from blocks.errors import CheckpointError
    from blocks.parent import open_parent
    from nas.run import open_run

    run = open_run(directory)
    parent = open_parent(run.config.parent)
    if parent.fingerprint != run.fingerprint:
        message = f"{directory} belongs to another parent: {run.config.parent} has changed ({parent.fingerprint}, was {run.fingerprint})"
        raise CheckpointError(f"{message}; score it into another --run")
    return run, parent


def reporter(quiet: bool) -> Any:
    from nas.progress import Reporter

    return Reporter(quiet)


def run_flag(run: Path) -> str:
    return "" if run == DEFAULT_RUN else f" --run {run}"


def empty(run: Path) -> None:
    """Removes a run directory for --restart; never anything that is not one."""
    import shutil

    from blocks.errors import ConfigError

    if run.exists():
        if not (run / "config.yaml").exists():
            raise ConfigError(f"--restart: {run} is not a run directory (it has no config.yaml); nothing was removed")
        shutil.rmtree(run)


def emit(content: dict[str, Any], as_json: bool) -> None:
    """A plan or result: JSON for machines, `key: value` lines for people."""
    if as_json:
        typer.echo(json.dumps(content, indent=1))
        return
    for key, value in content.items():
        typer.echo(
            f"{key.replace('_', ' ')}: {value:,}"
            if isinstance(value, int) and not isinstance(value, bool)
            else f"{key.replace('_', ' ')}: {value}"
        )
