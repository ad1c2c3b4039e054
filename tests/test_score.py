"""`nas score` as a whole: where things lie changes no file, rounds go on where they stopped, the table says how sure it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from app import BUDGET, World, contents, nas, stamps, succeed

from nas.score_files import ScoreFiles
from nas.table import ScoreRow, load_table


def made(run: Path) -> dict[str, bytes]:
    """What a run consists of, apart from when and how it was made."""
    files = contents(run)
    return {
        name: files[name] for name in files if name == "scores.csv" or name.startswith(("data/", "library/", "scores/"))
    }


def rows(run: Path) -> list[ScoreRow]:
    return [row for layer in load_table(run / "scores.csv") for row in layer]


def values(run: Path) -> dict[tuple[int, str], dict[str, list[float]]]:
    return ScoreFiles(run / "scores").load("one_pass", range(4))


@pytest.mark.parametrize(
    "words",
    [
        ("--weights", "streamed"),
        ("--activations", "host"),
        ("--activations", "disk"),
        ("--weights", "streamed", "--activations", "disk"),
    ],
    ids=" ".join,
)
def test_where_weights_and_activations_lie_changes_no_file(
    world: World, tmp_path: Path, words: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    plan = succeed(*world.score_words(run), *words, "--json").json["plan"]["arrangement"]
    assert [plan[name.removeprefix("--")] for name in words[::2]] == list(words[1::2])
    assert made(run) == made(world.runs / "scored")
    assert not list(run.rglob(".*"))


def test_the_summary_says_what_was_planned_and_what_it_took(world: World) -> None:
    summary = json.loads((world.runs / "scored" / "score.json").read_text())
    plan = summary["plan"]
    assert (summary["candidates"], summary["exact"]) == (plan["candidates"], plan["scored_exactly"])
    assert summary["tokens"] == {"fit": plan["fit_tokens"], "calibration": plan["calibration_tokens"]}
    assert (summary["one_pass_tokens"], summary["exact_tokens"]) == (512, plan["exact_tokens"]) == (512, 256)
    assert summary["peak_memory_gb"] > 0 and plan["memory_gb"] > 0 and plan["seconds"] > 0
    assert plan["flops"]["total"] == sum(n for part, n in plan["flops"].items() if part != "total")


def test_every_score_lies_in_its_interval(world: World) -> None:
    for row in rows(world.runs / "scored"):
        if row.source == "parent":
            assert (row.score, row.score_low, row.score_high) == (0.0, None, None)
        else:
            assert row.score_low is not None and row.score_high is not None
            assert 0 <= row.score_low < row.score < row.score_high


def test_the_estimator_asked_for_is_the_one_in_the_table(world: World, tmp_path: Path) -> None:
    run, tok = tmp_path / "run", values(world.runs / "scored")
    assert succeed(*world.score_words(run), "--estimator", "fisher", "--json").json["estimator"] == "fisher"
    fisher = values(run)
    assert all(own.keys() == {"tok", "seq"} for own in tok.values())
    for row in rows(run):
        if row.source != "parent":
            key = (row.layer, str(row.spec))
            assert fisher[key]["tok"] == tok[key]["tok"] and fisher[key]["fisher"] != tok[key]["tok"]
            assert row.one_pass == pytest.approx(sum(fisher[key]["fisher"]) / 16, rel=1e-4)


# Rounds

Judged = list[list[list[str]]]
"""What was given to `settled`: the choices before and after, for every round but the first."""


def score_in_rounds(world: World, run: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    """All rounds, as if no two of them agreed."""
    judged: Judged = []
    monkeypatch.setattr("nas.score.settled", lambda _, before, now: bool(judged.extend((before, now))))
    succeed(*world.score_words(run), "--auto-tokens")
    return judged


@pytest.fixture(scope="module")
def in_rounds(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Judged]:
    run = tmp_path_factory.mktemp("rounds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        return run, score_in_rounds(world, run, patch)


def test_all_rounds_together_score_as_one_does(world: World, in_rounds: tuple[Path, Judged]) -> None:
    """The labels of a sequence are drawn by its place in the text."""
    (run, judged), one = in_rounds, world.runs / "scored"
    assert len(list((run / "scores").glob("one_pass_000*.json"))) == 3 and len(judged) == 4
    whole, parts = values(one), values(run)
    assert parts.keys() == whole.keys()
    for key, own in whole.items():
        for name in own:
            assert parts[key][name] == pytest.approx(own[name], rel=1e-4, abs=1e-6)
    for found, expected in zip(rows(run), rows(one), strict=True):
        assert found.score == pytest.approx(expected.score, rel=1e-3, abs=1e-6)


def test_rounds_stop_when_the_choices_stay_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts as the same is tested in test_rounds.py; here nearly everything does."""
    monkeypatch.setattr("nas.rounds.TOLERANCE", 10.0)
    run = tmp_path / "run"
    summary = succeed(*world.score_words(run), "--auto-tokens", "--json").json
    assert summary["sequences"]["one_pass"] == 8  # of 16
    assert not list((run / "scores").glob("one_pass_*.2.json"))
    before = stamps(run)
    succeed(*world.score_words(run), "--auto-tokens")
    assert stamps(run) == before


