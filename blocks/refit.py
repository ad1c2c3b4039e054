"""The refit sweep: a closed-form healing of an assembled child.

Layer by layer on the child's own stream, o_proj and down_proj are refitted by ridge towards their present values so that
the child's residual stream returns to the parent's: first after the attention, then after the FFN. Errors that earlier
layers left are corrected by the layers that follow; so are those of rounding, since the stream is that of the rounded child.
No gradient step; about four forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from blocks.fit import Statistics
from blocks.layer import LayerMath, Weights, add_subblock, attention_input, ffn_input, has_ffn
from blocks.rounded import RoundedWeights, round_layer
from blocks.spec import AttentionSpec, FFNSpec, LayerSpec
from blocks.sweep import Sweep

NO_ATTENTION, NO_FFN = AttentionSpec("skip"), FFNSpec("skip")
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
    specs: Sequence[LayerSpec] | None = None,
    kv: torch.dtype | None = None,
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
        specs: of the child's layers, if any of them is to be rounded. What is returned is not.
        kv: dtype of the child's KV cache; None is that of the computation.
    """
    served = sweep.of(child, kv)
    parent_stream = sweep.embed(tokens, torch.float32)
    stream = parent_stream
    refitted: list[dict[str, Tensor]] = []
    for (index, original), own in zip(sweep.layers(sweep.parent.shape.layers), child, strict=True):
        if stream is parent_stream and index not in changed and kv is None:
            refitted.append(dict(own))
            stream = parent_stream = sweep.forward(original, parent_stream)
        else:
            target = _targets(sweep, original, parent_stream)
            new, spec = dict(own), None if specs is None else specs[index]
            stream = _refit_layer(served, new, spec, stream, target, pseudo_tokens)
            parent_stream = target[1]
            refitted.append(new)
        if on_layer is not None:
            on_layer(index)
    return refitted


def _targets(sweep: Sweep, original: Weights, parent_stream: Tensor) -> tuple[Tensor, Tensor]:
    """The parent's streams after the attention and after the whole of one layer."""
    math = sweep.math(parent_stream.shape[1])
    middle, end = sweep.empty_like(parent_stream), sweep.empty_like(parent_stream)
    with sweep.fast_products():
        for batch, (h,) in sweep.read(parent_stream):
            after = add_subblock(original, h, attention_input(original, h, math))
            sweep.store.write(middle, batch, after)
            sweep.store.write(end, batch, add_subblock(original, after, ffn_input(original, after, math)))
    return middle, end


def _refit_layer(
    sweep: Sweep,
    own: dict[str, Tensor],
    spec: LayerSpec | None,
    stream: Tensor,
    targets: tuple[Tensor, Tensor],
    pseudo_tokens: float,
) -> Tensor:
    """Refits one layer in `own`; returns the child's stream after it."""
    attention, ffn = (
        (None, None) if spec is None else (LayerSpec(spec.attention, NO_FFN), LayerSpec(NO_ATTENTION, spec.ffn))
    )
    for read, part, goal in zip((attention_input, ffn_input), (attention, ffn), targets, strict=True):
        if read is attention_input and not has_ffn(own):
            goal = targets[1]  # with no FFN behind it, the attention answers for the whole layer
        stream = _refit_subblock(sweep, own, part, read, stream, goal, pseudo_tokens)
    return stream


def _refit_subblock(
    sweep: Sweep,
    own: dict[str, Tensor],
    spec: LayerSpec | None,
    read: Read,
    stream: Tensor,
    goal: Tensor,
    pseudo_tokens: float,
) -> Tensor:
    """Refits the last matrix of one subblock in `own`, if it has one, so that the stream behind it becomes `goal`.

    `spec` has the precision of that subblock alone, for the other one's matrices are not read.
    """
    math = sweep.math(stream.shape[1])
    served = own if spec is None else round_layer(own, spec)
    statistics, name = None, ""
    for _, (h, wanted) in sweep.read(stream, goal):
        with sweep.fast_products():
            last = read(served, h, math)
        if last is None:
            return stream
        name, inputs = last
        if isinstance(served, RoundedWeights):
            inputs = served.round_input(name, inputs)
        if statistics is None:
            statistics = Statistics(inputs.shape[-1], stream.shape[-1], sweep.device)
        statistics.add(inputs, wanted - h - own.get(f"{name}.bias", 0))
    assert statistics is not None
    matrix = own[f"{name}.weight"]
    fitted = statistics.reduce(sweep.ranks).solve(matrix.T, pseudo_tokens)
    own[f"{name}.weight"] = fitted.T.to(matrix.dtype)
    served = own if spec is None else round_layer(own, spec)
    moved = sweep.empty_like(stream)
    with sweep.fast_products():
        for batch, (h,) in sweep.read(stream):
            sweep.store.write(moved, batch, add_subblock(served, h, read(served, h, math)))
    return moved
