"""Options that commands share, and the first and last steps that they share."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

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

# A scenario: what the child must serve.
BatchOption = Annotated[int | None, typer.Option("--batch", help="Sequences served at once.")]
ContextOption = Annotated[int | None, typer.Option("--context", help="Tokens of KV cache per sequence.")]
PromptOption = Annotated[
    int | None, typer.Option("--prompt", help="Tokens of a request's prompt; half of the context.")
]
OutputOption = Annotated[
    int | None, typer.Option("--output", help="Tokens generated for a request; the rest of the context.")
]
TpOption = Annotated[
    int | None,
    typer.Option("--tp", help="GPUs that share each layer: heads and channels must divide; times are one GPU's."),
]
WeightDtypeOption = Annotated[
    str | None, typer.Option("--weight-dtype", help="bfloat16, float16 or float32; a child is written in it.")
]
KvDtypeOption = Annotated[
    str | None,
    typer.Option(
        "--kv-dtype", help="bfloat16, float16, float32 or float8; of several, bf16,fp8, a search takes the better."
    ),
]


def settings_of(kind: type, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The arguments of a command (its `locals()`) that are fields of the configuration `kind`; `more` go before them."""
    return {field.name: arguments[field.name] for field in fields(kind) if field.name in arguments} | more


def pick_device(name: str | None) -> torch.device:
    """The torch device of a flag; a GPU by its number is the current one from then on. Raises ConfigError for one that is not there."""
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
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
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
    import shlex

    return "" if run == DEFAULT_RUN else f" --run {shlex.quote(str(run))}"


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
