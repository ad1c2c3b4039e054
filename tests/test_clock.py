"""Clocks: rooflines by hand, profiles through the disk, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from blocks.errors import CheckpointError, ConfigError
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.clock import (
    Check,
    Measured,
    Profile,
    Times,
    architecture_times,
    attended_tokens,
    load_clock,
    rank_kv_heads,
    tokens_per_second,
)
from nas.costs import Scenario
from nas.datasheet import DATASHEETS, RooflineClock

DOCUMENT = Path(__file__).parent.parent / "docs" / "clocks.md"
LLAMA = ModelShape(4096, 14_336, 32, 32, 8, 128, 128_256)
ODD = ModelShape(64, 1000, 3, 4, 2, 16, 300)  # on disk its FFN has 1024 channels
SCENARIO = Scenario(batch=4, context=2048)
PARENT = LLAMA.parent_layer
LINEAR = LayerSpec(AttentionSpec("linear"), FFNSpec("linear"))
SKIP = LayerSpec(AttentionSpec("skip"), FFNSpec("skip"))


def profile(**changes: Any) -> Profile:
    entries = {
        "attention:kv2": Measured(3.0, 0.5, 0.01, 0.02, 3.1, 0.6),
        "attention:skip": Measured(0.0, 0.0),
        "ffn:1024": Measured(7.0, 1.25),
        "ffn:512": Measured(4.0, 0.75),
    }
    checks = (Check("parent", ("attention:kv2+ffn:1000",) * 3, 32.0, 30.0, 5.75, 5.5, 0.01, 0.02),)
    content: dict[str, Any] = {
        "name": "here",
        "device": "a device",
        "shape": ODD,
        "scenario": Scenario(batch=2, context=64),
        "fixed": Measured(2.0, 0.5),
        "entries": entries,
        "checks": checks,
        "about": {"date": "2026-01-01", "rounds": 7},
    }
    return Profile(**(content | changes))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "p.json"
    profile().save(path)
    return path


# Definitions


def test_a_rate_is_the_generated_tokens_over_one_prefill_and_all_decodes() -> None:
    scenario = Scenario(batch=8, context=300, prompt=200, output=50)
    # 8 x 50 tokens in 0.5 s + 50 x 10 ms = 1 s
    assert tokens_per_second(scenario, 500_000_000, 10_000_000) == pytest.approx(400.0)


@pytest.mark.parametrize(("output", "attended"), [(1, 101), (2, 101), (3, 102), (50, 125)])
def test_the_timed_decode_is_in_the_middle_of_the_output(output: int, attended: int) -> None:
    """The mean of prompt + 1 ... prompt + output, to half a token."""
    scenario = Scenario(context=200, prompt=100, output=output)
    mean = sum(100 + step for step in range(1, output + 1)) / output
    assert attended_tokens(scenario) == attended and abs(attended - mean) <= 0.5


def test_heads_are_divided_or_replicated_over_ranks() -> None:
    assert [rank_kv_heads(AttentionSpec("kv", n), 4) for n in (8, 4, 2, 1)] == [2, 1, 1, 1]
    with pytest.raises(ConfigError, match=r"--tp 2 does not divide the KV heads of attention:kv3 \(3\)"):
        rank_kv_heads(AttentionSpec("kv", 3), 2)


# Datasheets


def test_the_worked_examples_of_the_document_hold() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert blocks and all("assert" in block for block in blocks)
    for block in blocks:
        exec(block, {})


def test_the_table_of_the_document_is_the_code() -> None:
    rows = re.findall(
        r"^\| (\w+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.-]+) \| ([\d.]+) \| NVIDIA",
        DOCUMENT.read_text(),
        re.M,
    )
    assert [row[0] for row in rows] == list(DATASHEETS)
    for name, gb, bandwidth, half, float8, float32 in rows:
        sheet = DATASHEETS[name]
        assert (sheet.memory_gb, sheet.bandwidth) == (float(gb), pytest.approx(float(bandwidth) * 1e12))
        assert sheet.flops["bfloat16"] == sheet.flops["float16"] == pytest.approx(float(half) * 1e12)
        assert sheet.flops["float32"] == pytest.approx(float(float32) * 1e12)
        assert sheet.flops.get("float8", 0) == pytest.approx(0 if float8 == "-" else float(float8) * 1e12)


def roofline(name: str = "H200", scenario: Scenario = SCENARIO, shape: ModelShape = LLAMA) -> RooflineClock:
    clock = load_clock(name, shape, scenario)
    assert isinstance(clock, RooflineClock)
    return clock


def test_decode_reads_its_bytes_at_the_bandwidth_and_prefill_computes_at_the_peak() -> None:
    clock = roofline()
    ffn = clock.subblock(FFNSpec("width", 14_336))
    assert ffn.decode_ns == round(1e9 * 3 * 4096 * 14_336 * 2 / 4.8e12)
    assert ffn.prefill_ns == round(1e9 * 2 * 4 * 1024 * 3 * 4096 * 14_336 / 989.5e12)
    one = clock.subblock(AttentionSpec("kv", 1))
    weights, cache = 2 * 4096 * 128 * 33, 4 * 1536 * 2 * 128
    assert one.decode_ns == round(1e9 * 2 * (weights + cache) / 4.8e12)
    flops = 2 * 4 * 1024 * weights + 4 * sum(4 * 32 * 128 * (i + 1) for i in range(1024))
    assert one.prefill_ns == round(1e9 * flops / 989.5e12)
    assert clock.layer(LINEAR).decode_ns == 2 * round(1e9 * 4096 * 4096 * 2 / 4.8e12)
    assert clock.layer(SKIP) == Times(0, 0)


def test_many_sequences_make_decode_compute_bound() -> None:
    batch = 4096
    ffn = roofline(scenario=Scenario(batch=batch, context=2)).subblock(FFNSpec("width", 14_336))
    assert ffn.decode_ns == round(1e9 * 2 * batch * 3 * 4096 * 14_336 / 989.5e12)


def test_dtypes_price_weights_and_cache_apart() -> None:
    wide = roofline(scenario=Scenario(batch=4, context=2048, kv_dtype="float32")).work(AttentionSpec("kv", 8))[1]
    half = roofline().work(AttentionSpec("kv", 8))[1]
    assert wide.bytes - half.bytes == 4 * 1536 * 2 * 8 * 128 * 2 and wide.flops == half.flops
    slow = roofline(scenario=Scenario(batch=4, context=2048, weight_dtype="float32"))
    assert slow.subblock(FFNSpec("width", 14_336)).prefill_ns == pytest.approx(
        roofline().subblock(FFNSpec("width", 14_336)).prefill_ns * 989.5 / 67, rel=1e-6
    )


def test_ranks_share_the_work_but_replicate_a_single_kv_head() -> None:
    two = roofline(scenario=Scenario(batch=4, context=2048, tp=2))
    for spec in (AttentionSpec("kv", 8), AttentionSpec("linear"), FFNSpec("width", 7168)):
        for whole, half in zip(roofline().work(spec), two.work(spec), strict=True):
            assert (2 * half.flops, 2 * half.bytes) == (whole.flops, whole.bytes), spec
    whole, half = roofline().work(AttentionSpec("kv", 1))[1], two.work(AttentionSpec("kv", 1))[1]
    assert 2 * half.bytes - whole.bytes == 2 * (2 * 4096 * 128 + 4 * 1536 * 2 * 128)  # one head more, weights and cache


@pytest.mark.parametrize("tp", [3, 5])
def test_ranks_that_do_not_divide_the_parent_are_refused(tp: int) -> None:
    with pytest.raises(ConfigError, match=f"--tp {tp} does not divide num_attention_heads"):
        load_clock("H100", LLAMA, Scenario(tp=tp))


def test_widths_are_those_on_disk() -> None:
    clock = roofline(shape=ODD)
    assert clock.layer(ODD.parent_layer) == clock.layer(LayerSpec(AttentionSpec("kv", 2), FFNSpec("width", 1024)))


def test_the_whole_is_the_sum_and_a_smaller_child_is_faster() -> None:
    clock = roofline()
    small = LayerSpec(AttentionSpec("kv", 1), FFNSpec("width", 2816))
    child = Architecture((PARENT,) * 16 + (small,) * 16)
    whole = architecture_times(clock, child)
    parent, other = clock.layer(PARENT), clock.layer(small)
    assert whole.decode_ns == clock.fixed.decode_ns + 16 * (parent.decode_ns + other.decode_ns)
    assert whole.prefill_ns == clock.fixed.prefill_ns + 16 * (parent.prefill_ns + other.prefill_ns)
    assert other.decode_ns < parent.decode_ns and other.prefill_ns < parent.prefill_ns


@pytest.mark.parametrize(
    ("text", "name"),
    [("h100", "H100"), (" rtx-4090", "RTX4090"), ("NVIDIA GeForce RTX 4090", "RTX4090"), ("l40s", "L40S")],
)
def test_datasheets_are_found_however_they_are_written(text: str, name: str) -> None:
    clock = load_clock(text, LLAMA, SCENARIO)
    assert (clock.name, clock.device, clock.estimate) == (f"{name} datasheet", DATASHEETS[name].device, True)


def test_an_unknown_clock_offers_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"clock A-10: no such profile.*did you mean 'A100'\?.*one of A100, H100"
    ) as raised:
        load_clock("A-10", LLAMA, SCENARIO)
    assert "\n" not in str(raised.value)
    with pytest.raises(ConfigError, match=r"clock profiles/mine.json: no such profile"):
        load_clock("profiles/mine.json", LLAMA, SCENARIO)


def test_a_dtype_without_units_is_refused() -> None:
    with pytest.raises(ConfigError, match="A100 80GB SXM has no float8 units"):
        DATASHEETS["A100"].peak("float8")


# Profiles


def test_a_profile_comes_back_from_disk_and_sums(saved: Path) -> None:
    assert Profile.load(saved) == profile(name=str(saved))
    clock = load_clock(str(saved), ODD, Scenario(batch=2, context=64))
    assert (clock.name, clock.device, clock.estimate) == (str(saved), "a device", False)
    assert clock.fixed == Times(2_000_000, 500_000)
    assert clock.layer(ODD.parent_layer) == Times(10_000_000, 1_750_000)  # ffn:1000 is ffn:1024 on disk
    assert clock.layer(LayerSpec(AttentionSpec("skip"), FFNSpec("width", 512))) == Times(4_000_000, 750_000)
    assert architecture_times(clock, ODD.parent_architecture) == Times(32_000_000, 5_750_000)
    assert clock.layer(SKIP) == Times(0, 0)


def test_errors_of_checks_are_shares_of_the_measured_time(saved: Path) -> None:
    (check,) = json.loads(saved.read_text())["checks"]
    assert check["prefill_error"] == pytest.approx(2 / 30) and check["decode_error"] == pytest.approx(0.25 / 5.5)


def test_memory_alone_does_not_make_another_scenario(saved: Path) -> None:
    same = Scenario(batch=2, context=4096, prompt=32, output=32, reserve_gb=3.0)
    assert load_clock(str(saved), ODD, same).fixed == Times(2_000_000, 500_000)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch": 3}, "--batch 2, not 3"),
        ({"prompt": 16}, "--prompt 32, not 16; --output 32, not 48"),
        ({"prompt": 32, "output": 8}, "--output 32, not 8"),
        ({"tp": 2}, "--tp 1, not 2"),
        ({"weight_dtype": "float16"}, "--weight-dtype bfloat16, not float16"),
        ({"kv_dtype": "float32"}, "--kv-dtype bfloat16, not float32"),
    ],
)
def test_another_scenario_is_refused(saved: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_clock(str(saved), ODD, replace(Scenario(batch=2, context=64), **changes))
    assert f"measured for something else: {said}; measure this one with `nas bench`" in str(raised.value)


@pytest.mark.parametrize("name", asdict(ODD))
def test_another_shape_is_refused(saved: Path, name: str) -> None:
    old = getattr(ODD, name)
    new = (not old) if isinstance(old, bool) else 2 * old
    with pytest.raises(ConfigError, match=f"something else: {name} {old}, not {new};"):
        load_clock(str(saved), replace(ODD, **{name: new}), Scenario(batch=2, context=64))


def test_a_candidate_that_was_not_measured_is_named(saved: Path) -> None:
    clock = load_clock(str(saved), ODD, Scenario(batch=2, context=64))
    with pytest.raises(ConfigError, match=r"has no time for ffn:256 .*ffn:512.*measure it: `nas bench`"):
        clock.layer(LayerSpec(AttentionSpec("kv", 2), FFNSpec("width", 200)))


def damaged(**changes: Any) -> str:
    return json.dumps(profile().to_json() | changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a profile"),
        ("[]", "is not a profile"),
        ("{}", "no 'format'"),
        (damaged(format=2), "newer than 1; update this package"),
        (damaged(shape={"hidden_size": 3}), "is not a profile"),
        (damaged(scenario={"batch": 0}), "is not a profile"),
        (damaged(fixed={"prefill_ms": -1.0, "decode_ms": 1.0}), "not a number of milliseconds"),
        (damaged(entries={"ffn:512": {"prefill_ms": float("nan"), "decode_ms": 1.0}}), "not a number of milliseconds"),
        (damaged(entries={"ffn:512": "fast"}), "is not a profile"),
    ],
)
def test_a_damaged_profile_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=said) as raised:
        load_clock(str(path), ODD, Scenario())
    assert str(path) in str(raised.value) and "nas bench" in str(raised.value) and "\n" not in str(raised.value)
