"""From an architecture to a child: candidates out of the library, the refit sweep, a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from blocks.checkpoint import write_child
from blocks.layer import Weights
from blocks.library import BlockLibrary
from blocks.refit import refit_sweep
from blocks.spec import Architecture
from blocks.sweep import Sweep
from nas.exact import kl_to_parent
from nas.progress import Reporter


@dataclass
class Child:
    """An assembled child: its architecture and the tensors of each layer."""

    architecture: Architecture
    layers: list[Weights]


@dataclass
class Assembler:
    """Builds children from a block library and measures them.

    Attributes:
        fit_tokens: token ids [N, S] for the refit sweep.
        verify_tokens: token ids [N, S] of calibration text, for true KL.
        pseudo_tokens: of the refit sweep; None for no refit.
    """

    sweep: Sweep
    library: BlockLibrary
    fit_tokens: Tensor
    verify_tokens: Tensor
    pseudo_tokens: float | None
    reporter: Reporter
    _hidden: Tensor | None = None

    def assemble(self, architecture: Architecture, description: str) -> Child:
        """Takes each layer from the library and, unless switched off, runs the refit sweep."""
        parent = self.sweep.parent.shape.parent_layer
        changed = [index for index, spec in enumerate(architecture) if spec != parent]
        layers: list[Weights] = [self.sweep.layer(index) for index in range(len(architecture))]
        for index in changed:
            layers[index] = self.library.open(index, layers[index], architecture[index]).layer_weights(
                architecture[index]
            )
        if self.pseudo_tokens is None or not changed:
            return Child(architecture, layers)
        with self.reporter.task(f"Refitting {description}", len(layers)) as advance:
            refitted = refit_sweep(
                self.sweep, layers, changed, self.fit_tokens, self.pseudo_tokens, lambda _: advance()
            )
        return Child(architecture, list(refitted))

    def true_kl(self, child: Child) -> float:
        """KL(parent || child) on the verification text, nats per token."""
        if self._hidden is None:
            self._hidden = self.sweep.run(self.verify_tokens)
        hidden = self.sweep.run(self.verify_tokens, child.layers)
        return float(kl_to_parent(self.sweep, self._hidden, [hidden]).mean())

    def write(self, child: Child, path: Path, dtype: str) -> None:
        """Writes the child as a checkpoint in `dtype`."""
        write_child(path, self.sweep.parent.path, child.architecture, self._tensors(child), dtype)

    def _tensors(self, child: Child) -> Iterator[tuple[str, Tensor]]:
        store = self.sweep.parent.weights()
        yield "model.embed_tokens.weight", store.embedding
        for index, weights in enumerate(child.layers):
            for name, tensor in weights.items():
                yield f"model.layers.{index}.{name}", tensor
        yield "model.norm.weight", store.final_norm
        if not self.sweep.parent.shape.tie_word_embeddings:
            yield "lm_head.weight", store.head
