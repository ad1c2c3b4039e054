"""The solver against brute force: optimal, never over the limit, and pools whose members differ as asked."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks.errors import InfeasibleBudgetError
from nas.solve import Problem, Solution, solve, solve_pool

# HiGHS stops when bound and score are 1e-6 nats apart, far below what two scores can be told apart by.
SCORE_TOLERANCE = 1e-6


def random_problem(seed: int, layers: int = 5, candidates: int = 4) -> Problem:
    """Layers with different numbers of candidates, and a limit anywhere between the cheapest and the dearest."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, candidates) for _ in range(rng.randint(1, layers))]
    unit = rng.choice([1, 2, 256, 5_242_880])
    scores = [[rng.choice([0.0, rng.random(), 20 * rng.random()]) for _ in range(size)] for size in sizes]
    costs = [[unit * rng.randrange(1000) for _ in range(size)] for size in sizes]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    return Problem(scores, costs, rng.randint(low, high))


def feasible(problem: Problem) -> list[tuple[int, ...]]:
    every = itertools.product(*(range(len(scores)) for scores in problem.scores))
    return [choice for choice in every if problem.total_cost(choice) <= problem.limit]


def differences(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))


def assert_consistent(problem: Problem, solution: Solution) -> None:
    assert solution.cost == problem.total_cost(solution.choice) <= problem.limit
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
    assert_optimal(Problem(scores, costs, low + int(share * (high - low))))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_limit_that_one_choice_meets_to_the_byte(missing: int) -> None:
    """Coprime costs of 10 GB: the solver's own tolerances are thousands of bytes wide."""
    for seed in range(25):
        rng = random.Random(seed)
        costs = [[rng.randrange(10**10, 2 * 10**10) | 1 for _ in range(4)] for _ in range(5)]
        scores = [[rng.random() for _ in range(4)] for _ in range(5)]
        wanted = [rng.randrange(4) for _ in range(5)]
        limit = sum(costs[layer][candidate] for layer, candidate in enumerate(wanted)) - missing
        assert_optimal(Problem(scores, costs, max(limit, sum(map(min, costs)))))


def test_candidates_that_differ_by_single_bytes_of_ten_billion() -> None:
    """Tolerances let many choices through that are a few bytes over: none may be returned, and no feasible one lost."""
    for seed in range(25):
        rng = random.Random(seed)
        base = [rng.randrange(10**10, 2 * 10**10) for _ in range(6)]
        costs = [[cost + rng.randrange(40) for _ in range(4)] for cost in base]
        scores = [[rng.random() for _ in range(4)] for _ in range(6)]
        assert_optimal(Problem(scores, costs, sum(map(min, costs)) + rng.randrange(60)))


def test_single_bytes_beside_gigabytes() -> None:
    """Differences of bytes and of gigabytes in one problem, so that no common divisor and no offset helps."""
    for seed in range(25):
        rng = random.Random(seed)
        costs = [[rng.randrange(5) if c < 2 else 10**10 + rng.randrange(5) for c in range(4)] for _ in range(6)]
        scores = [[rng.random() for _ in range(4)] for _ in range(6)]
        assert_optimal(Problem(scores, costs, 3 * 10**10 + rng.randrange(12)))


def test_real_sizes_are_solved_to_proven_optimality() -> None:
    """80 layers of 54 candidates, as a 70B parent has them: the bound proves what brute force cannot."""
    rng = random.Random(0)
    costs = [[rng.randrange(1, 2000) * 1_048_576 for _ in range(54)] for _ in range(80)]
    scores = [[rng.random() / (1 + cost / 1e9) for cost in layer] for layer in costs]
    problem = Problem(scores, costs, sum(max(layer) for layer in costs) // 3)
    solution = solve(problem)
    assert solution is not None
    assert_consistent(problem, solution)
    assert solution.score - solution.bound <= 1e-6 + 1e-4 * solution.score


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_pool_members_are_the_best_at_their_distance_from_all_before(distance: int) -> None:
    for seed in range(12):
        problem = random_problem(1000 + seed)
        pool = solve_pool(problem, 5, distance)
        left = feasible(problem)
        for solution in pool:
            assert_consistent(problem, solution)
            assert solution.score == pytest.approx(min(map(problem.total_score, left)), abs=SCORE_TOLERANCE)
            left = [choice for choice in left if differences(choice, solution.choice) >= distance]
        assert len(pool) == 5 or not left


def test_pool_is_sorted_and_its_members_keep_their_distance() -> None:
    rng = random.Random(1)
    costs = [[rng.randrange(1000) for _ in range(6)] for _ in range(12)]
    scores = [[rng.random() for _ in range(6)] for _ in range(12)]
    pool = solve_pool(Problem(scores, costs, 5000), 8, 3)
    assert len(pool) == 8
    assert all(a.score <= b.score + SCORE_TOLERANCE for a, b in itertools.pairwise(pool))
    assert all(differences(a.choice, b.choice) >= 3 for a, b in itertools.combinations(pool, 2))


def test_a_pool_ends_when_nothing_is_left() -> None:
    problem = Problem([[0.0, 1.0], [0.0, 1.0]], [[3, 1], [3, 1]], 4)
    assert [set(s.choice) for s in solve_pool(problem, 10, 1)] == [{0, 1}, {0, 1}, {1}]
    assert solve(problem, [(0, 1), (1, 0), (1, 1)]) is None


def test_a_limit_below_the_cheapest_is_infeasible_and_says_by_how_much() -> None:
    problem = Problem([[0.0, 1.0], [0.0, 1.0]], [[2_000_000_000, 1_500_000_000], [4, 7]], 1_500_000_003)
    with pytest.raises(InfeasibleBudgetError) as caught:
        solve(problem)
    assert (caught.value.smallest_gb, caught.value.binding) == (1.500000004, "memory")
    with pytest.raises(InfeasibleBudgetError):
        solve_pool(problem, 3, 1)


def test_the_cheapest_choice_itself_is_feasible() -> None:
    solution = solve(Problem([[0.0, 1.0], [0.0, 1.0]], [[3, 1], [3, 2]], 3))
    assert solution is not None
    assert (solution.choice, solution.cost) == ((1, 1), 3)
