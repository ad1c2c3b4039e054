"""What `nas bench` was asked to measure, where the profile goes, and how it is printed."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from blocks.errors import CheckpointError, ConfigError
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.clock import Check, Measured, Profile, built_layer, tokens_per_second
from nas.costs import DTYPE_BYTES, CostModel, Scenario
from search_spaces import SearchSpace, load_space

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from nas.bench import Effort

Spec = AttentionSpec | FFNSpec
T = TypeVar("T")
HALF = 0.5
MADE, CHOSEN = "half", "chosen"  # labels of the checked child: one made to half the parent's size, or the one given
DEFAULT_RUN = Path("runs/default")


@dataclass(frozen=True)
class Subject:
    """What is measured: a shape, the candidates of a space, and the children that the sum is checked on."""

    name: str
    shape: ModelShape
    space: SearchSpace
    children: Mapping[str, Architecture]

    def specs(self) -> list[Spec]:
        return candidates(self.space, self.shape, list(self.children.values()))


def find_subject(
    scenario: Scenario,
    run: Path | None = None,
    parent: str | None = None,
    shape: Path | None = None,
    space: str | None = None,
    target: str | None = None,
    architecture: Path | None = None,
) -> Subject:
    """Of the one of `run`, `parent` and `shape` that is given; `runs/default` if none is.

    Raises:
        ConfigError: if more than one is given, or the architecture is of another parent.
        CheckpointError, UnsupportedModelError: for files that are damaged, or a model that cannot be taken apart.
    """
    if sum(given is not None for given in (run, parent, shape)) > 1:
        raise ConfigError("give one of --run, --parent and --shape: they all say whose subblocks to measure")
    if shape is not None:
        name, sizes = str(shape), read_shape(shape)
    elif parent is not None:
        from blocks.parent import open_parent

        name, sizes = parent, open_parent(parent).shape
    else:
        run = run or DEFAULT_RUN
        name, sizes, space, target, architecture = _of_run(run, space, target, architecture)
    loaded = load_space(space or "default", target or "vllm")
    return Subject(name, sizes, loaded, _children(sizes, loaded, scenario, architecture))


def _of_run(
    run: Path, space: str | None, target: str | None, architecture: Path | None
) -> tuple[str, ModelShape, str, str, Path | None]:
    from blocks.parent import open_parent
    from nas.run import open_run

    config = open_run(run).config
    chosen = run / "architecture.json"
    if architecture is None and chosen.exists():
        architecture = chosen
    return str(run), open_parent(config.parent).shape, space or config.space, target or config.target, architecture


def _children(
    shape: ModelShape, space: SearchSpace, scenario: Scenario, architecture: Path | None
) -> dict[str, Architecture]:
    if architecture is None:
        return {MADE: made_child(space, shape, scenario, HALF)}
    given = Architecture.load(architecture).structure  # what is timed computes in one dtype
    if len(given) != shape.num_hidden_layers:
        raise ConfigError(
            f"--architecture {architecture} has {len(given)} layers, the parent {shape.num_hidden_layers}: "
            "it is of another parent"
        )
    for layer in given:
        shape.check(layer)
    return {CHOSEN: given}


def candidates(space: SearchSpace, shape: ModelShape, children: Sequence[Architecture] = ()) -> list[Spec]:
    """Every subblock that a layer of the space, of the parent or of `children` may be, as built; the parent's own first."""
    layers = [shape.parent_layer]
    for layer in sorted({0, shape.num_hidden_layers - 1}):
        layers += space.layer_candidates(shape, layer)
    layers += [layer for child in children for layer in child]
    built = [built_layer(shape, layer) for layer in layers]
    attentions: list[Spec] = [layer.attention for layer in built]
    return list(dict.fromkeys(attentions + [layer.ffn for layer in built]))


def made_child(space: SearchSpace, shape: ModelShape, scenario: Scenario, share: float, seed: int = 0) -> Architecture:
    """A child of mixed layers that keeps about `share` of the parent's weights and KV cache, drawn from the space.

    Subblocks are drawn one after another and lowered to a smaller candidate until the bytes are met.
    """
    rng, costs = random.Random(seed), CostModel(shape, scenario)
    attentions = [space.attention_candidates(shape, layer) for layer in shape.layers]
    ffns = space.ffn_candidates(shape)
    layers = list(shape.parent_architecture)
    excess = costs.cost(shape.parent_architecture).total_bytes - costs.budget_for_share(share)
    order = [(layer, part) for layer in shape.layers for part in ("attention", "ffn")] * (len(ffns) + 8)
    rng.shuffle(order)
    for layer, part in order:
        if excess <= 0:
            break
        old = layers[layer]
        if part == "attention":
            new = LayerSpec(_lower(attentions[layer], old.attention, rng), old.ffn)
        else:
            new = LayerSpec(old.attention, _lower(ffns, old.ffn, rng))
        excess -= costs.layer_bytes(old) - costs.layer_bytes(new)
        layers[layer] = new
    return Architecture(tuple(layers))


