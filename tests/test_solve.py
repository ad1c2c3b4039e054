"""The solver against brute force: optimal, proven, never beyond a limit, and pools whose members differ as asked."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Sequence

import pytest
from additive_problems import (
    differences,
    every_choice,
    feasible,
    problem_of,
    real_like,
    realistic,
    small_problem,
    uncorrelated,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from blocks.errors import ConfigError, InfeasibleBudgetError, NasError
from nas import knapsack
from nas.solve import Limit, Problem, Solution, extreme, solve, solve_pool, why_infeasible

SECONDS = 10.0  # of CPU time for 126 groups x 60 candidates x 3 limits: 5 promised, and slow machines


def one_limit(scores: Sequence[Sequence[float]], amounts: Sequence[Sequence[int]], high: int) -> Problem:
    return problem_of(scores, (amounts, None, high))


def assert_consistent(problem: Problem, solution: Solution) -> None:
    assert problem.feasible(solution.choice)
    assert solution.totals == {limit.name: problem.total(limit.name, solution.choice) for limit in problem.limits}
    assert solution.score == pytest.approx(problem.total_score(solution.choice))
    assert solution.gap == max(0.0, solution.score - solution.bound)
    assert set(solution.binding) == {name for name, price in solution.prices.items() if price > 0}


def assert_best(problem: Problem, solution: Solution | None, allowed: list[tuple[int, ...]]) -> None:
    """Of the choices allowed, the best, and proven."""
    assert solution is not None
    assert_consistent(problem, solution)
    assert solution.choice in allowed
    best = min(map(problem.total_score, allowed))
    assert solution.score == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert solution.bound <= best + 1e-9
    assert solution.gap <= 2e-9 * max(1.0, abs(best))


def assert_solved(problem: Problem) -> None:
    allowed = feasible(problem)
    if allowed:
        assert_best(problem, solve(problem), allowed)
        return
    with pytest.raises(InfeasibleBudgetError):
        solve(problem)


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_solution_equals_brute_force(start: int) -> None:
    for seed in range(start, start + 50):
        assert_solved(small_problem(seed))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any scores and amounts, with up to three limits that have a low bound, a high one, both or none."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))

    def table(values: st.SearchStrategy) -> list[list]:  # type: ignore[type-arg]
        return [draw(st.lists(values, min_size=size, max_size=size)) for size in sizes]

    limits = []
    for place in range(draw(st.integers(0, 3))):
        amounts = table(st.integers(0, draw(st.sampled_from([3, 1000, 2**40]))))
        least, most = sum(map(min, amounts)), sum(map(max, amounts))
        ends = [draw(st.none() | st.integers(least, most)) for _ in range(2)]
        if None not in ends:
            ends.sort()
        limits.append(Limit(f"limit {place}", amounts, *ends))
    return Problem(table(st.floats(-10, 10)), limits)


@settings(max_examples=100, deadline=None)
@given(problems())
def test_any_scores_amounts_and_bounds_are_solved(problem: Problem) -> None:
    assert_solved(problem)


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_near_and_avoid_together_equal_brute_force(problem: Problem, data: st.DataObject) -> None:
    allowed = feasible(problem)
    assume(allowed)
    groups = len(problem.scores)
    center, changes = data.draw(st.sampled_from(every_choice(problem))), data.draw(st.integers(0, groups))
    avoid, distance = data.draw(st.lists(st.sampled_from(allowed), max_size=2)), data.draw(st.integers(1, groups))
    left = [
        c for c in allowed if differences(c, center) <= changes and all(differences(c, a) >= distance for a in avoid)
    ]
    solution = solve(problem, avoid, distance, (center, changes))
    if left:
        assert_best(problem, solution, left)
    else:
        assert solution is None


@settings(max_examples=60, deadline=None)
@given(problems())
def test_what_limits_leave_and_why_they_conflict_equal_brute_force(problem: Problem) -> None:
    for limit in problem.limits:
        others = Problem(problem.scores, [other for other in problem.limits if other is not limit])
        totals = [limit.total(choice) for choice in feasible(others)]
        assert extreme(problem, limit.name, "min") == (min(totals) if totals else None)
        assert extreme(problem, limit.name, "max") == (max(totals) if totals else None)
    conflicting = why_infeasible(problem).conflicting
    assert bool(conflicting) == (not feasible(problem))
    named = [limit for limit in problem.limits if limit.name in conflicting]
    assert not conflicting or not feasible(Problem(problem.scores, named))
    for fewer in itertools.combinations(named, len(named) - 1) if named else ():
        assert feasible(Problem(problem.scores, fewer))


@pytest.mark.parametrize("missing", [0, 1])
def test_a_limit_that_one_choice_meets_to_the_byte(missing: int) -> None:
    """Coprime amounts of 10 GB: a floating-point solver's tolerances are thousands of bytes wide."""
    for seed in range(25):
        rng = random.Random(seed)
        amounts = [[rng.randrange(10**10, 2 * 10**10) | 1 for _ in range(4)] for _ in range(5)]
        scores = [[rng.random() for _ in range(4)] for _ in range(5)]
        wanted = sum(rng.choice(group) for group in amounts) - missing
        assert_solved(one_limit(scores, amounts, wanted))
        assert_solved(problem_of(scores, (amounts, wanted, wanted)))


