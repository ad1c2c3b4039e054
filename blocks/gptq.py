"""GPTQ: rounds a matrix so that its outputs change little, from the Gram matrix of its inputs alone.

Frantar et al., arXiv 2210.17323. For weights W [rows, n] on inputs X [T, n] with Gram H = X'X, it looks for codes of small

    error = ||X (W - Q)'||^2 = sum over rows of (w - q) H (w - q)'

Columns are rounded one after another, and what rounding did to column i is made good by the columns still to come: with U
the upper Cholesky factor of H^-1 (H^-1 = U'U), w_j -= (w_i - q_i) / U_ii * U_ij. The order is that of the columns, or of
falling diagonal of H (`act_order`), where the heavy inputs are rounded first, while there is most left to mend with.

Rows do not know of each other: matrices with the same inputs (q/k/v, gate/up) can be stacked and share the factor, and,
in nvfp4, the divisor that they need to share anyway.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blocks.errors import ConfigError, NasError
from blocks.formats import Format, Quantized, Scales

MORE_DAMPING = (1.0, 10.0, 100.0)  # times `damping`, if a factor fails: fp32 sums of huge collinear inputs


def gptq_codes(
    weight: Tensor,
    gram: Tensor,
    format: Format,
    damping: float = 0.01,
    block: int = 128,
    act_order: bool = False,
    divisor: Tensor | None = None,
) -> Quantized:
    """Codes and scales by GPTQ. No row has a larger error on `gram` than rounding to nearest leaves: else that is taken.

    Args:
        weight, gram: [rows, n] and [n, n], the sum over tokens of the outer products of inputs (`Statistics.gram`).
        damping: added to the diagonal of the Gram, as a share of its mean.
        block: columns rounded before the others hear of it; a matter of speed alone. At least one group is taken.
        act_order: round the columns of the largest inputs first. Scales of groups are then those of the original weights;
            in the order of the columns they are taken anew, from what a group has become when its turn comes.
        divisor: of nvfp4, shared with matrices that are not in `weight`.

    Raises:
        ConfigError: shapes that do not fit together, or that the format cannot hold.
        NasError: a Gram that is not finite, or not that of any inputs.
    """
    columns = weight.shape[1]
    format.check(columns)
    if gram.shape != (columns, columns):
        raise ConfigError(
            f"gptq: a Gram of {list(gram.shape)} for {columns} inputs; give the one of this matrix's inputs"
        )
    weight = weight.float()
    nearest = format.nearest(weight, divisor)
    gram = gram.to(weight.device, torch.float64)
    order = gram.diagonal().argsort(descending=True, stable=True) if act_order else None
    factor = _factor(gram if order is None else gram[order[:, None], order], damping)
    rows_of_columns = weight.T.contiguous() if order is None else weight.T[order]
    if order is None:
        codes, scales = _in_order(rows_of_columns, factor, format, nearest.scales, block)
    else:
        steps = nearest.scales.steps.T
        group = format.group or columns
        codes = _sweep(rows_of_columns, factor, format, block, lambda column, _: steps[order[column] // group])
        codes, scales = codes[order.argsort()], nearest.scales
    return _better_rows(Quantized(format, codes.T.contiguous(), scales), nearest, weight, gram)


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """||X d'||^2 [rows] in fp64 of each row d of a difference of weights [rows, n], from the Gram of the inputs."""
    d = difference.double()
    return ((d @ gram.double()) * d).sum(1)


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


def _in_order(columns: Tensor, factor: Tensor, format: Format, scales: Scales, block: int) -> tuple[Tensor, Scales]:
    """Codes [n, rows] of columns from first to last; the scales of a group are taken when its first column is reached."""
    if format.group is None:
        step = scales.steps[:, 0]
        return _sweep(columns, factor, format, block, lambda column, ahead: step), scales
    group, renewed = format.group, []

    def step_of(column: int, ahead: Tensor) -> Tensor:
        if column % group == 0:
            renewed.append(format.scales(ahead[:group].T, scales.divisor))
        return renewed[-1].steps[:, 0]

    whole_groups = max(block // group, 1) * group  # what a block does to later columns, they hear only at its end
    codes = _sweep(columns, factor, format, whole_groups, step_of)
    return codes, Scales(torch.cat([each.values for each in renewed], 1), scales.divisor)


def _sweep(
    columns: Tensor, factor: Tensor, format: Format, block: int, step_of: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Codes [n, rows] of columns [n, rows], each rounded and made good by those after it, a block at a time.

    `step_of(column, ahead)` gives the steps [rows] of a column; `ahead` is what it and the rest of its block have become.
    """
    columns, codes = columns.clone(), []
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        part = columns[start:end]
        errors = torch.empty_like(part)
        for i, column in enumerate(range(start, end)):
            step = step_of(column, part[i:])
            codes.append(format.round(part[i] / step))
            errors[i] = (part[i] - codes[-1].float() * step) / factor[column, column]
            part[i + 1 :].addr_(factor[column, column + 1 : end], errors[i], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return torch.stack(codes)


def _better_rows(found: Quantized, nearest: Quantized, weight: Tensor, gram: Tensor) -> Quantized:
    """`found`, but rounded to nearest in each row where that has the smaller error."""
    good = output_error(found.weight - weight, gram) <= output_error(nearest.weight - weight, gram)
    codes = torch.where(good[:, None], found.codes, nearest.codes)
    values = torch.where(good[:, None], found.scales.values, nearest.scales.values)
    return Quantized(found.format, codes, Scales(values, nearest.scales.divisor))
