"""Additive problems for tests and benchmarks: realistic ones of large parents, random ones, and brute force as the judge."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np

from nas.solve import Limit, Problem


def problem_of(
    scores: Sequence[Sequence[float]], *limits: tuple[Sequence[Sequence[int]], int | None, int | None]
) -> Problem:
    return Problem(scores, [Limit(f"limit {i}", *limit) for i, limit in enumerate(limits)])


def small_problem(seed: int, groups: int = 5, candidates: int = 4, limits: int = 3) -> Problem:
    """Groups of different sizes; limits with one bound or two, coarse or fine, loose or met by few choices to the unit."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, candidates) for _ in range(rng.randint(1, groups))]
    scores = [[rng.choice([0.0, rng.random(), -rng.random(), 20 * rng.random()]) for _ in range(n)] for n in sizes]
    found = []
    for place in range(rng.randint(0, limits)):
        unit, base, most = rng.choice([1, 256, 5_242_880, 10**9 + 7]), rng.choice([0, 10**10]), rng.choice([3, 1000])
        amounts = [
            [base + unit * rng.randrange(most) + rng.choice([0, rng.randrange(5)]) for _ in range(n)] for n in sizes
        ]
        exact = sum(rng.choice(group) for group in amounts)
        between = rng.randint(sum(map(min, amounts)), sum(map(max, amounts)))
        low, high = sorted([exact, between])
        low_end, high_end = rng.choice([(None, high), (None, low), (low, None), (low, high), (exact, exact)])
        found.append(Limit(f"limit {place}", amounts, low_end, high_end))
    return Problem(scores, found)


def every_choice(problem: Problem) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(len(scores)) for scores in problem.scores)))


def feasible(problem: Problem) -> list[tuple[int, ...]]:
    return [choice for choice in every_choice(problem) if problem.feasible(choice)]


def differences(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


SHARES = {"memory": 0.5, "parameters": 0.47, "request": 0.48}


def real_like(seed: int, groups: int, candidates: int, limits: int) -> Problem:
    """Scores rise with what is cut, and all amounts follow the share that is kept."""
    rng = random.Random(seed)
    kept = [[1.0, *(rng.random() for _ in range(candidates - 1))] for _ in range(groups)]
    scores = [[(1 - share) ** 1.5 * rng.lognormvariate(-4, 0.5) for share in row] for row in kept]
    chosen = []
    for name, share in list(SHARES.items())[:limits]:
        amounts = [[int(1e9 * x * rng.uniform(0.6, 1)) for x in row] for row in kept]
        chosen.append(Limit(name, amounts, high=int(share * sum(map(max, amounts)))))
    return Problem(scores, chosen)


def unrelated(seed: int, groups: int, candidates: int, limits: int) -> Problem:
    """All at random: what such solvers find hardest."""
    return uncorrelated(seed, groups, candidates, limits, share=0.3)


def uncorrelated(seed: int, groups: int = 126, candidates: int = 60, limits: int = 3, share: float = 0.35) -> Problem:
    """Scores and amounts that have nothing to do with each other: no real parent is as bad."""
    rng = np.random.default_rng(seed)
    scores = rng.random((groups, candidates)).tolist()
    found = []
    for _ in range(limits):
        amounts = rng.integers(0, 10**9, (groups, candidates))
        least, most = int(amounts.min(axis=1).sum()), int(amounts.max(axis=1).sum())
        found.append((amounts.tolist(), None, least + int(share * (most - least))))
    return problem_of(scores, *found)


def realistic(
    seed: int,
    layers: int = 126,
    widths: int = 12,
    noise: float = 0.1,
    shares: Sequence[tuple[str, float]] = (("bytes", 0.5), ("parameters", 0.5), ("decode", 0.5)),
) -> Problem:
    """A parent of Llama-3.1-405B's sizes: 5 attentions x `widths` FFNs a layer, batch 64, context 8,192, bf16.

    Scores are convex in what is cut, of very different layers, with `noise` (of their logarithm); times are those of an H100's
    bandwidth and arithmetic with 1 % noise. Each limit lies at a share between its least and largest total.
    """
    rng = np.random.default_rng(seed)
    hidden, full = 16_384, 53_248
    kv = [8, 4, 2, 1, 0]
    width = [round(full * i / (widths - 1) / 256) * 256 for i in range(widths)]
    pairs = [(k, w) for k in kv for w in width]
    parameters = [(2 * hidden + 2 * k * 128 + 1) * hidden * (k > 0) + (3 * w + 1) * hidden * (w > 0) for k, w in pairs]
    cache = [2 * k * 128 * 2 * 64 * 8192 for k, _ in pairs]
    scores: list[list[float]] = []
    amounts: dict[str, list[list[int]]] = {name: [] for name in ("bytes", "parameters", "kv", "prefill", "decode")}
    for layer in range(layers):
        of_ffn = 0.02 * math.exp(rng.normal(0, 0.8)) * (3 if layer in (0, 1, layers - 1) else 1)
        of_attention = 0.01 * math.exp(rng.normal(0, 0.8))
        row = []
        for k, w in pairs:
            cut = of_ffn * ((1 - w / full) ** 2 + 0.3 * (w == 0)) + of_attention * ((1 - k / 8) ** 1.5 + (k == 0))
            row.append(cut * math.exp(rng.normal(0, noise)))
        scores.append(row)
        amounts["bytes"].append([2 * p + c for p, c in zip(parameters, cache, strict=True)])
        amounts["parameters"].append(parameters)
        amounts["kv"].append(cache)
        jitter = np.exp(rng.normal(0, 0.01, (2, len(pairs))))
        decode = [
            (2 * p + c) / 3.35e12 * 1e9 + 5000 * (k > 0) for p, c, (k, _) in zip(parameters, cache, pairs, strict=True)
        ]
        amounts["decode"].append([int(t * j) for t, j in zip(decode, jitter[0], strict=True)])
        amounts["prefill"].append(
            [int((p * 2 * 2048 * 64 / 6e14 * 1e9 + 1e5) * j) for p, j in zip(parameters, jitter[1], strict=True)]
        )
    limits = []
    for name, share in shares:
        least, most = sum(map(min, amounts[name])), sum(map(max, amounts[name]))
        limits.append(Limit(name, amounts[name], high=least + int(share * (most - least))))
    return Problem(scores, limits)
