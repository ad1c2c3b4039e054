"""Precision beside structure: scores against true KLs, joint tables and prices by hand, searches that keep their budgets."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from app import World, nas, stamps, succeed
from tables import row

from blocks.errors import CheckpointError, ConfigError
from blocks.formats import format_named
from blocks.layer import layer_forward
from blocks.parent import open_parent
from blocks.refit import refit_sweep
from blocks.rounded import RoundedWeights, round_layer, shared_matrices, subblock_bytes
from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import Sweep
from nas.additive import Candidates
from nas.baselines import child_in_one_precision, parent_in_one_precision
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario
from nas.exact import kl_to_parent
from nas.limits import Bound
from nas.precisions import (
    KV8,
    PrecisionScores,
    PrecisionScoring,
    held_by_none,
    load_precisions,
    parse_precisions,
    require_served,
    to_score,
    with_precisions,
)
from nas.progress import Reporter
from nas.run import open_run

SHAPE = ModelShape(64, 512, 2, 4, 2, 16, 256)
PARENT = LayerSpec.parse("attention:kv2+ffn:512")
STRUCTURES = [LayerSpec.parse(f"attention:{a}+ffn:{f}") for a in ("kv2", "kv1", "skip") for f in ("512", "256", "skip")]
LIMITS = ("--batch", "1", "--context", "128")
SEARCH = ("--precisions", "bf16,fp8,nvfp4", "--path-steps", "2", "--trials", "10", *LIMITS)


def scores_of(*formats: str) -> PrecisionScores:
    """Made up: a prime for each layer, subblock and format."""
    values = {}
    numbers = itertools.count(1)
    for layer, spec, name in itertools.product(range(2), STRUCTURES, formats):
        for part in (spec.attention, spec.ffn):
            if part.kind != "skip" and not (name == KV8 and str(part).startswith("ffn")):
                values[layer, str(part), name] = 0.001 * next(numbers)
    return PrecisionScores(values)


def candidates_of(formats: tuple[str, ...], kv_dtype: str = "bfloat16", budget: int | None = None) -> Candidates:
    table = [
        [row(layer, spec, 0.0 if spec == PARENT else 0.1 * (1 + n)) for n, spec in enumerate(STRUCTURES)]
        for layer in (0, 1)
    ]
    scores = scores_of(*formats, KV8)
    costs = CostModel(SHAPE, Scenario(batch=2, context=64, kv_dtype=kv_dtype))
    bounds = [Bound("memory", None, budget)] if budget is not None else []
    return Candidates.of(with_precisions(table, scores, formats, costs), costs, bounds, scores)


# ---- layers in other formats


@pytest.mark.parametrize("text", ["attention:kv4@fp8+ffn:512@nvfp4", "attention:kv4@int8+ffn:512@int4-g32"])
def test_a_rounded_layer_is_its_matrices_and_inputs_rounded_one_by_one(
    text: str, tiny_sweep: Callable[..., Sweep]
) -> None:
    sweep, spec = tiny_sweep(), LayerSpec.parse(text)
    weights = sweep.layer(0)
    rounded = round_layer(weights, spec)
    assert isinstance(rounded, RoundedWeights)
    for group in shared_matrices(weights):
        format = format_named((spec.attention if group[0].startswith("self_attn") else spec.ffn).precision)
        divisor = format.divisor(*(weights[f"{name}.weight"] for name in group))
        for name in group:
            assert torch.equal(rounded[f"{name}.weight"], format.fake(weights[f"{name}.weight"], divisor))
            x = torch.randn(3, weights[f"{name}.weight"].shape[1])
            assert torch.equal(rounded.round_input(name, x), format.fake_input(x))
    norms = [name for name in weights if "norm" in name]
    assert norms and all(torch.equal(rounded[name], weights[name]) for name in norms)
    assert round_layer(weights, spec.structure) is weights


def test_a_cache_in_float8_rounds_rotated_keys_and_values(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep()
    layers = [sweep.layer(index) for index in sweep.parent.shape.layers]
    h = sweep.embed(torch.arange(12)[None])
    plain, cached = sweep.math(12), sweep.of(layers, torch.float8_e4m3fn).math(12)
    weights = sweep.layer(0)
    from blocks.layer import add_subblock, attention_input, queries_keys_values, rotate

    q, k, v = queries_keys_values(weights, h, plain)
    q, k = rotate(q, plain), rotate(k, plain).to(torch.float8_e4m3fn).float()
    v = v.to(torch.float8_e4m3fn).float()
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)
    context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = h + context @ weights["self_attn.o_proj.weight"].T
    found = add_subblock(weights, h, attention_input(weights, h, cached))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found, add_subblock(weights, h, attention_input(weights, h, plain)))


def test_a_refit_heals_what_rounding_did(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep()
    text = torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(0))
    architecture = sweep.parent.shape.parent_architecture.at("nvfp4a16")
    layers = [sweep.layer(index) for index in sweep.parent.shape.layers]
    parent = sweep.run(text)

    def kl(masters: Any) -> float:
        served = [round_layer(weights, spec) for weights, spec in zip(masters, architecture, strict=True)]
        return float(kl_to_parent(sweep, parent, [sweep.of(served).run(text)])[0].mean())

    everywhere = range(len(layers))
    blind = refit_sweep(sweep, layers, everywhere, text, 30.0)
    seeing = refit_sweep(sweep, layers, everywhere, text, 30.0, specs=architecture.layers)
    assert kl(seeing) < 0.9 * min(kl(layers), kl(blind))


# ---- prices


def test_prices_are_bytes_of_matrices_with_scales_by_hand() -> None:
    layer = LayerSpec.parse("attention:kv1@fp8+ffn:256@nvfp4a16")
    attention = (64 * 64 * 2 + 2 * 16 * 64) + 2 * (64 + 16 + 16 + 64) + 2 * 64  # E4M3, bf16 scales of rows, norm
    matrix = 64 * 256 // 2 + 64 * 256 // 16 + 4  # E2M1 pairs, E4M3 scales of 16, the divisor
    ffn = 3 * matrix + 2 * 64
    assert subblock_bytes(SHAPE, layer.attention, 2) == attention
    assert subblock_bytes(SHAPE, layer.ffn, 2) == ffn
    costs = CostModel(SHAPE, Scenario(batch=2, context=64, kv_dtype="fp8"))
    kv = 2 * 64 * 2 * 16  # one byte a value
    assert costs.layer_bytes(layer) == attention + ffn + kv
    architecture = Architecture((layer, PARENT))
    cost = costs.cost(architecture)
    assert (cost.kv_bytes, cost.parameters) == (kv + 2 * kv, SHAPE.parameters(architecture.structure))
    assert cost.total_bytes == costs.fixed_bytes + sum(map(costs.layer_bytes, architecture))
    assert "fp8, nvfp4a16 with their scales" in costs.formula(architecture)


def test_a_share_is_one_of_the_parent_with_a_cache_as_wide_as_its_weights() -> None:
    of_bf16, of_fp8 = (CostModel(SHAPE, Scenario(kv_dtype=name)).budget_for_share(0.5) for name in ("bf16", "fp8"))
    assert of_bf16 == of_fp8


def test_what_a_format_cannot_hold_is_no_candidate() -> None:
    hidden_64 = CostModel(SHAPE, Scenario())
    assert not hidden_64.holds(LayerSpec.parse("attention:kv2@int4+ffn:skip"))  # 64 inputs, scales of 128
    assert hidden_64.holds(LayerSpec.parse("attention:kv2@int4-g32+ffn:512@nvfp4"))
    with pytest.raises(ConfigError, match="no multiple of the 128"):
        hidden_64.layer_bytes(LayerSpec.parse("attention:kv2@int4+ffn:skip"))
    specs = candidates_of(("bf16", "int4", "fp8")).specs[0]
    assert {spec.attention.precision for spec in specs} == {"bf16", "fp8"}


def test_channels_that_no_groups_divide_are_left_alone_though_padding_would_make_them_fit() -> None:
    costs = CostModel(replace(SHAPE, hidden_size=128, intermediate_size=576), Scenario())  # on disk 768 channels
    assert not costs.holds(LayerSpec.parse("attention:skip+ffn:576@int4"))
    assert costs.holds(LayerSpec.parse("attention:skip+ffn:576@int4-g32"))
    assert costs.holds(LayerSpec.parse("attention:skip+ffn:512@int4"))


def test_gpus_share_whole_groups() -> None:
    """o_proj and down_proj are cut along their inputs, where groups lie."""
    shape = replace(SHAPE, hidden_size=128, head_dim=32, intermediate_size=11_776)
    two, eight = (CostModel(shape, Scenario(tp=tp)) for tp in (2, 8))
    for name, divide in (("bf16", True), ("fp8", True), ("int4-g32", True), ("nvfp4", True), ("int4", False)):
        assert two.divides(LayerSpec.parse(f"attention:kv2@{name}+ffn:skip")) is divide, name  # 64 inputs each
        channels = LayerSpec.parse(f"attention:skip+ffn:11776@{name}")
        assert two.divides(channels) and eight.divides(channels) is divide, name  # 5,888 and 1,472 each


def test_formats_that_hold_nothing_are_named() -> None:
    narrow = replace(SHAPE, hidden_size=72, intermediate_size=500)
    formats = ("bf16", "fp8", "nvfp4", "int4")
    rows = [[row(0, LayerSpec.parse(f"attention:kv2+ffn:{width}"), 0.0)] for width in (500, 512)]
    assert held_by_none(rows[:1], formats, CostModel(narrow, Scenario())) == ["nvfp4", "int4"]
    assert held_by_none(rows[1:], formats, CostModel(SHAPE, Scenario())) == ["int4"]  # hidden size 64
    assert held_by_none(rows[1:], formats, CostModel(replace(SHAPE, hidden_size=128), Scenario())) == []


# ---- joint tables


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8"])
def test_a_joint_score_is_structure_plus_precision(kv_dtype: str) -> None:
    found = candidates_of(("bf16", "fp8", "nvfp4"), kv_dtype)
    by_structure = {spec: 0.0 if spec == PARENT else 0.1 * (1 + n) for n, spec in enumerate(STRUCTURES)}
    known = scores_of("bf16", "fp8", "nvfp4", KV8).values
    for layer in (0, 1):
        assert (
            len(set(found.specs[layer])) == len(found.specs[layer]) == 2 * 2 * 9 + 2 * 2 * 3 + 1
        )  # a skip has no format
        for spec, score in zip(found.specs[layer], found.scores[layer], strict=True):
            expected = by_structure[spec.structure]
            for part in (spec.attention, spec.ffn):
                if part.precision != "bf16":
                    expected += known[layer, str(part.structure), part.precision]
            if kv_dtype == "float8" and spec.attention.kind == "kv":
                expected += known[layer, str(spec.attention.structure), KV8]
            assert score == pytest.approx(expected)
            assert found.rounding(layer, spec) == pytest.approx(expected - by_structure[spec.structure])


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.9])
def test_the_optimum_and_the_baselines_in_one_format_are_those_of_brute_force(share: float) -> None:
    budget = CostModel(SHAPE, Scenario(batch=2, context=64)).budget_for_share(share)
    candidates = candidates_of(("bf16", "fp8", "nvfp4"), budget=budget)
    children = [Architecture(pair) for pair in itertools.product(*candidates.specs)]
    within = [child for child in children if candidates.allows(child)]
    best = candidates.predicted(candidates.architecture(candidates.optimum().choice))
    assert best == pytest.approx(min(map(candidates.predicted, within)))

    def least(of: list[Architecture]) -> float | None:
        return min(map(candidates.predicted, of), default=None)

    one_format = [child for child in within if any(child == child.at(name) for name in ("bf16", "fp8", "nvfp4"))]
    whole = [child for child in one_format if child.structure == SHAPE.parent_architecture]
    for found, among in (
        (child_in_one_precision(candidates), one_format),
        (parent_in_one_precision(candidates), whole),
    ):
        assert (None if found is None else candidates.predicted(found)) == pytest.approx(least(among))
        assert found is None or candidates.allows(found)


def test_names_of_formats() -> None:
    assert parse_precisions(" nvfp4, bf16 ,fp8,nvfp4") == ("bf16", "nvfp4", "fp8")
    assert to_score(("bf16", "fp8"), ["bfloat16", "float8"]) == ["fp8", KV8]
    with pytest.raises(ConfigError, match="did you mean nvfp4"):
        parse_precisions("nvpf4")
    with pytest.raises(ConfigError, match=r"nvfp4.*llama\.cpp"):
        require_served("llamacpp", ["bf16", "nvfp4"])
    require_served("vllm", ["bf16", "fp8", "nvfp4", "int4-g32"])


def test_a_precision_without_a_score_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no score of fp8 .* a search without --dry-run makes it"):
        PrecisionScores().of(0, LayerSpec.parse("attention:kv2@fp8+ffn:skip"))
    with pytest.raises(CheckpointError, match="is not there; a search without --dry-run makes it"):
        load_precisions(tmp_path / "precisions.csv")
    (tmp_path / "precisions.csv").write_text("layer,candidate\n0,attention:kv2\n")
    with pytest.raises(CheckpointError, match="damaged"):
        load_precisions(tmp_path / "precisions.csv")


# ---- whole runs


@pytest.fixture(scope="module")
def searched(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = world.copy("scored", tmp_path_factory.mktemp("precision") / "run")
    succeed("search", "--run", run, "--budget", "0.4", "--kv-dtype", "bf16,fp8", *SEARCH)
    return run, json.loads((run / "architecture.json").read_text())


def test_a_search_with_precisions_keeps_its_budget_and_beats_what_has_none(
    searched: tuple[Path, dict[str, Any]],
) -> None:
    _, found = searched
    assert found["precisions"] == ["bf16", "fp8", "nvfp4"]
    within = [trial for trial in found["trials"] if trial["state"] == "complete"]
    assert all(trial["total_bytes"] <= found["budget_bytes"] for trial in within if trial["within"])
    assert found["cost"]["total_bytes"] <= found["budget_bytes"]
    assert Architecture.from_list(found["layers"]).precisions != ["bf16"]
    assert found["kl"] == min(trial["kl"] for trial in within if trial["within"])
    for name in ("parent-uniform-precision", "child-uniform-precision"):
        assert found["kl"] <= found["baselines"][name]["kl"]
    assert found["kl"] < 0.5 * found["baselines"]["depth-score"]["kl"]


def test_the_child_of_a_search_knows_its_precisions_and_is_measured_with_them(
    searched: tuple[Path, dict[str, Any]],
) -> None:
    run, found = searched
    config = json.loads((run / "child" / "config.json").read_text())
    layers = Architecture.from_list(found["layers"])
    assert config["marquetry_precisions"] == [[layer.attention.precision, layer.ffn.precision] for layer in layers]
    assert found["heldout"]["child"]["kl"] > 0


def test_gptq_rounds_every_child_of_a_search(searched: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    run, nearest = tmp_path / "run", searched[1]
    shutil.copytree(searched[0], run)
    known = stamps(run)
    words = ("search", "--run", run, "--budget", "0.4", "--kv-dtype", "fp8", *SEARCH, "--quantizer", "gptq")
    succeed(*words)
    found = json.loads((run / "architecture.json").read_text())
    assert found["kl"] < nearest["kl"] and found["heldout"]["child"]["kl"] < nearest["heldout"]["child"]["kl"]
    for name in ("parent-uniform-precision", "child-uniform-precision"):
        assert found["kl"] <= found["baselines"][name]["kl"] < nearest["baselines"][name]["kl"]

    # one pass serves both quantizers, and what GPTQ saves is in the factor of a format
    assert {name for name, time in stamps(run).items() if known.get(name) != time and "/precision-" in name} == set()
    tables = [load_precisions(run / name).values for name in ("precisions.csv", "precisions-gptq.csv")]
    assert all(
        tables[1][key] == value if key[2] == KV8 else tables[1][key] < value
        for key, value in tables[0].items()
        if value > 0
    )
    assert "done already" in nas(*words).err

    words = ("export", run, "--to", "transformers", "--quantizer")
    assert "nas search chose its weights by GPTQ; --quantizer nearest keeps that" in succeed(*words, "gptq").err
    assert "warning" not in succeed(*words, "nearest").err
    assert "warning" not in succeed("export", searched[0], *words[2:], "gptq", "--out", tmp_path / "out").err
    for options, message in (
        ((*SEARCH, "--quantizer", "best"), "quantizer is 'best'; it must be nearest or gptq"),
        (
            (*SEARCH, "--quantizer", "gptq", "--no-refit"),
            "quantizer is 'gptq'; it must be nearest without the refit sweep",
        ),
        (
            ("--quantizer", "gptq", "--precisions", "bf16"),
            "quantizer is 'gptq'; it must be nearest without --precisions",
        ),
    ):
        refused = nas("search", "--run", run, "--budget", "0.4", *options)
        assert refused.code == 2 and message in refused.err
    assert SearchConfig(budget=0.4, precisions="fp8", quantizer="gptq").quantizer == "gptq"


def test_a_dry_run_chooses_the_kv_dtype_that_the_search_would(searched: tuple[Path, dict[str, Any]]) -> None:
    run, found = searched
    before = stamps(run)
    words = ("search", "--run", run, "--budget", "0.4", *SEARCH, "--dry-run", "--kv-dtype")
    plan = succeed(*words, "bf16,fp8", "--json").json
    assert plan["scenario"]["kv_dtype"] == found["scenario"]["kv_dtype"] == "float8"
    assert plan["additive_optimum"] == found["optimum"]["score"]
    assert plan["additive_optimum"] == min(
        succeed(*words, dtype, "--json").json["additive_optimum"] for dtype in ("bf16", "fp8")
    )
    assert "KV cache in float8 (predicted KL: bfloat16 " in succeed(*words, "bf16,fp8").err
    assert "KV cache in bfloat16 " in succeed(*words, "bf16,fp8", "--budget", "1").err
    assert stamps(run) == before


def test_a_dry_run_plans_with_the_kv_dtypes_that_have_scores_and_says_so(world: World) -> None:
    words = ("search", "--run", world.runs / "scored", "--budget", "0.6", *LIMITS, "--dry-run", "--json", "--kv-dtype")
    plan = succeed(*words, "fp8,bf16")
    assert "planned with a KV cache in bfloat16 alone, of float8,bfloat16" in plan.err
    assert plan.json == succeed(*words, "bf16").json
    assert "precisions.csv is not there" in nas(*words, "fp8").err
    with pytest.raises(ConfigError, match="a search without --dry-run makes it"):
        PrecisionScores().of(0, LayerSpec.parse("attention:kv2+ffn:skip"), "float8")


def test_scores_of_precisions_are_made_once_and_only_those_that_are_missing(
    searched: tuple[Path, dict[str, Any]], world: World, tmp_path: Path
) -> None:
    run, found = searched
    times = {path: path.stat().st_mtime_ns for path in (run / "scores").glob("precision-*")}
    assert len(times) == 3 * len(found["layers"])  # fp8, nvfp4, kv-float8
    assert "done already" in nas("search", "--run", run, "--budget", "0.4", "--kv-dtype", "bf16,fp8", *SEARCH).err
    succeed(
        "search",
        "--run",
        run,
        "--budget",
        "0.5",
        "--trials",
        "2",
        "--path-steps",
        "0",
        *LIMITS,
        "--precisions",
        "fp8,int8",
    )
    later = {path: path.stat().st_mtime_ns for path in (run / "scores").glob("precision-*")}
    assert times.items() <= later.items()
    assert {path.name.split("_")[0] for path in later.keys() - times.keys()} == {"precision-int8"}


def test_a_finished_search_stays_finished_when_other_formats_are_scored(
    searched: tuple[Path, dict[str, Any]], world: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(searched[0], run)
    words = ("search", "--run", run, "--budget", "0.4", "--kv-dtype", "bf16,fp8", *SEARCH)
    succeed(*words)
    before = (run / "precisions.csv").read_text()
    succeed(*world.score_words(run), "--precisions", "nvfp4a16")
    assert (run / "precisions.csv").read_text() != before
    assert "This search was done already" in succeed(*words).err


def test_scores_of_formats_go_on_where_they_were(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    succeed(*world.score_words(run), "--precisions", "fp8")
    whole = (run / "precisions.csv").read_text()
    for name in ("scores/precision-fp8_001.json", "scores/precision-fp8_000.json", "precisions.csv"):
        (run / name).unlink()
    kept = stamps(run)
    succeed(*world.score_words(run), "--precisions", "fp8")
    assert (run / "precisions.csv").read_text() == whole
    assert {name: time for name, time in stamps(run).items() if name in kept} == kept


def test_true_kls_of_the_parent_are_measured_once_on_a_text(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.copy("scored", tmp_path / "run")
    table, measured, true_kl = run / "precisions.csv", [], PrecisionScoring.true_kl

    def counted(*arguments: Any) -> float:
        measured.append(arguments)
        return true_kl(*arguments)

    monkeypatch.setattr(PrecisionScoring, "true_kl", counted)

    def written(*precisions: str, tokens: int = 256) -> tuple[str, int]:
        """precisions.csv, and how many true KLs it took."""
        measured.clear()
        parent, device = open_parent(str(world.parent)), torch.device("cpu")
        PrecisionScoring(open_run(run), parent, device, Reporter(quiet=True), tokens).ensure(precisions)
        return table.read_text(), len(measured)

    assert written("fp8", KV8)[1] == 3  # of attentions and FFNs in fp8, of caches in float8
    both, count = written("fp8", "int8")
    assert count == 2
    table.unlink()
    assert written("fp8", "int8", KV8) == (both, 0)
    for path in (run / "scores").glob("kl-*"):  # as runs were before these files
        path.unlink()
    table.unlink()
    assert written("fp8", "int8", KV8) == (both, 5)
    table.unlink()
    assert written("fp8", "int8", KV8, tokens=512) == (both, 0)  # all formats of a run are of one text


def test_table_scores_are_near_true_kls_and_sums_near_joint_ones(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    result = succeed(*world.score_words(run), "--precisions", "fp8,int8", "--verify-additivity", "--json")
    told = json.loads(result.out)["precisions"]
    assert told["scored"] == ["fp8", "int8"]
    rows = json.loads((run / "additivity.json").read_text())["rows"]
    assert len(rows) == 12 and {r["precision"] for r in rows} == {"fp8", "int8"}
    for found in rows:
        assert found["sum_error"] == pytest.approx(
            (found["structure"] + found["precision_by_table"]) / found["joint"] - 1
        )
        assert found["precision_by_table"] == pytest.approx(found["precision_of_parent"], rel=0.8, abs=2e-4)
    assert told["additivity"]["errors"]["int8"]["median_sum_error"] < 0.02


def test_additivity_needs_precisions(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    failed = nas(*world.score_words(run), "--verify-additivity")
    assert failed.code != 0 and "add --precisions" in failed.err


def test_precisions_that_cannot_be_are_refused_before_anything_is_scored(world: World, tmp_path: Path) -> None:
    for words, message in (
        (("--verify-additivity",), "add --precisions"),
        (("--precisions", "fp8,bogus"), "precision 'bogus' is not known"),
        (("--precisions", "fp8", "--target", "llamacpp"), "--precisions fp8: llama.cpp does not read it"),
    ):
        for more in ((), ("--dry-run",)):
            failed = nas(*world.score_words(tmp_path / "run"), *words, *more)
            assert failed.code != 0 and message in failed.err and not (tmp_path / "run").exists()


def test_a_layer_forward_of_rounded_weights_differs(tiny_sweep: Callable[..., Sweep]) -> None:
    sweep = tiny_sweep()
    h, math = sweep.embed(torch.arange(8)[None]), sweep.math(8)
    weights = sweep.layer(0)
    changed = [
        (
            layer_forward(round_layer(weights, LayerSpec.parse(f"attention:kv4@{name}+ffn:512@{name}")), h, math)
            - layer_forward(weights, h, math)
        ).norm()
        for name in ("int8", "fp8", "nvfp4a16", "nvfp4")
    ]
    assert 0 < changed[0] < changed[1] < changed[2] < changed[3]
