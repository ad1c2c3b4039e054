"""Rounds of calibration text: every sequence once, and a stop only when the choices that scores lead to stay the same."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from nas.costs import CostModel, Scenario
from nas.interval import FEWEST
from nas.rounds import SHARES, TOLERANCE, choices, rounds, settled
from nas.table import ScoreRow

SHAPE = ModelShape(64, 512, 3, 4, 4, 16, 300)
PARENT, NARROW, NO_FFN, NO_ATTENTION, NOTHING = SPECS = [
    LayerSpec.parse(text) for text in ("kv4+ffn:512", "kv4+ffn:256", "kv4+ffn:skip", "skip+ffn:512", "skip+ffn:skip")
]


def row(layer: int, spec: LayerSpec, score: float) -> ScoreRow:
    return ScoreRow(
        layer, str(spec.attention), str(spec.ffn), score, None, None, "one-pass", score, score, None, 0, 0, 0
    )


def table(scores: list[list[float]], specs: list[LayerSpec] = SPECS) -> list[ScoreRow]:
    """Rows of all layers from scores by layer and spec."""
    return [row(layer, spec, score) for layer, own in enumerate(scores) for spec, score in zip(specs, own, strict=True)]


@given(st.integers(1, 2000))
def test_rounds_cover_all_sequences_once(sequences: int) -> None:
    parts = rounds(sequences)
    assert [n for part in parts for n in range(part.start, part.stop)] == list(range(sequences))
    assert 1 <= len(parts) <= 3
    assert parts[0].stop >= min(FEWEST, sequences)  # the first scores have intervals already


def test_rounds_are_a_quarter_half_and_all() -> None:
    assert rounds(64) == [slice(0, 16), slice(16, 32), slice(32, 64)]
    assert rounds(16) == [slice(0, 4), slice(4, 8), slice(8, 16)]
    assert rounds(8) == [slice(0, 4), slice(4, 8)]
    assert rounds(4) == [slice(0, 4)]
    assert rounds(2) == [slice(0, 2)]


@pytest.mark.parametrize("seed", range(10))
def test_choices_are_the_cheapest_by_score_at_each_budget(seed: int) -> None:
    """Against all architectures, each priced whole."""
    rng = random.Random(seed)
    scores = [[0.0, *(rng.random() for _ in SPECS[1:])] for _ in SHAPE.layers]
    costs = CostModel(SHAPE, Scenario())

    def score(chosen: tuple[LayerSpec, ...]) -> float:
        return sum(own[SPECS.index(spec)] for own, spec in zip(scores, chosen, strict=True))

    every = list(itertools.product(SPECS, repeat=3))
    expected = []
    for share in SHARES:
        limit = costs.budget_for_share(share)
        affordable = [chosen for chosen in every if costs.cost(Architecture(chosen)).total_bytes <= limit]
        expected.append([str(spec) for spec in min(affordable, key=score)])
    assert choices(table(scores), SHAPE) == expected


def test_budgets_out_of_reach_are_left_out() -> None:
    costs, half = CostModel(SHAPE, Scenario()), LayerSpec.parse("kv2+ffn:512")
    smallest = costs.cost(Architecture((half,) * 3)).total_bytes
    reached = [share for share in SHARES if smallest <= costs.budget_for_share(share)]
    assert 0 < len(reached) < len(SHARES)
    assert len(choices(table([[0.0, 1.0]] * 3, [PARENT, half]), SHAPE)) == len(reached)


def test_the_same_choices_are_settled() -> None:
    rows = table([[0.0, 0.1, 0.3, 0.4, 0.9]] * 3)
    now = choices(rows, SHAPE)
    assert settled(rows, now, now)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (0.3, True),  # as good by the later scores
        (0.3 * (1 + TOLERANCE / 2), True),  # or so little worse that they cannot tell
        (0.3 * (1 + 2 * TOLERANCE), False),
        (0.2, True),  # the earlier choice is even better: the solver had no other budget to see
    ],
)
def test_other_choices_are_settled_if_the_later_scores_cannot_tell_them_apart(later: float, expected: bool) -> None:
    """The earlier choice skips an attention at `later` nats, the later one an FFN at 0.3; nothing else differs."""
    rows = table([[0.0, 1.0, 0.3, later, 2.0]] * 3)
    before = [[str(NO_ATTENTION), str(PARENT), str(PARENT)]]
    now = [[str(NO_FFN), str(PARENT), str(PARENT)]]
    assert settled(rows, before, now) is expected


def test_one_unsettled_budget_is_enough_to_go_on() -> None:
    rows = table([[0.0, 0.1, 0.3, 0.4, 0.9]] * 3)
    same, worse, better = ([str(spec)] * 3 for spec in (NARROW, NO_ATTENTION, NO_FFN))
    assert settled(rows, [same, same], [same, same])
    assert not settled(rows, [same, worse], [same, better])
    assert not settled(rows, [worse, same], [better, same])


def test_nothing_lost_is_settled_only_by_nothing_lost() -> None:
    """Of a total of zero one per cent is zero."""
    rows = table([[0.0, 1e-9, 0.3, 0.4, 0.9]] * 3)
    parent, narrow = ([str(spec)] * 3 for spec in (PARENT, NARROW))
    assert settled(rows, [parent], [parent])
    assert not settled(rows, [narrow], [parent])
