"""Candidates of every kind on a tiny parent, fitted to random text, and all exact scores at once; for the tests of the scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.library import LayerLibrary
from blocks.spec import LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep
from nas.exact import ExactScores, Reference

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


def exact_scores(
    sweep: Sweep,
    candidates: Sequence[tuple[LayerLibrary, Sequence[LayerSpec]]],
    layers: Sequence[int],
    reference: Reference,
    most: int = 16,
) -> list[Tensor]:
    """True replace-one-block KL in nats per token [specs, N], for each of `layers` (rising) with its library and specs."""
    found: dict[tuple[int, LayerSpec], Tensor] = {}
    queue = ExactScores(sweep, reference, most, lambda layer, spec, kl: found.update({(layer, spec): kl}))
    for layer, (library, specs) in reversed(list(zip(layers, candidates, strict=True))):
        queue.add(layer, library, specs)
    queue.flush()
    return [
        torch.stack([found[layer, spec] for spec in specs])
        for layer, (_, specs) in zip(layers, candidates, strict=True)
    ]
