"""Exact replace-one-block scores: replace one layer, run the layers behind it, take the KL on every token.

The parent's streams are kept, so nothing in front of the replaced layer is run again; candidates of neighbouring layers go
through the layers behind them together.

Reference: Puzzle, arXiv 2411.19146 (replace-one-block scores).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.library import LayerLibrary
from blocks.spec import LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep
from nas.scoring import CandidateOutputs, head_rows


@dataclass
class Reference:
    """The parent on the text of the exact scores.

    Attributes:
        streams: the fp32 stream entering each layer [N, S, D].
        hidden: the final normalised hidden states [N, S, D].
    """

    streams: StreamCheckpoints
    hidden: Tensor


def run_reference(sweep: Sweep, tokens: Tensor, every: int = 1) -> Reference:
    """Runs the parent once over token ids [N, S] and keeps the stream of every `every`-th layer."""
    streams = StreamCheckpoints(sweep, tokens, every, torch.float32)
    return Reference(streams, sweep.hidden(streams[sweep.parent.shape.num_hidden_layers]))


@torch.no_grad()
def kl_to_parent(sweep: Sweep, parent: Tensor, children: Sequence[Tensor] | Tensor) -> Tensor:
    """KL(parent || child) of each child, mean over each sequence, nats per token: [children, N].

    Args:
        parent: final hidden states [N, S, D].
        children: the same of each child. Vocabulary work is done a few tokens at a time.
    """
    head, length = sweep.head, parent.shape[1]
    result = torch.empty(len(children), len(parent) * length, device=sweep.device)
    flat = [hidden.flatten(0, 1) for hidden in (parent, *children)]
    step = head_rows(head)
    chunks = (slice(start, start + step) for start in range(0, len(flat[0]), step))
    with sweep.fast_products():
        for chunk, (own, *others) in sweep.store.read(chunks, *flat):
            log_p = torch.log_softmax((own @ head.T).float(), dim=-1)
            for row, child in enumerate(others):
                # p (log p - log q), the difference first: entropies and cross-entropies apart lose 2e-4 nats to fp32 over
                # 49,152 tokens.
                log_q = torch.log_softmax((child @ head.T).float(), dim=-1)
                result[row, chunk] = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    return result.unflatten(1, (-1, length)).mean(2)


class ExactScores:
    """Replaced layers on their way to the KL, so many at a time; layers are added from the last to the first.

    Their streams fill one buffer from its end, so those that a layer runs, the ones replaced in front of it, always lie
    together at its beginning.

    Args:
        sweep: the parent.
        reference: the parent on the same text.
        most: streams carried through the layers behind at once; more of them read weights less often, and take memory.
        on_score: told (layer, spec, KL of each sequence [N] in nats per token) of each candidate.
    """

    def __init__(
        self, sweep: Sweep, reference: Reference, most: int, on_score: Callable[[int, LayerSpec, Tensor], None]
    ) -> None:
        self.sweep, self.reference, self.on_score = sweep, reference, on_score
        self._streams = torch.empty(most, *reference.hidden.shape, dtype=torch.float32, device=sweep.device)
        self._waiting: list[tuple[int, LayerSpec]] = []  # as they lie at the end of the buffer

    def add(self, layer: int, library: LayerLibrary, specs: Sequence[LayerSpec]) -> None:
        """Takes candidates of a layer: no one else needs to keep the library for them."""
        remaining = list(specs)
        while remaining:
            free = len(self._streams) - len(self._waiting)
            now, remaining = remaining[:free], remaining[free:]
            _replace_layer(
                self.sweep, library, now, self.reference.streams[layer], self._streams[free - len(now) : free]
            )
            self._waiting = [(layer, spec) for spec in now] + self._waiting
            if len(now) == free:
                self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Runs what waits to the end."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        streams = self._streams[len(self._streams) - len(waiting) :]
        for index, weights in self.sweep.layers(range(waiting[0][0] + 1, self.sweep.parent.shape.num_hidden_layers)):
            alive = streams[: sum(layer < index for layer, _ in waiting)].flatten(0, 1)
            self.sweep.forward(weights, alive, out=alive)
        self.sweep.hidden(streams.flatten(0, 1), out=streams.flatten(0, 1))
        for (layer, spec), kl in zip(waiting, kl_to_parent(self.sweep, self.reference.hidden, streams), strict=True):
            self.on_score(layer, spec, kl)


@torch.no_grad()
def _replace_layer(
    sweep: Sweep, library: LayerLibrary, specs: Sequence[LayerSpec], stream: Tensor, outputs: Tensor
) -> None:
    """Writes to outputs [specs, N, S, D] what leaves one layer with each candidate in its place, for the stream [N, S, D]."""
    math = sweep.math(stream.shape[1])
    with sweep.fast_products():
        for group in CandidateOutputs(library, specs).groups():
            for batch, (h,) in sweep.read(stream):
                for row, added in group(h, math):
                    outputs[row, batch] = h + added
            del group  # before the tensors of the next one come to the device
