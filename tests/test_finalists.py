"""The last choice: rounds of halving, diverse finalists within the limits, and short heals that go on where they were killed."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from app import BUDGET, World, contents, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tables import costs_of, every_architecture, limited, random_table, shape_of

import nas.finalists
from blocks.checkpoint import write_child
from blocks.parent import open_parent
from blocks.rounded_model import roundings
from blocks.spec import Architecture
from distill.config import DistillConfig
from nas.additive import Candidates
from nas.config import RunConfig
from nas.costs import Scenario
from nas.finalists import CLOSE, SHIFT, VARIANT_GAP, ShortHeals, choose_finalists, short, variants
from nas.progress import Reporter
from nas.run import Run, open_run
from nas.rungs import rungs
from nas.study import Ledger, architecture_of
from nas.trials import Trials

# Rounds


def test_rounds_halve_the_finalists_and_double_the_tokens() -> None:
    assert rungs(4, 1_000_000) == [(4, 500_000), (2, 1_000_000)]
    assert rungs(8, 1_000_000) == [(8, 250_000), (4, 500_000), (2, 1_000_000)]
    assert rungs(3, 1_000_000) == [(3, 500_000), (2, 1_000_000)]
    assert rungs(5, 1_000_000) == [(5, 250_000), (3, 500_000), (2, 1_000_000)]
    assert rungs(2, 1_000_000) == [(2, 1_000_000)]
    assert rungs(1, 1_000_000) == []


@given(finalists=st.integers(2, 100), tokens=st.integers(1, 10**9))
def test_rounds_end_with_two_on_all_tokens(finalists: int, tokens: int) -> None:
    rounds = rungs(finalists, tokens)
    assert rounds[0][0] == finalists and rounds[-1] == (2, tokens)
    for (many, few), (fewer, more) in itertools.pairwise(rounds):
        assert fewer == (many + 1) // 2 and more // 2 == few


# Other kinds of children


SHAPE = shape_of(4)
COSTS = costs_of(Scenario(batch=2, context=256), SHAPE)


def attention(architecture: Architecture) -> int:
    return sum(SHAPE.attention_parameters(layer.attention) for layer in architecture)


def skipped(architecture: Architecture) -> list[int]:
    return [index for index, layer in enumerate(architecture) if layer.attention.kind == "skip"]


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.3, 0.5, 0.7]))
def test_variants_are_the_best_of_their_kind(seed: int, share: float) -> None:
    """Against brute force: more of the attention kept than in the optimum, less, and one run of skips."""
    candidates = limited(random_table(seed, SHAPE, most=6), COSTS, budget=share)
    optimum = candidates.optimum()
    best, found = candidates.architecture(optimum.choice), variants(candidates, optimum)
    every = [a for a in every_architecture(candidates) if candidates.excess(candidates.choice(a)) <= 0]
    amounts = [[SHAPE.attention_parameters(spec.attention) for spec in specs] for specs in candidates.specs]
    most, least, now = sum(map(max, amounts)), sum(map(min, amounts)), attention(best)
    runs = {tuple(range(start, start + len(skipped(best)))) for start in range(len(best))}
    kinds = {
        "attention-rich": [a for a in every if attention(a) >= now + round(SHIFT * (most - now))],
        "ffn-rich": [a for a in every if attention(a) <= now - round(SHIFT * (now - least))],
        "contiguous": [a for a in every if tuple(skipped(a)) in runs] if len(skipped(best)) >= 2 else [],
    }
    assert set(found) == {name for name, of_kind in kinds.items() if of_kind}
    for name, architecture in found.items():
        assert architecture in kinds[name]
        score = min(map(candidates.predicted, kinds[name]))
        assert candidates.predicted(architecture) <= score * (1 + VARIANT_GAP) + 1e-12


# Choosing finalists


def some_trials(tmp_path: Path, rows: Sequence[tuple[str, float, float]]) -> tuple[Candidates, Trials]:
    """A ledger of children by (origin, true KL, share outside the limit), all different."""
    candidates = limited(random_table(0, SHAPE, most=6), COSTS, budget=0.6)
    ledger = Ledger(tmp_path / "study.journal", "search", candidates.specs)
    for architecture, (origin, kl, excess) in zip(every_architecture(candidates), rows, strict=False):
        ledger.queue(architecture, origin)
        trial = ledger.take(None)
        assert trial is not None
        ledger.record(trial, kl, {"memory": excess, "parameters": -0.1})
    return candidates, Trials(candidates, None, ledger, Reporter(quiet=True))  # type: ignore[arg-type]


def names(trials: Trials, most: int) -> list[str]:
    return [finalist.name for finalist in choose_finalists(trials, most)]


def test_finalists_are_of_different_kinds(tmp_path: Path) -> None:
    """The best, then the best of each other kind however many of one kind lead, then whatever is next."""
    kls = [0.30, 0.31, 0.32, 0.33, 0.40, 0.44, 0.42, 0.41]
    kinds = ["pool", "pool", "pool", "swap", "ffn-rich", "path", "attention-rich", "attention-rich"]
    _, trials = some_trials(tmp_path, [(kind, kl, -0.1) for kind, kl in zip(kinds, kls, strict=True)])
    assert names(trials, 4) == ["0000-pool", "0007-attention-rich", "0004-ffn-rich", "0005-path"]
    assert names(trials, 6)[4:] == ["0003-swap", "0001-pool"]
    assert len(names(trials, 100)) == 8 and names(trials, 2) == ["0000-pool", "0007-attention-rich"]


def test_finalists_are_within_the_limits_and_not_much_worse(tmp_path: Path) -> None:
    rows = [
        ("optimum", 0.30, 0.0),
        ("swap", 0.10, 0.001),  # best, but a thousandth too large
        ("path", 0.30 * CLOSE + 0.001, -0.2),
        ("ffn-rich", 0.30 * CLOSE - 0.001, -0.2),
        ("uniform", 0.9, -0.3),
    ]
    _, trials = some_trials(tmp_path, rows)
    assert names(trials, 2) == ["0000-optimum", "0003-ffn-rich"]
    everything = choose_finalists(trials, 10)
    assert {finalist.name for finalist in everything} == {"0000-optimum", "0003-ffn-rich", "0002-path", "0004-uniform"}
    assert all(value <= 0 for finalist in everything for value in finalist.trial.constraints.values())


def test_a_child_is_a_finalist_once(tmp_path: Path) -> None:
    """Though two workers that started at once have queued it both."""
    candidates, trials = some_trials(tmp_path, [("optimum", 0.3, 0.0), ("pool", 0.35, 0.0)])
    first = architecture_of(trials.ledger.trials[0].params)
    trials.ledger.study.enqueue_trial(trials.ledger.trials[0].params, {"origin": "path"})
    trial = trials.ledger.take(None)
    assert trial is not None
    trials.ledger.record(trial, 0.3, {"memory": 0.0})
    found = [finalist.architecture for finalist in choose_finalists(trials, 4)]
    assert found[0] == first and len(set(found)) == len(found) == 2
    assert all(a in set(every_architecture(candidates)) for a in found)


# Short heals


def test_a_recipe_of_qad_from_the_healed_is_that_of_the_parent() -> None:
    """Finalists have no healed weights to learn from; and those without precisions learn as they are."""
    config = short(DistillConfig(qad=True, teacher="healed", tokens=10**6), 4096)
    assert config.teacher == "parent" and config.tokens == 4096
    assert not replace(config, qad=False).qad


def heals_of(run: Run, config: DistillConfig) -> ShortHeals:
    """Short heals of children that need not be written."""
    assembler: Any = SimpleNamespace(assemble=lambda *_: None, write=lambda *_: None)
    place = torch.device("cpu")
    return ShortHeals(run, "study", "finalists", None, assembler, "bfloat16", config, place, Reporter(quiet=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 3, 30, 31])
def test_the_last_round_ends_with_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Steps are rounded up. The curve begins with the KL that the trial had."""
    config = DistillConfig(tokens=steps * 128 - 1, batch_sequences=4, sequence_length=32)
    _, trials = some_trials(tmp_path, [("optimum", 0.3, 0.0), ("path", 0.31, 0.0), ("swap", 0.32, 0.0)])
    asked: list[int] = []

    def heal(self: ShortHeals, architecture: Architecture, directory: Path, until: int) -> Any:
        asked.append(until)
        after = SimpleNamespace(kl=0.2, kl_se=0.01)
        return SimpleNamespace(tokens=until * 128, steps=until, after=after)

    monkeypatch.setattr(ShortHeals, "_run", heal)
    run = Run(tmp_path, RunConfig(), "fingerprint")
    for _ in range(2):  # the second time all is known
        _, told = heals_of(run, config).choose(choose_finalists(trials, 3))
        assert [f["heal"][0]["kl"] for f in told] == [0.3, 0.31, 0.32]
        assert [f["heal"][-1]["steps"] for f in told] == [steps, steps, math.ceil((config.tokens // 2) / 128)]
    assert max(asked) == config.steps == steps


def test_finalists_are_rounded_as_they_will_be_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `nas distill` rounds its student: through the dtype of the checkpoint."""
    run = open_run(world.runs / "searched")
    parent = open_parent(str(world.parent))
    plain = Architecture.load(run.path("architecture.json"))
    rounded = Architecture(tuple(layer.at("int3", "nvfp4") for layer in plain))
    students: list[Any] = []
    monkeypatch.setattr(nas.finalists, "heal", lambda config, teacher, student, *_, **__: students.append(student))
    heals = heals_of(run, DistillConfig())
    heals.parent = parent
    for name, architecture in (("rounded", rounded), ("plain", plain)):
        weights = load_file(run.path("child") / "model.safetensors")
        write_child(tmp_path / name / "child", parent.path, architecture, weights, "bfloat16")
        heals._run(architecture, tmp_path / name, 1)
    assert {rounding.through for rounding in roundings(students[0])} == {torch.bfloat16}
    assert not list(roundings(students[1]))


WORDS = (*BUDGET, "--verify", "3", "--trials", "1", "--no-prune", "--finalists", "4", "--heal-tokens", "2048")
KILLED_AT = {20: 2, 41: 4}  # nine reports of progress for eight steps -> heals that are done by then
RECIPE = "distill: {batch_sequences: 4, micro_batch: 4, sequence_length: 32, learning_rate: 2.0e-4}\n"
STEPS = 2048 // (4 * 32)


@pytest.fixture(scope="module")
def healed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Searches with four finalists, 8 steps for each and 8 more for two: one that ended, and some killed on the way."""
    directory = tmp_path_factory.mktemp("finalists")
    (directory / "recipe.yaml").write_text(RECIPE)
    cases: list[list[object]] = []
    for name, killed in [("whole", None), *((f"killed-{step}", ("heal", step)) for step in KILLED_AT)]:
        words = [
            "search",
            "--run",
            world.copy("scored", directory / name),
            *WORDS,
            "--recipe",
            directory / "recipe.yaml",
        ]
        cases.append([1, killed, words])
    (directory / "cases.json").write_text(json.dumps(cases, default=str))
    script = Path(__file__).with_name("search_workers.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "cases.json"], cwd=directory, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[0], *[[-signal.SIGKILL]] * len(KILLED_AT)], done.stderr
    return directory


def found(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "architecture.json").read_text())
    return content


def test_the_one_that_heals_best_is_the_child(healed: Path) -> None:
    result = found(healed / "whole")
    finalists = result["finalists"]
    assert len({tuple(f["layers"]) for f in finalists}) == len(finalists) == 4
    rounds = [[point["steps"] for point in f["heal"][1:]] for f in finalists]
    assert sorted(rounds) == [[STEPS // 2], [STEPS // 2], [STEPS // 2, STEPS], [STEPS // 2, STEPS]]
    first = sorted(f["heal"][1]["kl"] for f in finalists)
    last = {f["name"]: f["heal"][2]["kl"] for f in finalists if len(f["heal"]) == 3}
    assert sorted(f["heal"][1]["kl"] for f in finalists if f["name"] in last) == first[:2]
    (chosen,) = (f for f in finalists if f["chosen"])
    assert chosen["heal"][-1]["kl"] == min(last.values())
    assert chosen["layers"] == result["layers"] and chosen["heal"][0] == {"tokens": 0, "kl": result["kl"]}
    assert chosen["heal"][-1]["kl"] < chosen["heal"][0]["kl"] and chosen["heal"][-1]["tokens"] == 2048
    within = {tuple(t["layers"]) for t in result["trials"] if t["within"]}
    assert {tuple(f["layers"]) for f in finalists} <= within


def test_the_weights_are_cleared_and_the_curves_stay(healed: Path) -> None:
    run, finalists = healed / "whole", found(healed / "whole")["finalists"]
    kept = {str(path.relative_to(run / "finalists")) for path in (run / "finalists").rglob("*") if path.is_file()}
    assert kept == {f"{f['name']}/curve.json" for f in finalists}
    for f in finalists:
        curve = json.loads((run / "finalists" / f["name"] / "curve.json").read_text())
        assert curve["rounds"] == f["heal"][1:]


@pytest.mark.parametrize("step", KILLED_AT)
def test_killed_heals_go_on_from_their_checkpoints(healed: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """And end as if never killed, bit for bit; what was healed is not healed again."""
    run = healed / f"killed-{step}"
    assert not (run / "architecture.json").exists()
    curves = {path.parent.name: json.loads(path.read_text()) for path in (run / "finalists").glob("*/curve.json")}
    assert sum(len(curve["rounds"]) for curve in curves.values()) == KILLED_AT[step]
    asked: list[tuple[str, int]] = []
    begun_at: list[int] = []
    heal = nas.finalists.heal

    def noted(*arguments: Any, until: int, on_step: Any, **options: Any) -> Any:
        asked.append((arguments[5].parent.name, until))
        steps: list[int] = []
        result = heal(*arguments, until=until, on_step=lambda p: (steps.append(p.step), on_step(p)), **options)
        begun_at.append(steps[0])
        return result

    monkeypatch.setattr(nas.finalists, "heal", noted)
    succeed("search", "--run", run, *WORDS, "--recipe", healed / "recipe.yaml")
    done = {(name, point["steps"]) for name, curve in curves.items() for point in curve["rounds"]}
    assert len(asked) + len(done) == 6 and not done & set(asked)
    assert begun_at == [0 if until == STEPS // 2 else STEPS // 2 + 1 for _, until in asked]
    ours, expected = found(run), found(healed / "whole")
    for key in ("layers", "finalists", "kl", "heldout"):
        assert ours[key] == expected[key]
    assert contents(run / "child") == contents(healed / "whole" / "child")
    assert not list((run / "finalists").rglob("*.safetensors"))


def test_what_other_searches_healed_is_not_mistaken_for_ours(healed: Path, world: World, tmp_path: Path) -> None:
    """Another budget, and other healing: both have a first trial called 0000-optimum."""
    few = (
        "--finalists",
        2,
        "--heal-tokens",
        256,
        "--recipe",
        healed / "recipe.yaml",
        "--trials",
        1,
        "--verify",
        2,
        "--no-refit",
    )
    larger = ("--budget", "0.8", "--batch", "1", "--context", "128")
    used = world.copy("scored", tmp_path / "used")
    succeed("search", "--run", used, *BUDGET, *few)
    fresh = world.copy("scored", tmp_path / "fresh")
    for run in (used, fresh):
        succeed("search", "--run", run, *larger, *few)
    assert found(used)["finalists"] == found(fresh)["finalists"]
    more = (*larger, *few, "--heal-tokens", 512)
    succeed("search", "--run", used, *more)
    assert all(f["heal"][-1]["tokens"] == 512 for f in found(used)["finalists"])
