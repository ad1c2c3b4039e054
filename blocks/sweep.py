"""The layer sweep: a model run layer by layer over all calibration sequences at once.

Statistics, fits, scores, refits and true-KL evaluation are all loops over `Sweep.layer(i)` that keep the residual
stream of every sequence, so one layer's tensors are needed at a time.

Shapes: N sequences, S positions, D hidden_size. A residual stream is one tensor [N, S, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.layer import LayerMath, Weights, layer_forward, rms_norm

if TYPE_CHECKING:
    from blocks.parent import Parent


@dataclass
class Sweep:
    """A parent on a device, read layer by layer.

    Attributes:
        parent: whose tensors are read.
        device, dtype: where and in what precision the layers compute.
        tokens_per_batch: how many tokens go through a layer at a time (bounds the memory of activations).
        resident: keep the layers' tensors on the device once read.
    """

    parent: Parent
    device: torch.device
    dtype: torch.dtype = torch.float32
    tokens_per_batch: int = 4096
    resident: bool = True
    _layers: dict[int, Weights] = field(default_factory=dict, repr=False)
    _math: dict[int, LayerMath] = field(default_factory=dict, repr=False)

    @cached_property
    def embedding(self) -> Tensor:
        return self.parent.weights().embedding.to(self.device, self.dtype)

    @cached_property
    def head(self) -> Tensor:
        """The output matrix [V, D]; the embedding itself when tied."""
        if self.parent.shape.tie_word_embeddings:
            return self.embedding
        return self.parent.weights().head.to(self.device, self.dtype)

    @cached_property
    def final_norm(self) -> Tensor:
        return self.parent.weights().final_norm.to(self.device, self.dtype)

    def layer(self, index: int) -> Weights:
        if index in self._layers:
            return self._layers[index]
        weights = self.parent.weights().layer(index, self.dtype, self.device)
        if self.resident:
            self._layers[index] = weights
        return weights

    def math(self, length: int) -> LayerMath:
        """Rotary tables for sequences of `length` tokens."""
        if length not in self._math:
            self._math[length] = LayerMath.of(self.parent.config, length, self.device, self.dtype)
        return self._math[length]

    def batches(self, stream: Tensor) -> Iterator[slice]:
        """Slices over the sequences of a stream [N, S, ...], at most `tokens_per_batch` tokens each."""
        step = max(1, self.tokens_per_batch // stream.shape[1])
        for start in range(0, len(stream), step):
            yield slice(start, start + step)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids [N, S] -> the residual stream entering layer 0."""
        return F.embedding(tokens.to(self.device), self.embedding)

    def finish(self, stream: Tensor) -> Tensor:
        """The stream leaving the last layer -> normalised hidden states that the head reads."""
        return rms_norm(stream, self.final_norm, self.parent.config.rms_norm_eps)

    @torch.no_grad()
    def forward(self, weights: Weights, stream: Tensor) -> Tensor:
        """One layer over a whole stream [N, S, D]; returns a new stream (the same one if the layer is empty)."""
        if not weights:
            return stream
        math = self.math(stream.shape[1])
        out = torch.empty_like(stream)
        for batch in self.batches(stream):
            out[batch] = layer_forward(weights, stream[batch], math)
        return out

    @torch.no_grad()
    def run(self, tokens: Tensor, layers: Callable[[int], Weights] | None = None) -> Tensor:
        """All layers (the parent's, or those that `layers(index)` gives): token ids [N, S] -> hidden states [N, S, D]."""
        stream = self.embed(tokens)
        for index in range(self.parent.shape.num_hidden_layers):
            stream = self.forward((layers or self.layer)(index), stream)
        return self.finish(stream)
