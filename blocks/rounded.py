"""Layers as they are served in other number formats: their matrices rounded, and what these multiply rounded as it comes.

    rounded = round_layer(weights, LayerSpec.parse("attention:kv3@fp8+ffn:768@nvfp4"))
    layer_forward(rounded, h, math)

Matrices that engines run as one (q/k/v, gate/up) share a format and, in nvfp4, the divisor of their scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from blocks.errors import ConfigError
from blocks.formats import Format, format_named
from blocks.layer import RoundsInputs, Weights
from blocks.shape import ModelShape
from blocks.spec import BF16, AttentionSpec, FFNSpec, LayerSpec

SHARED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("self_attn.linear_attn",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
    ("mlp.linear_mlp",),
)
"""Matrices of a layer by their names, together where engines run them as one."""


class RoundedWeights(dict[str, Tensor], RoundsInputs):
    """Tensors of a layer by their names within it; matrices hold what their codes stand for.

    Attributes:
        formats: of the matrices that are not bf16, by name without ".weight".
        input_divisors: of nvfp4's inputs (W4A4) where calibration found them; else they are taken from the inputs.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        formats: Mapping[str, Format],
        input_divisors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(tensors)
        self.formats, self.input_divisors = dict(formats), dict(input_divisors or {})

    def round_input(self, name: str, x: Tensor) -> Tensor:
        """What the matrix `name` multiplies [..., inputs], as its kernel sees it."""
        format = self.formats.get(name)
        if format is None or format.input_bits == 16:
            return x
        return format.fake_input(x, self.input_divisors.get(name)).to(x.dtype)

    def to(self, dtype: torch.dtype) -> RoundedWeights:
        tensors = {name: tensor.to(dtype) for name, tensor in self.items()}
        return RoundedWeights(tensors, self.formats, self.input_divisors)


def precision_of(spec: LayerSpec, name: str) -> str:
    """The precision of a tensor of a layer by its name within it."""
    return (spec.attention if name.startswith("self_attn.") else spec.ffn).precision


def shared_matrices(names: Mapping[str, Tensor]) -> list[list[str]]:
    """The matrices (without ".weight") among a layer's tensors, those together that share a format and a divisor."""
    groups = ([name for name in group if f"{name}.weight" in names] for group in SHARED)
    return [group for group in groups if group]


def round_layer(weights: Weights, spec: LayerSpec) -> Weights:
    """A layer's tensors with each matrix rounded to nearest in the format that `spec` gives it; as they are if all are bf16.

    Raises ConfigError for a format that is not known, or that a matrix's inputs are no multiple of.
    """
    if {spec.attention.precision, spec.ffn.precision} == {BF16}:
        return weights
    tensors, formats = dict(weights), {}
    for group in shared_matrices(weights):
        format = format_named(precision_of(spec, group[0]))
        if format.name == BF16:
            continue
        matrices = [weights[f"{name}.weight"] for name in group]
        divisor = format.divisor(*matrices)
        for name, matrix in zip(group, matrices, strict=True):
            tensors[f"{name}.weight"] = format.fake(matrix, divisor).to(matrix.dtype)
            formats[name] = format
    return RoundedWeights(tensors, formats)


def holds(shape: ModelShape, spec: AttentionSpec | FFNSpec) -> bool:
    """Whether the precision of a subblock can hold its matrices: their inputs are a multiple of what shares a scale."""
    group = format_named(spec.precision).group or 1
    return all(columns % group == 0 for _, columns in shape.matrices(spec))


def subblock_bytes(shape: ModelShape, spec: AttentionSpec | FFNSpec, weight_bytes: int) -> int:
    """Bytes of a subblock on disk: matrices in its precision with their scales, norm and biases at `weight_bytes` each.

    Raises ConfigError for a format that is not known or cannot hold it.
    """
    parameters = shape.subblock_parameters(spec)
    if spec.precision == BF16:
        return parameters * weight_bytes
    matrices, format = shape.matrices(spec), format_named(spec.precision)
    if not holds(shape, spec):
        raise ConfigError(
            f"{spec}: its inputs are no multiple of the {format.group} that share a scale in {format.name}"
        )
    rest = parameters - sum(rows * columns for rows, columns in matrices)
    return rest * weight_bytes + sum(format.bytes(rows, columns) for rows, columns in matrices)