def _lower(options: Sequence[T], present: T, rng: random.Random) -> T:
    """One of the options after `present`; they fall in size."""
    smaller = options[options.index(present) + 1 :]
    return rng.choice(smaller) if smaller else present


def read_shape(path: Path) -> ModelShape:
    """The sizes in a config.json, or in a directory that holds one; no weights are needed.

    Raises CheckpointError if it is not a model's, UnsupportedModelError if it cannot be a parent.
    """
    from blocks.child.layout import as_config, read_config
    from blocks.errors import NasError
    from blocks.families import family_of

    content = read_config(path)
    try:
        config = as_config(content)
        return family_of(str(config.model_type)).shape(config)
    except NasError:
        raise
    except Exception as error:  # configurations validate themselves with errors of many kinds
        raise CheckpointError(f"--shape {path} is not a model's configuration: {error}") from error


def default_out(subject: Subject, scenario: Scenario, device: torch.device) -> Path:
    """profiles/DEVICE-DIGEST.json, where the digest is of the shape and the scenario."""
    from nas.bench import device_name
    from nas.run import digest

    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return Path("profiles") / f"{slug}-{digest(asdict(subject.shape), asdict(scenario))[:8]}.json"


def plan(subject: Subject, scenario: Scenario, device: torch.device, effort: Effort, out: Path) -> dict[str, Any]:
    """What would be measured, for --dry-run."""
    from nas.bench import device_name
    from nas.inference import Sizes

    sizes = Sizes(subject.shape, scenario, device)
    parent = subject.shape.parent_architecture
    cache = sum(sizes.cache_values(layer.attention) for layer in parent) * scenario.kv_value_bytes
    return {
        "of": subject.name,
        "device": device_name(device),
        "candidates": [str(spec) for spec in subject.specs()],
        "assembled": ["parent", *subject.children],
        "batch": scenario.batch,
        "prompt": scenario.prompt_tokens,
        "output": scenario.output_tokens,
        "attended": sizes.attended,
        "sequences_read_at_a_time": sizes.sequences,
        "tp": scenario.tp,
        "rounds": effort.rounds,
        "weights_gb": round(sizes.weight_values(parent) * DTYPE_BYTES[scenario.weight_dtype] / 1e9, 3),
        "kv_gb": round(cache / 1e9, 3),
        "out": str(out),
    }


# Print


def bench_table(profile: Profile) -> Table:
    """Candidates with their times, and their share of the parent's own subblock."""
    from rich.table import Table

    s, shape = profile.scenario, profile.shape
    table = Table(
        title=f"{profile.device}: batch {s.batch}, prompt {s.prompt_tokens}, output {s.output_tokens}, {s.weight_dtype}"
        + (f", one of {s.tp} GPUs, without their communication" if s.tp > 1 else "")
    )
    table.add_column("candidate", no_wrap=True)
    for column in ("prefill ms", "±", "share", "decode ms", "±", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    own = {"attention": profile.entries[str(parent_spec(shape, "attention"))]}
    own["ffn"] = profile.entries[str(parent_spec(shape, "ffn"))]
    for name, entry in profile.entries.items():
        table.add_row(name, *_cells(entry, own[name.partition(":")[0]]))
    table.add_row("fixed", *_cells(profile.fixed, None))
    return table


def parent_spec(shape: ModelShape, part: str) -> AttentionSpec | FFNSpec:
    """The parent's own attention or FFN as built."""
    built = built_layer(shape, shape.parent_layer)
    return built.attention if part == "attention" else built.ffn


def _cells(entry: Measured, parent: Measured | None) -> list[str]:
    cells = []
    for phase in ("prefill", "decode"):
        ms, spread = getattr(entry, f"{phase}_ms"), getattr(entry, f"{phase}_spread")
        of = getattr(parent, f"{phase}_ms") if parent is not None else 0.0
        cells += [f"{ms:.4f}", f"{spread:.1%}", f"{ms / of:.0%}" if of else ""]
    return cells


def check_lines(profile: Profile) -> list[str]:
    """One line an assembled model: predicted and measured times, and the tokens per second measured."""
    width = max(len(check.label) for check in profile.checks)
    return [_check_line(check, profile.scenario, width) for check in profile.checks]


def _check_line(check: Check, scenario: Scenario, width: int) -> str:
    rate = tokens_per_second(scenario, round(check.prefill_measured_ms * 1e6), round(check.decode_measured_ms * 1e6))
    return (
        f"{check.label:<{width}}  prefill {check.prefill_measured_ms:.3f} ms, the sum says "
        f"{check.prefill_predicted_ms:.3f} ({check.prefill_error:+.1%}); decode {check.decode_measured_ms:.4f} ms, the sum "
        f"says {check.decode_predicted_ms:.4f} ({check.decode_error:+.1%}); {rate:,.0f} tokens/s"
    )
