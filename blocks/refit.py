"""The refit sweep: a closed-form healing of an assembled child.

Layer by layer on the child's own stream, o_proj and down_proj are refitted by ridge towards their present values so that
the child's residual stream returns to the parent's: first after the attention, then after the FFN. Errors that earlier
layers left are corrected by the layers that follow; so are those of rounding, since the stream is that of the rounded child.
No gradient step; about four forward passes.

A rounded child may have its weights chosen by GPTQ on the way (`stored`): q/k/v and gate/up before anything reads what they make,
o_proj and down_proj on the Gram that they were just refitted with. So all that is fitted later knows the codes before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from blocks.fit import Statistics
from blocks.formats import format_named
from blocks.gptq import gptq_weights
from blocks.layer import (
    ATTENTION_NORM,
    FFN_NORM,
    LayerMath,
    Weights,
    add_subblock,
    attention_input,
    ffn_input,
    has_ffn,
    rms_norm,
)
from blocks.rounded import RoundedWeights, precision_of, round_layer, shared_matrices
from blocks.spec import BF16, NO_ATTENTION, NO_FFN, LayerSpec
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
    specs: Sequence[LayerSpec] | None = None,
    kv: torch.dtype | None = None,
    stored: torch.dtype | None = None,
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
        stored: the dtype in which the child will be written, if what is to be rounded shall be chosen by GPTQ (`gptq_weights`).
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
            stream = _refit_layer(served, new, spec, stream, target, pseudo_tokens, stored)
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
    stored: torch.dtype | None,
) -> Tensor:
    """Refits one layer in `own`; returns the child's stream after it."""
    attention, ffn = (
        (None, None) if spec is None else (LayerSpec(spec.attention, NO_FFN), LayerSpec(NO_ATTENTION, spec.ffn))
    )
    for read, part, goal in zip((attention_input, ffn_input), (attention, ffn), targets, strict=True):
        if read is attention_input and not has_ffn(own):
            goal = targets[1]  # with no FFN behind it, the attention answers for the whole layer
        stream = _refit_subblock(sweep, own, part, read, stream, goal, pseudo_tokens, stored)
    return stream


def _refit_subblock(
    sweep: Sweep,
    own: dict[str, Tensor],
    spec: LayerSpec | None,
    read: Read,
    stream: Tensor,
    goal: Tensor,
    pseudo_tokens: float,
    stored: torch.dtype | None,
) -> Tensor:
    """Refits the last matrix of one subblock in `own`, if it has one, so that the stream behind it becomes `goal`.

    `spec` has the precision of that subblock alone, for the other one's matrices are not read.
    """
    math = sweep.math(stream.shape[1])
    if spec is not None and stored is not None:
        _choose_first(sweep, own, spec, stream, math, stored)
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
    matrix, statistics = own[f"{name}.weight"], statistics.reduce(sweep.ranks)
    own[f"{name}.weight"] = statistics.solve(matrix.T, pseudo_tokens).T.to(matrix.dtype)
    if spec is not None and stored is not None:
        _choose(own, spec, [name], statistics.gram, stored)
    served = own if spec is None else round_layer(own, spec)
    moved = sweep.empty_like(stream)
    with sweep.fast_products():
        for batch, (h,) in sweep.read(stream):
            sweep.store.write(moved, batch, add_subblock(served, h, read(served, h, math)))
    return moved


def _choose_first(
    sweep: Sweep, own: dict[str, Tensor], spec: LayerSpec, stream: Tensor, math: LayerMath, stored: torch.dtype
) -> None:
    """Chooses q/k/v, or gate/up, in `own`, of the subblock that `spec` is of."""
    for group in shared_matrices(own):
        norm = {"self_attn.q_proj": ATTENTION_NORM, "mlp.gate_proj": FFN_NORM}.get(group[0])
        if norm is None or precision_of(spec, group[0]) == BF16:
            continue
        statistics = Statistics(stream.shape[-1], 0, sweep.device)
        for _, (h,) in sweep.read(stream):
            inputs = rms_norm(h.float(), own[norm], math.rms_norm_eps)
            statistics.add(inputs, inputs[..., :0])
        _choose(own, spec, group, statistics.reduce(sweep.ranks).gram, stored)


def _choose(own: dict[str, Tensor], spec: LayerSpec, group: list[str], gram: Tensor, stored: torch.dtype) -> None:
    """Chooses matrices that are run as one, if they are rounded, by the Gram of their inputs: in `own`, numbers of `stored`."""
    format = format_named(precision_of(spec, group[0]))
    if format.name == BF16:
        return
    matrices = [own[f"{name}.weight"] for name in group]
    chosen = gptq_weights(torch.cat(matrices), gram, format, stored)
    for name, matrix, part in zip(group, matrices, chosen.split([len(each) for each in matrices]), strict=True):
        own[f"{name}.weight"] = part.to(matrix.dtype)
