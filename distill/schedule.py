"""The learning rate and the optimizer: a function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

import torch
from torch import nn

from distill.config import DistillConfig


def learning_rate(config: DistillConfig, step: int) -> float:
    """Learning rate of update number `step` (0-based): linear warmup, then cosine or constant."""
    warmup = round(config.warmup_share * config.steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(1, config.steps - 1 - warmup)
    share = config.final_lr_share + (1 - config.final_lr_share) * (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * share


def build_optimizer(config: DistillConfig, student: nn.Module) -> torch.optim.AdamW:
    """AdamW over the student's parameters; only matrices inside layers decay. Fused where torch has it."""
    tables = {id(m.weight) for m in student.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for name, p in student.named_parameters(remove_duplicate=False) if name.endswith("lm_head.weight")}
    trained = [p for p in student.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in trained if p.ndim < 2 or id(p) in tables]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, fused=fused
    )
