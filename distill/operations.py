"""What a decoder computes between its matrix products, each with its gradient: plain PyTorch, or one fused kernel on a GPU.

The plain forms are those of transformers' Llama, operation by operation; they run on a CPU and wherever Triton is missing.
The fused ones (`distill/kernels.py`) compute the same in fp32 and round once, where plain PyTorch rounds in between.

Shapes: B sequences, T positions, D hidden size, E head_dim, W FFN channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blocks.formats import Float8, NvFloat4
from blocks.fused import kernels_in
from blocks.layer import rms_norm
from blocks.rounded_model import Rounding

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """The fused kernels if they can compute this tensor, else None."""
    return _kernels() if tensor.is_cuda and tensor.dtype in FUSED_DTYPES else None


def _kernels() -> ModuleType | None:
    return kernels_in("distill")


def add_norm(
    x_BTD: Tensor, delta_BTD: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The residual stream x + delta in x's dtype (x if there is no delta), and its RMSNorm in `dtype`."""
    if kernels_for(x_BTD) is not None:
        total, normed = _AddNorm.apply(x_BTD, delta_BTD, weight_D, eps, dtype)
        return total, normed
    if delta_BTD is not None:
        x_BTD = x_BTD + delta_BTD
    return x_BTD, rms_norm(x_BTD, weight_D, eps).to(dtype)


def rotate(x_BTC: Tensor, cos_TE: Tensor, sin_TE: Tensor, heads: int) -> Tensor:
    """Rotary position embedding of the first `heads` heads of x [B, T, all heads * E]; x is spent (it may be overwritten).

    The tables [T, E] are fp32.
    """
    if kernels_for(x_BTC) is not None:
        rotated: Tensor = _Rotate.apply(x_BTC, cos_TE, sin_TE, heads)
        return rotated
    turning, kept = x_BTC.split([heads * cos_TE.shape[1], x_BTC.shape[-1] - heads * cos_TE.shape[1]], dim=-1)
    x_BTHE = turning.unflatten(-1, (heads, -1))
    first, second = x_BTHE.chunk(2, dim=-1)
    turned = x_BTHE * cos_TE[:, None] + torch.cat((-second, first), dim=-1) * sin_TE[:, None]
    return torch.cat([turned.flatten(-2).to(x_BTC.dtype), kept], dim=-1)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, of [B, T, 2W]: [B, T, W]."""
    if kernels_for(gate_up) is not None:
        product: Tensor = _Gated.apply(gate_up)
        return product
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def pack(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Matrices or biases one below the other in another dtype: one matrix product instead of several."""
    packed: Tensor = _Pack.apply(dtype, *weights)
    return packed


def round_inputs(x: Tensor, rounding: Rounding) -> Tensor:
    """What rounded matrices multiply [..., columns], as their kernel sees it; the gradient passes straight through."""
    format = rounding.format
    if format.input_bits < 16 and isinstance(format, (Float8, NvFloat4)) and kernels_for(x) is not None:
        rounded: Tensor = _RoundInputs.apply(x, format)
        return rounded
    return rounding.inputs(x)


class _AddNorm(torch.autograd.Function):
    """The two gradients of the residual stream are added in the kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        kernels = _kernels()
        assert kernels is not None
        flat = None if delta is None else delta.contiguous().flatten(0, -2)
        total, normed, scale = kernels.add_norm(x.contiguous().flatten(0, -2), flat, weight, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, scale)
        ctx.delta_dtype = None if delta is None else delta.dtype
        return x if delta is None else total.view_as(x), normed.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, d_normed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        if d_normed is None:
            d_delta = None if d_total is None or ctx.delta_dtype is None else d_total.to(ctx.delta_dtype)
            return d_total, d_delta, None, None, None
        kernels, shape = _kernels(), d_normed.shape
        assert kernels is not None
        flat = None if d_total is None else d_total.contiguous().view_as(total)
        d_x, d_delta, d_weight = kernels.add_norm_backward(
            d_normed.contiguous().view_as(total), flat, total, weight, scale, ctx.delta_dtype
        )
        return d_x.view(shape), None if d_delta is None else d_delta.view(shape), d_weight, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        kernels = _kernels()
        assert kernels is not None and x.is_contiguous()
        flat = x.flatten(0, -2)
        kernels.rotate(flat, flat, cos, sin, heads)
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor | None, ...]:
        kernels, d_x = _kernels(), d_x.contiguous()
        assert kernels is not None
        gradient = torch.empty_like(d_x)
        source, target = d_x.flatten(0, -2), gradient.flatten(0, -2)
        kernels.rotate(source, target, *ctx.saved_tensors, ctx.heads, transposed=True)
        return gradient, None, None, None


class _Gated(torch.autograd.Function):
    """Keeps the input alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        kernels = _kernels()
        assert kernels is not None
        ctx.save_for_backward(gate_up)
        out: Tensor = kernels.gated(gate_up.contiguous().flatten(0, -2))
        return out.view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        kernels, (gate_up,) = _kernels(), ctx.saved_tensors
        assert kernels is not None
        flat = gate_up.contiguous().flatten(0, -2), d_out.contiguous().flatten(0, -2)
        gradient: Tensor = kernels.gated_backward(*flat)
        return gradient.view_as(gate_up)


class _RoundInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Float8 | NvFloat4) -> Tensor:
        kernels, flat = _kernels(), x.contiguous().flatten(0, -2)
        assert kernels is not None
        if isinstance(format, Float8):
            rounded: Tensor = kernels.round_e4m3(flat)
        else:
            rounded = kernels.round_nvfp4(flat, format.divisor(flat))
        return rounded.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Pack(torch.autograd.Function):
    """Casts while it copies, there and back: two passes over a matrix where `to` and `cat` make four."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> Tensor:
        ctx.rows = [len(weight) for weight in weights]
        ctx.dtypes = [weight.dtype for weight in weights]
        packed = weights[0].new_empty(sum(ctx.rows), *weights[0].shape[1:], dtype=dtype)
        for part, weight in zip(packed.split(ctx.rows), weights, strict=True):
            part.copy_(weight)
        return packed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(gradient.split(ctx.rows), ctx.dtypes, strict=True)
        return None, *(part.to(dtype) for part, dtype in parts)
