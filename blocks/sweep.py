"""The layer sweep: a model run layer by layer over all calibration sequences at once.

Statistics, fits, scores, refits and true-KL evaluation are all loops over `Sweep.layers(...)` that keep the residual
stream of every sequence, so one layer's tensors are needed at a time. Whether weights stay on the device (resident) or
come from disk layer by layer with the next one on its way (streamed), and where the streams lie, changes no other line.

Shapes: N sequences, S positions, D hidden_size. A residual stream is one tensor [N, S, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.activations import Activations, copy_stream
from blocks.fit import tf32_products
from blocks.layer import LayerMath, Weights, layer_forward, rms_norm
from blocks.ranks import ALONE, Ranks
from blocks.rounded import RoundedWeights
from blocks.weights import EMBEDDING, FINAL_NORM

if TYPE_CHECKING:
    from blocks.parent import Parent


@dataclass
class Sweep:
    """A parent on a device, read layer by layer.

    Attributes:
        parent: whose tensors are read.
        device, dtype: where and in what precision the layers compute. Residual streams are added up in fp32 whatever the
            dtype; a stream is stored in the dtype it was given in.
        tokens_per_batch: how many tokens go through a layer at a time (bounds the memory of activations).
        resident: keep the parent's tensors on the device once read; otherwise each sweep reads them again.
        activations: where streams lie; None for the device.
        ranks: who shares the sequences.
        child: layers of a child that are run in place of the parent's; embedding, final norm and head are the parent's.
        kv: dtype that keys and values are rounded to, as they lie in a cache; None leaves them as they are.
        bytes_read: how much this sweep, and what `at` made of it, has read of the parent's weights so far.
    """

    parent: Parent
    device: torch.device
    dtype: torch.dtype = torch.float32
    tokens_per_batch: int = 4096
    resident: bool = True
    activations: Activations | None = None
    ranks: Ranks = ALONE
    child: Sequence[Weights] | None = None
    kv: torch.dtype | None = None
    _kept: dict[str, Weights] = field(default_factory=dict, repr=False)  # as stored, shared by every dtype
    _math: dict[tuple[int, torch.dtype, torch.dtype | None], LayerMath] = field(default_factory=dict, repr=False)
    _counted: list[int] = field(default_factory=lambda: [0], repr=False)

    def at(self, dtype: torch.dtype, tokens_per_batch: int | None = None) -> Sweep:
        """This sweep computing in another precision, over the same tensors."""
        return replace(self, dtype=dtype, tokens_per_batch=tokens_per_batch or self.tokens_per_batch)

    def of(self, child: Sequence[Weights], kv: torch.dtype | None = None) -> Sweep:
        """The same sweep over a child, given as the tensors of each of its layers, and the dtype of its KV cache."""
        return replace(self, child=child, kv=kv)

    @property
    def store(self) -> Activations:
        return self.activations or Activations(self.device)

    @property
    def bytes_read(self) -> int:
        return self._counted[0]

    # ---- weights

    @property
    def head(self) -> Tensor:
        """The output matrix [V, D]; the embedding itself when tied."""
        return self._part({"": self.parent.weights().head_name})[""]

    @property
    def final_norm(self) -> Tensor:
        return self._part({"": FINAL_NORM}, keep=True)[""]

    def layer(self, index: int) -> Weights:
        """All tensors of one layer by their names within it."""
        if self.child is not None:
            return self._computing(self.child[index])
        return self._part(self.parent.weights().layer_names(index))

    def layers(self, indices: Iterable[int]) -> Iterator[tuple[int, Weights]]:
        """(index, tensors) of several layers in the given order; a streamed one is read while the one before is computed."""
        wanted = list(indices)
        if self.resident or self.child is not None:
            for index in wanted:
                yield index, self.layer(index)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead: list[Future[tuple[Weights, torch.cuda.Event | None]]] = []
            for position, index in enumerate(wanted):
                if not ahead:
                    ahead.append(reader.submit(self._fetch, index))
                weights, ready = ahead.pop().result()
                if position + 1 < len(wanted):
                    ahead.append(reader.submit(self._fetch, wanted[position + 1]))
                if ready is not None:
                    torch.cuda.current_stream(self.device).wait_event(ready)
                    for tensor in weights.values():
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield index, self._computing(weights)
                del weights

    def _fetch(self, index: int) -> tuple[Weights, torch.cuda.Event | None]:
        """Reads one layer as stored, in a thread of its own: through page-locked memory onto a GPU."""
        weights = self.parent.weights()
        stored = weights.read(weights.layer_names(index), pinned=self.device.type == "cuda")
        self._count(stored)
        if self.device.type != "cuda":
            return stored, None
        stream = copy_stream(self.device, "weights")
        with torch.cuda.stream(stream):
            copied = {name: tensor.to(self.device, non_blocking=True) for name, tensor in stored.items()}
            ready = torch.cuda.Event()
            ready.record(stream)
        return copied, ready

    def _part(self, names: Mapping[str, str], keep: bool = False) -> Weights:
        """Tensors under the keys of `names`; kept on the device if it is to hold them all."""
        known = ",".join(names.values())
        if known in self._kept:
            return self._computing(self._kept[known])
        stored = self.parent.weights().read(names, pinned=self.device.type == "cuda")
        self._count(stored)
        weights = {key: tensor.to(self.device) for key, tensor in stored.items()}
        if self.resident or keep:
            self._kept[known] = weights
        return self._computing(weights)

    def _computing(self, weights: Weights) -> Weights:
        if isinstance(weights, RoundedWeights):
            return weights.to(self.dtype)
        return {name: tensor.to(self.dtype) for name, tensor in weights.items()}

    def _count(self, stored: Weights) -> None:
        self._counted[0] += sum(tensor.numel() * tensor.element_size() for tensor in stored.values())

    # ---- running

    def math(self, length: int) -> LayerMath:
        """Rotary tables for sequences of `length` tokens."""
        key = length, self.dtype, self.kv
        if key not in self._math:
            self._math[key] = replace(LayerMath.of(self.parent.config, length, self.device, self.dtype), kv=self.kv)
        return self._math[key]

    def batches(self, stream: Tensor) -> Iterator[slice]:
        """Slices over the sequences of a stream [N, S, ...], at most `tokens_per_batch` tokens each."""
        step = max(1, self.tokens_per_batch // stream.shape[1])
        for start in range(0, len(stream), step):
            yield slice(start, start + step)

    def read(self, *streams: Tensor) -> Iterator[tuple[slice, list[Tensor]]]:
        """(batch, its part of each stream on the device), see `batches`."""
        return self.store.read(self.batches(streams[0]), *streams)

    def empty_like(self, stream: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.store.empty(*stream.shape, dtype=dtype or stream.dtype)

    def embed(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Token ids [N, S] -> the residual stream entering layer 0, stored in `dtype` (that of the computation if None)."""
        weights = self.parent.weights()
        if self.resident:
            table = self._part({"": EMBEDDING})[""]
        else:  # rows are picked where the table lies: on disk
            table = weights.embedding
        stream = self.store.empty(*tokens.shape, table.shape[1], dtype=dtype or self.dtype)
        for batch in self.batches(stream):
            self.store.write(stream, batch, F.embedding(tokens[batch].to(table.device), table))
        return stream

    def finish(self, stream: Tensor) -> Tensor:
        """The stream leaving the last layer -> normalised hidden states that the head reads."""
        return rms_norm(stream, self.final_norm, self.parent.config.rms_norm_eps)

    @torch.no_grad()
    def hidden(self, stream: Tensor, out: Tensor | None = None) -> Tensor:
        """`finish` of a whole stream, kept in the precision of the computation; `out` may be the stream itself."""
        out = self.empty_like(stream, self.dtype) if out is None else out
        for batch, (h,) in self.read(stream):
            self.store.write(out, batch, self.finish(h))
        return out

    @torch.no_grad()
    def forward(self, weights: Weights, stream: Tensor, out: Tensor | None = None) -> Tensor:
        """One layer over a whole stream [N, S, D]; returns a new stream (the same one if the layer is empty), or `out`,
        which may be the stream itself."""
        if not weights:
            return stream
        math, out = self.math(stream.shape[1]), self.empty_like(stream) if out is None else out
        with self.fast_products():
            for batch, (h,) in self.read(stream):
                self.store.write(out, batch, layer_forward(weights, h, math))
        return out

    @torch.no_grad()
    def run(self, tokens: Tensor) -> Tensor:
        """All layers: token ids [N, S] -> hidden states [N, S, D]."""
        stream = self.embed(tokens, torch.float32)
        for _, weights in self.layers(self.parent.shape.layers):
            stream = self.forward(weights, stream)
        return self.hidden(stream)

    def fast_products(self) -> AbstractContextManager[None]:
        """tf32 for what runs a layer in fp32 on a GPU. Not for statistics and solves."""
        return tf32_products(self.device.type == "cuda" and self.dtype == torch.float32)


