"""The path: from the parent to the budget in small steps, each chosen around the child that the last one left.

Scores are taken at the parent; where much has been cut already, what another cut hurts is different. So at each step the
candidates are scored again around the present child,

    change of KL = sum_t k_t . d_t / T + 1/2 E[(g_t . d_t)^2]          k gradient of the KL, g of sampled log-likelihoods

with d the change from the candidate that stands in the layer now, and the additive problem of the step is solved for these
scores. One path gives a child for every budget on the way.

Reference: EvoPress, arXiv 2410.14649 (why sums of scores mislead under strong compression).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.spec import Architecture
from blocks.sweep import StreamCheckpoints
from nas.additive import Candidates
from nas.assemble import Assembler, Child
from nas.scoring import one_pass_scores, output_gradients
from nas.solve import solve

STEP_GAP = 1e-4  # relative: scores around a child are estimates
CHANGES = (2, 4, 8)  # layers that a proposal around a child changes at most


@dataclass(frozen=True)
class Rescoring:
    """How candidates are scored around a child.

    Attributes:
        tokens: of the verification text, in whole sequences.
        samples: labels drawn for each token.
        dtype: of the computation.
        seed: of the labels.
    """

    tokens: int
    samples: int
    dtype: torch.dtype
    seed: int

    def rows(self, assembler: Assembler) -> slice:
        """Which sequences of the verification text."""
        return slice(0, max(1, self.tokens // assembler.verify_tokens.shape[1]))


def changes_around(assembler: Assembler, candidates: Candidates, child: Child, how: Rescoring) -> list[list[float]]:
    """What each candidate would change of the child's KL, nats per token, by layer as in the table; 0 for the present one.

    Structures are scored around the child as it is in bf16; what precisions change is that of the table.
    """
    sweep = assembler.sweep.at(how.dtype).of(child.layers)
    rows = how.rows(assembler)
    hidden: Tensor = assembler.parent_hidden[rows].to(how.dtype)
    streams = StreamCheckpoints(sweep, assembler.verify_tokens[rows])
    gradients = output_gradients(sweep, streams.take(len(child.layers)), how.samples, how.seed, parent_hidden=hidden)
    found: dict[int, list[float]] = {}
    parent = assembler.sweep.at(how.dtype)
    for index, weights in sweep.layers(reversed(range(len(child.layers)))):
        library = assembler.candidates_of(index).at(parent.layer(index))
        present = child.architecture[index]
        structures = candidates.structures[index]
        scores = one_pass_scores(
            sweep,
            library,
            structures,
            streams.take(index),
            gradients,
            ("tok", "first"),
            (present.structure, weights),
        )
        changes = dict(zip(structures, (scores["tok"] + scores["first"]).mean(1).tolist(), strict=True))
        changes[present.structure] = 0.0  # but for rounding, in another order of the same products
        now = candidates.rounding(index, present)
        found[index] = [
            changes[spec.structure] + candidates.rounding(index, spec) - now for spec in candidates.specs[index]
        ]
    return [found[index] for index in range(len(child.layers))]


@dataclass(frozen=True)
class Step:
    """One child of the path.

    Attributes:
        progress: how far it is on the way: 0 the start, 1 the limits.
        predicted, kl: nats per token, on the text of the rescoring: what was foreseen, and what it is.
    """

    progress: float
    architecture: Architecture
    predicted: float
    kl: float


def walk(
    assembler: Assembler,
    candidates: Candidates,
    steps: int,
    how: Rescoring,
    start: Architecture,
    done: Sequence[Step] = (),
) -> Iterator[Step]:
    """The steps from `start` to the limits that are not `done`.

    The first step away from the parent uses the table, which is more exact there than any estimate around a child.
    """
    parent = candidates.costs.shape.parent_architecture
    present = done[-1].architecture if done else start
    child = assembler.assemble(present)
    kl = done[-1].kl if done else 0.0 if present == parent else _kl(assembler, child, how)
    for number in range(len(done), steps):
        progress = (number + 1) / steps
        if present == parent:
            scores, kl = candidates.scores, 0.0
        else:
            scores = changes_around(assembler, candidates, child, how)
        solution = solve(candidates.tightened(progress, start).problem_of(scores), gap=STEP_GAP)
        if solution is None:
            return
        present = candidates.architecture(solution.choice)
        child = assembler.assemble(present)
        predicted, kl = kl + solution.score, _kl(assembler, child, how)
        yield Step(progress, present, predicted, kl)


def _kl(assembler: Assembler, child: Child, how: Rescoring) -> float:
    return float(assembler.true_kl(child, how.rows(assembler)).mean())


def around(
    assembler: Assembler, candidates: Candidates, architecture: Architecture, how: Rescoring
) -> list[tuple[Architecture, float]]:
    """Children within the limits that should be better than this one, a few layers away, and by how much (nats per token)."""
    scores = changes_around(assembler, candidates, assembler.assemble(architecture), how)
    problem, present = candidates.problem_of(scores), candidates.choice(architecture)
    found: dict[Architecture, float] = {}
    for changes in CHANGES:
        solution = solve(problem, near=(present, changes), gap=STEP_GAP)
        if solution is not None and solution.choice != present:
            found[candidates.architecture(solution.choice)] = solution.score
    return sorted(found.items(), key=lambda pair: pair[1])
