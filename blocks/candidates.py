"""Building the candidates of one layer from the parent's activations: cut, then fitted in closed form.

For every attention candidate a: the merged or linear attention is fitted to the parent's attention output. Then, with
h_mid^a the stream after it, every FFN candidate is fitted to what is still missing, h_out - h_mid^a. So the FFN makes up
for what the attention lost: with the attention skipped this is the compensated skip. Where the FFN is skipped, o_proj
is fitted to the whole layer, h_out - h_in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    attention_input,
    ffn_activation,
    project,
    rms_norm,
)
from blocks.library import LayerLibrary
from blocks.merge import MergeStatistics, mean_pool, merge_heads
from blocks.spec import AttentionSpec, FFNSpec, LayerSpec
from blocks.sweep import Sweep


@dataclass(frozen=True)
class FitConfig:
    """How candidates are built."""

    method: str = "fitted"
    """"fitted" (closed form), or "cut" (published initialisation: mean-pooled heads, channels by contribution, plain skips)."""
    pseudo_tokens: float = 100.0
    """Weight of the prior (the cut matrix) in the ridge, in tokens of typical channel energy."""


ATTENDED, ADDED = 0, 1  # sets of targets: what the parent's attention adds to the stream, and what its whole layer adds


@torch.no_grad()
def fit_layer(
    sweep: Sweep, weights: Weights, stream: Tensor, specs: Sequence[LayerSpec], config: FitConfig
) -> LayerLibrary:
    """Builds every candidate of `specs` for one layer and returns them over the parent's tensors.

    One attention candidate at a time, so that the memory needed does not grow with their number; nothing that has a row
    for each token is kept but what the parent adds to the stream.

    Args:
        sweep: the engine whose batches and precision are used; statistics are summed over its ranks.
        weights: the parent's tensors of this layer.
        stream: the parent's residual stream entering it [N, S, D].
        specs: the candidate layers, in any order; the parent's own needs no entry.
        config: cut or fitted, and the ridge.
    """
    builder = _LayerBuilder(sweep, weights, stream, specs, config)
    for attention in dict.fromkeys(spec.attention for spec in specs):
        own = [spec for spec in specs if spec.attention == attention]
        builder.build_attention(attention, own)
        builder.build_ffns(attention, own)
    return builder.library


class _LayerBuilder:
    """The parent's layer on the fitting text, and the library being filled.

    `attended` and `added` [N, S, D] are what the parent's attention, and its whole layer, add to the stream.
    """

    def __init__(
        self, sweep: Sweep, weights: Weights, stream: Tensor, specs: Sequence[LayerSpec], config: FitConfig
    ) -> None:
        self.sweep, self.weights, self.stream, self.config = sweep, weights, stream, config
        self.fitted = config.method == "fitted"
        self.math = sweep.math(stream.shape[1])
        self.library = LayerLibrary(weights, place=None if sweep.store.place == "device" else torch.device("cpu"))
        self.heads = AttentionSpec("kv", weights["self_attn.k_proj.weight"].shape[0] // self.math.head_dim)
        self.attended, self.added = (sweep.empty_like(stream, sweep.dtype) for _ in range(2))
        fewer = self.fitted and any(s.attention.kind == "kv" and s.attention != self.heads for s in specs)
        self._run_parent(MergeStatistics(self.heads.kv_heads, self.math.head_dim, sweep.device) if fewer else None)

    def _run_parent(self, merge: MergeStatistics | None) -> None:
        for batch, (h,) in self.sweep.read(self.stream):
            h = h.float()
            attended = project(self.weights, "self_attn.o_proj", attention_context(self.weights, h, self.math))
            activation = ffn_activation(self.weights, h + attended, self.math)
            self.sweep.store.write(self.attended, batch, attended)
            self.sweep.store.write(self.added, batch, attended + project(self.weights, "mlp.down_proj", activation))
            if merge is not None:
                merge.add(self.weights, h, self.math)
        self.merge = None if merge is None else merge.reduce(self.sweep.ranks)

    # ---- attention

    def build_attention(self, spec: AttentionSpec, specs: Sequence[LayerSpec]) -> None:
        """One attention: cut, its last matrix fitted to what the parent's attention adds, and once more to what the whole
        layer adds if the FFN behind it is skipped."""
        if spec.kind == "skip":
            return
        if spec.kind == "kv" and spec != self.heads:
            self._put_fewer_heads(spec)
        without_ffn = [pair for pair in specs if pair.ffn.kind == "skip" and self.fitted]
        own = spec != self.heads and (self.fitted or spec.kind == "linear")
        if not own and not without_ffn:
            return
        statistics = self._attention_statistics(spec)
        if spec.kind == "linear":
            matrix, prior = LINEAR_ATTENTION, torch.zeros_like(statistics.cross)
        else:
            matrix, prior = O_PROJ, self.library.attention_weights(spec)[O_PROJ].T
        if own:
            fitted = statistics.solve(prior, self.config.pseudo_tokens, ATTENDED)
            prior = self.library.put(spec, matrix, fitted.T).T
        for pair in without_ffn:
            self.library.put(pair, matrix, statistics.solve(prior, self.config.pseudo_tokens, ADDED).T)

    def _put_fewer_heads(self, spec: AttentionSpec) -> None:
        if self.merge is None:
            changed = mean_pool(self.weights, spec.kv_heads, self.math)
        else:
            changed = merge_heads(self.weights, spec.kv_heads, self.math, self.merge)
        for name, tensor in changed.items():
            self.library.put(spec, name, tensor)

    def _attention_statistics(self, spec: AttentionSpec) -> Statistics:
        """From what the attention's last matrix reads to what the parent's attention, and its whole layer, add."""
        w, linear = self.weights, spec.kind == "linear"
        own = {} if linear else self.library.attention_weights(spec)
        inputs = w[ATTENTION_NORM].shape[0] if linear else w[O_PROJ].shape[1]
        bias = 0 if linear else w.get("self_attn.o_proj.bias", 0)
        statistics = Statistics(inputs, self.stream.shape[-1], self.sweep.device, targets=2)
        for _, (h, attended, added) in self.sweep.read(self.stream, self.attended, self.added):
            if linear:
                read = rms_norm(h, w[ATTENTION_NORM], self.math.rms_norm_eps)
            else:
                read = attention_context(own, h, self.math)
            statistics.add(read, attended - bias, added - bias)
        return statistics.reduce(self.sweep.ranks)

    # ---- FFN

    def build_ffns(self, attention: AttentionSpec, specs: Sequence[LayerSpec]) -> None:
        """Every FFN behind one attention, fitted to what the attention left undone of the layer."""
        full = self.weights[DOWN_PROJ].shape[1]
        changes_nothing = attention == self.heads or not self.fitted
        widths = {s.ffn.width for s in specs if s.ffn.kind == "width"} - ({full} if changes_nothing else set())
        linear = [s for s in specs if s.ffn.kind == "linear"]
        hidden = self.stream.shape[-1]
        by_width = Statistics(full, hidden, self.sweep.device) if widths else None
        by_norm = Statistics(hidden, hidden, self.sweep.device) if linear else None
        if by_width is None and by_norm is None:
            return
        bias = self.weights.get("mlp.down_proj.bias", 0)
        for middle, missing in self._behind(attention):
            if by_width is not None:
                by_width.add(ffn_activation(self.weights, middle, self.math), missing - bias)
            if by_norm is not None:
                by_norm.add(rms_norm(middle, self.weights[FFN_NORM], self.math.rms_norm_eps), missing)
        if by_norm is not None:
            by_norm.reduce(self.sweep.ranks)
            fitted = by_norm.solve(torch.zeros_like(by_norm.cross), self.config.pseudo_tokens)
            for spec in linear:
                self.library.put(spec, LINEAR_FFN, fitted.T)
        if by_width is not None:
            by_width.reduce(self.sweep.ranks)
            self._put_widths(attention, by_width, sorted(widths))

    def _behind(self, attention: AttentionSpec) -> Iterator[tuple[Tensor, Tensor]]:
        """By batch: the stream after one attention, and what the FFN behind it has to add [B, S, D]."""
        own = self.library.attention_weights(attention)
        for _, (h, attended, added) in self.sweep.read(self.stream, self.attended, self.added):
            h = h.float()
            if attention == self.heads:
                yield h + attended, added - attended
            elif (last := attention_input(own, h, self.math)) is None:
                yield h, added
            else:
                output = project(own, *last)
                yield h + output, added - output

    def _put_widths(self, attention: AttentionSpec, statistics: Statistics, widths: Sequence[int]) -> None:
        """One Gram, one channel order, one Cholesky for all widths."""
        output = self.weights[DOWN_PROJ].T
        full = len(output)
        narrow = [w for w in widths if w < full]
        matrices: Iterable[tuple[int, Tensor]]
        if self.fitted:
            order = greedy_order(statistics.gram, statistics.cross, max(narrow, default=0))
            matrices = statistics.solve_prefixes(output, order, widths, self.config.pseudo_tokens, last=True)
        else:
            order = contribution(statistics.gram, output.float()).argsort(descending=True)
            matrices = ((width, output[order[:width]]) for width in widths)
        if narrow:
            self.library.put_order(attention, order)
        for width, matrix in matrices:
            if width == full:  # nothing is cut: back to the parent's own channel order
                matrix = torch.empty_like(matrix).index_copy_(0, order, matrix)
            self.library.put(LayerSpec(attention, FFNSpec("width", width)), DOWN_PROJ, matrix.T)
