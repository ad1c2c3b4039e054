"""How long `nas score` will take here: a few batches of one layer, timed with the functions that will do the work."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blocks.activations import Activations
from blocks.candidates import FitConfig, fit_layer
from blocks.sweep import Sweep
from distill.block_local import LocalConfig, distill_layer
from nas.config import RunConfig, ScoreConfig
from nas.exact import kl_to_parent
from nas.plan import EXACT_STREAMS, Counts
from nas.scoring import one_pass_scores, output_gradients
from search_spaces import SearchSpace

LONG = 3.0  # seconds: beside so much work, what is slow the first time only does not count


class Probe:
    """Times one layer of the parent on random tokens: what takes longer with more text, and what does not."""

    def __init__(
        self, config: RunConfig, sweep: Sweep, space: SearchSpace, counts: Counts, every: int, ranks: int
    ) -> None:
        self.config, self.sweep, self.counts, self.every, self.ranks = config, sweep, counts, every, ranks
        self.layer = min(1, counts.layers - 1)
        self.weights = sweep.layer(self.layer)
        self.specs = space.layer_candidates(sweep.parent.shape, self.layer)[1:]

    def seconds(self) -> dict[str, float]:
        """Of each part of `nas score`, named as in its summary."""
        counts, layers, passes = self.counts, self.counts.layers, 1 if self.every == 1 else 2
        fit, calibration, exact = (
            n / self.ranks for n in (counts.fit_tokens, counts.calibration_tokens, counts.exact_tokens)
        )
        streamed = not self.sweep.resident
        wide = replace(self.sweep.at(torch.float32), activations=Activations(self.sweep.device))  # as in `ExactScores`
        read = self._time(lambda: list(self.sweep.layers([self.layer]))) if streamed else 0.0
        forward = self._scaled(self._forward, fit + calibration)
        suffix = max(self._scaled(lambda n: self._forward(n, wide), exact * EXACT_STREAMS), read) / EXACT_STREAMS
        one = self._scaled(lambda n: self._kl(n, wide, 1), exact)
        three = self._scaled(lambda n: self._kl(n, wide, 3), exact)
        kl = (
            max(three - one, 0.0) / 2
        )  # of a child; the parent's side, and reading the head, are once for all that wait
        found = {
            "parent": layers * (max(forward, 2 * read) + suffix + read),
            "fit": layers * max(self._scaled(self._fit, fit), read) + layers * (passes - 1) * forward,
            "exact": (counts.suffix_layers + counts.scored_exactly) * suffix
            + counts.scored_exactly * kl
            + counts.suffix_sweeps * max(one - kl, 0.0),
        }
        if counts.local_tokens:
            found["fit"] += layers * self._local(fit)
        if calibration:
            found["vocabulary"] = self._scaled(self._gradients, calibration)
            found["one_pass"] = layers * self._scaled(self._one_pass, calibration)
        return found

    def _scaled(self, work: Callable[[int], None], tokens: float) -> float:
        """Seconds of `work` on so many tokens, from one and from two batches: a fixed part, and one by the token."""
        length = self.counts.sequence_length
        sequences = max(1, min(self.sweep.tokens_per_batch, int(tokens)) // length)
        once = self._settled(work, sequences * length)
        if tokens <= sequences * length:
            return once
        twice = self._settled(work, 2 * sequences * length)
        slope = max(twice - once, 0.0) / (sequences * length)
        return once + slope * (tokens - sequences * length)

    def _settled(self, work: Callable[[int], None], tokens: int) -> float:
        """Seconds without what is slow the first time only; a GPU chooses kernels and takes memory for each size."""
        first = self._time(lambda: work(tokens if self.sweep.device.type == "cuda" else self.counts.sequence_length))
        if first > LONG and self.sweep.device.type == "cuda":
            return first
        return self._time(lambda: work(tokens))

    def _time(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        if self.sweep.device.type == "cuda":
            torch.cuda.synchronize(self.sweep.device)
        return time.perf_counter() - started

    def _stream(self, tokens: int, sweep: Any = None) -> Tensor:
        """Noise: of embeddings, the tied head would make distributions so sharp that CPUs crawl through denormal numbers."""
        sweep, length = sweep or self.sweep, self.counts.sequence_length
        size = max(1, tokens // length), length, sweep.parent.shape.hidden_size
        generator = torch.Generator(sweep.device).manual_seed(0)
        stream: Tensor = sweep.store.empty(*size, dtype=sweep.dtype)
        return stream.copy_(torch.randn(size, generator=generator, device=sweep.device, dtype=sweep.dtype))

    def _forward(self, tokens: int, sweep: Any = None) -> None:
        sweep = sweep or self.sweep
        weights = {name: tensor.to(sweep.dtype) for name, tensor in self.weights.items()}
        sweep.forward(weights, self._stream(tokens, sweep))

    def _fit(self, tokens: int) -> None:
        score: ScoreConfig = self.config.score
        self.library = fit_layer(
            self.sweep, self.weights, self._stream(tokens), self.specs, FitConfig(score.fit, score.pseudo_tokens)
        )

    def _local(self, tokens: float) -> float:
        """Seconds of block-local distillation of one layer: of its steps, and of measuring before and after."""
        few = min(int(tokens), 2 * LocalConfig.batch_tokens)
        stream = self._stream(few)

        def learn(steps: int) -> float:
            config = LocalConfig(steps * LocalConfig.batch_tokens, self.config.score.bld_learning_rate, 0)
            fitted = replace(self.library, entries=dict(self.library.entries))
            return self._time(lambda: distill_layer(self.sweep, fitted, stream, self.specs, config))

        learn(1)
        once, thrice = learn(1), learn(3)
        step = max(thrice - once, 0.0) / 2
        steps = self.counts.local_tokens / self.ranks / LocalConfig.batch_tokens
        return max(once - step, 0.0) * tokens / few + step * steps

    def _one_pass(self, tokens: int) -> None:
        stream = self._stream(tokens)
        size = (*stream.shape[:2], self.config.score.label_samples, stream.shape[2])
        gradients = self.sweep.store.empty(*size, dtype=stream.dtype)
        gradients.copy_(torch.ones(()).expand(size))
        one_pass_scores(self.sweep, self.library, self.specs, stream, gradients)

    def _gradients(self, tokens: int) -> None:
        output_gradients(self.sweep, self._stream(tokens), self.config.score.label_samples, 0)

    def _kl(self, tokens: int, sweep: Any, children: int) -> None:
        hidden = sweep.hidden(self._stream(tokens, sweep))
        kl_to_parent(sweep, hidden, [hidden] * children)
