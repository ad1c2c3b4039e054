"""From score files to the score table: the map from one-pass to nats, intervals, and how well the two methods agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blocks.shape import ModelShape, as_built
from blocks.spec import Architecture, LayerSpec
from nas.data import load_pack
from nas.guard import fit_map, kind_of, rank_correlation
from nas.interval import bootstrap
from nas.run import Run
from nas.score_files import ScoreFiles
from nas.table import ScoreRow

Key = tuple[int, str]


@dataclass
class Tabulator:
    """The table of one run out of the score files that are there."""

    run: Run
    shape: ModelShape
    candidates: Sequence[Sequence[LayerSpec]]
    files: ScoreFiles
    _made: dict[str, Any] = field(default_factory=dict, repr=False)

    def rows(self, rounds: int = 1) -> list[ScoreRow]:
        """Every candidate of every layer, by the scores of the first `rounds`; also makes `summary`."""
        config = self.run.config.score
        one_pass = self.files.load("one_pass", self.shape.layers, rounds)
        exact = {key: values["kl"] for key, values in self.files.load("exact", self.shape.layers).items()}
        estimates = {key: values[config.estimator] for key, values in one_pass.items()}
        both = [key for key in exact if key in estimates]
        mean = {key: float(np.mean(values)) for key, values in exact.items()}
        # The map also takes one-pass values to the level of the text that the exact scores are of ...
        factors = fit_map([(LayerSpec.parse(key[1]), float(np.mean(estimates[key])), mean[key]) for key in both])
        # ... while the two methods are compared on the same sequences, the first ones.
        same_text = []
        for key in both:
            common = min(len(estimates[key]), len(exact[key]))  # a first round may have fewer than exact scores
            estimate, truth = (float(np.mean(values[key][:common])) for values in (estimates, exact))
            same_text.append((LayerSpec.parse(key[1]), estimate, truth))
        self._made = {
            "exact": len(exact),
            "rank_correlation": rank_correlation(same_text),
            "nats_per_one_pass": factors,
            "sequences": {
                "one_pass": max(map(len, estimates.values()), default=0),
                "exact": max(map(len, exact.values()), default=0),
            },
        }
        intervals = {"one-pass": self._intervals(estimates), "exact": self._intervals(exact)}
        rows = []
        for layer, spec in ((layer, spec) for layer, specs in enumerate(self.candidates) for spec in specs):
            key = (layer, str(spec))
            means = {name: float(np.mean(values)) for name, values in one_pass.get(key, {}).items()}
            factor, source = 1.0, "exact"
            if spec == self.shape.parent_layer:
                score, source = 0.0, "parent"
            elif key in mean:
                score = max(mean[key], 0.0)
            else:
                factor, source = factors.get(kind_of(spec), factors[""]), "one-pass"
                score = means[config.estimator] * factor
            low, high = (factor * bound for bound in intervals.get(source, {}).get(key, (np.nan, np.nan)))
            rows.append(self._row(layer, spec, score, source, (low, high), means, mean.get(key)))
        return rows

    def summary(self) -> dict[str, Any]:
        """How the scores were made and how they were checked, for score.json. Call after `rows`."""
        config = self.run.config
        packs = {part: load_pack(self.run.path("data") / f"{part}.npy") for part in ("fit", "calibration")}
        length = packs["calibration"].shape[1]
        return {
            "parent": config.parent,
            "candidates": sum(len(specs) - 1 for specs in self.candidates),
            "estimator": config.score.estimator,
            **self._made,
            "tokens": {part: pack.size for part, pack in packs.items()},
            "one_pass_tokens": self._made["sequences"]["one_pass"] * length,
            "exact_tokens": self._made["sequences"]["exact"] * length,
            "label_samples": config.score.label_samples,
        }

    def _intervals(self, values: dict[Key, list[float]]) -> dict[Key, np.ndarray]:
        found = bootstrap(np.array(list(values.values())), self.run.config.score.seed) if values else None
        return {} if found is None else dict(zip(values, found, strict=True))

    def _row(
        self,
        layer: int,
        spec: LayerSpec,
        score: float,
        source: str,
        interval: tuple[float, float],
        estimate: dict[str, float],
        truth: float | None,
    ) -> ScoreRow:
        built_shape, (built,) = as_built(self.shape, Architecture((spec,)))
        parameters = built_shape.layer_parameters(built)
        low, high = (None if np.isnan(bound) else max(float(bound), 0.0) for bound in interval)
        return ScoreRow(
            layer=layer,
            attention=str(spec.attention),
            ffn=str(spec.ffn),
            score=score,
            score_low=low,
            score_high=high,
            source=source,
            one_pass=estimate.get("fisher", estimate.get("tok")),
            one_pass_seq=estimate.get("seq"),
            exact=truth,
            parameters=parameters,
            weight_bytes=2 * parameters,
            kv_bytes_per_token=2 * self.shape.kv_values_per_token(spec.attention),
        )
