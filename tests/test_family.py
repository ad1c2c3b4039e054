"""`nas search --sweep`: one child for every budget, each within its own to the byte; members that are done are left alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from app import World, contents, nas, stamps, succeed

from blocks.checkpoint import load_child, read_architecture
from blocks.errors import ConfigError
from blocks.parent import open_parent
from blocks.spec import Architecture
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario

SHARES = (0.8, 0.7, 0.6)
WORDS = ("--sweep", "0.8:0.6:0.1", "--batch", 1, "--context", 128, "--verify", 2, "--trials", 1, "--path-steps", 1)
SCENARIO = Scenario(batch=1, context=128)


@pytest.fixture(scope="module")
def swept(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = world.copy("scored", tmp_path_factory.mktemp("family") / "run")
    succeed("search", "--run", run, *WORDS)
    return run


@pytest.fixture(scope="module")
def costs(world: World) -> CostModel:
    return CostModel(open_parent(str(world.parent)).shape, SCENARIO)


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def directories(run: Path) -> dict[float, Path]:
    return {0.8: run / "family" / "0.800", 0.7: run / "family" / "0.700", 0.6: run}


def test_shares_run_from_the_first_to_the_last() -> None:
    assert SearchConfig(sweep="0.8:0.6:0.1").shares == [0.8, 0.7, 0.6]
    assert SearchConfig(sweep="0.9:0.5:0.05").shares == [0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5]
    assert SearchConfig(sweep="0.9:0.5:0.15").shares == [0.9, 0.75, 0.6]
    assert SearchConfig(sweep="0.5:0.5:0.1").shares == [0.5]


@pytest.mark.parametrize(
    "text", ["0.9", "0.9:0.5", "0.5:0.9:0.1", "1.1:0.5:0.1", "0.9:0:0.1", "0.9:0.5:0", "a:b:c", "nan:0.5:0.1"]
)
def test_other_sweeps_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"FROM:TO:STEP") as caught:
        SearchConfig(sweep=text)
    assert "\n" not in str(caught.value) and "sweep" in str(caught.value) and text in str(caught.value)


def test_a_sweep_is_given_alone(world: World) -> None:
    for words in (("--budget", "0.5"), ("--budget-gb", "0.001")):
        result = nas("search", "--run", world.runs / "scored", "--sweep", "0.8:0.6:0.1", *words)
        assert result.code == 2 and "sweep" in result.err.splitlines()[-1]


def test_every_member_is_within_its_budget_to_the_byte(swept: Path, costs: CostModel) -> None:
    for share, directory in directories(swept).items():
        found, budget = read(directory / "architecture.json"), costs.budget_for_share(share)
        assert found["limits"] == {"memory": {"low": None, "high": budget, "unit": "bytes"}}
        architecture = Architecture.load(directory / "architecture.json")
        assert costs.cost(architecture).total_bytes == found["cost"]["total_bytes"] <= budget
        larger = [other for other in SHARES if other > share]
        assert all(costs.budget_for_share(other) > budget for other in larger)


def test_every_member_can_be_loaded_and_is_what_it_costs(swept: Path, costs: CostModel) -> None:
    for share, directory in directories(swept).items():
        child = load_child(directory / "child")
        shape, built = read_architecture(directory / "child")
        kv = sum(shape.kv_values_per_token(layer.attention) for layer in built) * SCENARIO.batch * SCENARIO.context * 2
        weights = sum(parameter.numel() for parameter in child.parameters()) * 2
        assert weights + kv == read(directory / "architecture.json")["cost"]["total_bytes"]
        assert weights + kv <= costs.budget_for_share(share)


def test_the_table_of_members_is_that_of_their_searches(swept: Path) -> None:
    members = read(swept / "family.json")["members"]
    assert [member["share"] for member in members] == list(SHARES)
    for member, directory in zip(members, directories(swept).values(), strict=True):
        found = read(directory / "architecture.json")
        assert (swept / member["directory"]).resolve() == directory.resolve()
        assert (member["layers"], member["kl"], member["gb"]) == (found["layers"], found["kl"], found["cost"]["gb"])
        assert member["heldout_kl"] == found["heldout"]["child"]["kl"]
        assert member["parameters"] == found["cost"]["parameters"]
    kls = [member["kl"] for member in members]
    assert kls == sorted(kls)  # less is kept, more is lost; on this parent and text by far


def test_each_path_starts_at_the_child_before(swept: Path, world: World) -> None:
    parent = open_parent(str(world.parent)).shape.parent_architecture.to_list()
    children = [read(directory / "architecture.json")["layers"] for directory in directories(swept).values()]
    starts = [read(directory / "path.json")["start"] for directory in directories(swept).values()]
    assert starts == [parent, *children[:-1]]


def test_the_last_member_is_the_run_s_own_and_is_shown(swept: Path) -> None:
    shown = succeed("show", "--run", swept, "--json").json["architecture"]
    assert shown["layers"] == read(swept / "family.json")["members"][-1]["layers"]
    assert f"{shown['cost']['gb']:.4f} GB" in succeed("show", "--run", swept).out


def test_run_again_it_does_nothing(swept: Path) -> None:
    before = stamps(swept)
    again = succeed("search", "--run", swept, *WORDS, "--json")
    assert stamps(swept) == before
    assert again.json == read(swept / "family.json")


def test_what_is_missing_is_made_again_and_nothing_else(swept: Path, world: World, tmp_path: Path) -> None:
    """As after a kill in the middle of the second member."""
    run = world.copy("scored", tmp_path / "run")
    shutil.copy(swept / "study.journal", run)
    shutil.copytree(swept / "family", run / "family")
    (run / "family" / "0.700" / "architecture.json").unlink()
    first = stamps(run / "family" / "0.800")
    succeed("search", "--run", run, *WORDS)
    assert stamps(run / "family" / "0.800") == first
    assert read(run / "family.json") == read(swept / "family.json")
    for share, directory in directories(run).items():
        assert contents(directory / "child") == contents(directories(swept)[share] / "child")
