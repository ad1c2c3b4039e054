"""Losses on the residual stream: the cosine of student and teacher after each layer, and each layer's own error.

Shapes: B sequences, T positions, D hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.loss import accumulation_dtype


class StreamRecord:
    """Keeps a stream as what enters the first layer and what each layer adds to it, L + 1 tensors in a short dtype.

    Some tokens carry activations thousands of times larger than what a layer adds to them: the streams themselves, rounded
    to bfloat16, would lose what a layer did. What is lost of one addition is made up for in the next, so that the sum of
    the first entries is off by the rounding of the last one alone.

    Shown the streams one after another, as `last_hidden` does; `entries` is what it kept.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.entries: list[Tensor] = []
        self._sum: Tensor | None = None

    def __call__(self, stream_BTD: Tensor) -> None:
        wide = stream_BTD.detach().to(accumulation_dtype(stream_BTD))
        entry = (wide if self._sum is None else wide - self._sum).to(self.dtype or stream_BTD.dtype)
        self.entries.append(entry)
        self._sum = entry.to(wide.dtype) if self._sum is None else self._sum + entry


def streams_of(entries: Sequence[Tensor]) -> Iterator[Tensor]:
    """The streams that a `StreamRecord` was shown, [B, T, D] in the accumulation dtype."""
    stream = torch.zeros_like(entries[0], dtype=accumulation_dtype(entries[0]))
    for entry in entries:
        stream = stream + entry
        yield stream


class CosineTerm:
    """The mean over some layers of 1 - cos(student's stream, teacher's stream) after the layer, summed over tokens.

    Shown the student's streams one after another, as `last_hidden` does; `total` is the term.

    Args:
        entries: the teacher's `StreamRecord.entries`.
        weight_BT: of each token.
        layers: numbers of the layers that count.
        dtype: that the gradient of a stream is kept in until the backward pass; None keeps the stream's own.
    """

    def __init__(
        self, entries: Sequence[Tensor], weight_BT: Tensor, layers: Collection[int], dtype: torch.dtype | None = None
    ) -> None:
        self.total = weight_BT.new_zeros(())
        self.weight_BT = weight_BT / max(1, len(layers))
        self.dtype = dtype
        self._layers = frozenset(layers)
        self._teacher = streams_of(entries)
        self._layer = -1  # what enters the first layer

    def __call__(self, stream_BTD: Tensor) -> None:
        teacher_BTD = next(self._teacher)
        if self._layer in self._layers:
            distance: Tensor = _CosineDistance.apply(
                stream_BTD, teacher_BTD, self.weight_BT, self.dtype or stream_BTD.dtype
            )
            self.total = self.total + distance
        self._layer += 1


class _CosineDistance(torch.autograd.Function):
    """sum_t w_t (1 - cos(s_t, t_t)), its gradient made in the forward pass: one tensor kept instead of five.

    With unit vectors a = s / |s| and b = t / |t|, and u = a - b:

        1 - cos = |u|^2 / 2        d(1 - cos) / ds = (u - (|u|^2 / 2) a) / |s|

    which loses no digits where the two streams are nearly parallel.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, gradient_dtype: torch.dtype) -> Tensor:
        dtype = accumulation_dtype(student)
        length = student.to(dtype).norm(dim=-1, keepdim=True).clamp_min(TINY)
        unit = student / length
        apart = unit - teacher / teacher.norm(dim=-1, keepdim=True).clamp_min(TINY)
        distance = apart.square().sum(-1) / 2
        if ctx.needs_input_grad[0]:
            gradient = apart.sub_(unit.mul_(distance[..., None])).mul_(weight[..., None] / length)
            ctx.save_for_backward(gradient.to(gradient_dtype))
            ctx.dtype = student.dtype
        return (distance * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * loss_gradient).to(ctx.dtype), None, None, None


class LocalTerm:
    """What each layer leaves wrong of the teacher's layer, given the teacher's stream; summed over layers and tokens.

        |student's layer(x) - y|^2 / |y - x|^2        x, y the teacher's stream before and after the layer

    1 for a layer that does nothing. Puzzle's block-local loss (arXiv 2411.19146, section 3), of single tokens rather than
    of a batch, so that neither micro-batches nor a token of huge activations change what the others weigh.

    `entering` and `leaving` are for `layers_apart`; `total` is the term.

    Args:
        entries: the teacher's `StreamRecord.entries`.
        weight_BT: of each token.
        layers: numbers of the layers that learn.
    """

    def __init__(self, entries: Sequence[Tensor], weight_BT: Tensor, layers: Collection[int]) -> None:
        self.total = weight_BT.new_zeros(())
        self.weight_BT = weight_BT
        self._layers = frozenset(layers)
        self._added = entries[1:]
        self._streams = streams_of(entries)
        self._x = entries[0]

    def entering(self, layer: int) -> Tensor | None:
        self._x = next(self._streams)
        return self._x if layer in self._layers else None

    def leaving(self, layer: int, stream_BTD: Tensor) -> None:
        added = self._added[layer].to(self._x.dtype)
        weight_BT = self.weight_BT / added.square().sum(-1).clamp_min(TINY)
        self.total = self.total + ((stream_BTD - self._x - added).square().sum(-1) * weight_BT).sum()


TINY = 1e-30
