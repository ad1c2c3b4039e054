"""The solver against brute force: optimal, never over the limit, and pools whose members differ as asked."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.errors import InfeasibleBudgetError
from nas.solve import POOL_GAP, Limit, Problem, Solution, extreme, solve, solve_pool, why_infeasible

SCORE_TOLERANCE = 1e-7  # relative rounding of sums, and the gap that counts as proven


def memory(scores: list[list[float]], costs: list[list[int]], high: int) -> Problem:
    return Problem(scores, [Limit("memory", costs, high=high)])


def random_problem(seed: int, layers: int = 5, candidates: int = 4) -> Problem:
    """Layers with different numbers of candidates, and a limit anywhere between the cheapest and the dearest."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, candidates) for _ in range(rng.randint(1, layers))]
    unit = rng.choice([1, 2, 256, 5_242_880])
    scores = [[rng.choice([0.0, rng.random(), 20 * rng.random()]) for _ in range(size)] for size in sizes]
    costs = [[unit * rng.randrange(1000) for _ in range(size)] for size in sizes]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    return memory(scores, costs, rng.randint(low, high))


def feasible(problem: Problem) -> list[tuple[int, ...]]:
    every = itertools.product(*(range(len(scores)) for scores in problem.scores))
    return [choice for choice in every if problem.feasible(choice)]


