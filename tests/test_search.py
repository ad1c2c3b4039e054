"""The search as a whole: budgets are kept to the byte, the optimum is found, and the child is what the cost model priced."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from app import BUDGET, SMALL, World, succeed, write_text
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import tiny_llama

from blocks.errors import CheckpointError, InfeasibleBudgetError
from blocks.parent import open_parent
from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from nas.additive import Candidates
from nas.baselines import uniform
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario
from nas.limits import Bound
from nas.run import open_run
from nas.search_problem import load_candidates
from nas.study import Ledger
from nas.table import ScoreRow
from search_spaces import load_space

SHAPE = ModelShape(64, 768, 3, 4, 2, 16, 272, tie_word_embeddings=True)
SCORE_TOLERANCE = 1e-6  # HiGHS's


def row(layer: int, spec: LayerSpec, score: float) -> ScoreRow:
    return ScoreRow(layer, str(spec.attention), str(spec.ffn), score, None, None, "exact", None, None, score, 0, 0, 0)


def candidates(seed: int, scenario: Scenario, layers: int = 3, most: int = 12) -> Candidates:
    """A random score table over at most `most` candidates a layer, the parent's own with score 0, and no limits yet."""
    rng = random.Random(seed)
    shape = replace(SHAPE, num_hidden_layers=layers)
    space = load_space("default", rng.choice(["vllm", "transformers"]))
    table = []
    for index in range(layers):
        parent, *others = space.layer_candidates(shape, index)
        chosen = rng.sample(others, min(most - 1, len(others)))
        table.append([row(index, parent, 0.0), *(row(index, spec, rng.random()) for spec in chosen)])
    return Candidates(table, CostModel(shape, scenario), ())


def within(space: Candidates, budget: int) -> Candidates:
    return Candidates(space.table, space.costs, (Bound("memory", None, budget),))


SCENARIOS = st.builds(
    Scenario,
    batch=st.integers(1, 64),
    context=st.integers(1, 100_000),
    weight_dtype=st.sampled_from(["bfloat16", "float32"]),
    kv_dtype=st.sampled_from(["bfloat16", "float32"]),
    reserve_gb=st.sampled_from([0.0, 0.123456789]),
)


def smallest(space: Candidates) -> int:
    return space.costs.fixed_bytes + sum(min(map(space.costs.layer_bytes, specs)) for specs in space.specs)


def dearest(space: Candidates) -> int:
    return space.costs.cost(space.costs.shape.parent_architecture).total_bytes


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), scenario=SCENARIOS, share=st.floats(0, 1.2))
def test_no_architecture_is_over_budget(seed: int, scenario: Scenario, share: float) -> None:
    space = candidates(seed, scenario)
    low, high = smallest(space), dearest(space)
    budget = low + int(share * (high - low))
    space = within(space, budget)
    pool = space.pool(3, 1)
    found = [space.architecture(solution.choice) for solution in pool]
    assert len(set(found)) == len(found) >= 1
    for solution, architecture in zip(pool, found, strict=True):
        assert space.costs.cost(architecture).total_bytes <= budget
        assert space.predicted(architecture) == pytest.approx(solution.score)
    if (plain := uniform(space)) is not None:
        assert space.costs.cost(plain).total_bytes <= budget
        assert len(set(plain)) == 1 and "skip" not in (plain[0].attention.kind, plain[0].ffn.kind)
        assert pool[0].score <= space.predicted(plain) + SCORE_TOLERANCE


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), scenario=SCENARIOS, share=st.floats(0, 1))
def test_the_search_finds_the_optimum_of_the_table(seed: int, scenario: Scenario, share: float) -> None:
    space = candidates(seed, scenario, most=6)
    low, high = smallest(space), dearest(space)
    budget = low + int(share * (high - low))
    space = within(space, budget)
    every = (Architecture(layers) for layers in itertools.product(*space.specs))
    fitting = [a for a in every if space.costs.cost(a).total_bytes <= budget]
    best = min(map(space.predicted, fitting))
    assert space.pool(1, 1)[0].score == pytest.approx(best, abs=SCORE_TOLERANCE)
    plain = [a for a in fitting if len(set(a)) == 1 and "skip" not in (a[0].attention.kind, a[0].ffn.kind)]
    assert uniform(space) is None or space.predicted(uniform(space)) == min(map(space.predicted, plain))
    assert (uniform(space) is None) == (not plain)


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), scenario=SCENARIOS)
def test_the_smallest_budget_is_exact_to_the_byte(seed: int, scenario: Scenario) -> None:
    space = candidates(seed, scenario)
    least = smallest(space)
    cheapest = within(space, least).pool(1, 1)[0]
    assert space.costs.cost(space.architecture(cheapest.choice)).total_bytes == least
    with pytest.raises(InfeasibleBudgetError) as caught:
        within(space, least - 1).pool(1, 1)
    assert round(caught.value.smallest_gb * 1e9) == least
    assert caught.value.binding in str(caught.value)


