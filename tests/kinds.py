"""Candidates of every kind on a tiny parent, fitted to random text; for the tests of the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.library import LayerLibrary
from blocks.spec import LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep

ALL = [
    LayerSpec.parse(f"attention:{attention}+ffn:{ffn}")
    for attention in ("kv4", "kv2", "kv1", "linear", "skip")
    for ffn in ("512", "256", "linear", "skip")
]
LENGTH = 40


def random_text(sequences: int = 6) -> Tensor:
    return torch.randint(0, 256, (sequences, LENGTH), generator=torch.Generator().manual_seed(1))


def fitted_library(sweep: Sweep, streams: StreamCheckpoints, layer: int) -> LayerLibrary:
    return fit_layer(sweep, sweep.layer(layer), streams[layer], ALL, FitConfig())
