"""Tables from elsewhere with number formats: priced to the byte, searched as brute force does, and fp8 alone told beside."""

from __future__ import annotations

import csv
import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from app import nas, succeed
from report_page import read_page

from blocks.errors import DataError, InfeasibleBudgetError
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario
from nas.external import load_external
from nas.external_shape import Count, find_shape
from nas.report import write_report
from nas.table_search import search_table

LLAMA_70B = ModelShape(8192, 28672, 80, 64, 8, 128, 128_256)
TINY = ModelShape(256, 1024, 3, 4, 2, 64, 512)
Rows = list[dict[str, Any]]
SKIPS = {"attention": AttentionSpec("skip"), "ffn": FFNSpec("skip")}

# Of Llama-3.3-70B, by hand. In fp8 a matrix takes a byte a weight and two for each of its outputs; a norm stays in bf16.
ATTENTION = 8192 * (2 * 8192 + 2 * 1024) + 2 * (2 * 8192 + 2 * 1024) + 2 * 8192
FFN = 3 * 8192 * 28672 + 2 * (2 * 28672 + 8192) + 2 * 8192
FIXED = 2 * (2 * 128_256 * 8192 + 8192)
KV = 80 * 2 * 8 * 128 * 2  # of a token


def counted(shape: ModelShape, spec: AttentionSpec | FFNSpec | LayerSpec) -> dict[str, Any]:
    """A row's counts, as a library in bf16 gives them."""
    parts = (spec.attention, spec.ffn) if isinstance(spec, LayerSpec) else (spec,)
    whole = {"attention": SKIPS["attention"], "ffn": SKIPS["ffn"]}
    whole |= {"attention" if isinstance(part, AttentionSpec) else "ffn": part for part in parts}
    layer = LayerSpec(whole["attention"], whole["ffn"])  # type: ignore[arg-type]
    kv = 2 * shape.kv_values_per_token(layer.attention)
    return {"candidate": str(spec), "parameters": shape.layer_parameters(layer), "kv_bytes_per_token": kv}


