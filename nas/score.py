"""`nas score`: fit the candidates of every layer, score them, write the table.

    1. forward over the fitting text: fit the candidates of each layer    -> library/layer_NNN.safetensors
    2. forward and backward over the calibration text: one-pass scores     -> scores/one_pass_NNN.json
    3. suffix sweeps over part of it: exact scores of the guard set        -> scores/exact_NNN.json
    4. the map from one-pass to nats, and the table                        -> scores.csv, score.json

Every file is written whole, so a run that was cut off goes on where it stopped, layer by layer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.errors import CheckpointError, ConfigError
from blocks.files import clear_leftovers, save_json
from blocks.library import BlockLibrary
from blocks.parent import Parent
from blocks.shape import as_built
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import Sweep
from nas.assemble import to_tokens
from nas.data import load_pack, prepare_data
from nas.guard import fit_map, guard_set, kind_of, rank_correlation
from nas.progress import Reporter
from nas.run import Run
from nas.scoring import exact_scores, one_pass_scores, output_gradients, run_reference
from nas.table import ScoreRow, save_table
from search_spaces import SearchSpace, load_space

STREAM_BYTES = 8e9  # of candidates' residual streams carried through a suffix sweep at once
MOST_STREAMS = 16  # no more of them either: results are kept, and progress is seen, after every sweep


@dataclass
class Scoring:
    """One run of `nas score`: the engine, the candidates of each layer, and where things go."""

    run: Run
    sweep: Sweep
    space: SearchSpace
    reporter: Reporter

    def __post_init__(self) -> None:
        self.config = self.run.config.score
        shape = self.sweep.parent.shape
        self.layers = range(shape.num_hidden_layers)
        self.candidates = [self.space.layer_candidates(shape, index) for index in self.layers]
        self.changed = [[spec for spec in specs if spec != shape.parent_layer] for specs in self.candidates]
        self.library = BlockLibrary(self.run.path("library"))

    def prepare(self) -> None:
        parent = self.sweep.parent
        with self.reporter.bar("Reading and packing text", 1) as (bar, task):
            advance = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
            prepare_data(
                self.run.config.data, parent.tokenizer(), parent.shape.vocab_size, self.run.path("data"), advance
            )

    def pack(self, part: str) -> np.ndarray:
        return load_pack(self.run.path("data") / f"{part}.npy")

    def tokens(self, part: str, most: int | None = None) -> Tensor:
        return to_tokens(self.pack(part), most, self.sweep.device)

    def fit(self) -> None:
        """Step 1. Layers whose file is there are only run through; behind the last missing one nothing is run."""
        missing = [index for index in self.layers if not self.library.has(index)]
        if not missing:
            return
        config = FitConfig(self.config.fit, self.config.pseudo_tokens)
        stream = self.sweep.embed(self.tokens("fit"))
        with self.reporter.task("Fitting candidates", missing[-1] + 1) as advance:
            for index in range(missing[-1] + 1):
                weights = self.sweep.layer(index)
                if index in missing:
                    fit = fit_layer(self.sweep, weights, stream, self.changed[index], config)
                    self.library.save(index, fit.library)
                    stream = fit.output
                else:
                    stream = self.sweep.forward(weights, stream)
                advance()

    def one_pass(self) -> None:
        """Step 2. Backwards, so what is missing is a prefix of the layers; gradients are carried through the rest."""
        missing = [index for index in self.layers if not self._file("one_pass", index).exists()]
        if self.config.method == "exact" or not missing:
            return
        tokens = self.tokens("calibration")
        with self.reporter.task("Running the parent", len(self.layers)) as advance:
            reference = run_reference(self.sweep, tokens, lambda _: advance())
        gradients = output_gradients(self.sweep, reference, self.config.label_samples, self.config.seed)
        with self.reporter.task("One-pass scores", len(self.layers) - missing[0]) as advance:
            for index in reversed(range(missing[0], len(self.layers))):
                specs = self.changed[index] if index in missing else []
                library = self.library.open(index, self.sweep.layer(index))
                scores = one_pass_scores(self.sweep, library, specs, reference.streams.pop(index), gradients)
                if index in missing:
                    self._save("one_pass", index, specs, {"tok": scores.tok, "seq": scores.seq})
                advance()

    def exact(self) -> None:
        """Step 3. Deep layers first; candidates of neighbouring layers share one suffix sweep as memory allows."""
        guarded = self.guarded()
        missing = [i for i in self.layers if guarded[i] and not self._file("exact", i).exists()]
        if not missing:
            return
        reference = run_reference(self.sweep, self.tokens("calibration", self.config.exact_tokens))
        most = min(MOST_STREAMS, int(STREAM_BYTES // (reference.hidden.numel() * reference.hidden.element_size())))
        with self.reporter.task("Exact scores of the guard set", sum(len(guarded[i]) for i in missing)) as advance:
            for layers, specs in _groups(missing, guarded, most):
                opened = [(self.library.open(i, self.sweep.layer(i)), s) for i, s in zip(layers, specs, strict=True)]
                for index, kl in zip(layers, exact_scores(self.sweep, opened, layers, reference), strict=True):
                    self._save("exact", index, guarded[index], {"kl": kl})
                    for _ in guarded[index]:
                        advance()

    def guarded(self) -> list[list[LayerSpec]]:
        if self.config.method != "one-pass":
            return self.changed
        return guard_set(self.sweep.parent.shape, self.candidates, self.config.exact_share, self.config.seed)

    def finish(self, seconds: float) -> dict[str, Any]:
        """Step 4."""
        by_sequence = {key: value for i in self.layers for key, value in self._load("one_pass", i).items()}
        exact_by_sequence = {key: value["kl"] for i in self.layers for key, value in self._load("exact", i).items()}
        one_pass = {key: {n: float(np.mean(v)) for n, v in value.items()} for key, value in by_sequence.items()}
        exact = {key: float(np.mean(kl)) for key, kl in exact_by_sequence.items()}
        both = {key: LayerSpec.parse(key[1]) for key in exact if key in one_pass}
        # The map also takes one-pass values to the level of the text that the exact scores are of ...
        factors = fit_map([(spec, one_pass[key]["tok"], exact[key]) for key, spec in both.items()])
        # ... while the two methods are compared on the same sequences, the first ones.
        same_text = [
            (spec, float(np.mean(by_sequence[key]["tok"][: len(exact_by_sequence[key])])), exact[key])
            for key, spec in both.items()
        ]
        rows = [self._row(i, spec, one_pass, exact, factors) for i in self.layers for spec in self.candidates[i]]
        save_table(self.run.path("scores.csv"), rows)
        summary = {
            "parent": self.run.config.parent,
            "candidates": sum(map(len, self.changed)),
            "exact": len(exact),
            "rank_correlation": rank_correlation(same_text),
            "nats_per_one_pass": factors,
            "tokens": {part: self.pack(part).size for part in ("fit", "calibration")},
            "label_samples": self.config.label_samples,
            "exact_tokens": int(self.tokens("calibration", self.config.exact_tokens).numel()),
            "device": str(self.sweep.device),
            "seconds": round(seconds, 1),
        }
        save_json(self.run.path("score.json"), summary)
        return summary

    def _row(
        self, layer: int, spec: LayerSpec, one_pass: dict[Any, Any], exact: dict[Any, float], factors: dict[str, float]
    ) -> ScoreRow:
        shape = self.sweep.parent.shape
        key = (layer, str(spec))
        estimate, truth = one_pass.get(key), exact.get(key)
        if spec == shape.parent_layer:
            score, source = 0.0, "parent"
        elif truth is not None:
            score, source = max(truth, 0.0), "exact"
        else:
            assert estimate is not None
            score, source = estimate["tok"] * factors.get(kind_of(spec), factors[""]), "one-pass"
        built_shape, (built,) = as_built(shape, Architecture((spec,)))
        parameters = built_shape.layer_parameters(built)
        return ScoreRow(
            layer=layer,
            attention=str(spec.attention),
            ffn=str(spec.ffn),
            score=score,
            source=source,
            one_pass=estimate and estimate["tok"],
            one_pass_seq=estimate and estimate["seq"],
            exact=truth,
            parameters=parameters,
            weight_bytes=2 * parameters,
            kv_bytes_per_token=2 * shape.kv_values_per_token(spec.attention),
        )

    def _file(self, kind: str, layer: int) -> Path:
        return self.run.path("scores") / f"{kind}_{layer:03d}.json"

    def _save(self, kind: str, layer: int, specs: Sequence[LayerSpec], values: dict[str, Tensor]) -> None:
        """Per-sequence values of each candidate, nats per token."""
        content = {
            str(spec): {name: [float(f"{x:.6g}") for x in tensor[row].tolist()] for name, tensor in values.items()}
            for row, spec in enumerate(specs)
        }
        save_json(self._file(kind, layer), content)

    def _load(self, kind: str, layer: int) -> dict[tuple[int, str], dict[str, list[float]]]:
        """Per-sequence values of each candidate of a layer."""
        file = self._file(kind, layer)
        if not file.exists():
            return {}
        try:
            content = json.loads(file.read_text())
            return {
                (layer, spec): {name: [float(x) for x in row] for name, row in values.items()}
                for spec, values in content.items()
            }
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); delete it and run `nas score` again") from error


def _groups(
    layers: Sequence[int], specs: Sequence[Sequence[LayerSpec]], most: int
) -> list[tuple[list[int], list[Sequence[LayerSpec]]]]:
    """Layers in falling order, grouped so that a group has at most `most` candidates (or one layer)."""
    groups: list[tuple[list[int], list[Sequence[LayerSpec]]]] = []
    for index in reversed(layers):
        if groups and sum(map(len, groups[-1][1])) + len(specs[index]) <= most:
            groups[-1][0].insert(0, index)
            groups[-1][1].insert(0, specs[index])
        else:
            groups.append(([index], [specs[index]]))
    return groups


def run_score(run: Run, parent: Parent, device: torch.device, reporter: Reporter) -> dict[str, Any]:
    """Does what is missing of `nas score` in a run directory and returns its summary (score.json)."""
    started = time.perf_counter()
    space = load_space(run.config.space, run.config.target)
    if parent.shape.qk_norm and space.target != "transformers":
        raise ConfigError(
            f"--target {space.target} does not serve children of {parent.family.model_type}: the Nemotron form has no "
            "query and key norms there; use --target transformers"
        )
    scoring = Scoring(run, make_sweep(parent, device), space, reporter)
    for directory in (run.directory, scoring.library.directory, run.path("scores")):
        clear_leftovers(directory)
    scoring.prepare()
    whole = all(scoring.library.has(index) for index in scoring.layers)
    if whole and run.has("score.json") and run.has("scores.csv"):
        reporter.say(f"Scores are there already: {run.path('scores.csv')}")
        return run.read("score.json", "score")
    for step in (scoring.fit, scoring.one_pass, scoring.exact):
        step()
    return scoring.finish(time.perf_counter() - started)


def make_sweep(parent: Parent, device: torch.device) -> Sweep:
    """The engine at this device's batch size, in fp32."""
    return Sweep(parent, device, torch.float32, tokens_per_batch=2048 if device.type == "cpu" else 16384)
