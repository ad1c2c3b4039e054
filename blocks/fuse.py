"""FFN fusion: FFNs that follow one another with no attention between them become one wide FFN.

In sequence, x1 = x + FFN_1(x), x2 = x1 + FFN_2(x1), ...; fused, all of them read the same x:

    y = x + sum_i FFN_i(x),    FFN_i(x) = down_i (silu(gate_i norm_i(x)) * up_i norm_i(x))

which is one FFN whose gate and up are stacked and whose down is concatenated. Each layer's RMSNorm weight is folded into the
columns of its own gate and up, and the norm of the fused FFN is all ones, so that "parallel instead of in sequence" is the
only approximation. Channels are padded with zeros to a multiple of 256, which adds exactly nothing. The fused FFN stands in
the first layer of its run; the other layers are left empty.

Which runs bear it is told by how little an FFN's output changes when an earlier one is left out (`dependency_matrix`).

Reference: FFN Fusion, arXiv 2503.18908.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.errors import ConfigError
from blocks.layer import DOWN_PROJ, FFN_NORM, LayerMath, Weights, ffn_input, project
from blocks.shape import rounded_width
from blocks.spec import EMPTY, Architecture, AttentionSpec, FFNSpec, LayerSpec

Run = tuple[int, ...]
"""Indices of the layers whose FFNs are fused, rising."""

_BIASES = {"gate_proj": "mlp.gate_proj.bias", "up_proj": "mlp.up_proj.bias", "down_proj": "mlp.down_proj.bias"}


def ffn_stretches(architecture: Architecture) -> list[Run]:
    """The maximal stretches of two or more FFNs that nothing but empty layers separates, by the indices of their layers.

    Every layer of a stretch is without attention. A linear replacement, which no gated FFN can hold, ends a stretch.
    """
    stretches: list[list[int]] = [[]]
    for index, layer in enumerate(architecture):
        if layer == EMPTY:
            continue
        if layer.attention.kind == "skip" and layer.ffn.kind == "width":
            stretches[-1].append(index)
        else:
            stretches.append([])
    return [tuple(stretch) for stretch in stretches if len(stretch) > 1]


def check_runs(architecture: Architecture, runs: Iterable[Run]) -> None:
    """Raises ConfigError unless each run is two or more FFNs in a row of one stretch, and no two runs share a layer."""
    stretches, used = ffn_stretches(architecture), set[int]()
    for run in runs:
        if len(run) < 2 or not any(_is_part(run, stretch) for stretch in stretches):
            known = " or ".join(span(stretch) for stretch in stretches) or "nothing: it has no such layers"
            raise ConfigError(
                f"layers {', '.join(map(str, run))} are not FFNs in a row without attention between; fuse within {known}"
            )
        if used & set(run):
            raise ConfigError(f"layers {span(run)} share a layer with another run; fuse each FFN once")
        used |= set(run)


def _is_part(run: Run, stretch: Run) -> bool:
    start = stretch.index(run[0]) if run[0] in stretch else len(stretch)
    return stretch[start : start + len(run)] == run


def fused_width(architecture: Architecture, run: Run) -> int:
    """Channels of the FFN that the run becomes."""
    return rounded_width(sum(architecture[index].ffn.width for index in run))


def fused_architecture(architecture: Architecture, runs: Iterable[Run]) -> Architecture:
    """The architecture with each run fused. Raises ConfigError as `check_runs`."""
    runs = list(runs)
    check_runs(architecture, runs)
    layers = list(architecture)
    for run in runs:
        layers[run[0]] = LayerSpec(AttentionSpec("skip"), FFNSpec("width", fused_width(architecture, run)))
        for index in run[1:]:
            layers[index] = EMPTY
    return Architecture(tuple(layers))


def fuse_ffns(layers: Sequence[Weights]) -> dict[str, Tensor]:
    """The tensors of one layer that computes the FFNs of several in parallel.

    Args:
        layers: the tensors of each layer by their names within it: an FFN with its norm and nothing else. Widths may
            differ; biases are taken along where there are any.

    Returns:
        The same names, in fp32 or, if they come so, fp64: gate and up [W, D], down [D, W], the norm [D] of ones.
    """
    wide = [{name: _at_least_fp32(tensor) for name, tensor in layer.items()} for layer in layers]
    width = rounded_width(sum(layer[DOWN_PROJ].shape[1] for layer in wide))
    fused: dict[str, Tensor] = {FFN_NORM: torch.ones_like(wide[0][FFN_NORM])}
    for name in ("gate_proj", "up_proj"):
        folded = torch.cat([layer[f"mlp.{name}.weight"] * layer[FFN_NORM] for layer in wide])
        fused[f"mlp.{name}.weight"] = F.pad(folded, (0, 0, 0, width - len(folded)))
        if biases := [layer[_BIASES[name]] for layer in wide if _BIASES[name] in layer]:
            stacked = torch.cat(biases)
            fused[_BIASES[name]] = F.pad(stacked, (0, width - len(stacked)))
    down = torch.cat([layer[DOWN_PROJ] for layer in wide], dim=1)
    fused[DOWN_PROJ] = F.pad(down, (0, width - down.shape[1]))
    if biases := [layer[_BIASES["down_proj"]] for layer in wide if _BIASES["down_proj"] in layer]:
        fused[_BIASES["down_proj"]] = torch.stack(biases).sum(0)
    return fused


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def fused_layers(layers: Iterable[tuple[int, Weights]], runs: Iterable[Run]) -> Iterator[tuple[int, Weights]]:
    """Passes on (index, tensors) of layers in rising order, with each run fused; at most one run is held at a time.

    A fused FFN comes with the index of its run's first layer once its last layer has passed; the emptied layers come
    before it, with no tensors. Nothing is computed between them, so the order of what computes is kept.
    """
    first = {index: run for run in runs for index in run}
    held: dict[int, Weights] = {}
    for index, weights in layers:
        run = first.get(index)
        if run is None:
            yield index, weights
            continue
        held[index] = weights
        if index != run[-1]:
            continue
        for emptied in run[1:]:
            yield emptied, {}
        yield run[0], fuse_ffns([held.pop(layer) for layer in run])


def fuse_layers(
    architecture: Architecture, layers: Sequence[Weights], runs: Sequence[Run]
) -> tuple[Architecture, list[Weights]]:
    """A child, as its architecture and the tensors of each layer, with runs fused. Raises ConfigError as `check_runs`."""
    new = fused_architecture(architecture, runs)
    by_index: Mapping[int, Weights] = dict(fused_layers(enumerate(layers), runs))
    return new, [by_index[index] for index in range(len(layers))]


# ---- how much one FFN depends on another


def ffn_output(w: Weights, x: Tensor, math: LayerMath) -> Tensor:
    """What the layer's FFN adds to the stream x [..., D]."""
    last = ffn_input(w, x, math)
    assert last is not None
    return project(w, *last)


