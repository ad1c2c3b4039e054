"""What the child must meet: ranges of memory, parameters, KV cache, throughput and latency, as whole-number limits.

A value is a number (the usual side: at most, or at least for throughput) or a range `LOW:HIGH`, `LOW:` or `:HIGH`. All of
them are sums over layers, so the solver takes them together:

    memory       weights + KV cache + reserve                                 bytes
    parameters   as built                                                     count
    kv           KV cache of the scenario                                     bytes
    ttft         time to first token: reading the prompts of a whole batch    ns
    tpot         time per output token: one decode step of a whole batch      ns
    request      ttft + output x tpot                                         ns

Throughput of at least X tokens/s is a request time of at most batch x output / X.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from blocks.errors import ConfigError, InfeasibleBudgetError
from nas.solve import Limit, Problem, Reach, why_infeasible

if TYPE_CHECKING:
    from nas.costs import Scenario

UNITS = {"memory": "bytes", "parameters": "", "kv": "bytes", "ttft": "ns", "tpot": "ns", "request": "ns"}
FLAGS = {
    "memory": "--budget-gb",
    "parameters": "--max-params",
    "kv": "--max-kv-gb",
    "ttft": "--max-latency-ms",
    "tpot": "--max-latency-ms",
    "request": "--min-throughput or --max-latency-ms",
}
LARGEST = 1e18  # of what users may ask for, in any unit


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included; None is no bound.

    Decimal numbers as they were written, so that 0.0157 GB are 15,700,000 bytes, although 0.0157 * 1e9 is less.
    """

    low: Fraction | None = None
    high: Fraction | None = None

    @classmethod
    def parse(cls, value: float | str, flag: str, least: bool = False) -> Range:
        """A number or "LOW:HIGH". A number alone is the highest value, or the least one if `least`.

        Raises ConfigError for anything that is not one, is not positive, or has its ends crossed.
        """
        low, colon, high = str(value).partition(":")
        if not colon:
            low, high = (low, "") if least else ("", low)
        ends = [_number(text, value, flag) for text in (low, high)]
        if ends == [None, None]:
            raise ConfigError(f"{flag} {value}: no number in it; write 80, 60:80, 60: or :80")
        if None not in ends and ends[0] > ends[1]:  # type: ignore[operator]
            raise ConfigError(f"{flag} {value}: the least value is above the largest")
        return cls(*ends)

    def times(self, factor: int) -> Range:
        return Range(*(None if end is None else end * factor for end in (self.low, self.high)))

    def inverted(self, numerator: int) -> Range:
        """The range of numerator / x for x in this one."""
        low, high = (None if end is None else numerator / end for end in (self.high, self.low))
        return Range(low, high)

    @property
    def whole(self) -> tuple[int | None, int | None]:
        """The whole numbers within."""
        low = None if self.low is None else math.ceil(self.low)
        high = None if self.high is None else math.floor(self.high)
        return low, high


def _number(text: str, value: float | str, flag: str) -> Fraction | None:
    if not text.strip():
        return None
    try:
        number = float(text)
    except ValueError:
        raise ConfigError(f"{flag} {value}: {text!r} is not a number; write 80, 60:80, 60: or :80") from None
    if not number > 0:
        raise ConfigError(f"{flag} {value}: {text} must be above 0")
    if not 1 / LARGEST <= number <= LARGEST:
        raise ConfigError(f"{flag} {value}: {text} is no size of any machine")
    return Fraction(repr(number))


@dataclass(frozen=True)
class Bound:
    """One limit on a whole child, in whole numbers of its unit (see `UNITS`)."""

    name: str
    low: int | None
    high: int | None

    def allows(self, total: int) -> bool:
        return (self.low is None or total >= self.low) and (self.high is None or total <= self.high)

    def excess(self, total: int) -> float:
        """By how much a total is outside, as a share of the bound; 0 or below inside."""
        over = -math.inf if self.high is None else (total - self.high) / max(self.high, 1)
        under = -math.inf if self.low is None else (self.low - total) / max(self.low, 1)
        return max(over, under)


def cost_field(limit: str) -> str:
    """The field of a `nas.costs.Cost`, and of the costs in architecture.json, that a limit counts."""
    return {"memory": "total_bytes", "kv": "kv_bytes", "parameters": "parameters"}.get(limit, f"{limit}_ns")


def limits_told(bounds: Sequence[Bound]) -> dict[str, Any]:
    """Bounds as architecture.json has them: every limit, and the budget of memory."""
    budget = next((bound.high for bound in bounds if bound.name == "memory"), None)
    limits = {bound.name: {"low": bound.low, "high": bound.high, "unit": UNITS[bound.name]} for bound in bounds}
    return {"limits": limits, "budget_bytes": budget, "budget_gb": None if budget is None else budget / 1e9}


def in_words(name: str, value: float) -> str:
    """A whole-number total of a limit for people: "12.3456 GB", "1,234,567", "12.3 ms"."""
    unit = UNITS[name]
    if unit == "bytes":
        return f"{value / 1e9:.4f} GB"
    if unit == "ns":
        return f"{value / 1e6:,.3f} ms"
    return f"{value:,.0f}"


