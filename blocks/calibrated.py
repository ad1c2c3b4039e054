"""Codes and scales of a child's layers, one layer after the other on the child's own stream: by GPTQ, or to nearest.

    for layer in calibrated_layers(sweep.of(master), architecture, tokens):
        layer.matrices["mlp.down_proj"].tensors()      # for the disk (blocks/packing.py)
        layer.weights                                  # for `layer_forward`: as it will be served

A layer's inputs are those that the layers before it give once they are rounded, and within it o_proj is rounded on what the
rounded q, k and v make, down_proj on what the rounded gate and up make: each step mends what those before it have done.
Matrices that engines run as one (q/k/v, gate/up) share their Gram, the Cholesky factor and, in nvfp4, the divisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.errors import ConfigError
from blocks.fit import Statistics
from blocks.formats import Format, Quantized, Scales, format_named
from blocks.gptq import DAMPING, gptq_codes
from blocks.layer import (
    ATTENTION_NORM,
    FFN_NORM,
    LayerMath,
    Weights,
    add_subblock,
    attention_context,
    attention_input,
    ffn_activation,
    ffn_input,
    rms_norm,
)
from blocks.packing import PackedMatrix
from blocks.rounded import RoundedWeights, precision_of, shared_matrices
from blocks.spec import BF16, Architecture, LayerSpec
from blocks.sweep import Sweep


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer as it will be served.

    Attributes:
        index: of the layer.
        weights: all its tensors, in the dtype that they were given in; what is rounded holds what its codes stand for.
        matrices: codes and scales of what is rounded, by name without ".weight".
    """

    index: int
    weights: RoundedWeights
    matrices: Mapping[str, PackedMatrix]


def calibrated_layers(
    sweep: Sweep,
    architecture: Architecture,
    tokens: Tensor,
    nearest: bool = False,
    damping: float = DAMPING,
    on_layer: Callable[[int], None] | None = None,
) -> Iterator[CalibratedLayer]:
    """The layers of a child rounded as `architecture` says, from first to last.

    Args:
        sweep: over the child's master weights (`sweep.of`, or one whose parent is the child).
        architecture: one spec a layer, with its precisions.
        tokens: token ids [N, S] to calibrate on, on the sweep's device or the CPU.
        nearest: round to nearest; the text then serves the input scales of W4A4 alone.
        damping: of `gptq_codes`.
        on_layer: told each finished layer.

    Raises:
        ConfigError: a format that cannot hold its matrix.
        NasError: inputs that are not finite.
    """
    stream = sweep.embed(tokens, torch.float32)
    math = sweep.math(tokens.shape[1])
    for index, given in sweep.layers(range(len(architecture))):
        layer = _Rounding(given, architecture[index], nearest, damping)
        for part, subblock in (("self_attn.", attention_input), ("mlp.", ffn_input)):
            for group in shared_matrices(given):
                if group[0].startswith(part) and layer.format(group) is not None:
                    layer.round(group, *_observed(sweep, layer, group, stream, math))
            _advance(sweep, layer.weights(), subblock, stream, math)
        yield CalibratedLayer(index, layer.weights(), layer.matrices)
        if on_layer is not None:
            on_layer(index)


def nearest_layers(layers: Iterable[Weights], architecture: Architecture) -> Iterator[CalibratedLayer]:
    """The same, each matrix rounded to nearest, without text. Raises ConfigError for a format that needs it (`needs_text`)."""
    if needs_text(architecture, nearest=True):
        raise ConfigError("nvfp4 rounds inputs with scales from calibration text; give text, or take nvfp4a16")
    for index, given in enumerate(layers):
        layer = _Rounding(given, architecture[index], nearest=True)
        for group in shared_matrices(given):
            if layer.format(group) is not None:
                layer.round(group)
        yield CalibratedLayer(index, layer.weights(), layer.matrices)


def needs_text(architecture: Architecture, nearest: bool) -> bool:
    """Whether rounding takes text: GPTQ does wherever something is rounded, nearest for the input scales of nvfp4 (W4A4)."""
    formats = [format_named(name) for name in architecture.rounded]
    return any(not nearest or _scales_inputs(format) for format in formats)


