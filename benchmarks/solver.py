"""How long the proven optimum of the additive problem takes.

    python benchmarks/solver.py                    # a CPU: about a minute

*real-like*: costs fall with the width kept, scores rise with what is cut, and the limits' amounts follow one another. *unrelated*:
everything at random, apart from one limit, which is what such solvers find hardest.
"""

from __future__ import annotations

import random
import statistics
import time

from nas.solve import Limit, Problem, solve, solve_pool

SIZES = ((30, 20, 1), (80, 54, 1), (80, 54, 2), (126, 60, 1), (126, 60, 3))
SEEDS = range(5)
SHARES = {"memory": 0.5, "parameters": 0.47, "request": 0.48}


def real_like(layers: int, candidates: int, limits: int, seed: int) -> Problem:
    rng = random.Random(seed)
    kept = [[1.0, *(rng.random() for _ in range(candidates - 1))] for _ in range(layers)]
    scores = [[(1 - share) ** 1.5 * rng.lognormvariate(-4, 0.5) for share in row] for row in kept]
    chosen = []
    for name, share in list(SHARES.items())[:limits]:
        amounts = [[int(1e9 * x * rng.uniform(0.6, 1)) for x in row] for row in kept]
        chosen.append(Limit(name, amounts, high=int(share * sum(map(max, amounts)))))
    return Problem(scores, chosen)


def unrelated(layers: int, candidates: int, limits: int, seed: int) -> Problem:
    rng = random.Random(seed)
    scores = [[rng.random() for _ in range(candidates)] for _ in range(layers)]
    chosen = []
    for name in list(SHARES)[:limits]:
        amounts = [[rng.randrange(10**9) for _ in range(candidates)] for _ in range(layers)]
        least, most = (sum(map(end, amounts)) for end in (min, max))
        chosen.append(Limit(name, amounts, high=least + int(0.3 * (most - least))))
    return Problem(scores, chosen)


def main() -> None:
    print(
        "| layers | candidates | limits | data | CPU-seconds, median (most) | largest relative gap | pool of 8, CPU-seconds |"
    )
    print("|" + "---|" * 7)
    for layers, candidates, limits in SIZES:
        for make in (real_like, unrelated):
            taken, gaps = [], []
            for seed in SEEDS:
                problem = make(layers, candidates, limits, seed)
                started = time.process_time()
                solution = solve(problem)
                taken.append(time.process_time() - started)
                assert solution is not None
                gaps.append(solution.gap / solution.score)
            started = time.process_time()
            solve_pool(problem, 8, 3)
            pool = time.process_time() - started
            seconds = f"{statistics.median(taken):.2f} ({max(taken):.2f})"
            name = make.__name__.replace("_", "-")
            print(
                f"| {layers} | {candidates} | {limits} | {name} | {seconds} | {max(gaps):.1e} | {pool:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
