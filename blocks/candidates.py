"""Building the candidates of one layer from the parent's activations: cut, then fitted in closed form.

For every attention candidate a: the merged or linear attention is fitted to the parent's attention output. Then, with
h_mid^a the stream after it, every FFN candidate is fitted to what is still missing, h_out - h_mid^a. So the FFN makes up
for what the attention lost: with the attention skipped this is the compensated skip. Where the FFN is skipped, o_proj
is fitted to the whole layer, h_out - h_in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.fit import Statistics, contribution, greedy_order
from blocks.layer import (
    ATTENTION_NORM,
    DOWN_PROJ,
    FFN_NORM,
    LINEAR_ATTENTION,
    LINEAR_FFN,
    O_PROJ,
    Weights,
    attention_context,
    ffn_activation,
    project,
    rms_norm,
)
from blocks.library import LayerLibrary
from blocks.merge import MergeStatistics, mean_pool, merge_heads
from blocks.spec import AttentionSpec, LayerSpec
from blocks.sweep import Sweep


@dataclass(frozen=True)
class FitConfig:
    """How candidates are built."""

    method: str = "fitted"
    """"fitted" (closed form), or "cut" (published initialisation: mean-pooled heads, channels by contribution, plain skips)."""
    pseudo_tokens: float = 100.0
    """Weight of the prior (the cut matrix) in the ridge, in tokens of typical channel energy."""


@dataclass
class LayerFit:
    """The library entries of one layer, and the stream that leaves the parent's layer."""

    library: LayerLibrary
    output: Tensor


@torch.no_grad()
def fit_layer(
    sweep: Sweep, weights: Weights, stream: Tensor, specs: Sequence[LayerSpec], config: FitConfig
) -> LayerFit:
    """Builds every candidate of `specs` for one layer.

    Args:
        sweep: the engine whose batches and precision are used.
        weights: the parent's tensors of this layer.
        stream: the parent's residual stream entering it [N, S, D].
        specs: the candidate layers, in any order; the parent's own needs no entry.
        config: cut or fitted, and the ridge.
    """
    builder = _LayerBuilder(sweep, weights, stream, config)
    for attention in dict.fromkeys(spec.attention for spec in specs):
        builder.build(attention, [spec for spec in specs if spec.attention == attention])
    return LayerFit(builder.library, builder.output)


