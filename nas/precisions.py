"""Scores of precision: what it hurts to hold one subblock in another number format, structure aside.

    run/scores/precision-nvfp4_007.json     per sequence, made in one pass as the scores of structure are (nas/scoring.py)
    run/scores/kl-attention-nvfp4.json      true KL of the parent with all its attentions in the format (kl-gptq-...: by GPTQ)
    run/scores/precisions.json              how many calibration tokens both are of
    run/precisions.csv                      in nats per token, one row for each layer, candidate and format
    run/precisions-gptq.csv                 the same for children that GPTQ rounds

A candidate with a precision scores what its structure scores plus what its format does: one measurement for each structure
and format instead of one for each pair of pairs. (`nas score --verify-additivity` measures how true the sum is.) The change
of a format is that from the candidate in bf16 to the same one rounded, so a narrower FFN has a number of its own. An fp8 KV
cache is one more such format, "kv-float8", of an attention.

One-pass values are brought to nats by the true KL of the parent with all its attentions, or all its FFNs, in the format. They are of
rounding to nearest; if GPTQ is to round the children, so is that parent, and the factor then holds what GPTQ saves.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from blocks.calibrated import calibrated_layers
from blocks.engines import ENGINES
from blocks.errors import CheckpointError, ConfigError
from blocks.files import save_json, save_text
from blocks.formats import format_named
from blocks.layer import LayerMath, Weights, layer_forward
from blocks.library import BlockLibrary, LayerLibrary
from blocks.parent import Parent
from blocks.rounded import round_layer
from blocks.spec import BF16, NO_ATTENTION, NO_FFN, Architecture, AttentionSpec, FFNSpec, LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep
from nas.costs import CostModel, Scenario
from nas.data import load_pack, to_tokens
from nas.engine import make_sweep
from nas.exact import kl_to_parent
from nas.progress import Reporter
from nas.run import Run
from nas.score_files import ScoreFiles
from nas.scoring import carry_back, estimate, output_gradients
from nas.table import ScoreRow, load_table

KV8 = "kv-float8"
KV_DTYPES = {KV8: torch.float8_e4m3fn}
TEXT = "scores/precisions.json"
COLUMNS = ("layer", "candidate", "precision", "score", "one_pass", "nats_per_one_pass")
Key = tuple[int, str, str]
"""Layer, structure of a subblock, precision."""
Subblock = AttentionSpec | FFNSpec


def table_of(quantizer: str) -> str:
    """The file in a run with the scores of formats."""
    return "precisions.csv" if quantizer == "nearest" else f"precisions-{quantizer}.csv"


def parse_precisions(text: str) -> tuple[str, ...]:
    """The formats of "bf16,fp8,nvfp4", each once, bf16 first. Raises ConfigError for an unknown one."""
    names = [format_named(name.strip()).name for name in text.split(",") if name.strip()]
    return (BF16, *dict.fromkeys(name for name in names if name != BF16))


def to_score(formats: Sequence[str], kv_dtypes: Sequence[str]) -> list[str]:
    """What a search with these formats and KV dtypes needs scores of."""
    return [name for name in formats if name != BF16] + [KV8] * ("float8" in kv_dtypes)


@dataclass(frozen=True)
class PrecisionScores:
    """Nats per token by layer, structure of the subblock and precision; 0 of bf16 and of skips."""

    values: dict[Key, float] = field(default_factory=dict)

    def of(self, layer: int, spec: LayerSpec, kv_dtype: str = "bfloat16") -> float:
        """What the precisions of a layer add to the score of its structure. Raises ConfigError for one without a score."""
        found = self.subblock(layer, spec.attention) + self.subblock(layer, spec.ffn)
        if kv_dtype == "float8" and spec.attention.kind == "kv":
            found += self._value(layer, spec.attention.structure, KV8)
        return found

    def subblock(self, layer: int, spec: Subblock) -> float:
        return 0.0 if spec.precision == BF16 else self._value(layer, spec.structure, spec.precision)

    def _value(self, layer: int, structure: Subblock, precision: str) -> float:
        key = layer, str(structure), precision
        if key not in self.values:
            raise ConfigError(
                f"no score of {precision} of {structure} in layer {layer}; a search without --dry-run makes it"
            )
        return self.values[key]


def load_precisions(path: Path) -> PrecisionScores:
    """Raises CheckpointError if the table is not there or damaged."""
    try:
        with path.open(newline="") as file:
            rows = {
                (int(row["layer"]), row["candidate"], row["precision"]): float(row["score"])
                for row in csv.DictReader(file)
            }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there; a search without --dry-run makes it") from None
    except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); delete it and run `nas score` again") from error
    return PrecisionScores(rows)


def known_precisions(path: Path) -> set[str]:
    """Those that the table has scores of; none if it is not there. Raises CheckpointError if it is damaged."""
    return {precision for _, _, precision in load_precisions(path).values} if path.exists() else set()


def with_precisions(
    table: Sequence[Sequence[ScoreRow]], scores: PrecisionScores, formats: Sequence[str], costs: CostModel
) -> list[list[ScoreRow]]:
    """The score table with every candidate in every pair of formats that can hold it, scores summed.

    Serving engines run q, k and v as one product, and gate and up, so a format is one of a whole subblock.
    """
    kv_dtype = costs.scenario.kv_dtype
    joint: list[list[ScoreRow]] = []
    for layer, rows in enumerate(table):
        found: dict[LayerSpec, ScoreRow] = {}
        for row, (attention, ffn) in product(rows, product(formats, formats)):
            spec = row.spec.at(attention, ffn)  # a skip stays as it is, and is kept once
            if spec not in found and costs.holds(spec):
                score = row.score + scores.of(layer, spec, kv_dtype)
                found[spec] = replace(row, attention=str(spec.attention), ffn=str(spec.ffn), score=score)
        joint.append(list(found.values()))
    return joint


def held_by_none(table: Sequence[Sequence[ScoreRow]], formats: Sequence[str], costs: CostModel) -> list[str]:
    """Those of the formats that no subblock of any candidate can be had in."""
    parts = {
        part for rows in table for row in rows for part in (row.spec.attention, row.spec.ffn) if part.kind != "skip"
    }
    alone = [
        LayerSpec(part, NO_FFN) if isinstance(part, AttentionSpec) else LayerSpec(NO_ATTENTION, part) for part in parts
    ]
    return [name for name in formats if not any(costs.holds(spec.at(name)) for spec in alone)]


@dataclass
class PrecisionScoring:
    """Scores formats for the candidates of a run, layer by layer; what is done is on disk.

    Attributes:
        tokens: of the calibration text, if no format of the run was scored before: all are scored on the text of the first.
            Rounding changes every token alike, so few will do.
        quantizer: "nearest" or "gptq": how the children will be rounded.
    """

    run: Run
    parent: Parent
    device: torch.device
    reporter: Reporter
    tokens: int
    quantizer: str = "nearest"

    def __post_init__(self) -> None:
        known = self.run.read_if(TEXT)
        if isinstance(known, dict) and isinstance(known.get("tokens"), int):
            self.tokens = known["tokens"]

    @cached_property
    def files(self) -> ScoreFiles:
        return ScoreFiles(self.run.path("scores"))

    @cached_property
    def blocks(self) -> BlockLibrary:
        return BlockLibrary(self.run.path("library"))

    @cached_property
    def sweep(self) -> Sweep:
        return make_sweep(self.parent, self.device)

    @cached_property
    def text(self) -> Tensor:
        """Token ids [N, S] that all of this is measured on."""
        return to_tokens(load_pack(self.run.path("data") / "calibration.npy"), self.tokens, self.device)

    @cached_property
    def table(self) -> list[list[ScoreRow]]:
        return load_table(self.run.path("scores.csv"))

    def ensure(self, precisions: Sequence[str]) -> PrecisionScores:
        """Scores what is missing of these precisions and returns all that is known."""
        path = self.run.path(table_of(self.quantizer))
        missing = {
            layer: names
            for layer in self.parent.shape.layers
            if (names := [name for name in precisions if not self.files.has(_kind(name), layer)])
        }
        if missing:
            if not self.run.has(TEXT):
                save_json(self.run.path(TEXT), {"tokens": self.tokens})
            self._one_pass(missing)
        known = known_precisions(path)
        if missing or not path.exists() or not known.issuperset(precisions):
            self._write(path, sorted(known.union(precisions)))
        return load_precisions(path)

    def _one_pass(self, missing: Mapping[int, Sequence[str]]) -> None:
        """Scores formats by layer, from the last layer to the first that lacks any."""
        config = self.run.config.score
        sweep = self.sweep.at(getattr(torch, config.compute_dtype))
        streams = StreamCheckpoints(sweep, self.text)
        layers = self.parent.shape.layers
        gradients = output_gradients(sweep, streams.take(len(layers)), config.label_samples, config.seed)
        blocks, behind = self.blocks, layers[min(missing) :]
        with self.reporter.task("Scoring precisions", len(behind)) as advance:
            for index, weights in sweep.layers(reversed(behind)):
                library = blocks.open(index, weights) if blocks.has(index) else LayerLibrary(weights)
                stream = streams.take(index)
                bases = self._bases(index, blocks.has(index))
                for name in missing.get(index, ()):
                    found = {
                        str(part): _score(sweep, library, base, part, name, stream, gradients)
                        for part, base in bases.items()
                        if fits(self.parent, base, part, name)
                    }
                    self.files.save_named(_kind(name), index, found)
                carry_back(sweep, weights, stream, gradients)
                advance()

    def _bases(self, layer: int, whole: bool) -> dict[Subblock, LayerSpec]:
        """The structures of a layer's subblocks, each in a candidate layer: the parent's other subblock stands beside it if it may.

        Without the library on disk, those of the parent alone: the others take their values.
        """
        own = self.parent.shape.parent_layer
        found: dict[Subblock, LayerSpec] = {}
        specs = [row.spec for row in self.table[layer]] if whole else [own]
        for spec in sorted(specs, key=lambda spec: (spec.attention != own.attention) + (spec.ffn != own.ffn)):
            for part in (spec.attention, spec.ffn):
                if part.kind != "skip":
                    found.setdefault(part, spec)
        return found

    def _write(self, path: Path, precisions: Sequence[str]) -> None:
        """The table from the files, with the factors that true KLs give."""
        values = self._values(precisions)
        factors = self._factors(precisions, values)
        own = {"attention": self.parent.shape.parent_layer.attention, "ffn": self.parent.shape.parent_layer.ffn}
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(COLUMNS)
        for layer, rows in enumerate(self.table):
            parts = (part for row in rows for part in (row.spec.attention, row.spec.ffn) if part.kind != "skip")
            for part, name in product(dict.fromkeys(parts), precisions):
                if name in KV_DTYPES and not has_cache(part):
                    continue
                kind = kind_of(part)
                value = values.get((layer, str(part), name), values.get((layer, str(own[kind]), name)))
                if value is not None:
                    factor = factors.get((name, kind), 1.0)
                    writer.writerow([layer, part, name, f"{factor * value:.6g}", f"{value:.6g}", f"{factor:.6g}"])
        save_text(path, buffer.getvalue())

    def _values(self, precisions: Sequence[str]) -> dict[Key, float]:
        """One-pass scores: means over sequences."""
        values: dict[Key, float] = {}
        for name in precisions:
            for (layer, part), found in self.files.load(_kind(name), self.parent.shape.layers).items():
                values[layer, part, name] = sum(found["tok"]) / len(found["tok"])
        return values

    def _factors(self, precisions: Sequence[str], values: dict[Key, float]) -> dict[tuple[str, str], float]:
        """Nats per one-pass nat of a precision and a kind of subblock: true KL of the parent over the sum of its layers' scores."""
        own, layers = self.parent.shape.parent_layer, self.parent.shape.layers
        factors: dict[tuple[str, str], float] = {}
        with self.reporter.task("True KL of the parent in each precision", len(precisions)) as advance:
            for name in precisions:
                for part in (own.attention, own.ffn):
                    scores = [values.get((layer, str(part), name)) for layer in layers]
                    known = [score for score in scores if score is not None]
                    if len(known) == len(layers) and sum(known) > 0:
                        factors[name, kind_of(part)] = self._kl_in(part, name) / sum(known)
                advance()
        return factors

    @cached_property
    def parent_hidden(self) -> Tensor:
        """The parent's final hidden states on `text` [N, S, D]."""
        return self.sweep.run(self.text)

    def _kl_in(self, part: Subblock, precision: str) -> float:
        """Of the parent with one kind of subblock in a format in every layer, nats per token. Measured once on the same text."""
        by = "gptq-" if self.quantizer == "gptq" and precision not in KV_DTYPES else ""
        file, tokens = f"scores/kl-{by}{kind_of(part)}-{precision}.json", self.text.numel()
        known = self.run.read_if(file)
        if not isinstance(known, dict) or known.get("tokens") != tokens:
            known = {"tokens": tokens, "kl": self._measured_kl_in(part, precision)}
            save_json(self.run.path(file), known)
        return float(known["kl"])

    def _measured_kl_in(self, part: Subblock, precision: str) -> float:
        if precision in KV_DTYPES:
            return self.true_kl(self.layers, KV_DTYPES[precision])
        spec = in_precision(self.parent.shape.parent_layer, part, precision)
        if self.quantizer == "nearest":
            return self.true_kl([round_layer(weights, spec) for weights in self.layers])
        fit = to_tokens(load_pack(self.run.path("data") / "fit.npy"), None, self.device)
        whole = Architecture.uniform(self.parent.shape.num_hidden_layers, spec)
        return self.true_kl([layer.weights for layer in calibrated_layers(self.sweep, whole, fit)])

    @property
    def layers(self) -> list[Weights]:
        """The parent's, a new list."""
        return [self.sweep.layer(index) for index in self.parent.shape.layers]

    def true_kl(self, layers: Sequence[Weights], kv: torch.dtype | None = None) -> float:
        """KL to the parent on `text` of a child with these layers and that KV cache, nats per token."""
        hidden = self.sweep.of(layers, kv).run(self.text)
        return float(kl_to_parent(self.sweep, self.parent_hidden, [hidden])[0].mean())