class StreamCheckpoints:
    """The streams entering each layer of the parent, to be taken from the last layer to the first.

    Every `every`-th is kept on the way forward; the others are run again from the one before when first taken (activation
    checkpointing, Chen et al., arXiv 1604.06174), which trades one more forward pass for every-fold less memory.

    Args:
        sweep: the parent.
        tokens: token ids [N, S].
        every: 1 keeps all.
        upto: how many layers to run; None runs all.
        on_layer: told each finished layer.
    """

    def __init__(
        self,
        sweep: Sweep,
        tokens: Tensor,
        every: int = 1,
        dtype: torch.dtype | None = None,
        upto: int | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        self.sweep, self.every = sweep, every
        self._streams = {0: sweep.embed(tokens, dtype)}
        for index, weights in sweep.layers(range(sweep.parent.shape.num_hidden_layers if upto is None else upto)):
            self._streams[index + 1] = sweep.forward(weights, self._streams[index])
            if index % every:
                del self._streams[index]
            if on_layer is not None:
                on_layer(index)

    def __getitem__(self, index: int) -> Tensor:
        """The stream entering layer `index` [N, S, D]; that leaving the last one has the number of layers as index."""
        if index not in self._streams:
            start = max(kept for kept in self._streams if kept < index)
            for layer, weights in self.sweep.layers(range(start, index)):
                self._streams[layer + 1] = self.sweep.forward(weights, self._streams[layer])
            self._streams = {kept: s for kept, s in self._streams.items() if kept <= index or kept % self.every == 0}
        return self._streams[index]

    def take(self, index: int) -> Tensor:
        """The same, and forgets it and all behind it."""
        stream = self[index]
        self._streams = {kept: other for kept, other in self._streams.items() if kept < index}
        return stream
