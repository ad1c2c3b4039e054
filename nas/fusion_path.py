"""`nas fuse PATH`: a child that belongs to no run, with text and a parent of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blocks.errors import ConfigError
from nas.config import DataConfig
from nas.costs import Scenario
from nas.data import prepare_data
from nas.export import check_target
from nas.fusion import FusionConfig, Task, fuse_child, plan_fusion
from nas.progress import Reporter

if TYPE_CHECKING:
    from blocks.parent import Parent

MOST_SEQUENCE = 512


def fuse_path(
    path: Path,
    parent: str | None,
    data: str | None,
    out: Path | None,
    config: FusionConfig,
    scenario: Scenario,
    device: torch.device,
    reporter: Reporter,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Fuses a child's directory into `out` (PATH-fused), and PATH-fused.json beside it; returns what that holds.

    Raises ConfigError without a parent or text; CheckpointError, DataError as what is opened.
    """
    if parent is None or data is None:
        raise ConfigError(f"nas fuse {path} needs the parent and some text: --parent PARENT --data TEXT")
    out = out or path.with_name(f"{path.name}-fused")
    check_target(path, out)
    if dry_run:
        return plan_fusion(path, out, config, scenario, device.type == "cuda")
    from blocks.parent import open_parent

    opened = open_parent(parent)
    with tempfile.TemporaryDirectory() as directory:
        split = prepare_data(
            data_config(opened, data, config), opened.tokenizer(), opened.shape.vocab_size, Path(directory)
        )
        task = Task(path, out, out.with_name(f"{out.name}.json"), split.pack("calibration"), split.pack("heldout"))
        return fuse_child(task, opened, config, scenario, device, reporter)


def data_config(parent: Parent, data: str, config: FusionConfig) -> DataConfig:
    """As much text as is measured on, and hardly any for parts that nothing here uses."""
    length = min(MOST_SEQUENCE, int(getattr(parent.config, "max_position_embeddings", MOST_SEQUENCE)))
    least = 8 * length
    most = max(config.tokens, least)
    return DataConfig(
        source=data,
        sequence_length=length,
        fit_tokens=least,
        train_tokens=least,
        calibration_tokens=most,
        heldout_tokens=most,
    )