def _kind(precision: str) -> str:
    return f"precision-{precision}"


def kind_of(part: Subblock) -> str:
    return "attention" if isinstance(part, AttentionSpec) else "ffn"


def has_cache(part: Subblock) -> bool:
    return isinstance(part, AttentionSpec) and part.kind == "kv"


def in_precision(layer: LayerSpec, part: Subblock, precision: str) -> LayerSpec:
    """A layer with that one of its subblocks in a precision."""
    if isinstance(part, AttentionSpec):
        return replace(layer, attention=layer.attention.at(precision))
    return replace(layer, ffn=layer.ffn.at(precision))


def fits(parent: Parent, base: LayerSpec, part: Subblock, precision: str) -> bool:
    """Whether a precision can be had by a subblock: KV dtypes by attentions with a cache, formats by what they can hold."""
    if precision in KV_DTYPES:
        return has_cache(part)
    return CostModel(parent.shape, Scenario()).holds(in_precision(base, part, precision))


def require_served(target: str, precisions: Sequence[str]) -> None:
    """Raises ConfigError for a precision that no child for the target engine may have."""
    from blocks.engines import serves_precision

    for name in precisions:
        if name != BF16 and not serves_precision(target, name):
            raise ConfigError(
                f"--precisions {name}: {ENGINES[target].title} does not read it from a checkpoint of ours; leave it out, or score "
                "for another --target"
            )


@torch.no_grad()
def _score(
    sweep: Sweep,
    library: LayerLibrary,
    base: LayerSpec,
    part: Subblock,
    precision: str,
    stream: Tensor,
    gradients: Tensor,
) -> dict[str, Tensor]:
    """What a precision of one subblock changes, by sequence [N], nats per token as one pass sees them."""
    math = sweep.math(stream.shape[1])
    plain: Weights = library.layer_weights(base)
    rounded, other = plain, math
    if precision in KV_DTYPES:
        other = replace(math, kv=KV_DTYPES[precision])
    else:
        rounded = round_layer(plain, in_precision(base, part, precision))
    found = torch.zeros(len(stream), device=sweep.device)
    with sweep.fast_products():
        for batch, (h, g) in sweep.read(stream, gradients):
            change = _added(rounded, h, other) - _added(plain, h, math)
            found[batch] = estimate(("tok",), change[:, :, None].to(g.dtype), g)["tok"][0]
    return {"tok": found}


def _added(weights: Weights, h: Tensor, math: LayerMath) -> Tensor:
    return layer_forward(weights, h, math) - h.float()
