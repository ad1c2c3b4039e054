"""The exact solver at the sizes of large parents: seconds, and what is proven.

Kinds of data: realistic ones of a 405B parent's sizes (costs fall with width, scores convex, of very different layers, with and
without noise; times with 1 % noise), and scores and amounts that have nothing to do with each other. Then a pool of 16, and one
step of a path (at most 6 groups change under a budget 1.5 % tighter).

    python benchmarks/solver.py            # CPU, a minute or two
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from additive_problems import realistic, uncorrelated

from nas.solve import Limit, Problem, Solution, solve, solve_pool

EQUAL = (("bytes", 0.5), ("parameters", 0.5), ("decode", 0.5))
TIMES = (("bytes", 0.4), ("prefill", 0.42), ("decode", 0.41))
CACHE = (("kv", 0.4), ("prefill", 0.5), ("parameters", 0.5))


def cases(seeds: int) -> dict[str, list[Problem]]:
    each = range(seeds)
    return {
        "80 x 54, memory": [uncorrelated(s, 80, 54, limits=1) for s in each],
        "80 x 60, realistic, memory": [realistic(s, 80, shares=(("bytes", 0.5),)) for s in each],
        "126 x 60 x 3, realistic, noise 0.1": [realistic(s, noise=0.1, shares=EQUAL) for s in each],
        "126 x 60 x 3, realistic, noise 0.02": [realistic(s, noise=0.02, shares=TIMES) for s in each],
        "126 x 60 x 3, realistic, KV cache": [realistic(s, noise=0.02, shares=CACHE) for s in each],
        "126 x 60 x 3, realistic, no noise": [realistic(s, noise=0.0, shares=EQUAL) for s in each],
        "126 x 60 x 3, unrelated": [uncorrelated(s) for s in each],
        "126 x 60 x 3, unrelated, tight": [uncorrelated(s, share=0.14) for s in each],
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=3)
    chosen = arguments.parse_args()
    print(
        "| groups x candidates x limits, data | CPU seconds, mean | at most | largest relative gap |\n|---|---|---|---|"
    )
    solve(uncorrelated(0, 10, 10))  # imports
    kinds = cases(chosen.seeds)
    for name, problems in kinds.items():
        timed = [_timed(problem) for problem in problems]
        seconds = [s for s, _ in timed]
        gap = max(solution.gap / abs(solution.score) for _, solution in timed)
        print(f"| {name} | {sum(seconds) / len(seconds):.2f} | {max(seconds):.2f} | {gap:.1e} |", flush=True)
    print(
        "\n| 16 choices, 4 groups apart | CPU seconds | worst member's score over the best | largest relative gap |\n|---|---|---|---|"
    )
    for name, problems in kinds.items():
        started = time.process_time()
        pool = solve_pool(problems[0], 16, 4)
        seconds_, worst = time.process_time() - started, pool[-1].score / pool[0].score
        gap = max(solution.gap / abs(solution.score) for solution in pool)
        print(f"| {name} | {seconds_:.1f} | {worst:.5f} | {gap:.1e} |", flush=True)
    print("\n| step of a path | CPU seconds | relative gap |\n|---|---|---|")
    for name, problems in kinds.items():
        _, start = _timed(problems[0])
        limits = [Limit(m.name, m.amounts, high=int(m.total(start.choice) * 0.985)) for m in problems[0].limits]
        seconds_, step = _timed(Problem(problems[0].scores, limits), near=(start.choice, 6))
        print(f"| {name} | {seconds_:.2f} | {step.gap / abs(step.score):.1e} |", flush=True)


def _timed(problem: Problem, near: tuple[tuple[int, ...], int] | None = None) -> tuple[float, Solution]:
    started = time.process_time()
    solution = solve(problem, near=near)
    assert solution is not None
    return time.process_time() - started, solution


if __name__ == "__main__":
    main()
