"""Fitting in closed form: ridge least squares from statistics, no gradient step.

Every fit here solves, for inputs A [T, n], targets Y [T, D] and a prior W0 [n, D],

    W = argmin ||A W - Y||^2 + lambda ||W - W0||^2 = W0 + (A'A + lambda I)^-1 (A'Y - A'A W0)

from the Gram A'A and the cross A'Y alone. Because W0 itself is allowed, a fitted candidate can never do worse on the
fitting text than the cut one (W0). `lambda` is given as a number of pseudo-tokens: the prior weighs as much as that
many tokens of typical channel energy. One Gram serves every FFN width: with channels sorted once, one Cholesky factor
serves all prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from blocks.errors import NasError
from blocks.ranks import ALONE, Ranks

SELECTION_STEPS, GROWTH = 96, 4  # of n channels, n / 96 are chosen at a time, later a quarter of those chosen already
WIDE = 8192  # channels: from here the greedy selection, which needs no precision, takes tf32 products on a GPU
GRAM_BLOCKS = 8  # the Gram of many channels is summed in this many bands, of its upper triangle only
FEW_CHANNELS = 2048  # below, one product of all is quicker


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Lets fp32 matrix products on a GPU round their inputs to tf32 (10 bits); sums stay fp32."""
    before = torch.get_float32_matmul_precision()
    if allowed:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Statistics:
    """Gram A'A [n, n] and crosses A'Y [n, D] of least squares problems with the same inputs, accumulated over batches.

    Sums are fp32 on a GPU, also of bf16 inputs, and fp64 on a CPU, where it costs little: there, neither batches nor ranks
    change what comes out. Solves run in fp64. `reduce` adds up what the ranks have and must be called before anything is
    read.

    Args:
        inputs, outputs: n and D.
        targets: how many sets of targets Y share the inputs.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str, targets: int = 1) -> None:
        dtype = sum_dtype(device)
        self.gram = torch.zeros(inputs, inputs, device=device, dtype=dtype)
        self.crosses = [torch.zeros(inputs, outputs, device=device, dtype=dtype) for _ in range(targets)]
        self.tokens = 0
        self._step = inputs if inputs <= FEW_CHANNELS else -(-inputs // GRAM_BLOCKS)
        self._factor: tuple[float, Tensor, Tensor] | None = None

    @property
    def cross(self) -> Tensor:
        return self.crosses[0]

    def add(self, inputs: Tensor, *targets: Tensor) -> None:
        """Adds a batch: inputs [..., n] and each set of targets [..., D]."""
        a = inputs.flatten(0, -2)
        for start in range(0, a.shape[1], self._step):
            band = slice(start, start + self._step)
            _add_product(self.gram[band, start:], a[:, band].T, a[:, start:])
        for cross, y in zip(self.crosses, targets, strict=True):
            _add_product(cross, a.T, y.flatten(0, -2).to(a.dtype))
        self.tokens += len(a)

    def reduce(self, ranks: Ranks = ALONE) -> Statistics:
        """Adds up the ranks' sums and fills in the lower triangle. Call once, after the last batch."""
        for start in range(0, len(self.gram), self._step):
            end = start + self._step
            ranks.sum_(band := self.gram[start:end, start:].contiguous())
            self.gram[start:end, start:] = band
            self.gram[end:, start:end] = band[:, end - start :].T
        for cross in self.crosses:
            ranks.sum_(cross)
        self.tokens = int(ranks.sum_(torch.tensor(self.tokens, device=self.gram.device)))
        return self

    def ridge(self, pseudo_tokens: float) -> float:
        """lambda for a prior that weighs as much as `pseudo_tokens` tokens of typical channel energy.

        Typical is the median channel: a few channels carry the huge activations of the first token, and a mean over
        them would hold all the others to the prior.
        """
        energy = self.gram.diagonal().double() / max(self.tokens, 1)
        return max(pseudo_tokens * energy.median().item(), 1e-6 * energy.mean().item(), 1e-12)

    def solve(self, prior: Tensor, pseudo_tokens: float, target: int = 0) -> Tensor:
        """The fitted matrix [n, D] in fp32, shrunk towards `prior` [n, D]; one factor serves all sets of targets."""
        if self._factor is None or self._factor[0] != pseudo_tokens:
            everything = torch.arange(len(self.gram), device=self.gram.device)
            self._factor = pseudo_tokens, *self._inverse_factor(everything, pseudo_tokens)
        _, inverse, hold = self._factor
        wanted = self.crosses[target].double() + hold[:, None] * prior.double()
        return (inverse.T @ (inverse @ wanted)).float()

    def solve_prefixes(
        self, prior: Tensor, order: Tensor, widths: Sequence[int], pseudo_tokens: float, last: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """(w, fitted matrix [w, D] of the channels order[:w], shrunk towards prior[order[:w]]) for each width, rising.

        One Cholesky factor L and one cumulative sum serve all widths. With F = L^-1 (A'Y + lambda W0), whose first w rows
        depend on the first w channels alone, the fit of width w is (L^-1)[:w, :w]' F[:w]: a sum over the rows up to w.
        `last` says that the Gram is not needed afterwards: of a very wide FFN it takes gigabytes.
        """
        longest = order[: max(widths)]
        inverse, hold = self._inverse_factor(longest, pseudo_tokens)
        if last:
            self.gram = self.gram[:0, :0].clone()
        target = self.cross[longest].double()
        for start in range(0, len(target), FEW_CHANNELS):  # in bands: whole temporaries would be gigabytes, too
            rows = slice(start, start + FEW_CHANNELS)
            target[rows].addcmul_(hold[rows, None], prior[longest[rows]].double())
        fitted = torch.zeros_like(target)
        start = 0
        for width in sorted(set(widths)):
            band = inverse[start:width, :width]
            fitted[:width].addmm_(band.T, band @ target[:width])
            yield width, fitted[:width].float()
            start = width

    def _inverse_factor(self, channels: Tensor, pseudo_tokens: float) -> tuple[Tensor, Tensor]:
        """L^-1 of the Gram of `channels` with the ridge on its diagonal, fp64, and that ridge by channel."""
        ridge, size = self.ridge(pseudo_tokens), len(channels)
        # Huge collinear channels (those of the first token) may have fp32 rounding that outweighs the ridge: then more of it.
        for relative in (0.0, 1e-5, 1e-3):
            gram = torch.empty(size, size, dtype=torch.float64, device=self.gram.device)
            for start in range(0, size, FEW_CHANNELS):
                rows = slice(start, start + FEW_CHANNELS)
                gram[rows] = self.gram[channels[rows, None], channels]
            hold = ridge + relative * gram.diagonal()
            gram.diagonal().add_(hold)
            if not invert_factor_(gram):
                return gram, hold
        raise NasError(
            "a Gram is not positive definite: the activations hold NaN or infinity; check the parent's weights"
        )


def invert_factor_(matrix: Tensor) -> Tensor:
    """Turns a symmetric matrix in place into L^-1, the inverse of its lower Cholesky factor; returns how many blocks failed.

    By halves, so that nearly all of it is matrix products and the memory beside the matrix stays below its own size:

        L21 = A21 L11^-T        A22 <- A22 - L21 L21'        (L^-1)21 = -L22^-1 L21 L11^-1
    """
    if len(matrix) <= FEW_CHANNELS:
        factor, failed = torch.linalg.cholesky_ex(matrix)
        identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))
        return failed != 0
    half = len(matrix) // 2
    first, below, second = matrix[:half, :half], matrix[half:, :half], matrix[half:, half:]
    failed = invert_factor_(first)
    factor = below @ first.T
    second.addmm_(factor, factor.T, alpha=-1)
    failed = failed + invert_factor_(second)
    torch.mm(second, factor @ first, out=factor)
    below.copy_(factor.neg_())
    matrix[:half, half:] = 0.0
    return failed


