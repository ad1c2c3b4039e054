"""GPTQ: rounds a matrix so that its outputs change little, from the Gram matrix of its inputs alone.

Frantar et al., arXiv 2210.17323. For weights W [rows, n] on inputs X [T, n] with Gram H = X'X, it looks for codes of small

    error = ||X (W - Q)'||^2 = sum over rows of (w - q) H (w - q)'

Columns are rounded one after another, and what rounding did to column i is made good by the columns still to come: with U
the upper Cholesky factor of H^-1 (H^-1 = U'U), w_j -= (w_i - q_i) / U_ii * U_ij. The order is that of falling inputs (the
diagonal of H): the heavy ones are rounded first, while there is most left to mend with. Scales are those of the original
weights, so the order costs nothing when the matrix is served.

Rows do not know of each other: matrices with the same inputs (q/k/v, gate/up) can be stacked and share the factor, and,
in nvfp4, the divisor that they need to share anyway.

`gptq_codes` gives codes for the disk, `gptq_weights` weights that rounding to nearest takes to such codes: a start for training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blocks.errors import ConfigError, NasError
from blocks.formats import Format, Quantized
from blocks.fused import kernels_in

BLOCK = 128  # columns rounded before the others hear of it; a matter of speed alone
DAMPING = 0.01  # added to the diagonal of the Gram, as a share of its mean
MORE_DAMPING = (1.0, 10.0, 100.0)  # times that, if a factor fails: fp32 sums of huge collinear inputs


def gptq_codes(
    weight: Tensor, gram: Tensor, format: Format, damping: float = DAMPING, divisor: Tensor | None = None
) -> Quantized:
    """Codes and scales by GPTQ. No row has a larger error on `gram` than rounding to nearest leaves: else that is taken.

    Args:
        weight, gram: [rows, n] and [n, n], the sum over tokens of the outer products of inputs (`Statistics.gram`).
        damping: added to the diagonal of the Gram, as a share of its mean.
        divisor: of nvfp4, shared with matrices that are not in `weight`.

    Raises:
        ConfigError: shapes that do not fit together, or that the format cannot hold.
        NasError: a Gram that is not finite, or not that of any inputs.
    """
    weight, gram = _checked(weight, gram, format)
    nearest = format.nearest(weight, divisor)
    codes, _ = _sweep(weight, gram, nearest, damping)
    found = Quantized(format, codes, nearest.scales)
    good = _no_worse(found, nearest, weight, gram)
    return Quantized(format, torch.where(good, codes, nearest.codes), nearest.scales)


def gptq_weights(
    weight: Tensor,
    gram: Tensor,
    format: Format,
    stored: torch.dtype = torch.float32,
    damping: float = DAMPING,
    divisor: Tensor | None = None,
) -> Tensor:
    """Weights [rows, n] that rounding to nearest takes to codes by GPTQ: a master to store, to serve and to train on.

    They are what GPTQ is about to round, each weight as the errors of the columns before it have left it, so they lie anywhere
    between codes, as trained weights do. Their scales are those of `weight`: the largest weight of each group stays what it is,
    though GPTQ might not round it so, and none grows beyond it. What that moves is made good by later columns like any error.

    Args, errors: as of `gptq_codes`.
        stored: the dtype that the weights will be kept in: they are returned in fp32, but are numbers of it.
    """
    weight, gram = _checked(weight.to(stored), gram, format)
    nearest = format.nearest(weight, divisor)
    _, found = _sweep(weight, gram, nearest, damping, stored)
    return torch.where(_no_worse(format.nearest(found, divisor), nearest, weight, gram), found, weight)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """||X d'||^2 [rows] in fp64 of each row d of a difference of weights [rows, n], from the Gram of the inputs."""
    d = difference.double()
    return ((d @ gram.double()) * d).sum(1)


