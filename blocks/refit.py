"""The refit sweep: a closed-form healing of an assembled child.

Layer by layer on the child's own stream, o_proj and down_proj are refitted by ridge towards their present values so that
the child's residual stream returns to the parent's: first after the attention, then after the FFN. Errors that earlier
layers left are corrected by the layers that follow. No gradient step; about three forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from blocks.fit import Statistics
from blocks.layer import Weights, add_subblock, attention_input, ffn_input, has_ffn
from blocks.sweep import Sweep


@torch.no_grad()
def refit_sweep(
    sweep: Sweep,
    child: Sequence[Weights],
    changed: Collection[int],
    tokens: Tensor,
    pseudo_tokens: float,
    on_layer: Callable[[int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Refits an assembled child on token ids [N, S] and returns its new layers.

    Layers before the first one that differs from the parent are left alone, since there the streams are equal.

    Args:
        sweep: the parent.
        child: the child's tensors, one mapping a layer (`LayerLibrary.layer_weights`).
        changed: indices of the layers that differ from the parent's.
        tokens: the fitting text.
        pseudo_tokens: how strongly the present values hold, in tokens of typical channel energy.
        on_layer: told each finished layer.
    """
    parent_stream = sweep.embed(tokens)
    stream = parent_stream
    refitted: list[dict[str, Tensor]] = []
    for index, own in enumerate(child):
        original = sweep.layer(index)
        if stream is parent_stream and index not in changed:
            refitted.append(dict(own))
            stream = parent_stream = sweep.forward(original, parent_stream)
        else:
            new, stream, parent_stream = _refit_layer(sweep, dict(own), original, stream, parent_stream, pseudo_tokens)
            refitted.append(new)
        if on_layer is not None:
            on_layer(index)
    return refitted


def _refit_layer(
    sweep: Sweep, own: dict[str, Tensor], original: Weights, stream: Tensor, parent_stream: Tensor, pseudo_tokens: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One layer; returns its new tensors and the child's and the parent's streams after it."""
    math = sweep.math(stream.shape[1])
    target_middle, target = torch.empty_like(stream), torch.empty_like(stream)
    for batch in sweep.batches(parent_stream):
        h = parent_stream[batch]
        target_middle[batch] = middle = add_subblock(original, h, attention_input(original, h, math))
        target[batch] = add_subblock(original, middle, ffn_input(original, middle, math))
    for read, goal in ((attention_input, target_middle), (ffn_input, target)):
        if read is attention_input and not has_ffn(own):
            goal = target  # with no FFN behind it, the attention answers for the whole layer
        name, inputs = "", []
        for batch in sweep.batches(stream):
            last = read(own, stream[batch], math)
            if last is None:
                break
            name = last[0]
            inputs.append(last[1])
        if not inputs:
            continue
        statistics = Statistics(inputs[0].shape[-1], stream.shape[-1], stream.device)
        bias = own.get(f"{name}.bias", 0)
        for batch, a in zip(sweep.batches(stream), inputs, strict=True):
            statistics.add(a, goal[batch] - stream[batch] - bias)
        matrix = own[f"{name}.weight"]
        own[f"{name}.weight"] = statistics.solve(matrix.T, pseudo_tokens).T.to(matrix.dtype)
        stream = torch.cat(
            [add_subblock(own, stream[b], (name, a)) for b, a in zip(sweep.batches(stream), inputs, strict=True)]
        )
    return own, stream, target
