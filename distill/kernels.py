"""The few Triton kernels that healing on a GPU spends its time between matrix products in.

Each does in one pass over memory what takes plain PyTorch three to ten, computes in fp32 whatever the dtypes that it reads
and writes, and is deterministic. The functions below launch them on flat tensors, contiguous and all on one device;
`distill/operations.py` gives them gradients, and says in plain PyTorch what each computes. Importing this module needs
Triton, which comes with PyTorch for CUDA.

Shapes: N tokens, D hidden size, V vocabulary, W FFN channels, T positions, E head_dim.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from blocks.formats import E4M3_ZERO_SCALE
from blocks.kernels import on_device, to_minifloat

LARGEST_BLOCK = 4096
PROGRAMS = 1024
"""Programs of the backward pass of a norm: each keeps its own sum of the weight's gradient."""


@triton.jit
def _kl(student, teacher, scale, loss, gradient, V, WANTS_GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """One token: loss = scale sum_v p (log p - log q), gradient = scale (q - p)."""
    row = tl.program_id(0).to(tl.int64)
    student += row * V
    teacher += row * V
    columns = tl.arange(0, BLOCK)
    infinity = float("inf")
    q_max, q_sum = -infinity, 0.0
    p_max, p_sum = -infinity, 0.0
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        s = tl.load(student + start + columns, mask=inside, other=-infinity).to(tl.float32)
        t = tl.load(teacher + start + columns, mask=inside, other=-infinity).to(tl.float32)
        q_new = tl.maximum(q_max, tl.max(s, 0))
        p_new = tl.maximum(p_max, tl.max(t, 0))
        q_sum = q_sum * tl.exp(q_max - q_new) + tl.sum(tl.exp(s - q_new), 0)
        p_sum = p_sum * tl.exp(p_max - p_new) + tl.sum(tl.exp(t - p_new), 0)
        q_max, p_max = q_new, p_new
    q_log, p_log = q_max + tl.log(q_sum), p_max + tl.log(p_sum)
    weight = tl.load(scale + row)
    kl = 0.0
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        s = tl.load(student + start + columns, mask=inside, other=0.0).to(tl.float32) - q_log
        t = tl.load(teacher + start + columns, mask=inside, other=0.0).to(tl.float32) - p_log
        p = tl.exp(t)
        kl += tl.sum(tl.where(inside, p * (t - s), 0.0), 0)
        if WANTS_GRADIENT:
            tl.store(gradient + row * V + start + columns, weight * (tl.exp(s) - p), mask=inside)
    tl.store(loss + row, weight * kl)


@triton.jit
def _add_norm(x, delta, weight, total, normed, scale, D, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    """One token: total = x + delta, scale = 1 / rms(total), normed = weight * total * scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    at = row * D + columns
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        value += tl.load(delta + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, value, mask=inside)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value, 0) / D + eps)
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + at, w * (value * inverse), mask=inside)
    tl.store(scale + row, inverse)


@triton.jit
def _add_norm_backward(
    d_normed,
    d_total,
    total,
    weight,
    scale,
    d_x,
    d_delta,
    d_weight,
    N,
    D,
    HAS_TOTAL: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every PROGRAMS-th token: the gradients of x and of delta, equal but for their dtype, and a part of the weight's."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in range(program, N, programs):
        at = row * D + columns
        inverse = tl.load(scale + row)
        x_hat = tl.load(total + at, mask=inside, other=0.0).to(tl.float32) * inverse
        d = tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)
        part += d * x_hat
        d *= w
        value = inverse * (d - x_hat * (tl.sum(d * x_hat, 0) / D))
        if HAS_TOTAL:
            value += tl.load(d_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + at, value, mask=inside)
        if HAS_DELTA:
            tl.store(d_delta + at, value, mask=inside)
    tl.store(d_weight + program * D + columns, part, mask=inside)


@triton.jit
def _rotate(
    source,
    target,
    cos,
    sin,
    T,
    heads,
    rotated,
    E: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """One token: its first `rotated` heads turned by its position (TRANSPOSED: the gradient's way back), the others copied."""
    row = tl.program_id(0).to(tl.int64)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < E // 2)
    turns = inside & (head < rotated)
    first = row * heads * E + head * E + column
    second = first + E // 2
    angle = (row % T) * E + column + tl.zeros_like(head)
    a = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + angle, mask=turns, other=1.0)
    cos_b = tl.load(cos + angle + E // 2, mask=turns, other=1.0)
    sin_a = tl.load(sin + angle, mask=turns, other=0.0)
    sin_b = tl.load(sin + angle + E // 2, mask=turns, other=0.0)
    if TRANSPOSED:
        new_a, new_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        new_a, new_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(target + first, new_a, mask=inside)
    tl.store(target + second, new_b, mask=inside)


@triton.jit
def _gated(gate_up, out, W, BLOCK: tl.constexpr):
    """A block of one token: silu(gate) * up."""
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < W
    gate = tl.load(gate_up + row * 2 * W + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * W + W + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * W + columns, gate * tl.sigmoid(gate) * up, mask=inside)


@triton.jit
def _gated_backward(gate_up, d_out, d_gate_up, W, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < W
    gate = tl.load(gate_up + row * 2 * W + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * W + W + columns, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_out + row * W + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(d_gate_up + row * 2 * W + columns, d_gate, mask=inside)
    tl.store(d_gate_up + row * 2 * W + W + columns, d * gate * sigmoid, mask=inside)


@triton.jit
def _round_e4m3(x, out, D, EPS: tl.constexpr, BLOCK: tl.constexpr):
    """One token in E4M3, its step the largest value / 448."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    value = tl.load(x + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    step = tl.div_rn(tl.max(tl.abs(value), 0), 448.0)
    step = tl.where(step == 0, EPS, step)
    scaled = tl.div_rn(value, step + tl.zeros_like(value))
    code = to_minifloat(tl.minimum(tl.maximum(scaled, -448.0), 448.0), -6, 3)
    tl.store(out + row * D + columns, code * step, mask=inside)


@triton.jit
def _round_nvfp4(x, divisor, out, groups, ZERO_SCALE: tl.constexpr, GROUPS: tl.constexpr):
    """One token in E2M1, in blocks of 16 with E4M3 scales over a divisor that all tokens share."""
    row = tl.program_id(0).to(tl.int64)
    group, column = tl.arange(0, GROUPS)[:, None], tl.arange(0, 16)[None, :]
    inside = (group < groups) & (column < 16)
    at = row * groups * 16 + group * 16 + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    shared = tl.load(divisor)
    largest = tl.max(tl.abs(value), 1)
    scale = to_minifloat(tl.minimum(shared * tl.div_rn(largest, 6.0 + tl.zeros_like(largest)), 448.0), -6, 3)
    step = tl.div_rn(tl.where(scale == 0, ZERO_SCALE, scale), shared + tl.zeros_like(scale))
    scaled = tl.div_rn(value, step[:, None] + tl.zeros_like(value))
    code = to_minifloat(tl.minimum(tl.maximum(scaled, -6.0), 6.0), 0, 1)
    tl.store(out + at, code * step[:, None], mask=inside)


# Launching


def round_e4m3(x_ND: Tensor) -> Tensor:
    """Tokens rounded to E4M3 with a scale each, in their own dtype: `Float8.fake_input`, bit for bit."""
    rows, size = x_ND.shape
    out_ND = torch.empty_like(x_ND)
    block = triton.next_power_of_2(size)
    with on_device(x_ND):
        _round_e4m3[(rows,)](x_ND, out_ND, size, torch.finfo(torch.float32).eps, block, num_warps=_warps(block))
    return out_ND


def round_nvfp4(x_ND: Tensor, divisor: Tensor) -> Tensor:
    """Tokens rounded to nvfp4 with a divisor [1], in their own dtype: `NvFloat4.fake_input`, bit for bit. 16 divides D."""
    rows, size = x_ND.shape
    out_ND = torch.empty_like(x_ND)
    block = triton.next_power_of_2(size // 16)
    with on_device(x_ND):
        _round_nvfp4[(rows,)](x_ND, divisor, out_ND, size // 16, E4M3_ZERO_SCALE, block, num_warps=_warps(block * 16))
    return out_ND


def kl_rows(student_NV: Tensor, teacher_NV: Tensor, scale_N: Tensor, gradient_NV: Tensor | None) -> Tensor:
    """scale * KL(teacher || student) of each token [N] from logits; writes its gradient to `gradient_NV`, of any dtype."""
    rows, vocabulary = student_NV.shape
    loss_N = torch.empty(rows, dtype=torch.float32, device=student_NV.device)
    block = min(LARGEST_BLOCK, triton.next_power_of_2(vocabulary))
    wants_gradient = gradient_NV is not None
    target = gradient_NV if wants_gradient else loss_N
    with on_device(student_NV):
        _kl[(rows,)](
            student_NV, teacher_NV, scale_N, loss_N, target, vocabulary, wants_gradient, block, num_warps=_warps(block)
        )
    return loss_N


def add_norm(
    x_ND: Tensor, delta_ND: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x + delta in x's dtype (x itself if there is no delta), its RMSNorm in `dtype`, and 1 / rms of each token [N]."""
    rows, size = x_ND.shape
    total_ND = x_ND if delta_ND is None else torch.empty_like(x_ND)
    normed_ND = torch.empty_like(x_ND, dtype=dtype)
    scale_N = torch.empty(rows, dtype=torch.float32, device=x_ND.device)
    block = triton.next_power_of_2(size)
    with on_device(x_ND):
        _add_norm[(rows,)](
            x_ND,
            x_ND if delta_ND is None else delta_ND,
            weight_D,
            total_ND,
            normed_ND,
            scale_N,
            size,
            eps,
            delta_ND is not None,
            block,
            num_warps=_warps(block),
        )
    return total_ND, normed_ND, scale_N


def add_norm_backward(
    d_normed_ND: Tensor,
    d_total_ND: Tensor | None,
    total_ND: Tensor,
    weight_D: Tensor,
    scale_N: Tensor,
    delta_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, of delta (None if `delta_dtype` is) and of the weight."""
    rows, size = total_ND.shape
    d_x_ND = torch.empty_like(total_ND)
    own_delta = delta_dtype not in (None, total_ND.dtype)
    d_delta_ND = torch.empty_like(total_ND, dtype=delta_dtype) if own_delta else None
    programs = min(rows, PROGRAMS)
    parts_PD = torch.empty(programs, size, dtype=torch.float32, device=total_ND.device)
    block = triton.next_power_of_2(size)
    with on_device(total_ND):
        _add_norm_backward[(programs,)](
            d_normed_ND,
            d_normed_ND if d_total_ND is None else d_total_ND,
            total_ND,
            weight_D,
            scale_N,
            d_x_ND,
            d_x_ND if d_delta_ND is None else d_delta_ND,
            parts_PD,
            rows,
            size,
            d_total_ND is not None,
            own_delta,
            block,
            num_warps=_warps(block),
        )
    d_weight_D = parts_PD.sum(0).to(weight_D.dtype)
    return d_x_ND, d_x_ND if delta_dtype == total_ND.dtype else d_delta_ND, d_weight_D


def rotate(
    source: Tensor, target: Tensor, cos_TE: Tensor, sin_TE: Tensor, rotated: int, *, transposed: bool = False
) -> None:
    """Turns the first `rotated` heads of every token [N, heads * E], N = sequences * T, and copies the others.

    `target` may be `source`. `transposed` applies the transposed matrix, which takes gradients back.
    """
    positions, head_dim = cos_TE.shape
    heads = source.shape[1] // head_dim
    block = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim // 2)
    with on_device(source):
        _rotate[(len(source),)](
            source,
            target,
            cos_TE,
            sin_TE,
            positions,
            heads,
            rotated,
            head_dim,
            transposed,
            *block,
            num_warps=_warps(block[0] * block[1]),
        )


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [N, 2W]: [N, W]."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, triton.next_power_of_2(width))
    with on_device(gate_up):
        _gated[(rows, triton.cdiv(width, block))](gate_up, out, width, block, num_warps=_warps(block))
    return out


def gated_backward(gate_up: Tensor, d_out: Tensor) -> Tensor:
    """The gradient of `gate_up` [N, 2W] from that of the output [N, W]."""
    rows, width = d_out.shape
    gradient = torch.empty_like(gate_up)
    block = min(1024, triton.next_power_of_2(width))
    with on_device(gate_up):
        _gated_backward[(rows, triton.cdiv(width, block))](
            gate_up, d_out, gradient, width, block, num_warps=_warps(block)
        )
    return gradient


def _warps(block: int) -> int:
    """Warps for a block of so many numbers: 8 numbers a thread, at most 16 warps."""
    return min(16, max(1, block // 256))