def _checked(weight: Tensor, gram: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Weight in fp32 and its Gram in fp64, if they go together."""
    columns = weight.shape[1]
    format.check(columns)
    if gram.shape != (columns, columns):
        raise ConfigError(
            f"gptq: a Gram of {list(gram.shape)} for {columns} inputs; give the one of this matrix's inputs"
        )
    return weight.float(), gram.to(weight.device, torch.float64)


def _factor(gram: Tensor, damping: float) -> Tensor:
    """U in fp32, upper triangular, U'U = (H + damping)^-1: the inverse of the R of H = R R', one Cholesky from the end.

    Inputs that are always zero get a diagonal of their own, and so neither mend anything nor are mended.
    """
    diagonal = gram.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise NasError(
            "gptq: the Gram of the inputs is not finite; compute it in fp32 or leave out the text that overflows"
        )
    mean = diagonal.mean().clamp(min=torch.finfo(torch.float64).tiny)
    dead = torch.where(diagonal > 0, 0.0, mean)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    for more in MORE_DAMPING:
        damped = gram + torch.diag(dead + more * damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True).float()
    raise NasError(
        f"gptq: the Gram of the inputs is not positive with a damping of {MORE_DAMPING[-1] * damping:g}; "
        "raise the damping or take more calibration text"
    )


def _sweep(
    weight: Tensor, gram: Tensor, nearest: Quantized, damping: float, stored: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Rounds columns one after another, a block at a time, each made good by those after it: codes, and what was rounded to them.

    With `stored`, what is rounded are numbers of that dtype, none beyond the largest of its group in `weight`, and that one itself.
    """
    format, columns = nearest.format, weight.shape[1]
    group = format.group or columns
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = _factor(gram[order[:, None], order], damping)
    shares = factor / factor.diagonal()[:, None]  # of a column's error, what each later one takes over
    rest, steps = weight.T[order].contiguous(), nearest.scales.steps.T[order // group]
    limits: tuple[Tensor, ...] = ()
    if stored is not None:
        sizes, largest = (each.T[order] for each in _largest(weight, group))
        limits = tuple(torch.where(largest, rest, limit) for limit in (-sizes, sizes))
    round_block = _rounder(weight, format, stored)
    for start in range(0, columns, BLOCK):
        block, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
        given = rest[block], steps[block], shares[block, block]
        errors = round_block(*given, format, stored, [each[block] for each in limits])
        rest[later].addmm_(shares[block, later].T, errors, alpha=-1)
    back = order.argsort()
    return format.round(rest / steps)[back].T.contiguous(), rest[back].T.contiguous()


def _round_block(
    part: Tensor,
    steps: Tensor,
    shares: Tensor,
    format: Format,
    stored: torch.dtype | None,
    limits: Sequence[Tensor],
) -> Tensor:
    """Errors [columns, rows] of a block's columns, rounded one after another; `part` becomes what was rounded."""
    errors = torch.empty_like(part)
    for i, put in enumerate(part):
        if stored is not None:
            put = put.clamp(*(each[i] for each in limits)).to(stored).float()
        torch.sub(part[i], format.round(put / steps[i]) * steps[i], out=errors[i])
        part[i] = put
        part[i + 1 :].addr_(shares[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _rounder(weight: Tensor, format: Format, stored: torch.dtype | None) -> Callable[..., Tensor]:
    """`_round_block`, or the kernel that does the same in one launch where it can."""
    kernels = kernels_in("blocks") if weight.is_cuda else None
    if kernels is not None and kernels.rounds_to(format, stored):
        return kernels.round_block
    return _round_block


def _largest(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Of each weight [rows, n]: the largest absolute value of its group, and whether it is the (first) one that has it."""
    sizes = weight.abs().unflatten(1, (-1, group))
    first = torch.zeros_like(sizes, dtype=torch.bool).scatter_(2, sizes.argmax(-1, keepdim=True), True)
    return sizes.amax(-1, keepdim=True).expand_as(sizes).flatten(1), first.flatten(1)


def _no_worse(found: Quantized, nearest: Quantized, weight: Tensor, gram: Tensor) -> Tensor:
    """Whether a row [rows, 1] of `found` has an error that is not larger than rounding to nearest leaves."""
    error, least = (output_error(each.weight - weight, gram) for each in (found, nearest))
    return (error <= least)[:, None]