def differences(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def assert_consistent(problem: Problem, solution: Solution) -> None:
    assert problem.feasible(solution.choice)
    assert solution.totals == {limit.name: limit.total(solution.choice) for limit in problem.limits}
    assert solution.score == pytest.approx(problem.total_score(solution.choice))
    assert solution.bound <= solution.score + SCORE_TOLERANCE


def assert_optimal(problem: Problem) -> None:
    solution = solve(problem)
    assert solution is not None
    assert_consistent(problem, solution)
    best = min(map(problem.total_score, feasible(problem)))
    assert solution.score == pytest.approx(best, abs=SCORE_TOLERANCE)
    assert solution.bound == pytest.approx(best, abs=SCORE_TOLERANCE)


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_solution_equals_brute_force(start: int) -> None:
    for seed in range(start, start + 50):
        assert_optimal(random_problem(seed))


@settings(max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.floats(0, 10), st.integers(0, 2**40)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.floats(0, 1),
)
def test_any_scores_and_bytes_are_solved(layers: list[list[tuple[float, int]]], share: float) -> None:
    scores = [[score for score, _ in layer] for layer in layers]
    costs = [[cost for _, cost in layer] for layer in layers]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    assert_optimal(memory(scores, costs, low + int(share * (high - low))))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_limit_that_one_choice_meets_to_the_byte(missing: int) -> None:
    """Coprime costs of 10 GB: the solver's own tolerances are thousands of bytes wide."""
    for seed in range(25):
        rng = random.Random(seed)
        costs = [[rng.randrange(10**10, 2 * 10**10) | 1 for _ in range(4)] for _ in range(5)]
        scores = [[rng.random() for _ in range(4)] for _ in range(5)]
        wanted = [rng.randrange(4) for _ in range(5)]
        limit = sum(costs[layer][candidate] for layer, candidate in enumerate(wanted)) - missing
        assert_optimal(memory(scores, costs, max(limit, sum(map(min, costs)))))


def test_candidates_that_differ_by_single_bytes_of_ten_billion() -> None:
    """Tolerances let many choices through that are a few bytes over: none may be returned, and no feasible one lost."""
    for seed in range(25):
        rng = random.Random(seed)
        base = [rng.randrange(10**10, 2 * 10**10) for _ in range(6)]
        costs = [[cost + rng.randrange(40) for _ in range(4)] for cost in base]
        scores = [[rng.random() for _ in range(4)] for _ in range(6)]
        assert_optimal(memory(scores, costs, sum(map(min, costs)) + rng.randrange(60)))


def test_single_bytes_beside_gigabytes() -> None:
    """Differences of bytes and of gigabytes in one problem, so that no common divisor and no offset helps."""
    for seed in range(25):
        rng = random.Random(seed)
        costs = [[rng.randrange(5) if c < 2 else 10**10 + rng.randrange(5) for c in range(4)] for _ in range(6)]
        scores = [[rng.random() for _ in range(4)] for _ in range(6)]
        assert_optimal(memory(scores, costs, 3 * 10**10 + rng.randrange(12)))


def test_real_sizes_are_solved_to_proven_optimality() -> None:
    """80 layers of 54 candidates, as a 70B parent has them: the bound proves what brute force cannot."""
    rng = random.Random(0)
    costs = [[rng.randrange(1, 2000) * 1_048_576 for _ in range(54)] for _ in range(80)]
    scores = [[rng.random() / (1 + cost / 1e9) for cost in layer] for layer in costs]
    problem = memory(scores, costs, sum(max(layer) for layer in costs) // 3)
    solution = solve(problem)
    assert solution is not None
    assert_consistent(problem, solution)
    assert solution.gap <= 1e-9 * (1 + solution.score)


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_pool_members_are_the_best_at_their_distance_from_all_before(distance: int) -> None:
    for seed in range(12):
        problem = random_problem(1000 + seed)
        pool = solve_pool(problem, 5, distance)
        left = feasible(problem)
        for solution in pool:
            assert_consistent(problem, solution)
            best = min(map(problem.total_score, left))
            assert best - SCORE_TOLERANCE <= solution.score <= best * (1 + POOL_GAP) + SCORE_TOLERANCE
            left = [choice for choice in left if differences(choice, solution.choice) >= distance]
        assert len(pool) == 5 or not left


def test_pool_is_sorted_and_its_members_keep_their_distance() -> None:
    rng = random.Random(1)
    costs = [[rng.randrange(1000) for _ in range(6)] for _ in range(12)]
    scores = [[rng.random() for _ in range(6)] for _ in range(12)]
    pool = solve_pool(memory(scores, costs, 5000), 8, 3)
    assert len(pool) == 8
    assert all(a.score <= b.score * (1 + POOL_GAP) + SCORE_TOLERANCE for a, b in itertools.pairwise(pool))
    assert all(differences(a.choice, b.choice) >= 3 for a, b in itertools.combinations(pool, 2))


def test_a_pool_ends_when_nothing_is_left() -> None:
    problem = memory([[0.0, 1.0], [0.0, 1.0]], [[3, 1], [3, 1]], 4)
    assert [set(s.choice) for s in solve_pool(problem, 10, 1)] == [{0, 1}, {0, 1}, {1}]
    assert solve(problem, [(0, 1), (1, 0), (1, 1)]) is None


def test_a_limit_below_the_cheapest_is_infeasible_and_says_by_how_much() -> None:
    problem = memory([[0.0, 1.0], [0.0, 1.0]], [[2_000_000_000, 1_500_000_000], [4, 7]], 1_500_000_003)
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(problem)
    assert (caught.value.smallest_gb, caught.value.binding) == (1.500000004, "memory")
    with pytest.raises(InfeasibleBudgetError):
        solve_pool(problem, 3, 1)


def test_the_cheapest_choice_itself_is_feasible() -> None:
    solution = solve(memory([[0.0, 1.0], [0.0, 1.0]], [[3, 1], [3, 2]], 3))
    assert solution is not None
    assert (solution.choice, solution.totals) == ((1, 1), {"memory": 3})


# Several limits


def limited_problem(seed: int) -> Problem:
    """Up to four groups and three limits, each with a least value, a largest one, or both; often without any choice."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, 4) for _ in range(rng.randint(1, 4))]
    scores = [[rng.choice([0.0, rng.random(), -rng.random()]) for _ in range(size)] for size in sizes]
    limits = []
    for name in ("memory", "parameters", "request")[: rng.randint(1, 3)]:
        unit = rng.choice([1, 7, 10**9])
        amounts = [[unit * rng.randrange(50) for _ in range(size)] for size in sizes]
        ends = sorted(rng.randint(sum(map(min, amounts)), sum(map(max, amounts))) for _ in range(2))
        low, high = rng.choice([(None, ends[1]), (ends[0], None), (ends[0], ends[1])])
        limits.append(Limit(name, amounts, low, high))
    return Problem(scores, limits)


@pytest.mark.parametrize("start", range(0, 240, 60))
def test_several_limits_equal_brute_force(start: int) -> None:
    infeasible = 0
    for seed in range(start, start + 60):
        problem = limited_problem(seed)
        left = feasible(problem)
        if not left:
            infeasible += 1
            with pytest.raises(InfeasibleBudgetError):
                solve(problem)
            continue
        solution = solve(problem)
        assert solution is not None and problem.feasible(solution.choice)
        best = min(map(problem.total_score, left))
        assert solution.score == pytest.approx(best, abs=SCORE_TOLERANCE)
        assert solution.bound <= best + SCORE_TOLERANCE and solution.gap <= SCORE_TOLERANCE
        assert set(solution.prices) == {limit.name for limit in problem.limits} and min(solution.prices.values()) >= 0
    assert 0 < infeasible < 60


def test_near_and_avoid_equal_brute_force() -> None:
    for seed in range(60):
        problem, rng = limited_problem(2000 + seed), random.Random(seed)
        left = feasible(problem)
        if not left:
            continue
        centre, changes = rng.choice(left), rng.randint(0, 3)
        avoid, distance = rng.sample(left, min(2, len(left))), rng.randint(1, 2)
        allowed = [c for c in left if differences(c, centre) <= changes]
        allowed = [c for c in allowed if all(differences(c, other) >= distance for other in avoid)]
        solution = solve(problem, avoid, distance, near=(centre, changes))
        if not allowed:
            assert solution is None
            continue
        assert solution is not None and solution.choice in allowed
        assert solution.score == pytest.approx(min(map(problem.total_score, allowed)), abs=SCORE_TOLERANCE)


def test_the_reach_of_a_limit_under_the_others_equals_brute_force() -> None:
    for seed in range(60):
        problem = limited_problem(3000 + seed)
        for limit in problem.limits:
            others = Problem(problem.scores, [other for other in problem.limits if other is not limit])
            totals = [limit.total(choice) for choice in feasible(others)]
            assert extreme(problem, limit.name, "min") == min(totals, default=None)
            assert extreme(problem, limit.name, "max") == max(totals, default=None)
        conflict = why_infeasible(problem) if not feasible(problem) else None
        if conflict is not None:
            named = Problem(problem.scores, [limit for limit in problem.limits if limit.name in conflict.conflicting])
            assert not feasible(named), "the limits that are said to conflict have choices"


def test_the_price_of_a_limit_is_what_more_of_it_saves() -> None:
    """With many small groups the relaxation is near the truth: raising the limit by 5 % saves about price x 5 %."""
    rng = random.Random(0)
    costs = [[100 - 10 * c for c in range(8)] for _ in range(60)]
    scores = [[(1 + rng.random()) * c**1.5 / 100 for c in range(8)] for _ in range(60)]
    high = 3500
    tight, loose = solve(memory(scores, costs, high)), solve(memory(scores, costs, round(high * 1.05)))
    assert tight is not None and loose is not None and tight.binding == ("memory",)
    saved = tight.score - loose.score
    assert 0.7 * saved <= tight.prices["memory"] * high * 0.05 <= 1.5 * saved
    slack = solve(memory(scores, costs, 10**6))
    assert slack is not None and slack.binding == () and slack.prices == {"memory": 0.0}


def test_the_largest_search_is_solved_within_five_seconds() -> None:
    """126 layers, 60 candidates, three limits, as a 405B parent has them."""
    rng = random.Random(0)
    kept = [[rng.random() for _ in range(60)] for _ in range(126)]
    scores = [[(1 - share) ** 1.5 * rng.lognormvariate(-4, 0.5) for share in row] for row in kept]
    limits = []
    for name, share in (("memory", 0.5), ("parameters", 0.47), ("request", 0.48)):
        amounts = [[int(1e9 * x * rng.uniform(0.6, 1)) for x in row] for row in kept]
        limits.append(Limit(name, amounts, high=int(share * sum(map(max, amounts)))))
    started = time.process_time()
    solution = solve(Problem(scores, limits))
    assert solution is not None and solution.gap <= 1e-8 * solution.score
    assert time.process_time() - started <= 5