@pytest.mark.parametrize(
    "lacking",
    [
        ("one_pass_000.1", "one_pass_001.1", *(f"one_pass_00{layer}.2" for layer in range(4))),
        ("one_pass_000.2",),
        (),
    ],
    ids=["in the second round", "in the third round", "before the table"],
)
def test_rounds_go_on_where_they_stopped(
    world: World,
    in_rounds: tuple[Path, Judged],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lacking: tuple[str, ...],
) -> None:
    """Layers are scored from the last to the first; a round is judged by what there was at its end, as if never stopped."""
    done, judged = in_rounds
    run = shutil.copytree(done, tmp_path / "run")
    for name in ("scores.csv", "score.json", *(f"scores/{file}.json" for file in lacking)):
        (run / name).unlink()
    assert score_in_rounds(world, run, monkeypatch) == judged
    assert made(run) == made(done)


def test_candidates_that_were_not_kept_are_built_again_for_the_child(world: World, tmp_path: Path) -> None:
    """The same scores without a library, the same child, and on disk only what it needs."""
    run = tmp_path / "run"
    succeed(*world.score_words(run), "--library", "rebuild")
    assert rows(run) == rows(world.runs / "scored")
    assert not (run / "library").exists() or not list((run / "library").iterdir())
    succeed("search", "--run", run, *BUDGET)
    for child in ("child", "uniform"):
        assert contents(run / child) == contents(world.runs / "searched" / child)
    built = sorted(path.name for path in (run / "library").iterdir())
    assert built and all(".attention-" in name for name in built)
    before = stamps(run)
    succeed(*world.score_words(run), "--library", "rebuild")
    succeed("search", "--run", run, *BUDGET)
    assert stamps(run) == before


def test_scores_without_a_library_go_on_where_they_stopped(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed(*world.score_words(run), "--library", "rebuild")
    expected = contents(run)
    for name in ("scores.csv", "score.json", "scores/one_pass_001.json", "scores/exact_003.json"):
        (run / name).unlink()
    succeed(*world.score_words(run), "--library", "rebuild")
    found = contents(run)
    assert all(found[name] == expected[name] for name in expected if name != "score.json")


def test_rounds_need_the_library(world: World, tmp_path: Path) -> None:
    result = nas(*world.score_words(tmp_path / "run"), "--library", "rebuild", "--auto-tokens")
    assert result.code == 2 and "add --library keep" in result.err.splitlines()[-1]


def test_block_local_distillation_changes_the_library_and_goes_on(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = (*world.score_words(run), "--bld-tokens", 8192)
    summary = succeed(*words, "--json").json
    assert summary["plan"]["local_tokens"] == 8192 and summary["plan"]["flops"]["local"] > 0
    assert contents(run / "library") != contents(world.runs / "scored" / "library")
    expected = contents(run)
    for name in ("scores.csv", "library/layer_001.safetensors", "scores/one_pass_001.json"):
        (run / name).unlink()
    succeed(*words)
    assert all(contents(run)[name] == expected[name] for name in expected if not name.endswith("score.json"))
    succeed("search", "--run", run, *BUDGET)