@pytest.mark.parametrize("lost", [12_000, 0], ids=["explored", "program"])
def test_single_bytes_beside_gigabytes(monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """Differences of bytes and of gigabytes in one problem, so that no common divisor and no offset helps.

    Both ways of solving must hold to the byte; the integer program alone lets many choices through that are over.
    """
    monkeypatch.setattr(knapsack, "LOST_STATES", lost)
    for seed in range(20):
        rng = random.Random(seed)
        amounts = [[rng.randrange(5) if c < 2 else 10**10 + rng.randrange(5) for c in range(4)] for _ in range(6)]
        scores = [[rng.random() for _ in range(4)] for _ in range(6)]
        assert_solved(one_limit(scores, amounts, 3 * 10**10 + rng.randrange(12)))
        base = [rng.randrange(10**10, 2 * 10**10) for _ in range(6)]
        amounts = [[amount + rng.randrange(40) for _ in range(4)] for amount in base]
        assert_solved(one_limit(scores, amounts, sum(map(min, amounts)) + rng.randrange(60)))


def test_the_integer_program_alone_equals_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "LOST_STATES", 0)
    for seed in range(300, 360):
        assert_solved(small_problem(seed))


def test_bounds_hold_when_states_are_too_few_for_a_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "FEWEST_STATES", 2)
    monkeypatch.setattr(knapsack, "MOST_STATES", 2)
    unproven = 0
    for seed in range(60):
        problem = uncorrelated(seed, groups=6, candidates=4, limits=2)
        best = min(map(problem.total_score, feasible(problem)))
        solution = solve(problem)
        assert solution is not None
        assert_consistent(problem, solution)
        assert solution.bound <= best + 1e-9 and best <= solution.score + 1e-9
        unproven += solution.gap > 1e-6
    assert unproven > 5  # so that the test has looked at what it is about


@pytest.mark.parametrize(
    "problem",
    [
        uncorrelated(0),
        uncorrelated(1, share=0.14),
        real_like(0, 126, 60, 3),
        realistic(0),
        realistic(1, shares=(("bytes", 0.4), ("prefill", 0.42), ("decode", 0.41))),
        realistic(2, noise=0.02, shares=(("kv", 0.4), ("prefill", 0.5), ("parameters", 0.5))),
    ],
    ids=["uncorrelated", "uncorrelated-tight", "real-like", "one-binds", "times", "coarse"],
)
def test_the_largest_size_is_proven_in_seconds(problem: Problem) -> None:
    assert (len(problem.scores), len(problem.scores[0]), len(problem.limits)) == (126, 60, 3)
    started = time.process_time()
    solution = solve(problem)
    assert time.process_time() - started <= SECONDS
    assert solution is not None
    assert_consistent(problem, solution)
    assert solution.gap <= 1.001e-9 * abs(solution.score)


def test_the_largest_size_agrees_with_the_integer_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that HiGHS can do as well: two ways of solving that share nothing but the relaxation."""
    problem = realistic(0, layers=40)
    explored = solve(problem)
    monkeypatch.setattr(knapsack, "LOST_STATES", 0)
    programmed = solve(problem)
    assert explored is not None and programmed is not None
    assert explored.score == pytest.approx(programmed.score, rel=1e-8)


def test_a_narrow_range_of_real_sizes_is_met() -> None:
    """Within 0.01 % of the optimum's memory and between two numbers of parameters: nearly an equality."""
    problem = realistic(4, shares=(("bytes", 0.5), ("parameters", 0.55)))
    memory, parameters = problem.limits
    assert memory.high is not None
    tight = Limit("memory", memory.amounts, int(memory.high * 0.9999), memory.high)
    total = parameters.total(solve(problem).choice)  # type: ignore[union-attr]
    fewer = Limit("parameters", parameters.amounts, int(total * 0.97), int(total * 0.98))
    solution = solve(Problem(problem.scores, [tight, fewer]))
    assert solution is not None
    assert_consistent(Problem(problem.scores, [tight, fewer]), solution)
    assert solution.gap <= 1.001e-9 * abs(solution.score)


def test_prices_are_what_a_unit_more_saves() -> None:
    """The relaxation of many small layers is nearly linear: a slightly larger budget saves its price."""
    problem = uncorrelated(3, groups=400, candidates=8, limits=2)
    before = solve(problem)
    assert before is not None and set(before.binding) == {"limit 0", "limit 1"}
    for place, limit in enumerate(problem.limits):
        assert limit.high is not None
        more = limit.high // 100
        limits = list(problem.limits)
        limits[place] = Limit(limit.name, limit.amounts, high=limit.high + more)
        after = solve(Problem(problem.scores, limits))
        assert after is not None
        assert before.score - after.score == pytest.approx(before.prices[limit.name] * more, rel=0.1)


