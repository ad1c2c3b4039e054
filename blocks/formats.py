"""Number formats of weights: what a matrix becomes in fp8, nvfp4, int4 or int8, and the bytes that it takes.

Quantize-dequantize in pure torch, on any device, fp32 in and out. Order of operations, rounding and special cases are those
of the package compressed-tensors, bit for bit, for what is computed here is what a checkpoint in its form will hold:

    step  = amax of a group / largest code      (448 for E4M3, 6 for E2M1, (2^b - 1) / 2 for b-bit integers)
    code  = round(clamp(weight / step)), ties to even
    value = code * step

Steps are rounded to the type that lies on disk before they are used. In nvfp4 a step has two parts, an E4M3 scale of each
block of 16 and one fp32 divisor of the whole matrix, 6 * 448 / amax, which several matrices that an engine runs as one
(q/k/v, gate/up) have to share. NaN and infinity are not refused: they come out as NaN.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.errors import ConfigError

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E4M3_ZERO_SCALE = 0.125  # what compressed-tensors writes for the scale of a block of zeros
SHAPE_BYTES = 2 * 8  # packed integers carry `weight_shape`, two int64


@dataclass(frozen=True)
class Scales:
    """Scales of a matrix [rows, columns].

    Attributes:
        values: [rows, groups] in fp32, each of them a number of the type that lies on disk.
        divisor: [1] in fp32 or None: steps are values / divisor (nvfp4's `weight_global_scale`).
    """

    values: Tensor
    divisor: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        """[rows, groups], what a code is multiplied by."""
        return self.values if self.divisor is None else self.values / self.divisor


@dataclass(frozen=True)
class Quantized:
    """A matrix as codes [rows, columns] with their scales; `weight` is what they stand for, in fp32."""

    format: Format
    codes: Tensor
    scales: Scales

    @property
    def weight(self) -> Tensor:
        return self.format.dequantize(self.codes, self.scales)


@dataclass(frozen=True)
class Format(ABC):
    """A number format of the weights of linear layers, and of their inputs.

    Attributes:
        name: the key in `FORMATS`.
        bits: of one code, scales not counted.
        group: columns that share a scale; None: a whole row (an output channel) does.
        input_bits: of the inputs, which are quantized as they come; 16: they are left alone.
    """

    name: str
    bits: int
    group: int | None = None
    input_bits: int = 16

    @property
    @abstractmethod
    def largest(self) -> float:
        """The code that the largest weight of a group is scaled to."""

    @abstractmethod
    def round(self, scaled: Tensor) -> Tensor:
        """The codes nearest to weight / step, of any shape: int8 in integer formats, else fp32 values of the grid."""

    @abstractmethod
    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix on disk in compressed-tensors form, scales and their like included, no file header."""

    def bits_per_weight(self, rows: int, columns: int) -> float:
        return 8 * self.bytes(rows, columns) / (rows * columns)

    def check(self, columns: int, name: str = "a matrix") -> None:
        """Raises ConfigError if matrices of so many inputs cannot be held."""
        if columns < 1 or columns % (self.group or 1):
            raise ConfigError(
                f"{self.name}: {name} has {columns} inputs, not a multiple of the {self.group} that share a scale; "
                "choose another format or width for it"
            )

    def divisor(self, *tensors: Tensor) -> Tensor | None:
        """The divisor [1] that the matrices share, or that goes with inputs of this largest value; None: none in this format."""
        return None

    def divisors(self, amax: Tensor) -> Tensor | None:
        """The divisor that goes with each of these largest absolute values, of any shape; None: none in this format."""
        return None

    def scales(self, weight: Tensor, divisor: Tensor | None = None) -> Scales:
        """Scales of a matrix [rows, columns] by its largest absolute values. Give the `divisor` that matrices share."""
        self.check(weight.shape[-1])
        divisor = self.divisor(weight) if divisor is None else divisor
        return Scales(self._scale_values(self._grouped(weight).abs().amax(-1), divisor), divisor)

    def quantize(self, weight: Tensor, scales: Scales) -> Tensor:
        """Codes of the shape of `weight`, rounded to nearest."""
        self.check(weight.shape[-1])
        return self.round(self._grouped(weight) / scales.steps[..., None]).flatten(-2)

    def dequantize(self, codes: Tensor, scales: Scales) -> Tensor:
        """What codes stand for, in fp32."""
        return (self._grouped(codes) * scales.steps[..., None]).flatten(-2)

    def nearest(self, weight: Tensor, divisor: Tensor | None = None) -> Quantized:
        """The matrix rounded to nearest."""
        scales = self.scales(weight, divisor)
        return Quantized(self, self.quantize(weight, scales), scales)

    def fake(self, weight: Tensor, divisor: Tensor | None = None) -> Tensor:
        """The matrix quantized and dequantized, in fp32."""
        return self.nearest(weight, divisor).weight

    def fake_input(self, inputs: Tensor, divisor: Tensor | None = None) -> Tensor:
        """Inputs [..., columns] of a layer as its kernel sees them, in fp32: with dynamic scales, token by token.

        `divisor` (nvfp4) is a constant of the served layer, from the largest input in calibration; else from these inputs.
        """
        return inputs.float()

    def _grouped(self, tensor: Tensor) -> Tensor:
        return tensor.float().unflatten(-1, (-1, self.group or tensor.shape[-1]))

    @abstractmethod
    def _scale_values(self, amax: Tensor, divisor: Tensor | None) -> Tensor:
        """Scales of groups with largest absolute values `amax`."""


@dataclass(frozen=True)
class Bfloat16(Format):
    """bf16, as children are written without any of this: steps of 1."""

    @property
    def largest(self) -> float:
        return torch.finfo(torch.bfloat16).max

    def round(self, scaled: Tensor) -> Tensor:
        return scaled.bfloat16().float()

    def bytes(self, rows: int, columns: int) -> int:
        return 2 * rows * columns

    def _scale_values(self, amax: Tensor, divisor: Tensor | None) -> Tensor:
        return torch.ones_like(amax)


@dataclass(frozen=True)
class _Stepped(Format):
    """Formats whose scales are plain numbers: of a row or a group of weights in `scale_dtype`, of a token in fp32."""

    scale_dtype: torch.dtype = torch.bfloat16

    def fake_input(self, inputs: Tensor, divisor: Tensor | None = None) -> Tensor:
        if self.input_bits == 16:
            return inputs.float()
        x = inputs.float()
        steps = _steps(x.abs().amax(-1, keepdim=True), self.largest, torch.float32)
        return self.round(x / steps) * steps

    def _scale_values(self, amax: Tensor, divisor: Tensor | None) -> Tensor:
        return _steps(amax, self.largest, self.scale_dtype)


@dataclass(frozen=True)
class Float8(_Stepped):
    """E4M3 weights, a scale for each output channel; E4M3 inputs, a scale for each token ("float-quantized")."""

    @property
    def largest(self) -> float:
        return E4M3_MAX

    def round(self, scaled: Tensor) -> Tensor:
        return to_e4m3(scaled)

    def bytes(self, rows: int, columns: int) -> int:
        self.check(columns)
        return rows * columns + rows * self.scale_dtype.itemsize


@dataclass(frozen=True)
class Integer(_Stepped):
    """Symmetric integers of 2 to 8 bits, a scale for each group of columns or each output channel.

    With 16-bit inputs, codes are packed densely into int32 words, row by row ("pack-quantized"); with 8-bit inputs (8-bit
    weights only) they are plain int8 ("int-quantized").
    """

    @property
    def largest(self) -> float:
        return (2**self.bits - 1) / 2  # 7.5, not 7: the largest weight may be cut by half a step, the others gain

    def round(self, scaled: Tensor) -> Tensor:
        half = 2 ** (self.bits - 1)
        return scaled.clamp(-half, half - 1).round().to(torch.int8)

    def bytes(self, rows: int, columns: int) -> int:
        self.check(columns)
        scales = rows * (columns // self.group if self.group else 1) * self.scale_dtype.itemsize
        if self.input_bits == 8:
            return rows * columns + scales
        return 4 * rows * -(-columns * self.bits // 32) + scales + SHAPE_BYTES


@dataclass(frozen=True)
class NvFloat4(Format):
    """E2M1 weights (0 .5 1 1.5 2 3 4 6) in blocks of 16 with E4M3 scales; with `input_bits` 4, inputs in the same form.

    Codes are packed two to a byte ("nvfp4-pack-quantized"). Pretraining Large Language Models with NVFP4, arXiv 2509.25149.
    """

    @property
    def largest(self) -> float:
        return E2M1_MAX

    def round(self, scaled: Tensor) -> Tensor:
        return to_e2m1(scaled)

    def bytes(self, rows: int, columns: int) -> int:
        self.check(columns)
        divisors = 8 if self.input_bits == 4 else 4  # of the weights and of the inputs, fp32
        return rows * columns // 2 + rows * columns // 16 + divisors

    def divisor(self, *tensors: Tensor) -> Tensor:
        return self.divisors(torch.stack([tensor.abs().amax().float() for tensor in tensors]).amax()).reshape(1)

    def divisors(self, amax: Tensor) -> Tensor:
        # A reciprocal times a constant, and not a quotient: the last bit differs, and theirs is this one.
        divisors = amax.float().clamp(min=torch.finfo(torch.float32).tiny).reciprocal() * (E4M3_MAX * E2M1_MAX)
        return torch.nan_to_num(divisors, nan=1.0, posinf=1.0, neginf=1.0)

    def fake_input(self, inputs: Tensor, divisor: Tensor | None = None) -> Tensor:
        return self.fake(inputs, divisor) if self.input_bits == 4 else inputs.float()

    def _scale_values(self, amax: Tensor, divisor: Tensor | None) -> Tensor:
        assert divisor is not None
        values = to_e4m3(divisor * _divided(amax, E2M1_MAX))
        return torch.where(values == 0, E4M3_ZERO_SCALE, values)


def to_e4m3(x: Tensor) -> Tensor:
    """fp32 values of the grid of E4M3 (float8_e4m3fn) nearest to x, ties to even, beyond 448 cut to it."""
    x = x.clamp(-E4M3_MAX, E4M3_MAX)
    if x.device.type in ("cpu", "cuda"):
        return x.to(torch.float8_e4m3fn).float()
    return _to_minifloat(x, lowest=-6, mantissa=3)  # other devices do not know the type


def to_e2m1(x: Tensor) -> Tensor:
    """fp32 values of the grid of E2M1 nearest to x, ties to even, beyond 6 cut to it. -0 in, 0 out; else the sign is kept."""
    return _to_minifloat(x.clamp(-E2M1_MAX, E2M1_MAX) + 0.0, lowest=0, mantissa=1)


def _to_minifloat(x: Tensor, lowest: int, mantissa: int) -> Tensor:
    """Rounds fp32 to a float of few bits: to multiples of 2^(exponent - mantissa), `lowest` the exponent of subnormals."""
    exponent = ((x.view(torch.int32) >> 23) & 255).clamp(min=127 + lowest)
    spacing = ((exponent - mantissa) << 23).view(torch.float32)
    return (x / spacing).round() * spacing  # exact but for the rounding: spacings are powers of two


def _steps(amax: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """amax / largest as a number of `dtype`; epsilon where that is zero, so that nothing is divided by it."""
    info = torch.finfo(dtype)
    steps = _divided(amax, largest).clamp(info.min, info.max).to(dtype).float()
    return torch.where(steps == 0, info.eps, steps)


def _divided(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once. A plain number would be turned into a product with its reciprocal on a GPU."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Bfloat16("bf16", 16),
        Float8("fp8", 8, input_bits=8),
        NvFloat4("nvfp4", 4, group=16, input_bits=4),
        NvFloat4("nvfp4a16", 4, group=16),
        Integer("int4", 4, group=128),
        Integer("int4-g32", 4, group=32),
        Integer("int8", 8),
        Integer("int3", 3, group=64),  # harsh, and without an engine's kernel: for experiments
    )
}


def format_named(name: str) -> Format:
    """The format of that name. Raises ConfigError, which offers the nearest name."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f": did you mean {near[0]}?" if near else "."
    raise ConfigError(f"precision {name!r} is not known{hint} Known: {', '.join(FORMATS)}")
