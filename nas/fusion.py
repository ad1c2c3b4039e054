"""`nas fuse`: FFNs in sequence become one wide FFN where that is faster and hurts little (blocks/fuse.py).

    a run's child       child/ -> fused/ and fusion.json; with `replace`, fused/ becomes the child that `nas distill` heals
    its healed child    healed/ -> healed-fused/ and healed-fusion.json
    any child           PATH -> PATH-fused (or `out`), and PATH-fused.json beside it

Everything is decided on calibration text, and reported on held-out text. Nothing is written before all is decided.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocks.checkpoint import as_built, check_child, read_architecture, write_child
from blocks.child.layout import as_config, read_config
from blocks.digest import sample_file
from blocks.errors import CheckpointError, ConfigError
from blocks.families import FAMILIES
from blocks.files import remove_directory, replace_directory, save_json
from blocks.fuse import Run as FusedRun
from blocks.fuse import ffn_stretches, fused_architecture, fused_layers, fused_width
from blocks.parent import Parent
from blocks.spec import Architecture
from blocks.sweep import Sweep
from blocks.weights import EMBEDDING, FINAL_NORM, HEAD
from nas.clock import MS
from nas.config import require, to_dict
from nas.costs import CostModel, Scenario
from nas.data import load_pack, to_tokens
from nas.engine import make_sweep
from nas.fusion_search import Chooser, FusingChild, Proposal, Row, count_proposals, fused_runs, propose
from nas.fusion_times import DEFAULT_SHEET, HERE, FFNTimes, ffn_times
from nas.measure import measure
from nas.progress import Reporter
from nas.run import Run, digest

SOURCES = {"child": ("fused", "fusion.json"), "healed": ("healed-fused", "healed-fusion.json")}
UNFUSED = "child-unfused"


@dataclass(frozen=True)
class FusionConfig:
    """What may be fused, and at what price."""

    max_kl: float = 0.02
    """Nats per token that all fusions together may add to the child's KL to the parent, on calibration text."""
    max_length: int | None = None
    """FFNs in one run at most; None is no limit."""
    per_length: int = 2
    """Runs of each length that are measured in each stretch of layers without attention, those of least dependency."""
    include_last: bool = False
    """Whether the last FFN of a stretch may be fused too; the paper leaves it out."""
    tokens: int = 32_768
    """Calibration tokens for dependencies and KLs."""
    clock: str | None = None
    """"device" measures here, a datasheet (H100, ...) estimates; None measures on a GPU and else estimates an H100."""
    sync_us: float = 0.0
    """Microseconds of one all-reduce, counted once an FFN with `tp` above 1: one GPU cannot measure it."""

    def __post_init__(self) -> None:
        require("max_kl", self.max_kl, self.max_kl >= 0, "0 or more")
        require("max_length", self.max_length, self.max_length is None or self.max_length >= 2, "at least 2")
        require("sync_us", self.sync_us, self.sync_us >= 0, "0 or more")
        for name in ("per_length", "tokens"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")


@dataclass(frozen=True)
class Task:
    """One child to fuse.

    Attributes:
        source, out: the child's directory, and where the fused one goes.
        record: the JSON file that says what was found.
        calibration, heldout: token packs [sequences, S].
    """

    source: Path
    out: Path
    record: Path
    calibration: np.ndarray
    heldout: np.ndarray


def open_sweep(path: Path, device: torch.device) -> Sweep:
    """A sweep over a child's own layers, embedding, norm and head. Raises CheckpointError as `check_child`."""
    check_child(path)
    shape, _ = read_architecture(path)
    config = as_config(read_config(path))
    return make_sweep(Parent(str(path), path, config, shape, FAMILIES["llama"], ""), device)


def plan_fusion(source: Path, out: Path, config: FusionConfig, scenario: Scenario, on_gpu: bool) -> dict[str, Any]:
    """What would be done, for --dry-run; reads no weights."""
    _, architecture = read_architecture(source)
    stretches = ffn_stretches(architecture)
    return {
        "child": str(source),
        "stretches": [list(stretch) for stretch in stretches],
        "proposals": count_proposals(stretches, config.include_last, config.max_length, config.per_length),
        "max_kl": config.max_kl,
        "tokens": config.tokens,
        "clock": config.clock or (HERE if on_gpu else f"{DEFAULT_SHEET} datasheet"),
        "batch": scenario.batch,
        "prompt": scenario.prompt_tokens,
        "output": scenario.output_tokens,
        "out": str(out),
    }


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
    known = set(Scenario.__dataclass_fields__)
    priced = Scenario(**{key: value for key, value in before["scenario"].items() if key in known})
    costs = CostModel(parent.shape, priced)
    after = before | {
        "key": digest(before["key"], result["runs"]),
        "layers": result["layers"],
        "cost": costs.cost(architecture).to_json(),
        "formula": costs.formula(architecture),
        "kl": result["kl"]["after"],
        "kl_se": None,
        "heldout": before["heldout"] | {"child": result["heldout"]["fused"]},
        "fusion": {name: result[name] for name in ("runs", "kl", "times", "clock")},
        "unfused": before,
    }
    save_json(run.path("architecture.json"), after)


def _link(file: Path, to: Path) -> None:
    """The same file under a second name, which takes no room: nothing here ever writes into a file that is whole."""
    try:
        to.hardlink_to(file)
    except OSError:  # a file system without such links
        shutil.copyfile(file, to)


# ---- one child


def fuse_child(
    task: Task, parent: Parent, config: FusionConfig, scenario: Scenario, device: torch.device, reporter: Reporter
) -> dict[str, Any]:
    """Decides what is fused, writes the fused child to `task.out` and the record; or reads what was done already."""
    key = _key(task.source, config, scenario, device)
    if (done := _done(task, key)) is not None:
        reporter.say(f"This child was fused already: {task.record}")
        return done
    sweep = open_sweep(task.source, device)
    shape, architecture = read_architecture(task.source)
    stretches = ffn_stretches(architecture)
    tokens = to_tokens(task.calibration, config.tokens, device)
    rows: list[Row] = []
    child = times = None
    if count_proposals(stretches, config.include_last, config.max_length, config.per_length):
        hidden, head = _parent_states(parent, tokens, device, reporter)
        with reporter.task("Running the child", 1) as advance:
            child = FusingChild(sweep, architecture, tokens, hidden, head)
            advance()
        proposals = propose_all(child, config, reporter)
        widths = _widths(architecture, proposals)
        times = ffn_times(config.clock, shape, scenario, widths, device, config.sync_us, reporter)
        rows = Chooser(child, scenario, times, config.max_kl, reporter).choose(proposals)
    runs = fused_runs(rows)
    result: dict[str, Any] = {"key": key, "child": str(task.source), "fused": str(task.out) if runs else None}
    result |= {"runs": [list(run) for run in runs], "stretches": [list(stretch) for stretch in stretches]}
    result |= _told(rows, child, times, architecture, scenario, config, tokens.numel())
    task.record.unlink(missing_ok=True)
    if runs:
        with reporter.task("Writing the fused child", 1) as advance:
            write_fused(task.source, task.out, sweep, architecture, runs)
            advance()
        del child, sweep
        directories = {"unfused": task.source, "fused": task.out}
        result["heldout"] = measure(parent, directories, task.heldout, device, reporter)
    elif task.out.exists():
        remove_directory(task.out)  # of another setting; this one fuses nothing
    save_json(task.record, result)
    return result


def _key(source: Path, config: FusionConfig, scenario: Scenario, device: torch.device) -> str:
    files = sorted(source.glob("*.safetensors"))
    measured = config.clock == HERE or (config.clock is None and device.type == "cuda")
    where = torch.cuda.get_device_name(device) if measured and device.type == "cuda" else str(measured)
    weights = [sample_file(file).hex() for file in files]
    return digest(to_dict(config), asdict(scenario), where, (source / "config.json").read_text(), weights)


def _done(task: Task, key: str) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(task.record.read_text())
    except (OSError, ValueError):
        return None
    whole = found.get("fused") is None or (task.out / "config.json").exists()
    return found | {"child": str(task.source)} if whole and found.get("key") == key else None


def _parent_states(parent: Parent, tokens: Tensor, device: torch.device, reporter: Reporter) -> tuple[Tensor, Tensor]:
    with reporter.task("Running the parent", 1) as advance:
        sweep = make_sweep(parent, device)
        hidden, head = sweep.run(tokens), sweep.head
        advance()
    return hidden, head


def propose_all(child: FusingChild, config: FusionConfig, reporter: Reporter) -> list[Proposal]:
    """Proposals of every stretch."""
    with reporter.task("Dependencies of FFNs", len(child.stretches)) as advance:
        matrices = child.dependencies(advance)
    return [
        proposal
        for stretch, matrix in matrices.items()
        for proposal in propose(stretch, matrix, config.include_last, config.max_length, config.per_length)
    ]


def _widths(architecture: Architecture, proposals: Sequence[Proposal]) -> set[int]:
    apart = {architecture[index].ffn.width for proposal in proposals for index in proposal.run}
    return apart | {fused_width(architecture, proposal.run) for proposal in proposals}


def write_fused(source: Path, out: Path, sweep: Sweep, architecture: Architecture, runs: Sequence[FusedRun]) -> None:
    """Writes a child with these runs fused, in the dtype it is stored in; at most one run and one shard are held."""
    weights = sweep.parent.weights()
    dtype = str(weights.dtype).removeprefix("torch.")
    write_child(out, source, fused_architecture(architecture, runs), _tensors(sweep, len(architecture), runs), dtype)


def _tensors(sweep: Sweep, layers: int, runs: Sequence[FusedRun]) -> Iterator[tuple[str, Tensor]]:
    weights = sweep.parent.weights()
    yield EMBEDDING, weights.embedding
    for index, layer in fused_layers(((index, weights.layer(index)) for index in range(layers)), runs):
        for name, tensor in layer.items():
            yield f"model.layers.{index}.{name}", tensor
    yield FINAL_NORM, weights.final_norm
    if HEAD in weights.shapes:
        yield HEAD, weights.head


# ---- what is told


def _told(
    rows: Sequence[Row],
    child: FusingChild | None,
    times: FFNTimes | None,
    architecture: Architecture,
    scenario: Scenario,
    config: FusionConfig,
    tokens: int,
) -> dict[str, Any]:
    runs = fused_runs(rows)
    told: dict[str, Any] = {
        "layers": fused_architecture(architecture, runs).to_list(),
        "unfused_layers": architecture.to_list(),
        "config": to_dict(config),
        "scenario": scenario.to_json(),
        "tokens": tokens,
        "proposals": [_row(row, scenario) for row in rows],
        "clock": None,
        "kl": None,
        "times": None,
    }
    if child is None or times is None:
        return told
    after = child.measure(child.kept)
    kept = [row for row in rows if row.kept]
    return told | {
        "clock": {"name": times.name, "device": times.device, "estimate": times.estimate},
        "kl": {"before": child.unfused.kl, "after": after.kl, "to_unfused": after.kl_unfused},
        "times": {name: sum(_row(row, scenario)[name] for row in kept) for name in TIMES},
    }


TIMES = ("prefill_ms", "fused_prefill_ms", "decode_ms", "fused_decode_ms", "request_ms", "fused_request_ms")


def _row(row: Row, scenario: Scenario) -> dict[str, Any]:
    def request(times: Any) -> float:
        return scenario.request_ns(times.prefill_ns, times.decode_ns) / MS

    return {
        "run": list(row.run),
        "length": len(row.run),
        "dependency": row.proposal.dependency,
        "dependency_sum": row.proposal.dependency_sum,
        "kl": row.alone.kl,
        "kl_to_unfused": row.alone.kl_unfused,
        "added": row.added,
        "prefill_ms": row.apart.prefill_ns / MS,
        "fused_prefill_ms": row.fused.prefill_ns / MS,
        "decode_ms": row.apart.decode_ns / MS,
        "fused_decode_ms": row.fused.decode_ns / MS,
        "request_ms": request(row.apart),
        "fused_request_ms": request(row.fused),
        "kept": row.kept,
        "why": row.why,
    }
