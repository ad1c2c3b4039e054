"""Tables from elsewhere: priced as CostModel prices, solved as brute force solves, told in one line where they are wrong."""

from __future__ import annotations

import csv
import itertools
import json
import math
import random
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from app import World, nas, succeed
from tables import costs_of, random_table, shape_of, table_of

from blocks.errors import InfeasibleBudgetError
from blocks.parent import open_parent
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.additive import Candidates
from nas.baselines import uniform
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario
from nas.external import load_external
from nas.limits import bounds_of
from nas.run import open_run
from nas.search_problem import load_candidates
from nas.show import _runs
from nas.table_search import search_table

LLAMA_70B = ModelShape(8192, 28672, 80, 64, 8, 128, 128_256)
ATTENTIONS = [AttentionSpec("kv", heads) for heads in (8, 4, 2, 1)] + [AttentionSpec("linear"), AttentionSpec("skip")]
FFNS = [FFNSpec("width", width) for width in (28672, 24576, 20480, 14336, 10240, 5632, 2816)]
FFNS += [FFNSpec("linear"), FFNSpec("skip")]
SCENARIO = Scenario(batch=8, context=8192, prompt=6144, output=1024, reserve_gb=1.5)
HEAVY = replace(SCENARIO, weight_dtype="float32", kv_dtype="float32", reserve_gb=0.25)
Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> Path:
    """In the form that the name's end says."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if path.suffix == ".parquet":
        text = {"layer", "subblock", "candidate", "attention", "ffn"}
        cells = {
            c: [None if row.get(c) is None else str(row[c]) if c in text else row[c] for row in rows] for c in columns
        }
        pq.write_table(pa.table(cells), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    return path


# A published library: 80 layers of Llama-3.3-70B's shape, 6 attentions x 9 FFNs


def times(costs: CostModel, layer: LayerSpec) -> dict[str, float]:
    return {"prefill_ms": costs.layer_total("ttft", layer) / 1e6, "decode_ms": costs.layer_total("tpot", layer) / 1e6}


def priced(costs: CostModel, layer: LayerSpec) -> dict[str, Any]:
    """What a library says of a candidate: counts, and the times of one scenario."""
    shape = costs.shape
    counts = {
        "parameters": shape.layer_parameters(layer),
        "kv_bytes_per_token": 2 * shape.kv_values_per_token(layer.attention),
    }
    return counts | times(costs, layer)


def fixed_rows(costs: CostModel) -> Rows:
    """Two of them: they add up."""
    embedding = costs.shape.vocab_size * costs.shape.hidden_size
    first = {"layer": "fixed", "candidate": "embedding", "parameters": embedding}
    rest = costs.shape.fixed_parameters - embedding
    ms = {"prefill_ms": costs.fixed_total("ttft") / 1e6, "decode_ms": costs.fixed_total("tpot") / 1e6}
    return [first, {"layer": "fixed", "candidate": "head and norm", "parameters": rest} | ms]


def subblock_scores(seed: int) -> list[tuple[dict[AttentionSpec, float], dict[FFNSpec, float]]]:
    """More for what is smaller; layers differ by orders of magnitude, as they do."""
    rng, scores = random.Random(seed), []
    for _ in LLAMA_70B.layers:
        scale = rng.lognormvariate(-5, 1)
        attention = {spec: scale * (place + rng.random()) for place, spec in enumerate(ATTENTIONS)}
        ffn = {spec: scale * (place + rng.random()) for place, spec in enumerate(FFNS)}
        scores.append((attention | {ATTENTIONS[0]: 0.0}, ffn | {FFNS[0]: 0.0}))
    return scores


def separate_rows(costs: CostModel, seed: int = 0) -> Rows:
    rows = fixed_rows(costs)
    for layer, (attention, ffn) in enumerate(subblock_scores(seed)):
        for a, score in attention.items():
            cut = LayerSpec(a, FFNSpec("skip"))
            rows.append({"layer": layer, "candidate": str(a), "score": score} | priced(costs, cut))
        for f, score in ffn.items():
            cut = LayerSpec(AttentionSpec("skip"), f)
            rows.append({"layer": layer, "candidate": str(f), "score": score} | priced(costs, cut))
    return rows


def joint_scores(seed: int = 0) -> list[dict[str, float]]:
    """By layer, of whole layers: the sum of both subblocks and what they do to one another."""
    rng = random.Random(seed)
    return [
        {str(LayerSpec(a, f)): (x + y) * (1.0 if 0 in (x, y) else rng.uniform(0.8, 1.5)) for a, x in attention.items() for f, y in ffn.items()}
        for attention, ffn in subblock_scores(seed)
    ]  # fmt: skip


def joint_rows(costs: CostModel, scores: list[dict[str, float]]) -> Rows:
    rows = fixed_rows(costs)
    for layer, candidates in enumerate(scores):
        for name, score in candidates.items():
            rows.append({"layer": layer, "candidate": name, "score": score} | priced(costs, LayerSpec.parse(name)))
    return rows


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Joint and separate, with the times of `SCENARIO`."""
    directory, costs = tmp_path_factory.mktemp("libraries"), costs_of(SCENARIO, LLAMA_70B)
    joint = write(directory / "joint.csv", joint_rows(costs, joint_scores()))
    return joint, write(directory / "separate.csv", separate_rows(costs))


