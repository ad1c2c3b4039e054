"""From an architecture to a child: candidates out of the library, the refit sweep, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from blocks.checkpoint import write_child
from blocks.layer import Weights
from blocks.library import BlockLibrary, LayerLibrary
from blocks.refit import refit_sweep
from blocks.rounded import round_layer
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import Sweep
from nas.exact import kl_to_parent
from nas.progress import Reporter

KEPT_BYTES = 4 << 30  # of the block library, kept on the device while children are assembled


@dataclass
class Child:
    """An assembled child.

    Attributes:
        layers: the tensors of each layer, not rounded: what is written, and what is healed.
    """

    architecture: Architecture
    layers: list[Weights]

    @cached_property
    def served(self) -> list[Weights]:
        """The same in the precisions of the architecture."""
        return [round_layer(weights, spec) for weights, spec in zip(self.layers, self.architecture, strict=True)]


@dataclass
class Assembler:
    """Builds children from a block library and measures them.

    Attributes:
        fit_tokens: token ids [N, S] for the refit sweep.
        verify_tokens: token ids [N, S] of calibration text, for true KL.
        pseudo_tokens: of the refit sweep; None for no refit.
        build: puts candidates that a child needs into the library, where it does not hold all.
        kv: dtype of the children's KV cache; None is that of the computation.
        stored: dtype in which children are written, if GPTQ chooses the weights of what is rounded; None: to nearest.
    """

    sweep: Sweep
    library: BlockLibrary
    fit_tokens: Tensor
    verify_tokens: Tensor
    pseudo_tokens: float | None
    reporter: Reporter
    build: Callable[[Architecture], None] | None = None
    kv: torch.dtype | None = None
    stored: torch.dtype | None = None
    _hidden: Tensor | None = None
    _opened: dict[int, LayerLibrary] = field(default_factory=dict, repr=False)

    @property
    def parent_hidden(self) -> Tensor:
        """The parent's final hidden states on the verification text [N, S, D]."""
        if self._hidden is None:
            self._hidden = self.sweep.run(self.verify_tokens)
        return self._hidden

    def candidates_of(self, index: int, spec: LayerSpec | None = None) -> LayerLibrary:
        """The candidates of one layer, kept on the device once read if the whole library is small."""
        if index in self._opened:
            return self._opened[index]
        library = self.library.open(index, self.sweep.layer(index), spec)
        if self.library.size <= KEPT_BYTES and self.library.has(index):
            self._opened[index] = library
        return library

    def assemble(self, architecture: Architecture, description: str = "", refit: bool = True) -> Child:
        """Takes each layer from the library and, unless switched off, runs the refit sweep."""
        structure = architecture.structure
        if self.build is not None:
            self.build(structure)
        parent = self.sweep.parent.shape.parent_layer
        changed = [index for index, spec in enumerate(architecture) if spec != parent]
        layers: list[Weights] = [self.sweep.layer(index) for index in range(len(architecture))]
        for index, spec in enumerate(structure):
            if spec != parent:
                layers[index] = self.candidates_of(index, spec).layer_weights(spec)
        if self.pseudo_tokens is None or not changed or not refit:
            return Child(architecture, layers)
        with self.reporter.task(f"Refitting {description}", len(layers)) if description else nullcontext() as advance:
            told = (lambda _: advance()) if advance is not None else None
            text, hold, specs = self.fit_tokens, self.pseudo_tokens, architecture.layers
            refitted = refit_sweep(self.sweep, layers, changed, text, hold, told, specs, self.kv, self.stored)
        return Child(architecture, list(refitted))

    def true_kl(self, child: Child, rows: slice = slice(None)) -> Tensor:
        """KL(parent || child) of each sequence of the verification text, or of some of them [N], nats per token."""
        hidden = self.sweep.of(child.served, self.kv).run(self.verify_tokens[rows])
        return kl_to_parent(self.sweep, self.parent_hidden[rows], [hidden])[0]

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
