"""Fitting in closed form: ridge least squares from statistics, no gradient step.

Every fit here solves, for inputs A [T, n], targets Y [T, D] and a prior W0 [n, D],

    W = argmin ||A W - Y||^2 + lambda ||W - W0||^2 = W0 + (A'A + lambda I)^-1 (A'Y - A'A W0)

from the Gram A'A and the cross A'Y alone. Because W0 itself is allowed, a fitted candidate can never do worse on the
fitting text than the cut one (W0). `lambda` is given as a number of pseudo-tokens: the prior weighs as much as that
many tokens of typical channel energy. One Gram serves every FFN width: with channels sorted once, one Cholesky factor
serves all prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SELECTION_BLOCK = 32  # channels chosen between two updates of the greedy selection


class Statistics:
    """Gram A'A [n, n] and cross A'Y [n, D] of a least squares problem, accumulated over batches.

    Accumulates in fp32 on the device of the data; solves run in fp64.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str) -> None:
        self.gram = torch.zeros(inputs, inputs, device=device)
        self.cross = torch.zeros(inputs, outputs, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Adds a batch: inputs [..., n] and targets [..., D]."""
        a, y = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        self.gram.addmm_(a.T, a)
        self.cross.addmm_(a.T, y)
        self.tokens += len(a)

    def ridge(self, pseudo_tokens: float) -> float:
        """lambda for a prior that weighs as much as `pseudo_tokens` tokens of typical channel energy.

        Typical is the median channel: a few channels carry the huge activations of the first token, and a mean over
        them would hold all the others to the prior.
        """
        energy = self.gram.diagonal().double() / max(self.tokens, 1)
        return max(pseudo_tokens * energy.median().item(), 1e-6 * energy.mean().item(), 1e-12)

    def solve(self, prior: Tensor, pseudo_tokens: float) -> Tensor:
        """The fitted matrix [n, D] in fp32, shrunk towards `prior` [n, D]."""
        everything = torch.arange(len(self.gram), device=self.gram.device)
        return self.solve_prefixes(prior, everything, [len(everything)], pseudo_tokens)[0]

    def solve_prefixes(self, prior: Tensor, order: Tensor, widths: Sequence[int], pseudo_tokens: float) -> list[Tensor]:
        """For each width w, the fitted matrix [w, D] of the channels order[:w], shrunk towards prior[order[:w]].

        One Cholesky factor and one forward substitution serve all widths: both are prefix-closed when the right-hand
        side is the cross itself. The prior enters as lambda * W0, since W = (G + lambda I)^-1 (A'Y + lambda W0).
        """
        longest = order[: max(widths)]
        ridge = self.ridge(pseudo_tokens)
        gram = self.gram[longest][:, longest].double()
        hold = torch.full_like(gram.diagonal(), ridge)
        gram.diagonal().add_(hold)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:  # huge collinear channels (those of the first token) whose fp32 rounding outweighs the ridge
            more = gram.diagonal() * 1e-5
            hold += more
            gram.diagonal().add_(more)
            factor = torch.linalg.cholesky(gram)
        target = self.cross[longest].double() + hold[:, None] * prior[longest].double()
        forward = torch.linalg.solve_triangular(factor, target, upper=False)
        return [
            torch.linalg.solve_triangular(factor[:w, :w].mT, forward[:w], upper=True).float() for w in widths
        ]  # fmt: skip


def contribution(gram: Tensor, output: Tensor) -> Tensor:
    """Importance [n] of each channel: its root-mean-square activation times the norm of its row of `output` [n, D]."""
    return gram.diagonal().clamp_min(0).sqrt() * output.norm(dim=1)


def greedy_order(gram: Tensor, cross: Tensor, first: int, block: int = SELECTION_BLOCK) -> Tensor:
    """Channels [n] sorted so that each prefix explains the targets well: orthogonal least squares, a block at a time.

    A channel's gain is the squared error it would remove given those already chosen, ||r_i||^2 / c_ii with r the cross
    and c the Gram after projecting the chosen ones out; the best `block` are taken at a time, then both are updated.
    Selects `first` channels this way; the rest follow by their last gain.

    Args:
        gram: A'A [n, n].
        cross: A'Y [n, D].
        first: how many channels need a good order (the largest width below n).
    """
    c, r = gram.clone(), cross.clone()
    # What rounding leaves of an explained channel: it scales with the channel, and channels differ by orders of magnitude.
    floor = gram.diagonal() * 1e-5 + gram.diagonal().mean() * 1e-6
    taken = torch.zeros(len(gram), dtype=torch.bool, device=gram.device)
    chosen: list[Tensor] = []
    for start in range(0, first, block):
        gain = r.pow(2).sum(1) / c.diagonal().clamp_min(floor)
        picks = gain.masked_fill(taken, -1.0).topk(min(block, first - start)).indices
        chosen.append(picks)
        taken[picks] = True
        inner = c[picks][:, picks]
        inner.diagonal().add_(floor[picks])
        solved = torch.cholesky_solve(torch.cat((c[picks], r[picks]), 1), torch.linalg.cholesky(inner))
        column = c[:, picks]
        c -= column @ solved[:, : len(gram)]
        r -= column @ solved[:, len(gram) :]
    gain = (r.pow(2).sum(1) / c.diagonal().clamp_min(floor)).masked_fill(taken, -1.0)
    rest = gain.argsort(descending=True)[: len(gram) - int(taken.sum())]
    return torch.cat((*chosen, rest))