def sum_dtype(device: torch.device | str) -> torch.dtype:
    """In which statistics are summed on a device."""
    return torch.float64 if torch.device(device).type == "cpu" else torch.float32


def _add_product(out: Tensor, x: Tensor, y: Tensor) -> None:
    """out += x @ y in the precision of `out`, whatever the inputs are."""
    if x.dtype != out.dtype and x.is_cuda:
        out += torch.mm(x, y, out_dtype=out.dtype)
    else:
        out.addmm_(x.to(out.dtype), y.to(out.dtype))


def contribution(gram: Tensor, output: Tensor) -> Tensor:
    """Importance [n] of each channel: its root-mean-square activation times the norm of its row of `output` [n, D]."""
    return gram.diagonal().clamp_min(0).sqrt().to(output.dtype) * output.norm(dim=1)


def greedy_order(gram: Tensor, cross: Tensor, first: int, steps: int = SELECTION_STEPS, growth: int = GROWTH) -> Tensor:
    """Channels [n] sorted so that each prefix explains the targets well: orthogonal least squares, a block at a time.

    A channel's gain is the squared error it would remove given those already chosen, ||r_i||^2 / c_ii with r the cross
    and c the Gram after projecting the chosen ones out; the best block is taken at a time, then both are updated.
    Selects `first` channels this way; the rest follow by their last gain.

    Args:
        gram: A'A [n, n].
        cross: A'Y [n, D].
        first: how many channels need a good order (the largest width below n).
        steps, growth: a block has n / steps channels, or the chosen ones / growth if that is more.
    """
    channels = len(gram)
    left = torch.cat((gram, cross), 1).float()  # c and r, which every update changes alike
    # What rounding leaves of an explained channel: it scales with the channel, and channels differ by orders of magnitude.
    rough = gram.is_cuda and channels >= WIDE
    energy = left.diagonal().clone()
    floor = energy * (1e-3 if rough else 1e-5) + energy.mean() * 1e-6
    taken = torch.zeros(channels, dtype=torch.bool, device=gram.device)
    # Where all is explained (text shorter than the FFN is wide), rounding must not choose: then by the gain at the start.
    at_first = left[:, channels:].pow(2).sum(1) / energy.clamp_min(floor) * 1e-5

    def gain() -> Tensor:
        removed = left[:, channels:].pow(2).sum(1) / left.diagonal().clamp_min(floor)
        return (removed + at_first).masked_fill_(taken, -1.0)

    chosen: list[Tensor] = []
    block = -(-channels // steps)
    start = 0
    while start < first:
        picks = gain().topk(min(max(block, start // growth), first - start)).indices
        start += len(picks)
        chosen.append(picks)
        taken[picks] = True
        rows = left[picks]
        factor = _factor_of_rest(rows[:, picks], floor[picks])
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
        with tf32_products(rough):
            left.addmm_(rows[:, :channels].T, rows, alpha=-1)
    rest = gain().argsort(descending=True)[: channels - first]
    return torch.cat((*chosen, rest))


def _factor_of_rest(inner: Tensor, floor: Tensor) -> Tensor:
    """Cholesky factor of what is left of some channels; where that is nothing but rounding, of each alone."""
    inner = inner + torch.diag(floor)
    factor, failed = torch.linalg.cholesky_ex(inner)
    # Chosen on the device: a look at `failed` would make a GPU wait at every step.
    return torch.where(failed == 0, factor, torch.diag(inner.diagonal().clamp_min(floor).sqrt()))