@torch.no_grad()
def dependency_matrix(layers: Sequence[Weights], streams: Iterable[Tensor], math: LayerMath) -> Tensor:
    """How much each FFN of a stretch depends on each one before it: M [n, n], zero but above the diagonal.

        M[i, j] = mean over tokens of 1 - cos(h_j, h_j without i)

    where h_j is what FFN j adds to the stream, and "without i" is the same after FFN i was left out, those between i and j
    computed anew on what is then there (arXiv 2503.18908, figure 2). 0: j does not notice that i is missing.

    Args:
        layers: the tensors of the n layers of the stretch.
        streams: batches [B, S, D] of the stream that enters its first layer; taken one by one.
    """
    total = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    tokens = 0
    for stream in streams:
        inputs, outputs = [stream.float()], []
        for w in layers:
            outputs.append(ffn_output(w, inputs[-1], math))
            inputs.append(inputs[-1] + outputs[-1])
        for i in range(len(layers)):
            x = inputs[i]
            for j in range(i + 1, len(layers)):
                without = ffn_output(layers[j], x, math)
                total[i, j] += float(_cosine_distance(outputs[j], without).sum())
                x = x + without
        tokens += stream.shape[:-1].numel()
    return total / max(tokens, 1)


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos of the last dimension, in fp64; as half the squared distance of unit vectors, exact where it is tiny."""
    return (F.normalize(a.double(), dim=-1) - F.normalize(b.double(), dim=-1)).square().sum(-1) / 2


def span(run: Run) -> str:
    """ "12-17"."""
    return f"{run[0]}-{run[-1]}"