@pytest.mark.parametrize(
    ("scenario", "binding"),
    [
        (Scenario(batch=1, context=1), "embeddings, head and final norm"),
        (Scenario(batch=8, context=100_000), "the KV cache of the smallest layers"),
        (Scenario(batch=1, context=1, reserve_gb=1.0), "the reserve"),
    ],
)
def test_an_impossible_budget_says_what_binds(scenario: Scenario, binding: str) -> None:
    with pytest.raises(InfeasibleBudgetError, match=f"what binds is {binding}") as caught:
        within(candidates(0, scenario, most=50), 1).pool(1, 1)
    assert caught.value.binding == binding


def test_without_skips_the_weights_of_the_layers_bind() -> None:
    shape = replace(SHAPE, vocab_size=8)
    rows = [[row(index, shape.parent_layer, 0.0)] for index in range(3)]
    space = Candidates(rows, CostModel(shape, Scenario(batch=1, context=1)), (Bound("memory", None, 1),))
    with pytest.raises(InfeasibleBudgetError, match="what binds is the weights of the smallest layers"):
        space.pool(1, 1)


@given(tenths_of_mb=st.integers(1, 10**7))
def test_a_budget_of_four_digits_is_that_many_bytes(world: World, tenths_of_mb: int) -> None:
    """0.0157 GB are 15,700,000 bytes, although 0.0157 * 1e9 is less."""
    run = open_run(world.runs / "scored")
    shape = replace(SHAPE, num_hidden_layers=4, tie_word_embeddings=False)
    config = SearchConfig(budget_gb=float(f"{tenths_of_mb / 10_000:.4f}"))
    assert load_candidates(run, shape, config, Scenario()).bounds == (Bound("memory", None, tenths_of_mb * 100_000),)


def test_a_table_of_another_parent_is_refused(world: World) -> None:
    with pytest.raises(CheckpointError, match=r"scores\.csv has 4 layers, the parent 3; run `nas score` again"):
        load_candidates(open_run(world.runs / "scored"), SHAPE, SearchConfig(budget=0.5), Scenario())


def measure(ledger: Ledger, architecture: Architecture, origin: str, kl: float, excess: float) -> None:
    ledger.queue(architecture, origin)
    trial = ledger.take(None)
    assert trial is not None
    ledger.record(trial, kl, {"memory": excess}, total_bytes=90)


def test_the_ledger_remembers_by_architecture_and_study(tmp_path: Path) -> None:
    specs = [[LayerSpec.parse(f"kv{heads}+ffn:{width}") for heads in (1, 2) for width in (256, 512)]] * 2
    one, other = Architecture((specs[0][0], specs[0][3])), Architecture((specs[0][3], specs[0][0]))
    ledger = Ledger(tmp_path / "study.journal", "first", specs)
    measure(ledger, one, "pool", 0.5, -0.1)
    measure(ledger, other, "uniform", 0.25, 0.0)
    ledger.queue(one, "swap")  # known already
    again = Ledger(tmp_path / "study.journal", "first", specs)
    assert (again.value(one), again.value(other)) == (0.5, 0.25)
    assert again.value(Architecture((specs[0][1], specs[0][1]))) is None
    assert Ledger(tmp_path / "study.journal", "second", specs).value(one) is None
    first, second = again.study.trials
    assert {k: v for k, v in first.user_attrs.items() if k != "worker"} == {"origin": "pool", "total_bytes": 90}
    assert (first.constraints, second.constraints) == ({"memory": -0.1}, {"memory": 0.0})
    assert again.study.best_trial.value == 0.25 and again.take(None) is None


