"""What to measure next: children within the limits that a table corrected by all true KLs so far holds for good.

The true KL of a child is modelled as

    KL(x) = b * sum of scores + sum over layers of w[layer, candidate],        w ~ N(0, (r * b * score + e)^2)

a Bayesian linear regression whose prior trusts each score to a share of itself. A proposal draws w from the posterior
(Thompson sampling; Russo et al., arXiv 1707.02038) and solves the additive problem for it exactly, at most a few layers away from
one of the best children. So the budget is kept by construction, and what is uncertain is tried in proportion.

Of hundreds of candidates some are drawn far below what they cost, and an exact solver finds them all: it would take the children
whose scores are the most wrong. So no candidate is taken for better than a share of its score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blocks.spec import Architecture
from nas.additive import Candidates
from nas.solve import solve

DISTRUST = 0.5  # r: standard deviation of a score's error, as a share of it
LEAST = 0.02  # e: the same for the smallest scores, as a share of the mean score
NOISE = 0.05  # what is not additive, as a share of the largest misfit of the table
BELIEVED = 0.5  # share of a score below which no draw is believed
CHANGES = (1, 2, 2, 3, 4, 6)  # layers that a proposal changes at most
BEST = 4  # a proposal starts from one of so many
ATTEMPTS = 6
PROPOSAL_GAP = 1e-3

Measured = tuple[Architecture, float]
"""A child and its true KL, nats per token."""


@dataclass(frozen=True)
class Proposer:
    """Names the next child to measure.

    Attributes:
        candidates: the additive problem.
    """

    candidates: Candidates

    def __call__(
        self, measured: Sequence[Measured], known: Callable[[Architecture], bool], rng: np.random.Generator
    ) -> Architecture | None:
        """A child within the limits that is not `known` yet; None if chance finds none.

        Args:
            measured: all true KLs so far.
        """
        choices = ((kl, a, self.candidates.choice(a)) for a, kl in measured)
        within = sorted(((kl, a) for kl, a, c in choices if self.candidates.excess(c) <= 0), key=lambda pair: pair[0])
        if not within:
            return self.candidates.architecture(self.candidates.optimum().choice)
        factor, _ = self._compared(measured)
        least = [BELIEVED * factor * np.asarray(row) for row in self.candidates.scores]
        for _ in range(ATTEMPTS):
            start = within[min(int(rng.exponential(1.0)), BEST - 1, len(within) - 1)][1]
            drawn = self.draw(measured, rng)
            sampled = [np.maximum(row, floor).tolist() for row, floor in zip(drawn, least, strict=True)]
            near = self.candidates.choice(start), int(rng.choice(CHANGES))
            solution = solve(self.candidates.problem_of(sampled), near=near, gap=PROPOSAL_GAP)
            if solution is not None and not known(found := self.candidates.architecture(solution.choice)):
                return found
        return self._shaken(within[0][1], known, rng)

    def draw(self, measured: Sequence[Measured], rng: np.random.Generator) -> list[list[float]]:
        """Scores drawn from the posterior (of no measured child: the prior), by layer as in the table, in nats of true KL."""
        scores = [np.asarray(row) for row in self.candidates.scores]
        if not measured:
            return [
                (row + rng.normal(size=len(row)) * width).tolist()
                for row, width in zip(scores, self._spread(1.0), strict=True)
            ]
        choices = np.array([self.candidates.choice(architecture) for architecture, _ in measured])
        factor, residual = self._compared(measured)
        spread = self._spread(factor)
        prior = [rng.normal(size=len(row)) * width for row, width in zip(scores, spread, strict=True)]
        correction = self._towards(choices, residual, spread, prior, rng)
        return [
            (factor * row + noise + change).tolist()
            for row, noise, change in zip(scores, prior, correction, strict=True)
        ]

    def _compared(self, measured: Sequence[Measured]) -> tuple[float, NDArray[np.float64]]:
        """b, nats of true KL per nat of score; and by how much b times its sum of scores misses the true KL of each child."""
        true = np.array([kl for _, kl in measured])
        predicted = np.array([self.candidates.predicted(architecture) for architecture, _ in measured])
        factor = float(np.median(true / np.maximum(predicted, 1e-9)))
        return factor, true - factor * predicted

    def _spread(self, factor: float) -> list[NDArray[np.float64]]:
        """Standard deviations of the prior, by layer."""
        scores = self.candidates.scores
        mean = float(np.mean([score for row in scores for score in row if score > 0] or [1.0]))
        return [factor * (DISTRUST * np.maximum(np.asarray(row), 0.0) + LEAST * mean) for row in scores]

    def _towards(
        self,
        choices: NDArray[np.int_],
        residual: NDArray[np.float64],
        spread: Sequence[NDArray[np.float64]],
        prior: Sequence[NDArray[np.float64]],
        rng: np.random.Generator,
    ) -> list[NDArray[np.float64]]:
        """What turns a draw from the prior into one from the posterior (Matheron's rule): K(., X) (K(X, X) + s^2)^-1 misfit."""
        variance = np.stack([width[choices[:, layer]] ** 2 for layer, width in enumerate(spread)], axis=1)
        same = choices[:, None, :] == choices[None, :, :]
        kernel = (same * variance[None]).sum(-1)
        drawn = np.sum([draw[choices[:, layer]] for layer, draw in enumerate(prior)], axis=0)
        noise = NOISE * max(float(np.abs(residual).max()), 1e-9)
        misfit = residual - drawn - noise * rng.normal(size=len(residual))
        # Beside the noise a little for children measured twice, which would make the kernel singular.
        held = noise**2 + 1e-9 * max(float(kernel.diagonal().mean()), 1e-9)
        weights = np.linalg.solve(kernel + held * np.eye(len(kernel)), misfit)
        return [
            np.bincount(choices[:, layer], weights=weights, minlength=len(width)) * width**2
            for layer, width in enumerate(spread)
        ]

    def _shaken(
        self, start: Architecture, known: Callable[[Architecture], bool], rng: np.random.Generator
    ) -> Architecture | None:
        """Random changes of one to four layers that stay within the limits."""
        for _ in range(200):
            choice = list(self.candidates.choice(start))
            for layer in rng.choice(len(choice), size=min(len(choice), int(rng.integers(1, 5))), replace=False):
                choice[layer] = int(rng.integers(len(self.candidates.specs[layer])))
            if self.candidates.excess(choice) <= 0 and not known(found := self.candidates.architecture(choice)):
                return found
        return None