def infeasible(
    problem: Problem, fixed: Mapping[str, int], bounds: Sequence[Bound], advice: str = ""
) -> InfeasibleBudgetError:
    """Why no choice meets all limits, in one line: what binds, and the smallest budget that would do.

    Args:
        problem: the layers, whose limits have no choice.
        fixed: what no choice changes, by limit.
        bounds: on whole children, as asked for.
        advice: said last.
    """
    reaches = why_infeasible(problem).reaches
    alone = [reach for reach in reaches if reach.missed_alone]
    together = [reach for reach in reaches if reach.missed_under_others]
    asked = {bound.name: bound for bound in bounds}
    said = [_missed(reach, asked[reach.name], fixed[reach.name], bool(alone)) for reach in alone or together]
    memory = next((r.least if alone else r.least_under_others for r in alone or together if r.name == "memory"), None)
    smallest = math.inf if memory is None else (memory + fixed["memory"]) / 1e9
    binding = (alone or together or reaches)[0].name
    if alone:
        message = f"no child of this space meets the limits: {'; '.join(said)}"
    elif said:
        message = f"no child of this space meets all limits together; it would take {' or '.join(said)}"
    elif len(bounds) == 1:
        message = f"no child of this space lies within {_span(bounds[0])} ({FLAGS[bounds[0].name]}): they jump over it"
    else:
        message = f"no child of this space meets {', '.join(asked)} together, and no single one of them can be moved to make room"
    return InfeasibleBudgetError(message + advice, smallest, binding)


def _span(bound: Bound) -> str:
    ends = (None if end is None else in_words(bound.name, end) for end in (bound.low, bound.high))
    return f"{bound.name} of {' to '.join(end for end in ends if end is not None)}"


def _missed(reach: Reach, bound: Bound, fixed: int, alone: bool) -> str:
    least = reach.least if alone else reach.least_under_others
    most = reach.largest if alone else reach.largest_under_others
    name, flag = reach.name, FLAGS[reach.name]
    if bound.high is not None and least is not None and least + fixed > bound.high:
        reached = in_words(name, least + fixed)
        return (
            f"{name} is at least {reached}, above {in_words(name, bound.high)} ({flag})"
            if alone
            else f"{name} of {reached} ({flag})"
        )
    reached = in_words(name, (most or 0) + fixed)
    return (
        f"{name} is at most {reached}, below {in_words(name, bound.low or 0)} ({flag})"
        if alone
        else f"{name} of {reached} ({flag})"
    )


def as_limits(
    bounds: Sequence[Bound], fixed: Mapping[str, int], amounts: Mapping[str, Sequence[Sequence[int]]]
) -> list[Limit]:
    """Limits on the sum over layers: those on the whole child less what is fixed."""
    return [
        Limit(
            bound.name,
            amounts[bound.name],
            None if bound.low is None else bound.low - fixed[bound.name],
            None if bound.high is None else bound.high - fixed[bound.name],
        )
        for bound in bounds
    ]


class Prices(Protocol):
    """What turns a wish into bytes: a `CostModel`, or a table from elsewhere."""

    @property
    def scenario(self) -> Scenario: ...
    def budget_for_share(self, share: float) -> int: ...


def bounds_of(ranges: Mapping[str, Range], costs: Prices) -> list[Bound]:
    """Ranges as they are asked for (GB, shares, tokens/s, ms; `SearchConfig.ranges`) as bounds in whole numbers.

    What bounds the same total twice, such as a throughput and a latency, becomes one bound. Raises ConfigError if
    nothing is left between the two.
    """
    found: dict[str, tuple[int | None, int | None]] = {}
    for name, wanted in ranges.items():
        limit, whole = _in_whole_numbers(name, wanted, costs)
        low, high = found.get(limit, (None, None))
        found[limit] = _tighter(low, whole[0], max), _tighter(high, whole[1], min)
    for limit, (low, high) in found.items():
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"{FLAGS[limit]}: at least {in_words(limit, low)} and at most {in_words(limit, high)} leave nothing between them"
            )
    return [Bound(limit, low, high) for limit, (low, high) in found.items()]


def _in_whole_numbers(name: str, wanted: Range, costs: Prices) -> tuple[str, tuple[int | None, int | None]]:
    if name == "share":
        low, high = (None if end is None else costs.budget_for_share(float(end)) for end in (wanted.low, wanted.high))
        return "memory", (low, high)
    if name == "throughput":
        scenario = costs.scenario
        return "request", wanted.inverted(scenario.batch * scenario.output_tokens * 10**9).whole
    factor = {"memory": 10**9, "kv": 10**9, "parameters": 1}.get(name, 10**6)
    return name, wanted.times(factor).whole


def _tighter(a: int | None, b: int | None, of: Callable[[int, int], int]) -> int | None:
    return b if a is None else a if b is None else of(a, b)