# The child on disk


@pytest.fixture(scope="module", params=["tied", "untied"])
def searched(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A searched run of a parent with tied or untied embeddings, in fp32 and bf16 respectively."""
    if request.param == "untied":
        return world.runs / "searched"
    directory = tmp_path_factory.mktemp("tied")
    sizes = {"initializer_range": 0.1, "intermediate_size": 768, "num_hidden_layers": 3, "head_dim": 8}
    parent = tiny_llama(directory / "parent", tie_word_embeddings=True, **sizes)
    text = write_text(directory / "text.jsonl")
    words = ("--run", directory / "run")
    succeed("score", "--parent", parent, "--data", text, *words, *SMALL, "--target", "transformers")
    succeed("search", *words, *BUDGET, "--weight-dtype", "float32")
    return directory / "run"


@pytest.mark.parametrize("name", ["child", "uniform"])
def test_the_child_on_disk_has_the_printed_parameters_and_bytes(searched: Path, name: str) -> None:
    found = json.loads((searched / "architecture.json").read_text())
    cost = found["cost" if name == "child" else "uniform_cost"]
    with safe_open(searched / name / "model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (not a mapping)
    assert sum(tensor.numel() for tensor in tensors) == cost["parameters"]
    assert sum(tensor.nbytes for tensor in tensors) == cost["weight_bytes"]
    assert cost["total_bytes"] <= found["budget_bytes"]
    if name == "child":
        assert f"weights {cost['parameters']:,} x" in found["formula"]
        assert f"= {cost['weight_bytes']:,} B + KV 1 x 128 tokens x" in found["formula"]


def test_the_child_loads_where_nobody_heard_of_us(searched: Path, tmp_path: Path) -> None:
    """With as many parameters and as large a KV cache as the run states."""
    found = json.loads((searched / "architecture.json").read_text())
    parent = open_run(searched).config.parent
    program = f"""
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
child = AutoModelForCausalLM.from_pretrained({str(searched / "child")!r}, trust_remote_code=True, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained({str(searched / "child")!r}, trust_remote_code=True)
tokens = tokenizer("some text to go on with", return_tensors="pt")
grown = child.generate(**tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
cache = child(**tokens, use_cache=True).past_key_values
values = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in cache.layers if layer.keys is not None)
print(json.dumps([sum(p.numel() for p in child.parameters()), grown.shape[1] - tokens["input_ids"].shape[1], values]))
"""
    # -I hides this repository (the current directory and PYTHONPATH) from the process
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    parameters, grown, values = json.loads(done.stdout)
    shape = open_parent(parent).shape
    architecture = Architecture.from_list(found["layers"])
    assert (parameters, grown) == (found["cost"]["parameters"], 8)
    assert values == sum(shape.kv_values_per_token(layer.attention) for layer in architecture)


def test_the_best_measured_child_is_the_one_written(searched: Path) -> None:
    found = json.loads((searched / "architecture.json").read_text())
    assert found["trials"][0]["origin"] == "optimum"
    assert found["trials"][0]["predicted_kl"] == pytest.approx(found["optimum"]["score"])
    best = min((t for t in found["trials"] if t["state"] == "complete"), key=lambda trial: trial["kl"])
    assert best["layers"] == found["layers"] and best["kl"] == found["kl"] <= found["trials"][0]["kl"]
    assert best["total_bytes"] == found["cost"]["total_bytes"]
    assert best["predicted_kl"] == pytest.approx(found["predicted_kl"])
    assert found["optimum"]["bound"] <= found["optimum"]["score"] + SCORE_TOLERANCE
    assert all(trial["total_bytes"] <= found["budget_bytes"] for trial in found["trials"])


def test_refitting_brings_the_same_architecture_nearer_to_the_parent(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    refitted = json.loads((world.runs / "searched" / "architecture.json").read_text())
    plain = succeed("search", "--run", run, *BUDGET, "--no-refit", "--json").json
    before = {tuple(trial["layers"]): trial["kl"] for trial in plain["trials"]}
    after = {tuple(trial["layers"]): trial["kl"] for trial in refitted["trials"]}
    both = before.keys() & after.keys()  # the sampler proposes others once the values differ
    assert len(both) >= 4 and sum(after[layers] for layers in both) < sum(before[layers] for layers in both)