def test_a_slack_limit_has_no_price() -> None:
    problem = problem_of([[0.0, 1.0]], ([[5, 1]], None, 9), ([[5, 1]], 3, None))
    solution = solve(problem)
    assert solution is not None
    assert (solution.choice, solution.prices, solution.binding) == ((0,), {"limit 0": 0.0, "limit 1": 0.0}, ())


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_pool_members_are_the_best_at_their_distance_from_all_before(distance: int) -> None:
    for seed in range(1000, 1012):
        problem = small_problem(seed)
        left = feasible(problem)
        if not left:
            continue
        pool = solve_pool(problem, 5, distance, gap=1e-9)
        for solution in pool:
            assert_best(problem, solution, left)
            left = [choice for choice in left if differences(choice, solution.choice) >= distance]
        assert len(pool) == 5 or not left


def test_a_pool_of_sixteen_is_quick_and_its_members_keep_their_distance() -> None:
    problem = realistic(5, layers=40, shares=(("bytes", 0.5), ("decode", 0.55)))
    started = time.process_time()
    pool = solve_pool(problem, 16, 4)
    assert time.process_time() - started <= 2 * SECONDS
    assert len(pool) == 16
    assert all(a.score <= b.score for a, b in itertools.pairwise(pool))
    assert all(differences(a.choice, b.choice) >= 4 for a, b in itertools.combinations(pool, 2))
    for solution in pool:
        assert_consistent(problem, solution)
        assert solution.gap <= 2e-3 * solution.score


def test_a_pool_ends_when_nothing_is_left() -> None:
    problem = one_limit([[0.0, 1.0], [0.0, 1.0]], [[3, 1], [3, 1]], 4)
    assert [set(s.choice) for s in solve_pool(problem, 10, 1)] == [{0, 1}, {0, 1}, {1}]
    assert solve(problem, [(0, 1), (1, 0), (1, 1)]) is None


def test_limits_that_cannot_be_met_are_named_with_what_they_can_reach() -> None:
    problem = one_limit([[0.0, 1.0], [0.0, 1.0]], [[2_000_000_000, 1_500_000_000], [4, 7]], 1_500_000_003)
    with pytest.raises(InfeasibleBudgetError, match="limit 0") as caught:
        solve(problem)
    assert (caught.value.smallest_gb, caught.value.binding) == (1.500000004, "limit 0")
    with pytest.raises(InfeasibleBudgetError):
        solve_pool(problem, 3, 1)
    with pytest.raises(InfeasibleBudgetError):
        solve(problem, near=((0, 0), 1))


def test_two_limits_that_conflict_only_together() -> None:
    problem = problem_of([[0.0, 1.0]] * 2, ([[5, 1]] * 2, None, 4), ([[9, 2]] * 2, 10, None), ([[1, 1]] * 2, None, 9))
    report = why_infeasible(problem)
    assert report.conflicting == ("limit 0", "limit 1")
    reach = report.reach("limit 0")
    assert (reach.least, reach.largest, reach.least_under_others, reach.largest_under_others) == (2, 10, 6, 10)
    assert not reach.missed_alone and reach.missed_under_others
    with pytest.raises(InfeasibleBudgetError, match="limit 0 and limit 1"):
        solve(problem)


def test_large_infeasible_problems_are_told_soon() -> None:
    problem = uncorrelated(9, share=0.1)
    started = time.process_time()
    with pytest.raises(InfeasibleBudgetError):
        solve(problem)
    assert time.process_time() - started <= 2 * SECONDS


def test_the_cheapest_choice_itself_is_feasible() -> None:
    solution = solve(one_limit([[0.0, 1.0], [0.0, 1.0]], [[3, 1], [3, 2]], 3))
    assert solution is not None
    assert (solution.choice, solution.totals) == ((1, 1), {"limit 0": 3})


def test_no_limits_at_all() -> None:
    solution = solve(Problem([[3.0, 1.0, 2.0], [0.5]], []))
    assert solution is not None
    assert (solution.choice, solution.score, solution.bound, solution.totals) == ((1, 0), 1.5, 1.5, {})


def test_amounts_beyond_what_can_be_counted_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than the solver can count"):
        solve(one_limit([[0.0, 1.0]] * 2, [[10**30 + 1, 10**29], [0, 1]], 10**30))


def test_amounts_of_any_size_with_a_common_unit_are_solved() -> None:
    solution = solve(one_limit([[0.0, 1.0], [0.0, 0.5]], [[2 * 10**30, 10**30], [2 * 10**30, 10**30]], 3 * 10**30))
    assert solution is not None
    assert (solution.choice, solution.totals) == ((0, 1), {"limit 0": 3 * 10**30})


def test_standard_output_stays_clean(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "LOST_STATES", 0)
    for seed in range(5):
        try:
            solve(small_problem(seed, limits=3))
        except NasError:
            continue
    assert capfd.readouterr().out == ""
