"""Triton kernels of number formats: rounding to a small float, and the columns of GPTQ, which plain PyTorch launches one by one.

Importing this module needs Triton, which comes with PyTorch for CUDA. `blocks/formats.py` and `blocks/gptq.py` say in plain
PyTorch what is computed here.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from blocks.formats import Float8, Format, Integer, NvFloat4

ROWS = 16
"""Rows of a matrix that one program of GPTQ keeps in registers, a block of columns of each."""


@triton.jit
def to_minifloat(x, LOWEST: tl.constexpr, MANTISSA: tl.constexpr):
    """`blocks.formats._to_minifloat`: fp32 to the nearest of a float of few bits, ties to even. Exact but for that rounding."""
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 127 + LOWEST) - MANTISSA
    spacing = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # powers of two, both
    return ((x * inverse + 12582912.0) - 12582912.0) * spacing  # 1.5 * 2^23: numbers next to it are one apart


@triton.jit
def _to_codes(scaled, LEAST: tl.constexpr, LARGEST: tl.constexpr, LOWEST: tl.constexpr, MANTISSA: tl.constexpr):
    """`Format.round` between two codes: of an integer (MANTISSA 0), or of a float of few bits."""
    cut = tl.minimum(tl.maximum(scaled, LEAST), LARGEST)
    if MANTISSA == 0:
        codes = (cut + 12582912.0) - 12582912.0
    else:
        codes = to_minifloat(cut, LOWEST, MANTISSA)
    return codes


@triton.jit
def _round_block(
    part,
    low,
    high,
    steps,
    shares,
    errors,
    rows,
    share_row,
    share_column,
    MASTER: tl.constexpr,
    BFLOAT16: tl.constexpr,
    LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
    LOWEST: tl.constexpr,
    MANTISSA: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS rows of a block [columns, rows], in registers while its columns are rounded one after another."""
    column = tl.arange(0, PADDED)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = column[:, None] * rows + row[None, :]
    inside = (column < COLUMNS)[:, None] & (row < rows)[None, :]
    values = tl.load(part + at, mask=inside, other=0.0)
    for i in range(COLUMNS):
        here = i * rows + row
        value = tl.sum(tl.where((column == i)[:, None], values, 0.0), 0)
        put = value
        if MASTER:
            least = tl.load(low + here, mask=row < rows, other=0.0)
            most = tl.load(high + here, mask=row < rows, other=0.0)
            put = tl.minimum(tl.maximum(put, least), most)
        if BFLOAT16:  # by integers, ties to even: Triton's interpreter would cut off
            bits = put.to(tl.int32, bitcast=True)
            put = (((bits + 32767 + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
        step = tl.load(steps + here, mask=row < rows, other=1.0)
        error = value - _to_codes(tl.div_rn(put, step), LEAST, LARGEST, LOWEST, MANTISSA) * step
        tl.store(errors + here, error, mask=row < rows)
        later = (column > i) & (column < COLUMNS)
        share = tl.load(shares + i * share_row + column * share_column, mask=later, other=0.0)
        values = tl.where((column == i)[:, None], put[None, :], values - share[:, None] * error[None, :])
    tl.store(part + at, values, mask=inside)


def rounds_to(format: Format, stored: torch.dtype | None) -> bool:
    """Whether `round_block` knows codes of that format, and masters of that dtype (None: there are none)."""
    return isinstance(format, Float8 | NvFloat4 | Integer) and stored in (None, torch.float32, torch.bfloat16)


def round_block(
    part: Tensor,
    steps: Tensor,
    shares: Tensor,
    format: Format,
    stored: torch.dtype | None,
    limits: Sequence[Tensor],
) -> Tensor:
    """`blocks.gptq._round_block`: errors [columns, rows] of a block's columns; `part`, contiguous, becomes what was rounded."""
    columns, rows = part.shape
    errors = torch.empty_like(part)
    steps, low, high = (each.contiguous() for each in (steps, *(limits or (part, part))))
    with on_device(part):
        _round_block[(triton.cdiv(rows, ROWS),)](
            part,
            low,
            high,
            steps,
            shares,
            errors,
            rows,
            *shares.stride(),
            stored is not None,
            stored == torch.bfloat16,
            *_grid(format),
            columns,
            triton.next_power_of_2(columns),
            ROWS,
            num_warps=4,
        )
    return errors


def _grid(format: Format) -> tuple[float, float, int, int]:
    """Least and largest code, exponent of subnormals and bits of the mantissa (0: integers)."""
    if isinstance(format, Integer):
        half = 2.0 ** (format.bits - 1)
        return -half, half - 1, 0, 0
    largest = format.largest
    return (-largest, largest, -6, 3) if isinstance(format, Float8) else (-largest, largest, 0, 1)


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the current device, so make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