@pytest.mark.parametrize("scenario", [SCENARIO, HEAVY], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("which", [0, 1], ids=["joint", "separate"])
def test_a_published_library_has_the_sizes_of_the_cost_model(
    libraries: tuple[Path, Path], which: int, scenario: Scenario
) -> None:
    table = load_external(libraries[which], scenario)
    costs = costs_of(scenario, LLAMA_70B)
    assert [len(rows) for rows in table.rows] == ([54] * 80 if which == 0 else [6, 9] * 80)
    rng = random.Random(0)
    choices = [tuple(rng.randrange(len(rows)) for rows in table.rows) for _ in range(10)]
    limits = ("memory", "parameters", "kv", *(("ttft", "tpot", "request") if scenario is SCENARIO else ()))
    for choice in (*choices, table.parent):
        own = costs.cost(Architecture.from_list(table.names(choice)))
        for limit in limits:
            assert table.total(limit, choice) == own.total(limit), limit
    assert table.names(table.parent) == LLAMA_70B.parent_architecture.to_list()
    for share in (1.0, 0.7, 0.123):
        assert table.budget_for_share(share) == costs.budget_for_share(share)


def test_the_optimum_of_a_published_library_is_that_of_the_same_problem_built_directly(
    libraries: tuple[Path, Path], tmp_path: Path
) -> None:
    words = ("--batch", 8, "--context", 8192, "--prompt", 6144, "--output", 1024, "--reserve-gb", 1.5)
    limits = ("--budget-gb", 100, "--max-params", "30e9:50e9")
    found = succeed("search", "--scores", libraries[0], *words, *limits, "--run", tmp_path / "run", "--json").json
    costs = costs_of(SCENARIO, LLAMA_70B)
    ranges = SearchConfig(budget_gb=100, max_params="30e9:50e9").ranges
    direct = Candidates.of(table_of(joint_scores()), costs, bounds_of(ranges, costs))
    optimum = direct.optimum()
    assert found["predicted_kl"] == pytest.approx(optimum.score, abs=1e-9)
    assert found["optimum"]["bound"] == pytest.approx(optimum.bound, abs=1e-6)
    assert found["layers"] == direct.architecture(optimum.choice).to_list()
    assert found["optimum"]["binding"] == list(optimum.binding) != []
    assert found["optimum"]["prices"] == pytest.approx(optimum.prices)
    own = costs.cost(Architecture.from_list(found["layers"])).to_json()
    assert {key: found["cost"][key] for key in own} == own  # bytes by kind, totals, times
    assert Architecture.load(tmp_path / "run" / "architecture.json").to_list() == found["layers"]
    assert found["formula"].startswith(f"weights of {own['parameters']:,} parameters {own['weight_bytes']:,} B + KV")
    for member in found["pool"]:
        total = costs.cost(Architecture.from_list(member["layers"]))
        assert member["totals"] == {"memory": total.total_bytes, "parameters": total.parameters}
        assert direct.allows(Architecture.from_list(member["layers"]))
    same = uniform(direct)
    assert same is not None
    assert found["baselines"]["uniform"]["layers"] == same.to_list()
    assert found["baselines"]["uniform"]["predicted_kl"] == pytest.approx(direct.predicted(same))
    kept = {str(a): costs.kept(a) for a in ATTENTIONS} | {str(f): costs.kept(f) for f in FFNS}
    assert found["kept"] == pytest.approx(kept)
    shown = succeed("show", "--run", tmp_path / "run").out
    assert "kv8" in shown and "100.0000 GB" in shown and "Traceback" not in shown


def test_separate_rows_have_the_optimum_of_the_sums_of_their_scores(libraries: tuple[Path, Path]) -> None:
    found = search_table(
        load_external(libraries[1], SCENARIO), SearchConfig(budget=0.5, min_throughput=250, verify=2), None
    )
    sums = [
        {str(LayerSpec(a, f)): x + y for a, x in attention.items() for f, y in ffn.items()}
        for attention, ffn in subblock_scores(0)
    ]
    costs = costs_of(SCENARIO, LLAMA_70B)
    ranges = SearchConfig(budget=0.5, min_throughput=250).ranges
    optimum = Candidates.of(table_of(sums), costs, bounds_of(ranges, costs)).optimum()
    assert found["predicted_kl"] == pytest.approx(optimum.score, abs=1e-6)
    assert len(found["layers"]) == 80 and found["groups"] == [(str(layer), "layer") for layer in range(80)]
    assert found["cost"]["tokens_per_s"] >= 250
    own = costs.cost(Architecture.from_list(found["layers"])).to_json()
    assert {key: found["cost"][key] for key in own} == own


# Small tables of made-up names, against brute force


def small_rows(seed: int) -> tuple[Rows, Rows]:
    """(fixed, others): of each of three layers joint rows or both subblocks, with whatever sizes."""
    rng, others = random.Random(seed), []
    for layer in range(3):
        for subblock in ("layer",) if rng.random() < 0.5 else ("attention", "ffn"):
            for candidate in range(rng.randint(1, 5)):
                row = {"layer": layer, "subblock": subblock, "candidate": f"{subblock[0]}{candidate}"}
                row |= {"score": rng.choice([0.0, rng.random()]), "parameters": rng.randrange(1000)}
                row |= {"kv_bytes": None if subblock == "ffn" else 16 * rng.randrange(50), "bytes": rng.randrange(3000)}
                others.append(row | {"prefill_ms": rng.randrange(9000) / 1000, "decode_ms": rng.randrange(900) / 1000})
    rng.shuffle(others)
    fixed = {"layer": "fixed", "candidate": "rest", "parameters": 77, "bytes": 500, "decode_ms": 0.125}
    return [fixed], others


def amounts_of(row: dict[str, Any], scenario: Scenario) -> tuple[int, int, int]:
    """(bytes, parameters, ns of a request), by hand."""
    prefill, decode = round(1e6 * row.get("prefill_ms", 0)), round(1e6 * row["decode_ms"])
    return row["bytes"] + (row.get("kv_bytes") or 0), row["parameters"], prefill + scenario.output_tokens * decode


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_small_tables_joint_and_separate_equal_brute_force_under_three_limits(start: int, tmp_path: Path) -> None:
    scenario, infeasible = Scenario(batch=2, context=64, prompt=40, output=10, reserve_gb=3e-7), 0
    for seed in range(start, start + 20):
        fixed, others = small_rows(seed)
        groups: dict[tuple[int, str], Rows] = {}
        for row in others:
            groups.setdefault((row["layer"], row["subblock"]), []).append(row)
        base = [300 + amounts_of(fixed[0], scenario)[0], *amounts_of(fixed[0], scenario)[1:]]
        totals = {}
        for choice in itertools.product(*groups.values()):
            sums = zip(base, *(amounts_of(row, scenario) for row in choice), strict=True)
            totals[tuple((r["layer"], r["subblock"], r["candidate"]) for r in choice)] = (
                tuple(map(sum, sums)),
                math.fsum(row["score"] for row in choice),
            )
        rng = random.Random(seed)
        some = [rng.choice(list(totals.values()))[0][limit] for limit in range(3)]
        config = SearchConfig(
            budget_gb=f"{some[0] / 1e9:.9f}", max_params=some[1], max_latency_ms=f"{some[2] / 1e6:.6f}", verify=1
        )
        fitting = {c: s for c, (sizes, s) in totals.items() if all(a <= b for a, b in zip(sizes, some, strict=True))}
        table = load_external(write(tmp_path / "table.csv", fixed + others), scenario)
        if not fitting:
            infeasible += 1
            with pytest.raises(InfeasibleBudgetError):
                search_table(table, config, None)
            continue
        found = search_table(table, config, None)
        assert found["predicted_kl"] == pytest.approx(min(fitting.values()), abs=1e-6)
        chosen = frozenset((int(n), s, c) for (n, s), c in zip(found["groups"], found["layers"], strict=True))
        sizes, score = next(told for choice, told in totals.items() if frozenset(choice) == chosen)
        assert (found["cost"]["total_bytes"], found["cost"]["parameters"], found["cost"]["request_ns"]) == sizes
        assert found["predicted_kl"] == pytest.approx(score)
    assert infeasible < 20


def test_the_best_uniform_choice_of_a_table_of_both_kinds(tmp_path: Path) -> None:
    """Layer 0 separate, layer 1 joint: the same means the same two subblocks in both."""
    rows = [{"layer": 0, "subblock": "attention", "candidate": c, "score": s, "bytes": b, "kv_bytes": 0} for c, s, b in (("a", 0.0, 9), ("b", 0.3, 3))]  # fmt: skip
    rows += [{"layer": 0, "subblock": "ffn", "candidate": c, "score": s, "bytes": b} for c, s, b in (("x", 0.0, 9), ("y", 0.1, 3))]  # fmt: skip
    joint = {"a+x": (0.0, 18), "a+y": (0.9, 12), "b+x": (0.1, 12), "b+y": (0.9, 6)}
    rows += [{"layer": 1, "candidate": c, "score": s, "bytes": b, "kv_bytes": 0} for c, (s, b) in joint.items()]
    found = search_table(
        load_external(write(tmp_path / "t.json", rows), Scenario()), SearchConfig(budget_gb="24e-9"), None
    )
    assert found["baselines"]["uniform"]["layers"] == ["b", "x", "b+x"]  # 0.3 + 0 + 0.1; a+y everywhere is 1.0
    assert found["layers"] == ["a", "y", "b+x"]
    assert found["predicted_kl"] == pytest.approx(0.2)


# A run's own scores.csv


def test_our_own_scores_give_the_optimum_of_their_run(world: World, tmp_path: Path) -> None:
    run = open_run(world.runs / "scored")
    shape = open_parent(str(world.parent)).shape
    scenario = Scenario(batch=1, context=128)
    own = run.path("scores.csv").read_text()
    bare = tmp_path / "bare.csv"
    bare.write_text(own)
    whole = tmp_path / "whole.csv"
    whole.write_text(f"{own}fixed,embedding,head,,,,,,,,{shape.fixed_parameters},,0\n")  # as docs/tables.md says
    limited: list[dict[str, Any]] = [{"budget": 0.6}, {"budget": 0.45, "max_params": 200_000}]
    for limits in limited:
        config = SearchConfig(**limits, verify=1)
        candidates = load_candidates(run, shape, config, scenario)
        optimum = candidates.optimum()
        found = search_table(load_external(whole, scenario), config, None)
        assert found["predicted_kl"] == pytest.approx(optimum.score, abs=1e-9)
        assert found["layers"] == candidates.architecture(optimum.choice).to_list()
        assert {b.name: b.high for b in candidates.bounds} == {n: limit["high"] for n, limit in found["limits"].items()}
        cost = candidates.costs.cost(Architecture.from_list(found["layers"]))
        assert (found["cost"]["total_bytes"], found["cost"]["parameters"]) == (cost.total_bytes, cost.parameters)
        same = uniform(candidates)
        assert (found["baselines"].get("uniform") or {}).get("layers") == (same and same.to_list())
    found = search_table(load_external(bare, scenario), SearchConfig(budget=0.6, verify=1), None)
    optimum = load_candidates(run, shape, SearchConfig(budget=0.6), scenario).optimum()
    assert found["predicted_kl"] == pytest.approx(optimum.score, abs=1e-9)
    assert ["embeddings" in warning for warning in found["warnings"]] == [True]


# Forms of files


MIXED: Rows = [
    {"layer": "fixed", "candidate": "embeddings", "parameters": 1000},
    {
        "layer": 0,
        "subblock": "attention",
        "candidate": "gqa-8",
        "score": 0.0,
        "parameters": 300,
        "kv_bytes_per_token": 8,
    },
    {"layer": 0, "subblock": "attention", "candidate": "none", "score": 0.5, "parameters": 0, "kv_bytes_per_token": 0},
    {"layer": 0, "subblock": "ffn", "candidate": "full", "score": 0.0, "parameters": 900},
    {"layer": 0, "subblock": "ffn", "candidate": "half", "score": 0.25, "parameters": 450},
    {"layer": 1, "attention": "gqa-8", "ffn": "full", "score": 0.0, "parameters": 1200, "kv_bytes_per_token": 8},
    {"layer": 1, "attention": "none", "ffn": "half", "score": 0.125, "parameters": 450, "kv_bytes_per_token": 0},
]
SMALL = Scenario(batch=1, context=10)


def test_csv_json_jsonl_and_parquet_say_the_same(tmp_path: Path) -> None:
    tables = [
        load_external(write(tmp_path / f"t.{end}", MIXED), SMALL)
        for end in ("csv", "json", "jsonl", "parquet", "tsv-like")
    ]
    assert [(t.groups, t.rows, t.fixed) for t in tables] == [(tables[0].groups, tables[0].rows, tables[0].fixed)] * 5
    assert tables[0].groups == ((0, "attention"), (0, "ffn"), (1, "layer"))
    assert [row.name for row in tables[0].rows[2]] == ["gqa-8+full", "none+half"]
    assert tables[0].total("memory", (0, 0, 0)) == 2 * (1000 + 300 + 900 + 1200) + 10 * (8 + 8)
    marked = tmp_path / "marked.csv"  # as spreadsheets write it
    marked.write_bytes(b"\xef\xbb\xbf" + (tmp_path / "t.csv").read_bytes())
    assert load_external(marked, SMALL).rows == tables[0].rows


def test_fixed_rows_and_the_reserve_are_in_every_total(tmp_path: Path) -> None:
    rows = [*MIXED, {"layer": "fixed", "candidate": "head", "parameters": 500, "kv_bytes": 7}]
    table = load_external(write(tmp_path / "t.csv", rows), replace(SMALL, reserve_gb=1e-6))
    assert (table.fixed["parameters"], table.fixed["kv"], table.fixed["memory"]) == (1500, 7, 3000 + 7 + 1000)
    parent = 2 * (300 + 900 + 1200) + 10 * 16
    assert table.budget_for_share(0.5) == 4007 + parent // 2
    found = search_table(table, SearchConfig(budget=1.0), None)
    assert found["cost"]["total_bytes"] == 4007 + parent
    kinds = ("fixed_bytes", "attention_bytes", "ffn_bytes", "layer_bytes", "kv_bytes", "reserve_bytes")
    assert [found["cost"][kind] for kind in kinds] == [3000, 600, 1800, 2400, 7 + 160, 1000]


def test_bytes_as_they_are_whatever_the_dtype_and_whole_requests_in_ms(tmp_path: Path) -> None:
    rows: Rows = [
        {"layer": 0, "candidate": "fp8", "score": 0.0, "bytes": 101, "parameters": 100, "kv_bytes": 13, "ms": 2.5},
        {"layer": 0, "candidate": "none", "score": 1.0, "bytes": 0, "parameters": 0, "kv_bytes": 0, "ms": 0.5},
    ]
    table = load_external(write(tmp_path / "t.csv", rows), HEAVY)
    assert table.total("memory", (0,)) == 101 + 13 + 250_000_000
    found = search_table(table, SearchConfig(max_latency_ms=1.0), None)
    assert (found["layers"], found["cost"]["request_ns"]) == (["none"], 500_000)
    halves = [{"layer": 0, "candidate": "a", "score": 0.0, "weight_bytes": 200, "kv_bytes": 0}]
    assert load_external(write(tmp_path / "h.csv", halves), HEAVY).total("weights", (0,)) == 400


def test_a_limit_of_throughput_on_whole_requests_can_be_shown(tmp_path: Path) -> None:
    rows = [{"layer": 0, "candidate": c, "score": s, "ms": ms} for c, s, ms in (("slow", 0.0, 100), ("fast", 0.5, 10))]
    run = tmp_path / "run"
    words = ("--batch", 2, "--context", 64, "--output", 32, "--min-throughput", 5000)
    out = succeed("search", "--scores", write(tmp_path / "t.csv", rows), *words, "--run", run).out
    assert "6,400 tokens/s" in out and "fast" in out
    succeed("report", "--run", run)
    assert "does not tell how large" in (run / "report.html").read_text()


def test_choices_that_follow_one_another_share_a_line() -> None:
    names = ["a", "x", "a", "x", "b", "x"]
    groups = [[str(layer), part] for layer in range(3) for part in ("attention", "ffn")]
    lines = [line.split() for line in _runs({"groups": groups, "layers": names})]
    assert lines == [["attention", "0-1", "a"], ["attention", "2", "b"], ["ffn", "0-2", "x"]]


# Families


def test_a_sweep_writes_a_family_whose_members_are_single_searches(tmp_path: Path) -> None:
    shape = shape_of(4)
    scores = [{str(r.spec): r.score for r in rows} for rows in random_table(3, shape)]
    path = write(tmp_path / "t.csv", joint_rows(costs_of(SCENARIO, shape), scores))
    run, words = tmp_path / "run", ("--batch", 8, "--context", 8192)
    shown = succeed("search", "--scores", path, "--sweep", "0.9:0.5:0.2", *words, "--run", run).out
    members = json.loads((run / "family.json").read_text())["members"]
    assert [(m["share"], m["directory"]) for m in members] == [(0.9, "family/0.900"), (0.7, "family/0.700"), (0.5, ".")]
    for member in members:
        alone = succeed("search", "--scores", path, "--budget", member["share"], *words, "--run", tmp_path / "o", "--json").json  # fmt: skip
        own = json.loads((run / member["directory"] / "architecture.json").read_text())
        assert member["layers"] == own["layers"] == alone["layers"]
        assert own["cost"] == alone["cost"] and own["limits"] == alone["limits"]
        assert f"{member['gb']:.4f}" in shown
    assert members[0]["predicted_kl"] <= members[1]["predicted_kl"] <= members[2]["predicted_kl"]
    succeed("report", "--run", run)
    models = json.loads((run / "report.json").read_text())["models"]
    assert [m["name"] for m in models if m["kind"] == "family"] == ["budget 0.9", "budget 0.7"]


# What is wrong with a table


def change(number: int, **values: Any) -> Callable[[Rows], Rows]:
    """Row `number`, from 1, with other cells."""
    return lambda rows: [row | values if n == number else row for n, row in enumerate(rows, 1)]


def without(*numbers: int) -> Callable[[Rows], Rows]:
    return lambda rows: [row for n, row in enumerate(rows, 1) if n not in numbers]


def lacking(column: str) -> Callable[[Rows], Rows]:
    return lambda rows: [{name: value for name, value in row.items() if name != column} for row in rows]


BAD: dict[str, tuple[Callable[[Rows], Rows], Sequence[str]]] = {
    "unknown column": (change(1, paramters=1), ("row 1", "'paramters'", "did you mean 'parameters'")),
    "no column": (lacking("score"), ("no column score", "layer, candidate")),
    "no candidates": (lambda rows: [{"layer": 0, "score": 1}], ("no column candidate or attention or ffn",)),
    "no rows": (lambda rows: [rows[0] | {"score": None}], ("no rows of layers",)),
    "duplicate": (change(3, candidate="gqa-8"), ("row 3", "gqa-8 of layer 0", "twice, first in row 2")),
    "fixed duplicate": (lambda rows: [*rows, rows[0]], ("row 8", "embeddings of fixed", "first in row 1")),
    "missing layer": (lambda rows: [r | {"layer": 2} if r["layer"] == 1 else r for r in rows], ("row 6", "layer 2", "no rows of layer 1")),
    "attention without ffn": (without(4, 5), ("row 2", "layer 0 has rows of attention only")),
    "ffn without attention": (without(2, 3), ("row 2", "layer 0 has rows of ffn only")),
    "joint beside separate": (lambda rows: [*rows, rows[3] | {"layer": 1}], ("row 6", "layer 1 has rows of layer and ffn")),
    "NaN": (change(4, score=float("nan")), ("row 4", "score is nan", "finite")),
    "NaN bytes": (change(4, parameters=float("nan")), ("row 4", "parameters is nan", "finite")),
    "negative": (change(5, parameters=-3), ("row 5", "parameters is -3", "0 or more")),
    "infinite": (change(5, score=float("inf")), ("row 5", "score is inf")),
    "no number": (change(5, score="low"), ("row 5", "score is 'low', not a number")),
    "no score": (change(5, score=None), ("row 5", "no score")),
    "no name": (change(5, candidate=None), ("row 5", "no candidate")),
    "half a layer": (change(6, layer=1.5), ("row 6", "layer is '1.5'")),
    "negative layer": (change(6, layer=-1), ("row 6", "layer is '-1'")),
    "infinite layer": (change(6, layer="inf"), ("row 6", "layer is 'inf'")),
    "no layer": (change(6, layer=None), ("row 6", "layer is ''")),
    "unknown subblock": (change(4, subblock="mlp"), ("row 4", "'mlp'", "attention, ffn or layer")),
    "weights that contradict": (change(4, weight_bytes=900), ("row 4", "weight_bytes is 900", "1800 in bf16")),
    "size unsaid": (change(4, parameters=None), ("row 4", "--budget-gb needs bytes or parameters")),
    "cache unsaid": (change(3, kv_bytes_per_token=None), ("row 3", "--budget-gb needs kv_bytes")),
    "no sizes": (lacking("parameters"), ("row 2", "--budget-gb needs bytes or parameters")),
    "no caches": (lacking("kv_bytes_per_token"), ("row 2", "--budget-gb needs kv_bytes")),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("end", ["csv", "jsonl"])
def test_a_bad_table_is_one_line_with_file_and_row(fault: str, end: str, tmp_path: Path) -> None:
    spoil, told = BAD[fault]
    path = write(tmp_path / f"table.{end}", spoil(MIXED))
    result = nas("search", "--scores", path, "--budget-gb", 1, "--run", tmp_path / "run")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    words = result.err.lower()
    for part in (str(path), *told):
        assert part.lower() in words, result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("limit", "needs"),
    [
        (("--max-params", 10), "--max-params needs parameters"),
        (("--max-kv-gb", 1), "--max-kv-gb needs kv_bytes"),
        (("--max-latency-ms", "4,"), "needs prefill_ms"),
        (("--max-latency-ms", ",4"), "needs decode_ms"),
        (("--min-throughput", 4), "needs prefill_ms and decode_ms, or ms"),
        (("--budget", 0.5), "--budget-gb needs bytes or parameters and kv_bytes"),
        (("--sweep", "0.9:0.5:0.1"), "--budget-gb needs bytes or parameters and kv_bytes"),
    ],
)
def test_a_limit_on_what_the_table_lacks_names_the_column(limit: Sequence[Any], needs: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{"layer": 0, "candidate": "a", "score": 1.0}])
    result = nas("search", "--scores", path, *limit, "--run", tmp_path / "run")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert f"{path}, row 1" in result.err and needs in result.err


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.csv", "layer,candidate,score,score\n0,a,1,2\n", "'score' is there twice"),
        ("t.csv", "layer,candidate,score\n0,a,1\n0,b,1,2\n", "row 2: more cells than columns"),
        ("t.csv", "", "has no rows"),
        ("t.json", '{"layer": 0}', "not a list of objects"),
        ("t.json", "[1]", "not a list of objects"),
        ("t.json", "[", "cannot read it"),
        ("t.jsonl", '{"layer": 0}\n[]', "row 2: not an object"),
        ("t.jsonl", '{"layer": 0}\n\n{', "row 2"),
        ("t.json", '[{"layer": 0, "candidate": "a", "score": true}]', "row 1: score is True"),
        ("t.parquet", "no parquet", "cannot read it"),
        ("t.csv", b"layer,candidate,score\n0,\xff\xfe,1\n", "cannot read it"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name: str, content: str | bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    result = nas("search", "--scores", tmp_path / name, "--budget-gb", 1, "--run", tmp_path / "run")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert name in result.err and told in result.err


def test_what_a_table_cannot_answer_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", MIXED)
    for words, told in (
        (("--scores", tmp_path / "no.csv", "--budget-gb", 1), "no such file"),
        (("--scores", tmp_path, "--budget-gb", 1), "cannot read it"),
        (("--scores", path), "give a limit"),
        (("--scores", path, "--budget-gb", 1, "--tp", 2), "--tp 2"),
        (("--scores", path, "--min-throughput", 1, "--clock", "H100"), "--clock"),
    ):
        result = nas("search", *words, "--run", tmp_path / "run")
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert told in result.err


# Limits that nothing meets


def test_the_smallest_budget_is_told_to_the_byte(tmp_path: Path) -> None:
    rng = random.Random(5)
    rows: Rows = [
        {"layer": layer, "candidate": c, "score": rng.random(), "bytes": rng.randrange(10**9, 2 * 10**9), "kv_bytes": rng.randrange(10**6), "parameters": rng.randrange(1, 100)}
        for layer in range(4) for c in "abc"
    ]  # fmt: skip
    path, run = write(tmp_path / "t.csv", rows), tmp_path / "run"
    groups = [[row for row in rows if row["layer"] == layer] for layer in range(4)]
    choices = list(itertools.product(*groups))
    middle = sorted(sum(row["parameters"] for row in choice) for choice in choices)[len(choices) // 2]
    for limits, fitting in (
        ((), choices),
        (("--max-params", middle), [c for c in choices if sum(row["parameters"] for row in c) <= middle]),
    ):
        least = min(sum(row["bytes"] + row["kv_bytes"] for row in choice) for choice in fitting)
        result = nas("search", "--scores", path, "--budget-gb", 3.9, *limits, "--run", run)
        assert (result.code, result.out, result.err.count("\n")) == (3, "", 1)
        told = re.search(r"smallest budget is --budget-gb ([\d.]+)", result.err)
        assert told is not None, result.err
        assert told[1] == f"{least / 1e9:.9f}".rstrip("0")
        assert not run.exists()
        found = succeed(
            "search", "--scores", path, "--budget-gb", told[1], *limits, "--run", tmp_path / "o", "--json"
        ).json
        assert found["cost"]["total_bytes"] == least
        below = f"{(least - 1) / 1e9:.9f}"
        assert nas("search", "--scores", path, "--budget-gb", below, *limits, "--run", run).code == 3


def test_limits_beside_the_budget_that_nothing_meets_name_no_budget(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", MIXED)
    result = nas("search", "--scores", path, "--budget-gb", 1, "--max-params", 10, "--run", tmp_path / "run")
    assert (result.code, result.err.count("\n")) == (3, 1)
    assert "parameters is at least 1,900" in result.err and "smallest budget" not in result.err


# The run of a table


def test_the_run_of_a_table_is_shown_and_reported(tmp_path: Path) -> None:
    path, run = write(tmp_path / "t.csv", MIXED), tmp_path / "run"
    words = ("--budget-gb", "6.2e-6", "--batch", 1, "--context", 10)
    found = succeed("search", "--scores", path, *words, "--run", run, "--json").json
    assert found["layers"] == ["gqa-8", "full", "none+half"]
    assert json.loads((run / "architecture.json").read_text()) == found
    shown = succeed("show", "--run", run).out
    assert "none+half" in shown and "gqa-8" in shown
    assert succeed("show", "--run", run, "--json").json["architecture"] == found
    succeed("report", "--run", run)
    report = json.loads((run / "report.json").read_text())
    assert report["map"]["parts"] == ["attention", "ffn", "layer"]
    assert report["map"]["models"]["child before healing"]["layer"] == [None, "none+half"]
    assert report["map"]["kept"]["none+half"] == pytest.approx(900 / 2480)
    assert "budget" not in report["notes"]
    assert "layers" in (run / "report.html").read_text()
    healing = nas("distill", "--run", run)
    assert (healing.code, healing.err.count("\n")) == (1, 1)
    (run / "architecture.json").write_text("{")
    result = nas("show", "--run", run)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "is damaged" in result.err


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", MIXED)
    for limit in (("--budget-gb", 1), ("--sweep", "0.9:0.7:0.1")):
        dry = succeed("search", "--scores", path, *limit, "--run", tmp_path / "run", "--dry-run", "--json").json
        assert len(dry["layers"]) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.csv"]


def test_a_run_of_a_parent_is_not_written_over(world: World, tmp_path: Path) -> None:
    run = world.copy("searched", tmp_path / "run")
    before = (run / "architecture.json").read_bytes()
    result = nas("search", "--scores", write(tmp_path / "t.csv", MIXED), "--budget-gb", 1, "--run", run)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "is a run of a parent" in result.err
    assert (run / "architecture.json").read_bytes() == before


def test_another_table_at_the_same_place_has_another_key(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    keys = []
    for rows in (MIXED, MIXED, change(4, score=0.001)(MIXED)):
        keys.append(search_table(load_external(write(path, rows), SMALL), SearchConfig(budget_gb=1), None)["key"])
    assert keys[0] == keys[1] != keys[2]


def test_the_examples_of_the_document_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "tables.md").read_text()
    blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL) for kind in ("csv", "sh", "python")}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "library.csv").write_text(blocks["csv"][0])
    namespace: dict[str, Any] = {}
    for block in blocks["python"]:
        exec(block, namespace)
    program, *words = shlex.split(blocks["sh"][0])
    assert program == "nas"
    succeed(*words)
    written = json.loads((tmp_path / "runs" / "library" / "architecture.json").read_text())
    assert written["layers"] == namespace["found"]["layers"]
    assert written["cost"] == namespace["found"]["cost"]
