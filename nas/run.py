"""The run directory: what belongs to one parent, one text and one search space, and which stage wrote what.

config.yaml        the settings of the run, resolved        data/           token packs and their split
env.json           versions and machine                     library/        fitted candidates, by layer
scores.csv         the score table                          score.json      how the scores were made and checked
scores/            per-layer results (resuming)             study.journal   every child measured (Optuna)
architecture.json  the chosen architecture                  child/          it, assembled, before healing
path.json          children on the way to the limits        uniform/        the uniform baseline within the same limits
finalists/         short heals before the last choice       family.json     the children of a sweep, with family/
distill/           checkpoints and metrics.jsonl            healed/         the healed child
eval.json          what `nas eval` measured, by model
results.json       the table of `nas show`                  report.html     the page of `nas report`, with report.json
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from blocks.errors import CheckpointError, ConfigError
from blocks.files import save_json, save_text
from nas.config import DataConfig, RunConfig, ScoreConfig, to_dict

README = "# A marquetry run\n\n" + (__doc__ or "") + "\nDraw it: `nas show --run {directory}`\n"


@dataclass(frozen=True)
class Run:
    """A run directory and its settings."""

    directory: Path
    config: RunConfig
    fingerprint: str

    def path(self, name: str) -> Path:
        return self.directory / name

    def read(self, name: str, stage: str) -> dict[str, Any]:
        """A JSON file of the run. Raises CheckpointError that names the stage which writes it."""
        path = self.path(name)
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.directory} has no {name} yet; run `nas {stage} --run {self.directory}` first"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete it and run `nas {stage}` again") from error
        return content

    def read_if(self, name: str) -> Any:
        """A JSON file of the run, or None if it is not there or not whole."""
        try:
            return json.loads(self.path(name).read_text())
        except (OSError, ValueError):
            return None

    def has(self, name: str) -> bool:
        return self.path(name).exists()


def create_run(directory: Path, config: RunConfig, fingerprint: str) -> Run:
    """Opens the run for scoring: a new one, or the same parent, text and space as before.

    A run whose text was never packed (no such text, or too little of it) holds nothing yet and takes other settings.
    Raises CheckpointError if the directory belongs to something else.
    """
    if (run := find_run(directory, config, fingerprint)) is not None:
        return run
    directory.mkdir(parents=True, exist_ok=True)
    save_json(directory / "env.json", environment())
    save_text(directory / "README.md", README.format(directory=directory))
    content = to_dict(config) | {"fingerprint": fingerprint}
    save_text(directory / "config.yaml", yaml.safe_dump(content, sort_keys=False))
    return Run(directory, config, fingerprint)


def find_run(directory: Path, config: RunConfig, fingerprint: str) -> Run | None:
    """The run that is there, with its text; None if there is none yet. Raises CheckpointError if it belongs to something else."""
    if not ((directory / "config.yaml").exists() and (directory / "data" / "split.json").exists()):
        return None
    run = open_run(directory)
    _require_same(run, config, fingerprint)
    return run


def open_run(directory: Path) -> Run:
    """Opens a run that `nas score` made. Raises CheckpointError if there is none, or it is damaged."""
    path = directory / "config.yaml"
    try:
        content = yaml.safe_load(path.read_text())
        fingerprint = content.pop("fingerprint")
        data, score = DataConfig(**content.pop("data")), ScoreConfig(**content.pop("score"))
        return Run(directory, RunConfig(**content, data=data, score=score), fingerprint)
    except FileNotFoundError:
        raise CheckpointError(f"no run at {directory}; start one with `nas score --run {directory}`") from None
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another --run") from error


def _require_same(run: Run, config: RunConfig, fingerprint: str) -> None:
    where = f"{run.directory} belongs to"
    remedy = "use another --run, or --restart to empty this one"
    if run.fingerprint != fingerprint:
        raise CheckpointError(
            f"{where} another parent: {run.config.parent} ({run.fingerprint}), not {config.parent} ({fingerprint}); {remedy}"
        )
    old, new = _flat(to_dict(run.config)), _flat(to_dict(config))
    different = [f"{key} {old[key]!r}, not {new[key]!r}" for key in new if old.get(key) != new[key] and key != "parent"]
    if different:
        raise CheckpointError(f"{where} other settings: {'; '.join(different)}; {remedy}")


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def digest(*parts: Any) -> str:
    """A short name for settings: equal settings, equal name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    packages = (
        "marquetry",
        "torch",
        "transformers",
        "optuna",
        "accelerate",
        "datasets",
        "safetensors",
        "scipy",
        "numpy",
    )
    return {
        "python": sys.version.split()[0],
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
