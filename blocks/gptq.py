"""GPTQ: rounds a matrix so that its outputs change little, from the Gram matrix of its inputs alone.

Frantar et al., arXiv 2210.17323. For weights W [rows, n] on inputs X [T, n] with Gram H = X'X, it looks for codes of small

    error = ||X (W - Q)'||^2 = sum over rows of (w - q) H (w - q)'

Columns are rounded one after another, and what rounding did to column i is made good by the columns still to come: with U
the upper Cholesky factor of H^-1 (H^-1 = U'U), w_j -= (w_i - q_i) / U_ii * U_ij. The order is that of the columns, or of
falling diagonal of H (`act_order`), where the heavy inputs are rounded first, while there is most left to mend with.

Rows do not know of each other: matrices with the same inputs (q/k/v, gate/up) can be stacked and share the factor, and,
in nvfp4, the divisor that they need to share anyway.

`gptq_codes` gives codes for the disk, `gptq_weights` weights that rounding to nearest takes to such codes: a start for training.
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
    weight, gram = _checked(weight, gram, format)
    nearest = format.nearest(weight, divisor)
    if act_order:
        order = _falling(gram)
        factor, step_of = _factor(gram[order[:, None], order], damping), _steps(nearest, order)
        codes, scales = _sweep(weight.T[order], factor, format, block, step_of)[0][order.argsort()], nearest.scales
    else:
        codes, scales = _in_order(weight.T.contiguous(), _factor(gram, damping), format, nearest.scales, block)
    return _better_rows(Quantized(format, codes.T.contiguous(), scales), nearest, weight, gram)


def gptq_weights(
    weight: Tensor,
    gram: Tensor,
    format: Format,
    damping: float = 0.01,
    block: int = 128,
    divisor: Tensor | None = None,
) -> Tensor:
    """Weights [rows, n] in fp32 that rounding to nearest takes to codes by GPTQ: a master to store, to serve and to train on.

    They are what GPTQ is about to round, each weight as the errors of the columns before it have left it, so they lie anywhere
    between codes, as trained weights do. Their scales are those of `weight`: the largest weight of each group stays what it is,
    though GPTQ might not round it so, and none grows beyond it. That costs a part of what `gptq_codes` wins.

    Args, errors: as of `gptq_codes` with `act_order`. A row stays what it was where rounding it to nearest has the smaller error.
    """
    weight, gram = _checked(weight, gram, format)
    nearest, order = format.nearest(weight, divisor), _falling(gram)
    sizes = weight.abs().unflatten(1, (-1, format.group or weight.shape[1]))
    limits = sizes.amax(-1, keepdim=True).expand_as(sizes).flatten(1)
    fixed = torch.zeros_like(sizes, dtype=torch.bool).scatter_(2, sizes.argmax(-1, keepdim=True), True).flatten(1)
    factor, step_of = _factor(gram[order[:, None], order], damping), _steps(nearest, order)
    _, found = _sweep(weight.T[order], factor, format, block, step_of, (limits.T[order], fixed.T[order]))
    found = found[order.argsort()].T
    good = output_error(format.fake(found, divisor) - weight, gram) <= output_error(nearest.weight - weight, gram)
    return torch.where(good[:, None], found, weight)


def _checked(weight: Tensor, gram: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Weight in fp32 and its Gram in fp64, if they go together."""
    columns = weight.shape[1]
    format.check(columns)
    if gram.shape != (columns, columns):
        raise ConfigError(
            f"gptq: a Gram of {list(gram.shape)} for {columns} inputs; give the one of this matrix's inputs"
        )
    return weight.float(), gram.to(weight.device, torch.float64)


def _falling(gram: Tensor) -> Tensor:
    """The columns in the order of their inputs, the largest first."""
    return gram.diagonal().argsort(descending=True, stable=True)


def _steps(nearest: Quantized, order: Tensor) -> Callable[[int, Tensor], Tensor]:
    """The steps of columns in that order, as `_sweep` asks for them: of the groups that they are in."""
    steps = nearest.scales.steps.T
    group = nearest.codes.shape[1] // len(steps)
    return lambda column, _: steps[order[column] // group]


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
        return _sweep(columns, factor, format, block, lambda column, ahead: step)[0], scales
    group, renewed = format.group, []

    def step_of(column: int, ahead: Tensor) -> Tensor:
        if column % group == 0:
            renewed.append(format.scales(ahead[:group].T, scales.divisor))
        return renewed[-1].steps[:, 0]

    whole_groups = max(block // group, 1) * group  # what a block does to later columns, they hear only at its end
    codes, _ = _sweep(columns, factor, format, whole_groups, step_of)
    return codes, Scales(torch.cat([each.values for each in renewed], 1), scales.divisor)


def _sweep(
    columns: Tensor,
    factor: Tensor,
    format: Format,
    block: int,
    step_of: Callable[[int, Tensor], Tensor],
    within: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Columns [n, rows], each rounded and made good by those after it, a block at a time: codes, and what was rounded to them.

    `step_of(column, ahead)` gives the steps [rows] of a column; `ahead` is what it and the rest of its block have become.
    `within` are [n, rows] the largest values that weights may get to, and which weights stay what they are.
    """
    given, columns, codes = columns, columns.clone(), []
    for start in range(0, len(columns), block):
        end = min(start + block, len(columns))
        part = columns[start:end]
        errors = torch.empty_like(part)
        for i, column in enumerate(range(start, end)):
            step = step_of(column, part[i:])
            if within is not None:
                limit, fixed = (each[column] for each in within)
                part[i] = torch.where(fixed, given[column], part[i].clamp(-limit, limit))
            codes.append(format.round(part[i] / step))
            errors[i] = (part[i] - codes[-1].float() * step) / factor[column, column]
            part[i + 1 :].addr_(factor[column, column + 1 : end], errors[i], alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return torch.stack(codes), columns


def _better_rows(found: Quantized, nearest: Quantized, weight: Tensor, gram: Tensor) -> Quantized:
    """`found`, but rounded to nearest in each row where that has the smaller error."""
    good = output_error(found.weight - weight, gram) <= output_error(nearest.weight - weight, gram)
    codes = torch.where(good[:, None], found.codes, nearest.codes)
    values = torch.where(good[:, None], found.scales.values, nearest.scales.values)
    return Quantized(found.format, codes, Scales(values, nearest.scales.divisor))
