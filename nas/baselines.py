"""What every search is compared with: simple children within the same limits.

uniform            the same candidate in every layer, no skips
depth-contiguous   whole layers left out, one run of them (as in Minitron, arXiv 2407.14679, and ShortGPT, arXiv 2403.03853)
depth-score        whole layers left out, those of the lowest scores first
random             a random choice, moved into the limits by random changes

and, where precisions are searched,

parent-uniform-precision   the parent in the one format that hurts least
child-uniform-precision    the best structure in the one format that then hurts least
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from blocks.spec import EMPTY, Architecture, LayerSpec
from nas.additive import Candidates
from nas.solve import Limit, solve_with

PARENT_PRECISION, CHILD_PRECISION = "parent-uniform-precision", "child-uniform-precision"
BASELINES = ("uniform", "depth-contiguous", "depth-score", "random", PARENT_PRECISION, CHILD_PRECISION)
ATTEMPTS = 20
GAP = 1e-4


def baselines(candidates: Candidates, seed: int) -> dict[str, Architecture]:
    """Those that exist within the limits and the space, by name."""
    found = {
        "uniform": uniform(candidates),
        "depth-contiguous": depth_contiguous(candidates),
        "depth-score": depth_by_score(candidates),
        "random": random_feasible(candidates, random.Random(seed)),
    }
    if candidates.precisions is not None:
        found[PARENT_PRECISION] = parent_in_one_precision(candidates)
        found[CHILD_PRECISION] = child_in_one_precision(candidates)
    return {name: architecture for name, architecture in found.items() if architecture is not None}


def uniform(candidates: Candidates) -> Architecture | None:
    """Of the uniform children within the limits, the one with the least total score."""
    layers = len(candidates.table)
    everywhere = [
        Architecture.uniform(layers, spec)
        for spec in candidates.specs[0]
        if "skip" not in (spec.attention.kind, spec.ffn.kind) and all(spec in specs for specs in candidates.specs)
    ]
    return _best(candidates, [architecture for architecture in everywhere if candidates.allows(architecture)])


def depth_contiguous(candidates: Candidates) -> Architecture | None:
    """The shortest run of empty layers that meets the limits, where its scores add up to the least."""
    layers = len(candidates.table)
    for length in range(1, layers):
        runs = (range(start, start + length) for start in range(layers - length + 1))
        fitting = [a for run in runs if (a := _without(candidates, run)) is not None and candidates.allows(a)]
        if fitting:
            return _best(candidates, fitting)
    return None


def depth_by_score(candidates: Candidates) -> Architecture | None:
    """Layers left out in the order of their scores until the limits are met."""
    scores = {index: rows[EMPTY] for index, rows in enumerate(_scores(candidates)) if EMPTY in rows}
    order = sorted(scores, key=lambda index: scores[index])
    for count in range(1, len(order) + 1):
        architecture = _without(candidates, order[:count])
        if architecture is not None and candidates.allows(architecture):
            return architecture
    return None


def random_feasible(candidates: Candidates, chooser: random.Random) -> Architecture | None:
    """A random choice; while it misses a limit, random layers take random candidates that bring it closer."""
    for _ in range(ATTEMPTS):
        choice = [chooser.randrange(len(specs)) for specs in candidates.specs]
        excess = candidates.excess(choice)
        for _ in range(20 * len(choice)):
            if excess <= 0:
                return candidates.architecture(choice)
            layer = chooser.randrange(len(choice))
            changed = [*choice]
            changed[layer] = chooser.randrange(len(candidates.specs[layer]))
            if (closer := candidates.excess(changed)) < excess:
                choice, excess = changed, closer
    return None


def precisions_of(candidates: Candidates) -> list[str]:
    """The formats that the candidates have."""
    parts = (part for specs in candidates.specs for spec in specs for part in (spec.attention, spec.ffn))
    return sorted({part.precision for part in parts if part.kind != "skip"})


def parent_in_one_precision(candidates: Candidates) -> Architecture | None:
    """Of the parent in each format, the one within the limits with the least score."""
    shape = candidates.costs.shape
    whole = [shape.parent_architecture.at(name) for name in precisions_of(candidates)]
    return _best(candidates, [a for a in whole if candidates.has(a) and candidates.allows(a)])


def child_in_one_precision(candidates: Candidates) -> Architecture | None:
    """The best by score of the children that have one format in all their matrices, over the formats."""
    found = []
    for name in precisions_of(candidates):
        other = [[int(spec != spec.at(name)) for spec in specs] for specs in candidates.specs]
        solution = solve_with(candidates.problem, Limit("other formats", other, high=0), gap=GAP)
        if solution is not None:
            found.append(candidates.architecture(solution.choice))
    return _best(candidates, found)


def _without(candidates: Candidates, empty: range | list[int]) -> Architecture | None:
    parent = candidates.costs.shape.parent_layer
    architecture = Architecture(tuple(EMPTY if index in empty else parent for index in range(len(candidates.table))))
    return architecture if candidates.has(architecture) else None


def _best(candidates: Candidates, architectures: list[Architecture]) -> Architecture | None:
    return min(architectures, key=candidates.predicted, default=None)


def _scores(candidates: Candidates) -> Iterator[dict[LayerSpec, float]]:
    for rows in candidates.table:
        yield {row.spec: row.score for row in rows}
