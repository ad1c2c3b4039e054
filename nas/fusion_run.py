"""`nas fuse` on a run.

its child           child/ -> fused/ and fusion.json; with `replace`, fused/ becomes the child that `nas distill` heals
its healed child    healed/ -> healed-fused/ and healed-fusion.json
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from blocks.checkpoint import as_built, read_architecture
from blocks.errors import CheckpointError, ConfigError, NasError
from blocks.files import remove_directory, replace_directory, save_json
from blocks.parent import Parent
from blocks.spec import Architecture
from nas.clock import load_clock
from nas.costs import CostModel, Scenario
from nas.data import load_pack
from nas.fusion import FusionConfig, Task, fuse_child
from nas.progress import Reporter
from nas.run import Run, digest
from nas.set_aside import set_aside_other_healing

SOURCES = {"child": ("fused", "fusion.json"), "healed": ("healed-fused", "healed-fusion.json")}
UNFUSED = "child-unfused"


def run_fuse(
    run: Run,
    parent: Parent,
    which: str,
    config: FusionConfig,
    scenario: Scenario,
    device: torch.device,
    reporter: Reporter,
    replace: bool = False,
) -> dict[str, Any]:
    """`nas fuse` on a run: writes fused/ and fusion.json (or healed-...), and returns what the latter holds."""
    if replace and which != "child":
        raise ConfigError(
            "--replace puts the fused child in the place of the one to be healed: not with --child healed"
        )
    task = task_of(run, which)
    result = fuse_child(task, parent, config, scenario, device, reporter)
    if replace and result["runs"]:
        replace_child(run, parent, result)
        reporter.say(f"{run.path('child')} is the fused child now, {run.path(UNFUSED)} the one before")
    elif replace and "unfused" in run.read("architecture.json", "search"):
        restore_child(run)
        reporter.say(f"{run.path('child')} is the child before fusion again")
    if replace:
        set_aside_other_healing(run, run.read("architecture.json", "search")["key"], reporter)
    return result


def task_of(run: Run, which: str) -> Task:
    """Of a run's child before healing (the unfused one, if it was replaced) or after it."""
    if which not in SOURCES:
        raise ConfigError(f"--child {which}: write child (before healing) or healed, or give a child's directory")
    out, record = SOURCES[which]
    data = run.path("data")
    source = unfused_child(run) if which == "child" else run.path("healed")
    if not (source / "config.json").exists():
        stage = "search" if which == "child" else "distill"
        raise CheckpointError(f"{run.directory} has no {which} yet; run `nas {stage} --run {run.directory}` first")
    return Task(
        source, run.path(out), run.path(record), load_pack(data / "calibration.npy"), load_pack(data / "heldout.npy")
    )


def unfused(run: Run) -> dict[str, Any]:
    """The architecture.json of the search, as it was before fusion."""
    found = run.read("architecture.json", "search")
    before: dict[str, Any] = found.get("unfused", found)
    return before


def unfused_child(run: Run) -> Path:
    """Where the child of the search lies: child/, or child-unfused/ once it was replaced (or that was cut off half-way)."""
    layers = unfused(run)["layers"]
    for name in ("child", UNFUSED):
        if run.has(f"{name}/config.json"):
            shape, built = read_architecture(run.path(name))
            if as_built(shape, Architecture.from_list(layers))[1] == built:
                return run.path(name)
    raise CheckpointError(
        f"{run.path('child')} is not the child of architecture.json (a search was cut off?); run `nas search` again"
    )


def replace_child(run: Run, parent: Parent, result: dict[str, Any]) -> None:
    """Makes fused/ the run's child. Cut off anywhere, `nas fuse --replace` finishes it: the unfused child is never lost."""
    if (source := unfused_child(run)) == run.path("child"):
        if run.has(UNFUSED):
            remove_directory(run.path(UNFUSED))
        source.rename(run.path(UNFUSED))
    with replace_directory(run.path("child")) as directory:
        for file in run.path("fused").iterdir():
            _link(file, directory / file.name)
    before = unfused(run)
    architecture = Architecture.from_list(result["layers"])
    cost, warnings = _cost(parent, before, architecture)
    after = before | {
        "key": digest(before["key"], result["runs"]),
        "layers": result["layers"],
        "cost": cost,
        "formula": CostModel(parent.shape, scenario_of(before)).formula(architecture),
        "kl": result["kl"]["after"],
        "kl_se": result["kl"]["after_se"],
        "heldout": before["heldout"] | {"child": result["heldout"]["fused"]},
        "warnings": [*before.get("warnings", []), *warnings],
        "fusion": {name: result[name] for name in ("runs", "kl", "times", "clock")},
        "unfused": before,
    }
    save_json(run.path("architecture.json"), after)


def restore_child(run: Run) -> None:
    """Takes a replacement back: the unfused child, and what the search wrote of it. May be cut off anywhere, as the other."""
    if (source := unfused_child(run)) != run.path("child"):
        if run.has("child"):
            remove_directory(run.path("child"))
        source.rename(run.path("child"))
    save_json(run.path("architecture.json"), unfused(run))


def _cost(parent: Parent, before: dict[str, Any], architecture: Architecture) -> tuple[dict[str, Any], list[str]]:
    """The fused child priced as the search priced the unfused one, and what to warn of.

    A profile of `nas bench` has no fused widths: then the unfused child's times stand, which are too long.
    """
    scenario, clock = scenario_of(before), before.get("clock")
    if clock is None:
        return CostModel(parent.shape, scenario).cost(architecture).to_json(), []
    try:
        timed = load_clock(clock["name"].removesuffix(" datasheet"), parent.shape, scenario)
        return CostModel(parent.shape, scenario, timed).cost(architecture).to_json(), []
    except NasError:
        cost = CostModel(parent.shape, scenario).cost(architecture).to_json()
        unfused_times = {name: before["cost"][name] for name, value in cost.items() if value is None}
        return cost | unfused_times, [f"times are those of the child before fusion: {clock['name']} has no fused FFNs"]


def scenario_of(found: dict[str, Any]) -> Scenario:
    """The scenario that an architecture.json holds."""
    return Scenario(
        **{name: found["scenario"][name] for name in Scenario.__dataclass_fields__ if name in found["scenario"]}
    )


def _link(file: Path, to: Path) -> None:
    """The same file under a second name, which takes no room: nothing here ever writes into a file that is whole."""
    try:
        to.hardlink_to(file)
    except OSError:  # a file system without such links
        shutil.copyfile(file, to)