def library(shape: ModelShape, joint: bool = False, formats: tuple[str, ...] = ("bf16",), seed: int = 0) -> Rows:
    """Every layer with two attentions, two FFNs and the skips, in every format; what is smaller or rougher hurts more."""
    rng, heads, width = random.Random(seed), shape.num_key_value_heads, shape.intermediate_size
    attentions = [AttentionSpec("kv", heads), AttentionSpec("kv", heads // 2), AttentionSpec("skip")]
    ffns = [FFNSpec("width", width), FFNSpec("width", width // 2), FFNSpec("skip")]
    rows: Rows = [{"layer": "fixed", "candidate": "ends", "parameters": shape.fixed_parameters}]
    for layer in shape.layers:
        specs: list[Any] = [LayerSpec(a, f) for a in attentions for f in ffns] if joint else [*attentions, *ffns]
        for place, spec in enumerate(specs):
            for rough, name in enumerate(formats):
                if rough == 0 or spec.at(name) != spec:
                    score = 0.0 if place % 3 == rough == 0 else (place % 3 + 0.05 * rough) * rng.uniform(0.5, 1.5)
                    score = score if place or rough or not joint else 0.0
                    rows.append({"layer": layer, "score": score, **counted(shape, spec.at(name))})
    return rows


def write(path: Path, rows: Rows) -> Path:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def parent_score(rows: Rows, name: str) -> float:
    """Sum over layers of the parent's subblocks in a format."""
    wanted = (f"attention:kv8@{name}", f"ffn:28672@{name}")
    return sum(row["score"] for row in rows if row["candidate"] in wanted)


# fp8 alone


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_the_parent_of_a_70b_table_in_fp8_by_hand(joint: bool, tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", library(LLAMA_70B, joint))
    found = succeed(
        "search", "--scores", table, "--budget-gb", 80, "--verify", 1, "--run", tmp_path / "run", "--json"
    ).json
    alone, kv = found["fp8_alone"], KV * 4 * 2048
    assert (alone["attention_bytes"], alone["ffn_bytes"]) == (80 * ATTENTION, 80 * FFN)
    assert alone["fixed_bytes"] == FIXED and alone["kv_bytes"] == kv
    total = FIXED + 80 * (ATTENTION + FFN) + kv
    assert alone["total_bytes"] == total == 75_354_161_152
    assert (alone["fits"], alone["exact"], alone["predicted_kl"]) == (True, True, None)
    assert alone["left_gb"] == pytest.approx(80 - total / 1e9)
    assert alone["kv_fp8"]["total_bytes"] == total - kv // 2 == 74_011_983_872
    assert json.loads((tmp_path / "run" / "architecture.json").read_text())["fp8_alone"] == alone


def test_what_fp8_alone_gives_is_printed_beside_the_search(tmp_path: Path) -> None:
    table = write(tmp_path / "table.csv", library(LLAMA_70B))
    words = ("search", "--scores", table, "--budget-gb", 80, "--verify", 1, "--run", tmp_path / "run")

    def printed(*more: Any) -> str:
        return " ".join(succeed(*words, *more).out.split())

    said = printed()
    assert (
        "fp8 alone the parent's matrices in fp8, embeddings and head in bfloat16: 75.3542 GB, fits with 4.6458 GB left"
        in said
    )
    assert "its KV cache in fp8 besides: 74.0120 GB, fits with 5.9880 GB left" in said
    assert "additive optimum" in said
    large = printed("--batch", 16, "--context", 8192)
    total = FIXED + 80 * (ATTENTION + FFN) + KV * 16 * 8192
    assert f"{total / 1e9:.4f} GB, does not fit: {total / 1e9 - 80:.4f} GB lacking" in large
    total -= KV * 16 * 8192 // 2
    assert (
        f"its KV cache in fp8 besides: {total / 1e9:.4f} GB, does not fit: {total / 1e9 - 80:.4f} GB lacking" in large
    )
    assert "KV cache in fp8 besides" not in printed("--kv-dtype", "float8")  # it is already


def test_a_share_of_parameters_alone_has_no_budget_to_fit(tmp_path: Path) -> None:
    table = load_external(write(tmp_path / "table.csv", library(TINY)), Scenario())
    alone = search_table(table, SearchConfig(max_params=3_000_000), None)["fp8_alone"]
    assert alone["fits"] is alone["left_gb"] is None and alone["total_bytes"] > 0


def test_the_table_says_what_fp8_hurts_where_it_has_it(tmp_path: Path) -> None:
    rows = library(LLAMA_70B, formats=("bf16", "fp8", "nvfp4"))
    path = write(tmp_path / "table.csv", rows)
    found = search_table(load_external(path, Scenario()), SearchConfig(budget_gb=80, verify=1), None)
    alone = found["fp8_alone"]
    assert alone["predicted_kl"] == pytest.approx(parent_score(rows, "fp8")) != pytest.approx(0)
    assert alone["total_bytes"] == 75_354_161_152
    assert found["predicted_kl"] <= alone["predicted_kl"]  # the same choice was there to be taken
    said = " ".join(
        succeed("search", "--scores", path, "--budget-gb", 80, "--verify", 1, "--run", tmp_path / "run").out.split()
    )
    assert f"sum of scores {alone['predicted_kl']:.4f}, the search's {found['predicted_kl']:.4f}" in said


def test_sizes_of_the_table_itself_come_first(tmp_path: Path) -> None:
    rows = library(TINY, formats=("bf16", "fp8"))
    for row in rows:
        if row["candidate"] == "ffn:1024@fp8":
            row["bytes"] = 1_000_003
    found = search_table(load_external(write(tmp_path / "t.csv", rows), Scenario()), SearchConfig(budget=0.9), None)
    assert found["fp8_alone"]["ffn_bytes"] == 3 * 1_000_003 and found["fp8_alone"]["exact"]


def test_names_that_are_not_ours_give_a_lower_bound(tmp_path: Path) -> None:
    names = {"attention:kv8": "gqa-8", "attention:kv4": "gqa-4", "ffn:28672": "full", "ffn:14336": "half"}
    rows = []
    for row in library(LLAMA_70B):
        part = str(row["candidate"]).partition(":")[0] if row["layer"] != "fixed" else ""
        rows.append({**row, "candidate": names.get(row["candidate"], row["candidate"]), "subblock": part})
    path = write(tmp_path / "table.csv", rows)
    found = search_table(load_external(path, Scenario()), SearchConfig(budget_gb=80, verify=1), None)
    alone = found["fp8_alone"]
    least = FIXED + sum(row["parameters"] for row in rows if row["candidate"] in ("gqa-8", "full")) + KV * 4 * 2048
    assert (alone["total_bytes"], alone["exact"]) == (least, False)
    exact = 75_354_161_152
    assert 0 < exact - least < 3e-4 * exact
    said = " ".join(
        succeed("search", "--scores", path, "--budget-gb", 80, "--verify", 1, "--run", tmp_path / "run").out.split()
    )
    assert f"at least {least / 1e9:.4f} GB, fits with at most {80 - least / 1e9:.4f} GB left" in said
    assert "scales are not counted" in said
    for row in rows:
        row["bytes"] = 2 * row.pop("parameters")
    table = load_external(write(path, rows), Scenario())
    assert search_table(table, SearchConfig(budget_gb=80, verify=1), None)["fp8_alone"] is None  # of bytes, who knows


def test_a_budget_that_structure_cannot_meet_is_told_what_fp8_takes(tmp_path: Path) -> None:
    rows = [row for row in library(LLAMA_70B) if "skip" not in str(row["candidate"])]
    rows = [row for row in rows if row["candidate"] not in ("attention:kv4", "ffn:14336")]
    table = load_external(write(tmp_path / "table.csv", rows), Scenario())
    with pytest.raises(InfeasibleBudgetError, match=r"the parent in fp8 alone takes 75\.3542 GB"):
        search_table(table, SearchConfig(budget_gb=80), None)


def test_the_report_draws_it_beside_the_child(tmp_path: Path) -> None:
    path, run = write(tmp_path / "table.csv", library(LLAMA_70B)), tmp_path / "run"
    succeed("search", "--scores", path, "--budget-gb", 80, "--verify", 1, "--run", run)
    report = write_report(run)
    page = read_page((run / "report.html").read_text())
    (model,) = [model for model in report["models"] if model["name"] == "parent in fp8"]
    assert model["cost"]["total_bytes"] == 75_354_161_152
    bars = [bar for bar in page.by_id("budget").all("rect") if "data-bytes" in bar.attributes]
    drawn = [bar.attributes["data-bytes"] for bar in bars if "parent in fp8" in bar.all("title")[0].text]
    assert list(map(int, drawn)) == [FIXED, 80 * ATTENTION, 80 * FFN, KV * 4 * 2048]
    assert report["map"]["precisions"] is None  # the search itself chose bf16 alone


# Rows with number formats


def subblock(shape: ModelShape, name: str) -> int:
    """Bytes of a subblock by hand: matrices in fp8 or nvfp4 (a byte for 16 weights, 8 for a matrix) or bf16, norm in bf16."""
    body, _, precision = name.partition("@")
    hidden, width = shape.hidden_size, shape.head_dim
    if body.endswith(":skip"):
        return 0
    if body.startswith("attention"):
        q, kv = shape.num_attention_heads * width, int(body.removeprefix("attention:kv")) * width
        matrices = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    else:
        channels = int(body.removeprefix("ffn:"))
        matrices = [(channels, hidden), (channels, hidden), (hidden, channels)]
    one = {
        "": lambda rows, columns: 2 * rows * columns,
        "fp8": lambda rows, columns: rows * columns + 2 * rows,
        "nvfp4": lambda rows, columns: rows * columns * 9 // 16 + 8,
    }[precision]
    return 2 * hidden + sum(one(rows, columns) for rows, columns in matrices)


@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_rows_with_formats_are_priced_by_their_matrices(joint: bool, tmp_path: Path) -> None:
    rows = library(TINY, joint, ("bf16", "fp8", "nvfp4"))
    scenario = Scenario(batch=2, context=256)
    table = load_external(write(tmp_path / "table.csv", rows), scenario)
    assert table.shape == replace(TINY, vocab_size=0)
    costs, seen = CostModel(TINY, scenario), set()
    for group in table.rows:
        for row in group:
            parts = row.name.split("+")
            assert row.amounts["weights"] == sum(subblock(TINY, part) for part in parts)
            seen.add(row.name)
            spec = row.spec if isinstance(row.spec, LayerSpec) else None
            if spec is not None:
                assert row.amounts["memory"] == costs.layer_bytes(spec)
    assert len(seen) == (9 + 8 + 8 if joint else 6 + 4 + 4)
    assert table.names(table.parent) == TINY.parent_architecture.to_list()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("joint", [False, True], ids=["separate", "joint"])
def test_the_optimum_over_formats_is_that_of_brute_force(joint: bool, seed: int, tmp_path: Path) -> None:
    shape, scenario = replace(TINY, num_hidden_layers=2), Scenario(batch=2, context=256)
    rows = library(shape, joint, ("bf16", "fp8", "nvfp4"), seed)
    groups: dict[tuple[int, str], Rows] = {}
    for row in rows[1:]:
        part = "" if joint else row["candidate"].partition(":")[0]
        groups.setdefault((row["layer"], part), []).append(row)

    def size(row: dict[str, Any]) -> int:
        parts = row["candidate"].split("+")
        return sum(subblock(shape, part) for part in parts) + 2 * 256 * row["kv_bytes_per_token"]

    sized = [[(size(row), row["score"]) for row in group] for group in groups.values()]
    fixed = 2 * shape.fixed_parameters
    parent = fixed + sum(max(group)[0] for group in sized)
    for share in (0.6, 0.35, 0.2):
        budget = fixed + int(share * (parent - fixed))
        best = min(
            sum(score for _, score in choice)
            for choice in itertools.product(*sized)
            if fixed + sum(taken for taken, _ in choice) <= budget
        )
        path = write(tmp_path / "t.csv", rows)
        found = search_table(load_external(path, scenario), SearchConfig(budget=share, verify=1), None)
        assert found["predicted_kl"] == pytest.approx(best, abs=1e-6)
        own = CostModel(shape, scenario).cost(Architecture.from_list(found["layers"])).to_json()
        assert found["cost"]["total_bytes"] <= budget
        bytes_ = {key: value for key, value in own.items() if value is not None}
        assert {key: found["cost"][key] for key in bytes_} == bytes_  # attention and FFN told apart, in formats, too


def test_a_choice_of_formats_is_shown_and_reported(tmp_path: Path) -> None:
    rows, run = library(TINY, formats=("bf16", "fp8", "nvfp4")), tmp_path / "run"
    path = write(tmp_path / "table.csv", rows)
    found = succeed("search", "--scores", path, "--budget", 0.4, "--verify", 1, "--run", run, "--json").json
    used = {part.partition("@")[2] or "bf16" for layer in found["layers"] for part in layer.split("+") if "skip" not in part}  # fmt: skip
    assert len(used) > 1
    assert set(found["kept"]) == {"attention:kv2", "attention:kv1", "attention:skip", "ffn:1024", "ffn:512", "ffn:skip"}
    shown = succeed("show", "--run", run).out
    assert "in formats" in shown and all(f" {name} (" in shown for name in used)
    report = write_report(run)
    assert {format["name"] for format in report["map"]["precisions"]["formats"]} >= used
    cells = report["map"]["models"]["child before healing"]["ffn"]
    assert cells == [layer.split("+")[1].partition("@")[0] for layer in found["layers"]]


def test_rows_whose_bytes_cannot_be_known_are_refused(tmp_path: Path) -> None:
    lone = {"layer": 0, "candidate": "attention:kv2+ffn:1024@fp8", "score": 0.1, "parameters": 900, "kv_bytes": 0}
    own = {"layer": 0, "candidate": "attention:kv2+ffn:1024", "score": 0.0, "parameters": 900, "kv_bytes": 0}
    path = write(tmp_path / "t.csv", [own, lone])
    with pytest.raises(DataError, match=r"t\.csv, row 2: attention:kv2\+ffn:1024@fp8 has no bytes"):
        load_external(path, Scenario())
    table = load_external(write(path, [own, {**lone, "bytes": 901}]), Scenario())  # as they are
    assert [row.amounts["weights"] for row in table.rows[0]] == [1800, 901]
    for name, words in (("fp9", "precision 'fp9' is not known"), ("int4", "no multiple of the 128")):
        thin = ModelShape(192, 768, 1, 3, 3, 64, 8)
        rows = [{"layer": 0, "score": 0.0, **counted(thin, spec)} for spec in (AttentionSpec("kv", 3), FFNSpec("width", 768))]  # fmt: skip
        rows.append({"layer": 0, "score": 0.1, **counted(thin, FFNSpec("width", 768, name))})
        with pytest.raises(DataError, match=f"row 3: .*{words}"):
            load_external(write(path, rows), Scenario())
    result = nas("search", "--scores", path, "--budget", 0.5, "--run", tmp_path / "run")
    assert result.code == 2 and result.err.count("\n") == 1


# The shape


SHAPES = {
    "llama": LLAMA_70B,
    "smollm": ModelShape(576, 1536, 4, 9, 3, 64, 49_152),
    "qwen2": ModelShape(896, 4864, 4, 14, 2, 64, 9, qkv_bias=True),
    "qwen2 as built": ModelShape(896, 4864, 4, 14, 2, 64, 9, qkv_bias=True, o_bias=True),
    "qwen3": ModelShape(1024, 3072, 4, 16, 8, 128, 9, qk_norm=True),
    "biases everywhere": ModelShape(320, 768, 4, 10, 5, 32, 9, qkv_bias=True, o_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("form", ["separate", "joint", "joint without skips"])
def test_counts_tell_the_shape(name: str, form: str) -> None:
    shape = SHAPES[name]
    heads = [n for n in range(1, shape.num_key_value_heads + 1) if shape.num_key_value_heads % n == 0]
    attentions = [AttentionSpec("kv", n) for n in heads] + [AttentionSpec("linear"), AttentionSpec("skip")]
    ffns = [FFNSpec("width", shape.intermediate_size), FFNSpec("width", 256), FFNSpec("linear"), FFNSpec("skip")]
    specs: list[Any] = [*attentions, *ffns]
    if form != "separate":
        specs = [LayerSpec(a, f) for a in attentions for f in ffns]
    if form == "joint without skips":
        specs = [spec for spec in specs if "skip" not in str(spec)]
    rows = [counted(shape, spec) for spec in specs]
    for kv in (True, False):  # without the cache, heads are told by how attentions grow with them
        counts = [
            Count.of(spec, row["parameters"], row["kv_bytes_per_token"] if kv else None)
            for spec, row in zip(specs, rows, strict=True)
        ]
        assert find_shape(counts, shape.num_hidden_layers) == replace(shape, vocab_size=0)
        wrong = [replace(counts[0], parameters=counts[0].parameters + 1), *counts[1:]]
        assert find_shape(wrong, shape.num_hidden_layers) is None


def test_too_little_tells_no_shape() -> None:
    spec = LLAMA_70B.parent_layer
    row = counted(LLAMA_70B, spec)
    assert find_shape([Count.of(spec, row["parameters"], row["kv_bytes_per_token"])], 80) is None
    assert find_shape([], 0) is None


def test_a_table_is_searched_in_the_formats_that_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", library(TINY, formats=("bf16", "fp8", "nvfp4")))

    def formats(*words: str) -> set[str]:
        found = succeed("search", "--scores", path, "--budget", "0.3", "--run", tmp_path / "run", *words, "--json").json
        return set(Architecture.from_list(found["layers"]).precisions)

    assert "nvfp4" in formats() and formats("--precisions", "fp8,nvfp4") == formats()
    assert "nvfp4" not in formats("--precisions", "fp8") and formats("--precisions", "bf16") == {"bf16"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("search: {precisions: fp8}\n")
    assert formats("--recipe", str(recipe)) == formats("--precisions", "fp8")
    failed = nas("search", "--scores", path, "--budget", "0.3", "--run", tmp_path / "run", "--precisions", "int4")
    assert failed.code != 0 and f"--precisions int4: {path} has no row in it; it has fp8, nvfp4" in failed.err