class _LayerBuilder:
    """The parent's layer on the fitting text: its streams, computed once, and the library being filled."""

    def __init__(self, sweep: Sweep, weights: Weights, stream: Tensor, config: FitConfig) -> None:
        self.sweep, self.weights, self.input, self.config = sweep, weights, stream, config
        self.math = sweep.math(stream.shape[1])
        self.library = LayerLibrary(weights)
        self.heads = AttentionSpec("kv", weights["self_attn.k_proj.weight"].shape[0] // self.math.head_dim)
        self.context = self._each(lambda h: attention_context(weights, h, self.math), stream)
        self.middle = stream + project(weights, "self_attn.o_proj", self.context)
        self.output = self._each(
            lambda h: h + project(weights, "mlp.down_proj", ffn_activation(weights, h, self.math)), self.middle
        )
        self._merge: MergeStatistics | None = None

    def build(self, attention: AttentionSpec, specs: Sequence[LayerSpec]) -> None:
        """All pairs (attention, FFN) of one attention candidate."""
        context, middle = self._attention(attention)
        if any(spec.ffn.kind == "width" for spec in specs):
            self._widths(attention, middle, specs)
        for spec in specs:
            if spec.ffn.kind == "linear":
                self._linear_ffn(spec, middle)
            elif spec.ffn.kind == "skip" and attention.kind != "skip" and self.config.method == "fitted":
                self._compensate_ffn_skip(spec, context)

    def _attention(self, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        """Builds one attention; returns what its last matrix reads, and the stream after it."""
        if spec == self.heads:
            return self.context, self.middle
        if spec.kind == "skip":
            return self.input, self.input
        if spec.kind == "linear":
            normalised = self._each(
                lambda h: rms_norm(h, self.weights[ATTENTION_NORM], self.math.rms_norm_eps), self.input
            )
            fitted = self._solve(normalised, self.middle - self.input, None)
            kept = self.library.put(spec, LINEAR_ATTENTION, fitted.T)
            return normalised, self.input + normalised @ kept.T
        return self._fewer_heads(spec)

    def _fewer_heads(self, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        cut = self.config.method == "cut"
        if cut:
            changed = mean_pool(self.weights, spec.kv_heads, self.math)
        else:
            changed = merge_heads(self.weights, spec.kv_heads, self.math, self._merge_statistics())
        merged = dict(self.weights) | {name: self.library.put(spec, name, tensor) for name, tensor in changed.items()}
        context = self._each(lambda h: attention_context(merged, h, self.math), self.input)
        if not cut:
            bias = self.weights.get("self_attn.o_proj.bias", 0)
            fitted = self._solve(context, self.middle - self.input - bias, merged[O_PROJ].T)
            merged[O_PROJ] = self.library.put(spec, O_PROJ, fitted.T)
        return context, self.input + project(merged, "self_attn.o_proj", context)

    def _merge_statistics(self) -> MergeStatistics:
        if self._merge is None:
            self._merge = MergeStatistics(self.heads.kv_heads, self.math.head_dim, self.input.device)
            for batch in self.sweep.batches(self.input):
                self._merge.add(self.weights, self.input[batch], self.math)
        return self._merge

    def _widths(self, attention: AttentionSpec, middle: Tensor, specs: Sequence[LayerSpec]) -> None:
        """Every FFN width behind one attention: one Gram, one channel order, one Cholesky."""
        output = self.weights[DOWN_PROJ].T
        full = len(output)
        widths = sorted({spec.ffn.width for spec in specs if spec.ffn.kind == "width"})
        fitted = self.config.method == "fitted"
        if attention == self.heads or not fitted:
            widths = [w for w in widths if w < full]  # the parent's own, or a cut that leaves the FFN as it is
        if not widths:
            return
        statistics = Statistics(full, output.shape[1], middle.device)
        bias = self.weights.get("mlp.down_proj.bias", 0)
        for batch in self.sweep.batches(middle):
            activation = ffn_activation(self.weights, middle[batch], self.math)
            statistics.add(activation, self.output[batch] - middle[batch] - bias)
        narrow = [w for w in widths if w < full]
        if not fitted:
            order = contribution(statistics.gram, output.float()).argsort(descending=True)
            matrices = [output[order[:w]] for w in widths]
        else:
            order = greedy_order(statistics.gram, statistics.cross, max(narrow, default=0))
            matrices = statistics.solve_prefixes(output, order, widths, self.config.pseudo_tokens)
        if narrow:
            self.library.put_order(attention, order)
        by_width = dict(zip(widths, matrices, strict=True))
        for spec in specs:
            if (matrix := by_width.get(spec.ffn.width)) is None:
                continue
            if spec.ffn.width == full:  # nothing is cut: back to the parent's own channel order
                matrix = torch.empty_like(matrix).index_copy_(0, order, matrix)
            self.library.put(spec, DOWN_PROJ, matrix.T)

    def _linear_ffn(self, spec: LayerSpec, middle: Tensor) -> None:
        normalised = self._each(lambda h: rms_norm(h, self.weights[FFN_NORM], self.math.rms_norm_eps), middle)
        self.library.put(spec, LINEAR_FFN, self._solve(normalised, self.output - middle, None).T)

    def _compensate_ffn_skip(self, spec: LayerSpec, context: Tensor) -> None:
        name = LINEAR_ATTENTION if spec.attention.kind == "linear" else O_PROJ
        prior = self.library.attention_weights(spec.attention)[name].T
        bias = self.weights.get("self_attn.o_proj.bias", 0) if name == O_PROJ else 0
        self.library.put(spec, name, self._solve(context, self.output - self.input - bias, prior).T)

    def _solve(self, inputs: Tensor, targets: Tensor, prior: Tensor | None) -> Tensor:
        """Ridge from inputs [N, S, n] to targets [N, S, D]; returns [n, D]."""
        statistics = Statistics(inputs.shape[-1], targets.shape[-1], inputs.device)
        for batch in self.sweep.batches(inputs):
            statistics.add(inputs[batch], targets[batch])
        if prior is None:
            prior = torch.zeros_like(statistics.cross)
        return statistics.solve(prior, self.config.pseudo_tokens)

    def _each(self, function: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
        return torch.cat([function(stream[batch]) for batch in self.sweep.batches(stream)])
