"""Limits of a search: what users write, in whole numbers; and the solver under several at once against brute force."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from app import World, nas
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import SCENARIO, SHAPE, costs_of, every_architecture, limited, random_table, shape_of, table_of

from blocks.errors import ConfigError, InfeasibleBudgetError
from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from nas.additive import Candidates
from nas.baselines import baselines
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario
from nas.finalists import variants
from nas.limits import Bound, Range, bounds_of
from nas.proposals import Proposer

SMOLLM2 = ModelShape(576, 1536, 30, 9, 3, 64, 49_152, tie_word_embeddings=True)


def bounds(costs: CostModel, **limits: Any) -> dict[str, tuple[int | None, int | None]]:
    return {bound.name: (bound.low, bound.high) for bound in bounds_of(SearchConfig(**limits).ranges, costs)}


# What users write


@pytest.mark.parametrize(
    ("text", "least", "expected"),
    [
        (80, False, (None, 80)),
        ("80", False, (None, 80)),
        (80, True, (80, None)),
        ("60:80", False, (60, 80)),
        ("60:80", True, (60, 80)),
        ("60:", False, (60, None)),
        (":80", True, (None, 80)),
        (" 1.5e3 : 2e3 ", False, (1500, 2000)),
        ("7:7", False, (7, 7)),
    ],
)
def test_a_limit_is_a_number_or_a_range(text: float | str, least: bool, expected: tuple[float, float]) -> None:
    found = Range.parse(text, "--flag", least)
    assert (found.low, found.high) == expected


@pytest.mark.parametrize(
    "text", ["", ":", "abc", "1:abc", "1:2:3", "0", "-3", "0:5", "nan", "inf", "80:60", "1e400", "8O"]
)
@pytest.mark.parametrize("name", ["budget_gb", "budget", "max_params", "max_kv_gb", "min_throughput", "max_latency_ms"])
def test_anything_else_is_one_line_that_names_the_flag(name: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SearchConfig(**{name: text})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"--{name.replace('_', '-')} {text}: ")


@pytest.mark.parametrize("text", [",", "1,2,3", "a,2", "1,0", "5:4,1"])
def test_two_latencies_are_read_as_strictly(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--max-latency-ms"):
        SearchConfig(max_latency_ms=text)


def test_numbers_beyond_all_machines_are_refused() -> None:
    for text in ("1e300", "1e-300"):
        for name in ("budget_gb", "min_throughput", "max_latency_ms"):
            with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} {text}: "):
                SearchConfig(**{name: text})


def test_a_share_is_at_most_one() -> None:
    for text in ("1.2", "0.5:1.2", 60):
        with pytest.raises(ConfigError, match=r"budget is .* a share between 0 and 1"):
            SearchConfig(budget=text)
    assert bounds(costs_of(), budget=1)["memory"][1] == costs_of().cost(SHAPE.parent_architecture).total_bytes


def test_a_limit_of_time_needs_a_clock() -> None:
    with pytest.raises(ConfigError, match="limits of time need a clock"):
        _ = Candidates.of(random_table(0), CostModel(SHAPE, SCENARIO), [Bound("request", None, 10**9)]).problem


# In whole numbers


@given(tenths_of_mb=st.integers(1, 10**8))
def test_gigabytes_of_four_digits_lose_no_byte(tenths_of_mb: int) -> None:
    """0.0157 GB are 15,700,000 bytes, although 0.0157 * 1e9 is less."""
    text = f"{tenths_of_mb / 10_000:.4f}"
    costs, size = costs_of(), tenths_of_mb * 100_000
    assert bounds(costs, budget_gb=text, max_kv_gb=float(text)) == {"memory": (None, size), "kv": (None, size)}
    assert bounds(costs, budget_gb=f"{text}:")["memory"] == (size, None)
    assert bounds(costs, budget_gb=f"{text}:{text}")["memory"] == (size, size)
    assert 0.0157 * 1e9 < 15_700_000


@given(ends=st.lists(st.decimals("0.0001", "1000", places=13), min_size=2, max_size=2).map(sorted))
def test_other_ends_are_rounded_inwards(ends: list[Decimal]) -> None:
    low, high = (Fraction(end) * 10**9 for end in ends)
    assert Range.parse(f"{ends[0]}:{ends[1]}", "--flag").times(10**9).whole == (math.ceil(low), math.floor(high))


def test_parameters_are_counted_one_by_one() -> None:
    assert bounds(costs_of(), max_params="1e6")["parameters"] == (None, 1_000_000)
    assert bounds(costs_of(), max_params="2.5:1e6")["parameters"] == (3, 1_000_000)
    assert bounds(costs_of(), max_params=1234567.9)["parameters"] == (None, 1_234_567)


@settings(max_examples=100)
@given(rate=st.decimals("0.001", "1e8", places=3), batch=st.integers(1, 512), output=st.integers(1, 4096))
def test_throughput_is_a_request_time_and_back(rate: Decimal, batch: int, output: int) -> None:
    """The longest request that is allowed has the throughput asked for, and one nanosecond more has not."""
    costs = CostModel(SHAPE, Scenario(batch=batch, context=8192, output=output))
    low, most = bounds(costs, min_throughput=str(rate))["request"]
    assert low is None and most is not None
    tokens = Fraction(batch * output * 10**9)
    assert tokens / (most + 1) < Fraction(rate) and (most == 0 or tokens / most >= Fraction(rate))
    assert most == 0 or costs.scenario.tokens_per_s(most) == pytest.approx(float(tokens / most), rel=1e-12)
    least, none = bounds(costs, min_throughput=f":{rate}")["request"]
    assert none is None and least == math.ceil(tokens / Fraction(rate))


def test_throughput_that_divides_is_exact() -> None:
    """2 x 128 tokens: at 1,000 tokens/s 0.256 s; at 300, 0.8533.. s, rounded down."""
    assert bounds(costs_of(), min_throughput=1000) == {"request": (None, 256_000_000)}
    assert bounds(costs_of(), min_throughput=300) == {"request": (None, 853_333_333)}
    assert bounds(costs_of(), min_throughput="300:1000") == {"request": (256_000_000, 853_333_333)}


def test_latencies_are_of_the_first_token_of_each_token_and_of_the_request() -> None:
    costs = costs_of()
    assert bounds(costs, max_latency_ms=250) == {"request": (None, 250_000_000)}
    assert bounds(costs, max_latency_ms="400,15.5") == {"ttft": (None, 400_000_000), "tpot": (None, 15_500_000)}
    assert bounds(costs, max_latency_ms=",15") == {"tpot": (None, 15_000_000)}
    assert bounds(costs, max_latency_ms="400,") == {"ttft": (None, 400_000_000)}
    assert bounds(costs, max_latency_ms="100:400,:15") == {
        "ttft": (100_000_000, 400_000_000),
        "tpot": (None, 15_000_000),
    }
    cost = costs.cost(SHAPE.parent_architecture)
    assert cost.ttft_ns is not None and cost.tpot_ns is not None
    assert cost.request_ns == cost.ttft_ns + 128 * cost.tpot_ns


def test_two_limits_on_one_total_meet() -> None:
    """A throughput of 1,000 tokens/s is 256 ms."""
    costs = costs_of()
    assert bounds(costs, min_throughput=1000, max_latency_ms=200) == {"request": (None, 200_000_000)}
    assert bounds(costs, min_throughput=1000, max_latency_ms=300) == {"request": (None, 256_000_000)}
    assert bounds(costs, min_throughput=1000, max_latency_ms="100:300") == {"request": (100_000_000, 256_000_000)}
    with pytest.raises(ConfigError, match=r"at least 300\.000 ms and at most 256\.000 ms leave nothing between them"):
        bounds(costs, min_throughput=1000, max_latency_ms="300:400")


def test_shares_are_those_of_the_memory_document() -> None:
    """docs/memory.md: SmolLM2-135M in the default scenario."""
    costs = CostModel(SMOLLM2, Scenario())
    expected = {0.9: 417_658_752, 0.7: 337_428_864, 0.6: 297_313_920, 0.5: 257_198_976}
    for share, size in expected.items():
        assert bounds(costs, budget=share) == {"memory": (None, size)}
    assert bounds(costs, budget="0.5:0.7") == {"memory": (257_198_976, 337_428_864)}


# Several GPUs


def test_key_value_heads_are_replicated_where_they_are_fewer_than_gpus() -> None:
    """16 values a head, keys and values, 2 bytes, 2 x 512 tokens: 65,536 bytes a head."""
    specs = {heads: LayerSpec.parse(f"attention:kv{heads}+ffn:768") for heads in (8, 2, 1)}
    shape = shape_of(2, num_attention_heads=8, num_key_value_heads=8)
    for tp, held in {1: (8, 2, 1), 2: (8, 2, 2), 4: (8, 4, 4), 8: (8, 8, 8)}.items():
        costs = CostModel(shape, Scenario(batch=2, context=512, tp=tp))
        assert [costs.layer_kv_bytes(spec) for spec in specs.values()] == [65_536 * heads for heads in held]
        for spec, heads in zip(specs.values(), held, strict=True):
            assert costs.cost(Architecture((spec, spec))).kv_bytes == 2 * 65_536 * heads


def test_what_gpus_cannot_share_is_left_out() -> None:
    """3 GPUs: 6 query heads and 3, 6 or 1 KV heads divide or are replicated; 2 KV heads, and 512 channels, do not."""
    shape = shape_of(2, num_attention_heads=6, num_key_value_heads=6)
    words = [f"attention:{a}+ffn:{f}" for a in ("kv6", "kv3", "kv2", "kv1", "skip") for f in ("768", "512", "skip")]
    table = table_of([{word: 0.1 for word in words}] * 2)
    kept = Candidates.of(table, CostModel(shape, Scenario(tp=3)), []).specs
    expected = [f"attention:{a}+ffn:{f}" for a in ("kv6", "kv3", "kv1", "skip") for f in ("768", "skip")]
    assert [[str(spec) for spec in specs] for specs in kept] == [expected] * 2
    five = Candidates.of(table, CostModel(shape, Scenario(tp=5)), []).specs[0]
    assert [str(spec) for spec in five] == ["attention:skip+ffn:skip"]


def test_gpus_share_channels_as_they_are_on_disk() -> None:
    """777 channels are written as 1,024."""
    costs = CostModel(shape_of(2, intermediate_size=777), Scenario(tp=2))
    assert costs.divides(LayerSpec.parse("attention:kv2+ffn:777"))


def test_gpus_that_can_share_nothing_are_one_clear_line() -> None:
    table = table_of([{"attention:kv2+ffn:768": 0.0, "attention:skip+ffn:256": 0.1}, {"attention:kv2+ffn:768": 0.0}])
    with pytest.raises(
        ConfigError, match=r"^--tp 5: no candidate of layer 0 .* \(4 query and 2 KV heads, 768 channels\)"
    ):
        Candidates.of(table, CostModel(SHAPE, Scenario(tp=5)), [])
    with pytest.raises(ConfigError, match=r"^--tp 8: no candidate of layer 1 "):
        Candidates.of(table, CostModel(SHAPE, Scenario(tp=8)), [])


# Together: against brute force


def some_limits(seed: int, candidates: Candidates) -> dict[str, Any]:
    """Limits of several kinds around a random architecture, which meets them all: tight, loose, from below, ranges."""
    rng, costs = random.Random(seed), candidates.costs
    cost = costs.cost(candidates.architecture([rng.randrange(len(specs)) for specs in candidates.specs]))
    assert cost.ttft_ns and cost.tpot_ns and cost.request_ns and cost.tokens_per_s

    def around(value: float, least: bool = False) -> str:
        """A limit that `value` meets; twelve digits."""
        below, above = value * rng.choice([0.999, 0.9, 0.5]), value * rng.choice([1.001, 1.1, 1.5])
        usual, whole = (
            (f"{below:.12g}:", f"{below:.12g}:{above:.12g}")
            if least
            else (f":{above:.12g}", f"{below:.12g}:{above:.12g}")
        )
        return rng.choice([usual, usual, whole])

    limits: dict[str, Any] = {"budget_gb": around(cost.gb), "max_params": around(cost.parameters)}
    times = {
        "min_throughput": around(cost.tokens_per_s, least=True),
        "max_latency_ms": rng.choice(
            [around(cost.request_ns / 1e6), f"{around(cost.ttft_ns / 1e6)},{around(cost.tpot_ns / 1e6)}"]
        ),
    }
    limits |= dict(rng.sample(sorted(times.items()), rng.randint(1, 2)))
    if cost.kv_bytes and rng.random() < 0.5:
        limits["max_kv_gb"] = around(cost.kv_bytes / 1e9)
    return limits


def meets(architecture: Architecture, costs: CostModel, limits: dict[str, Any]) -> bool:
    """In the terms in which they were asked for, without the bounds that the search made of them."""
    cost = costs.cost(architecture)
    assert cost.ttft_ns is not None and cost.tpot_ns is not None and cost.request_ns is not None
    found = {
        "budget_gb": cost.gb,
        "max_params": cost.parameters,
        "max_kv_gb": cost.kv_bytes / 1e9,
        "min_throughput": cost.tokens_per_s,
    }
    asked = {name: text for name, text in limits.items() if name in found}
    if (latency := limits.get("max_latency_ms")) is not None:
        parts = dict(zip(("ttft", "tpot"), latency.split(","), strict=True)) if "," in latency else {"request": latency}
        asked |= parts
        found |= {"ttft": cost.ttft_ns / 1e6, "tpot": cost.tpot_ns / 1e6, "request": cost.request_ns / 1e6}
    return all(
        float(text.partition(":")[0] or 0) <= (found[name] or 0) <= float(text.partition(":")[2] or "inf")
        for name, text in asked.items()
    )


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_the_optimum_under_several_limits_is_that_of_brute_force(seed: int) -> None:
    table, costs = random_table(seed), costs_of()
    limits = some_limits(seed, limited(table, costs, budget=1))
    candidates = limited(table, costs, **limits)
    fitting = [a for a in every_architecture(candidates) if meets(a, costs, limits)]
    assert fitting == [a for a in every_architecture(candidates) if candidates.allows(a)]
    optimum, best = candidates.optimum(), min(map(candidates.predicted, fitting))
    assert optimum.score == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert candidates.architecture(optimum.choice) in fitting
    assert optimum.bound <= best * (1 + 1e-9) + 1e-12
    for architecture in itertools.islice(every_architecture(candidates), 40):
        assert (candidates.excess(candidates.choice(architecture)) <= 0) == (architecture in fitting)


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6))
def test_whatever_is_proposed_meets_all_limits(seed: int) -> None:
    """The pool, the variants of the optimum, the baselines, and what the proposer names."""
    table, costs = random_table(seed), costs_of()
    limits = some_limits(seed, limited(table, costs, budget=1))
    candidates = limited(table, costs, **limits)
    pool = [candidates.architecture(solution.choice) for solution in candidates.pool(5, 2)]
    found = [*pool, *variants(candidates, candidates.optimum()).values(), *baselines(candidates, seed).values()]
    rng = np.random.default_rng(seed)
    measured = [(a, 0.1 + candidates.predicted(a)) for a in dict.fromkeys(found)]
    for _ in range(3):
        known = {a for a, _ in measured}
        proposed = Proposer(candidates)(measured, known.__contains__, rng)
        if proposed is not None:
            assert proposed not in known
            measured.append((proposed, 0.1 + candidates.predicted(proposed)))
    assert len(measured) >= 1 and all(meets(a, costs, limits) for a, _ in measured)


# What cannot be met


def refused(table: Any, costs: CostModel, **limits: Any) -> InfeasibleBudgetError:
    with pytest.raises(InfeasibleBudgetError) as caught:
        limited(table, costs, **limits).optimum()
    assert "\n" not in str(caught.value)
    return caught.value


def totals(candidates: Candidates, name: str, within: Callable[[Architecture], bool] = lambda _: True) -> list[int]:
    return [candidates.costs.cost(a).total(name) for a in every_architecture(candidates) if within(a)]


@pytest.mark.parametrize("seed", range(4))
def test_the_smallest_budget_is_exact_to_the_byte(seed: int) -> None:
    table, costs = random_table(seed), costs_of()
    least = min(totals(limited(table, costs, budget=1), "memory"))
    error = refused(table, costs, budget_gb=(least - 1) / 1e9)
    assert round(error.smallest_gb * 1e9) == least and error.exit_code == 3
    assert error.binding in str(error) and f"to {-(-least // 100_000) / 10_000:.4f}" in str(error)
    fits = limited(table, costs, budget_gb=least / 1e9)
    assert fits.costs.cost(fits.architecture(fits.optimum().choice)).total_bytes == least
    share = float(re.search(r"--budget to ([\d.]+)", str(error))[1])  # type: ignore[index]
    assert limited(table, costs, budget=share).optimum() and refused(table, costs, budget=share - 0.0001)


@pytest.mark.parametrize("seed", range(4))
def test_and_under_another_limit_it_is_the_smallest_that_meets_both(seed: int) -> None:
    """Enough parameters must be kept: then the smallest child of all is out of the question."""
    table, costs = random_table(seed), costs_of()
    free = limited(table, costs, budget=1)
    counts = sorted(totals(free, "parameters"))
    wanted = counts[2 * len(counts) // 3]
    least = min(totals(free, "memory", lambda a: costs.cost(a).parameters >= wanted))
    error = refused(table, costs, budget_gb=(least - 1) / 1e9, max_params=f"{wanted}:")
    assert round(error.smallest_gb * 1e9) == least
    assert error.binding in ("memory", "parameters") and "memory of " in str(error) and "--budget-gb" in str(error)
    assert "parameters of " in str(error) and "--max-params" in str(error)
    fits = limited(table, costs, budget_gb=least / 1e9, max_params=f"{wanted}:")
    assert costs.cost(fits.architecture(fits.optimum().choice)).total_bytes == least


def test_what_cannot_be_met_alone_is_named() -> None:
    table, costs = random_table(0), costs_of()
    free = limited(table, costs, budget=1)
    fastest = min(totals(free, "request"))
    error = refused(table, costs, budget=0.9, max_latency_ms=(fastest - 1) / 1e6)
    assert error.binding == "request" and "memory" not in str(error).partition(";")[0]
    assert f"request is at least {fastest / 1e6:,.3f} ms" in str(error) and "--max-latency-ms" in str(error)
    most = max(totals(free, "memory"))
    error = refused(table, costs, budget_gb=f"{(most + 1) / 1e9:.12f}:{(most + 9) / 1e9:.12f}")
    assert error.binding == "memory" and f"memory is at most {most / 1e9:.4f} GB, below" in str(error)


def test_a_range_that_every_child_jumps_over_is_told_as_such() -> None:
    table = table_of([{"attention:kv2+ffn:768": 0.0, "attention:kv1+ffn:256": 0.1}] * 3)
    costs = costs_of()
    sizes = sorted(set(totals(limited(table, costs, budget=1), "memory")))
    error = refused(table, costs, budget_gb=f"{(sizes[0] + 1) / 1e9:.12f}:{(sizes[1] - 1) / 1e9:.12f}")
    assert "memory" in str(error) and "--budget-gb" in str(error) and "smallest takes" not in str(error)
    assert "they jump over it" in str(error)


def test_a_kv_limit_of_no_byte_leaves_children_without_a_cache() -> None:
    table = table_of([{"attention:kv2+ffn:768": 0.0, "attention:skip+ffn:256": 0.1}] * 3)
    candidates = limited(table, costs_of(), max_kv_gb="1e-10")
    best = candidates.architecture(candidates.optimum().choice)
    assert best == Architecture.uniform(3, LayerSpec.parse("attention:skip+ffn:256"))
    assert candidates.allows(best) and candidates.excess(candidates.choice(best)) <= 0
    assert candidates.excess((0, 0, 0)) > 0


def test_the_command_ends_with_3_and_one_line(world: World) -> None:
    run = world.runs / "scored"
    for words, wanted in (
        (("--budget-gb", "0.00001"), "the smallest takes"),
        (("--budget", "0.9", "--min-throughput", "1e9", "--clock", "H100"), "request is at least"),
        (("--budget", "0.3", "--max-params", "670e3:"), "meets all limits together"),
    ):
        result = nas("search", "--run", run, "--batch", 1, "--context", 128, *words)
        last = result.err.splitlines()[-1]
        assert result.code == 3 and result.out == "" and "Traceback" not in result.err
        assert last.startswith("error: ") and wanted in last, result.err


def test_the_command_names_the_flag_of_junk(world: World) -> None:
    run = world.runs / "scored"
    for flag, text in (
        ("--max-kv-gb", "80:60"),
        ("--max-latency-ms", "x"),
        ("--min-throughput", "fast"),
        ("--tp", "3"),
    ):
        result = nas("search", "--run", run, "--budget", "0.5", "--clock", "H100", flag, text)
        assert result.code == 2 and f"error: {flag} {text}" in result.err.splitlines()[-1], result.err
