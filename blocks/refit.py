"""The refit sweep: a closed-form healing of an assembled child.

Layer by layer on the child's own stream, o_proj and down_proj are refitted by ridge towards their present values so that
the child's residual stream returns to the parent's: first after the attention, then after the FFN. Errors that earlier
layers left are corrected by the layers that follow. No gradient step; about four forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from blocks.fit import Statistics
from blocks.layer import LayerMath, Weights, add_subblock, attention_input, ffn_input, has_ffn
from blocks.sweep import Sweep

Read = Callable[[Weights, Tensor, LayerMath], tuple[str, Tensor] | None]
"""What a subblock's last matrix reads: `attention_input` or `ffn_input`."""


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
    parent_stream = sweep.embed(tokens, torch.float32)
    stream = parent_stream
    refitted: list[dict[str, Tensor]] = []
    for (index, original), own in zip(sweep.layers(sweep.parent.shape.layers), child, strict=True):
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
    target_middle, target = sweep.empty_like(stream), sweep.empty_like(stream)
    with sweep.fast_products():
        for batch, (h,) in sweep.read(parent_stream):
            middle = add_subblock(original, h, attention_input(original, h, math))
            sweep.store.write(target_middle, batch, middle)
            sweep.store.write(target, batch, add_subblock(original, middle, ffn_input(original, middle, math)))
    for read, goal in ((attention_input, target_middle), (ffn_input, target)):
        if read is attention_input and not has_ffn(own):
            goal = target  # with no FFN behind it, the attention answers for the whole layer
        stream = _refit_subblock(sweep, own, read, stream, goal, pseudo_tokens)
    return own, stream, target


def _refit_subblock(
    sweep: Sweep, own: dict[str, Tensor], read: Read, stream: Tensor, goal: Tensor, pseudo_tokens: float
) -> Tensor:
    """Refits the last matrix of one subblock in `own`, if it has one, so that the stream behind it becomes `goal`."""
    math = sweep.math(stream.shape[1])
    statistics, name = None, ""
    for _, (h, wanted) in sweep.read(stream, goal):
        with sweep.fast_products():
            last = read(own, h, math)
        if last is None:
            return stream
        name, inputs = last
        if statistics is None:
            statistics = Statistics(inputs.shape[-1], stream.shape[-1], sweep.device)
        statistics.add(inputs, wanted - h - own.get(f"{name}.bias", 0))
    assert statistics is not None
    matrix = own[f"{name}.weight"]
    fitted = statistics.reduce(sweep.ranks).solve(matrix.T, pseudo_tokens)
    own[f"{name}.weight"] = fitted.T.to(matrix.dtype)
    moved = sweep.empty_like(stream)
    with sweep.fast_products():
        for batch, (h,) in sweep.read(stream):
            sweep.store.write(moved, batch, add_subblock(own, h, read(own, h, math)))
    return moved
