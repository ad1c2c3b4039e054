"""The learning rate and the optimizers: functions of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from distill.config import DistillConfig
from distill.muon import Muon


def learning_rate(config: DistillConfig, step: int) -> float:
    """Learning rate of update number `step` (0-based): linear warmup, then what `config.schedule` says."""
    warmup = round(config.warmup_share * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "wsd":
        decay = max(1, round(config.decay_share * config.steps))
        progress = max(0.0, 1 - (config.steps - 1 - step) / decay)
        height = 1 - progress
    else:
        progress = (step - warmup) / max(1, config.steps - 1 - warmup)
        height = (1 + math.cos(math.pi * progress)) / 2
    share = config.final_lr_share + (1 - config.final_lr_share) * height
    return config.learning_rate * share


def build_optimizers(config: DistillConfig, student: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of the student's parameters, by name: AdamW, fused where torch has it, and Muon if asked for.

    Their groups carry an `lr_scale`, which `set_learning_rate` applies. Muon takes the matrices inside layers. Only those decay.
    """
    kinds = parameters_by_kind(student)
    scales = {"matrices": 1.0, "tables": config.embedding_lr_scale, "vectors": config.norm_lr_scale}
    groups: dict[str, dict[str, Any]] = {
        kind: {
            "params": parameters,
            "lr_scale": scales[kind],
            "weight_decay": config.weight_decay if kind == "matrices" else 0.0,
        }
        for kind, parameters in kinds.items()
        if parameters
    }
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer == "muon" and "matrices" in groups:
        optimizers["muon"] = Muon([groups.pop("matrices")], lr=config.learning_rate)
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") for group in groups.values() for p in group["params"])
        optimizers["adamw"] = torch.optim.AdamW(
            list(groups.values()), lr=config.learning_rate, betas=config.betas, fused=fused
        )
    return optimizers


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of every group, times the group's own scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def parameters_by_kind(student: nn.Module) -> dict[str, list[nn.Parameter]]:
    """What learns, in three kinds: "matrices" inside layers; "tables" (embedding and head); "vectors" (norms and biases)."""
    tables = {id(m.weight) for m in student.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for name, p in student.named_parameters(remove_duplicate=False) if name.endswith("lm_head.weight")}
    kinds: dict[str, list[nn.Parameter]] = {"matrices": [], "tables": [], "vectors": []}
    for parameter in student.parameters():
        if parameter.requires_grad:
            kind = "tables" if id(parameter) in tables else "matrices" if parameter.ndim >= 2 else "vectors"
            kinds[kind].append(parameter)
    return kinds
