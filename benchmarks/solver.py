"""How long the proven optimum of the additive problem takes, at the sizes of large parents.

    python benchmarks/solver.py                    # a CPU: some minutes, most of them for pools

First *real-like* data (costs fall with the width kept, scores rise with what is cut, and the limits' amounts follow one another)
and *unrelated* (everything at random, apart from one limit, which is what such solvers find hardest). Then data of a 405B
parent's sizes at 126 x 60 x 3: KV heads x widths in whole steps, scores convex with and without noise, times with 1 % noise, and
three limits that bind one, two or all at once. At last one step of a path: at most 6 groups change under limits 1.5 % tighter.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from additive_problems import real_like, realistic, uncorrelated, unrelated

from nas.solve import Limit, Problem, Solution, solve, solve_pool

SIZES = ((30, 20, 1), (80, 54, 1), (80, 54, 2), (126, 60, 1), (126, 60, 3))
SEEDS = range(5)
EQUAL = (("bytes", 0.5), ("parameters", 0.5), ("decode", 0.5))
TIMES = (("bytes", 0.4), ("prefill", 0.42), ("decode", 0.41))
CACHE = (("kv", 0.4), ("prefill", 0.5), ("parameters", 0.5))


def hard() -> Iterator[tuple[str, list[Problem]]]:
    for name, shares in (
        ("memory, parameters, decode", EQUAL),
        ("memory, prefill, decode", TIMES),
        ("KV, prefill, parameters", CACHE),
    ):
        for noise in (0.1, 0.02, 0.0):
            yield f"{name}; noise {noise}", [realistic(200 + s, noise=noise, shares=shares) for s in SEEDS]
    yield "unrelated, tight", [uncorrelated(s, share=0.14) for s in SEEDS]


def main() -> None:
    print(
        "| layers | candidates | limits | data | CPU-seconds, median (most) | largest relative gap | pool of 8, CPU-seconds |"
    )
    print("|" + "---|" * 7)
    for size in SIZES:
        for make in (real_like, unrelated):
            problems = [make(seed, *size) for seed in SEEDS]
            started = time.process_time()
            solve_pool(problems[-1], 8, 3)
            pool = time.process_time() - started
            print(
                f"| {' | '.join(map(str, size))} | {make.__name__.replace('_', '-')} | {_row(problems)} | {pool:.2f} |",
                flush=True,
            )
    print(
        "\n| 126 x 60 x 3: limits; data | CPU-seconds, median (most) | largest relative gap | step of a path, CPU-seconds | its gap |"
    )
    print("|" + "---|" * 5)
    for name, problems in hard():
        row = _row(problems)
        _, start = _timed(problems[0])
        limits = [Limit(m.name, m.amounts, high=int(m.total(start.choice) * 0.985)) for m in problems[0].limits]
        seconds, step = _timed(Problem(problems[0].scores, limits), near=(start.choice, 6))
        print(f"| {name} | {row} | {seconds:.2f} | {step.gap / abs(step.score):.1e} |", flush=True)


def _row(problems: list[Problem]) -> str:
    timed = [_timed(problem) for problem in problems]
    seconds = [taken for taken, _ in timed]
    gap = max(solution.gap / abs(solution.score) for _, solution in timed)
    return f"{statistics.median(seconds):.2f} ({max(seconds):.2f}) | {gap:.1e}"


def _timed(problem: Problem, near: tuple[tuple[int, ...], int] | None = None) -> tuple[float, Solution]:
    started = time.process_time()
    solution = solve(problem, near=near)
    assert solution is not None
    return time.process_time() - started, solution


if __name__ == "__main__":
    main()
