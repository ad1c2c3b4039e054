"""Successive halving over healing tokens (Jamieson & Talwalkar, arXiv 1502.07943): how many are healed how far."""

from __future__ import annotations


def rungs(finalists: int, tokens: int) -> list[tuple[int, int]]:
    """(how many are healed, on how many tokens each) of every round; the last two on all `tokens`."""
    rounds = []
    while finalists > 1:
        rounds.append(finalists)
        finalists = -(-finalists // 2)
    return [(count, tokens >> (len(rounds) - 1 - number)) for number, count in enumerate(rounds)]