class _Rounding:
    """A layer whose matrices are rounded group by group."""

    def __init__(self, given: Weights, spec: LayerSpec, nearest: bool, damping: float = DAMPING) -> None:
        self.given, self.spec, self.nearest = given, spec, nearest
        self.damping = damping
        self.matrices: dict[str, PackedMatrix] = {}

    def format(self, group: list[str]) -> Format | None:
        precision = precision_of(self.spec, group[0])
        return None if precision == BF16 else format_named(precision)

    def weights(self) -> RoundedWeights:
        """All tensors, those rounded so far as what they stand for."""
        tensors, formats, divisors = dict(self.given), {}, {}
        for name, matrix in self.matrices.items():
            key = f"{name}.weight"
            tensors[key] = matrix.quantized.weight.to(self.given[key].dtype)
            formats[name] = matrix.quantized.format
            if matrix.input_divisor is not None:
                divisors[name] = matrix.input_divisor
        return RoundedWeights(tensors, formats, divisors)

    def round(self, group: list[str], gram: Tensor | None = None, largest: Tensor | None = None) -> None:
        """Rounds matrices that are run as one, by GPTQ if a Gram is given."""
        format = self.format(group)
        assert format is not None
        matrices = [self.given[f"{name}.weight"].float() for name in group]
        stacked = torch.cat(matrices)
        if gram is None:
            done = format.nearest(stacked)
        else:
            done = gptq_codes(stacked, gram, format, self.damping)
        rows = [len(matrix) for matrix in matrices]
        parts = zip(done.codes.split(rows), done.scales.values.split(rows), strict=True)
        divisor = None if largest is None else format.divisor(largest)
        for name, (codes, values) in zip(group, parts, strict=True):
            self.matrices[name] = PackedMatrix(Quantized(format, codes, Scales(values, done.scales.divisor)), divisor)


def _scales_inputs(format: Format) -> bool:
    """Whether its input scales have a constant part, found on text."""
    return format.input_bits != 16 and format.divisor(torch.ones(1)) is not None


@torch.no_grad()
def _observed(
    sweep: Sweep, layer: _Rounding, group: list[str], stream: Tensor, math: LayerMath
) -> tuple[Tensor | None, Tensor | None]:
    """Over the text: the Gram of what the matrices multiply, and the largest of it; None for what is not needed."""
    format = layer.format(group)
    assert format is not None
    scales = _scales_inputs(format)
    if layer.nearest and not scales:
        return None, None
    weights = layer.weights()
    statistics = None if layer.nearest else Statistics(weights[f"{group[0]}.weight"].shape[1], 0, sweep.device)
    largest = torch.zeros((), device=sweep.device)
    for _, (h,) in sweep.read(stream):
        inputs = _inputs(weights, h.float(), math, group[0])
        if statistics is not None:
            statistics.add(inputs, inputs[..., :0])
        largest = torch.maximum(largest, inputs.abs().amax().float())
    gram = None if statistics is None else statistics.reduce(sweep.ranks).gram
    return gram, largest if scales else None


def _inputs(w: Weights, h: Tensor, math: LayerMath, name: str) -> Tensor:
    """What the matrix `name` multiplies, before it is rounded."""
    if name == "self_attn.o_proj":
        return attention_context(w, h, math)
    if name == "mlp.down_proj":
        return ffn_activation(w, h, math)
    return rms_norm(h, w[ATTENTION_NORM if name.startswith("self_attn.") else FFN_NORM], math.rms_norm_eps)


@torch.no_grad()
def _advance(
    sweep: Sweep,
    weights: Weights,
    subblock: Callable[[Weights, Tensor, LayerMath], tuple[str, Tensor] | None],
    stream: Tensor,
    math: LayerMath,
) -> None:
    """Adds one subblock's output to the stream, in place."""
    with sweep.fast_products():
        for batch, (h,) in sweep.read(stream):
            h = h.float()
            sweep.store.write(stream, batch, add_subblock(weights, h, subblock(weights, h, math)))
