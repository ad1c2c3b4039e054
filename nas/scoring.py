"""One-pass replace-one-block scores: what each candidate layer hurts, in nats per token of KL(parent || changed).

KL has value and gradient zero at the parent, so its leading term is 1/2 d' J' F J d, with d the change that a
candidate makes to its layer's output and F the Fisher matrix of the output distribution. With labels y drawn from the
parent's own distribution and g = grad of log p(y) at that place, E[(g . d)^2] = d' J' F J d. One forward pass, one
backward pass per label sample (activations only) score every candidate of every layer. Three estimators:

    tok     1/2 E[(g_t . d_t)^2] per token: leaves out the correlation between tokens, lower variance
    seq     1/2 E[(sum_t g_t . d_t)^2] / T per sequence: unbiased to second order, noisier
    fisher  1/2 sum_i E[g_ti^2] d_ti^2: the diagonal Fisher that is published for pruning; leaves out channels' correlation

Around a child the gradient of KL(parent || child) is not zero, and the change of KL has a first-order term too (`first`):
sum_t k_t . d_t / T, with k the exact gradient of the KL, carried back beside those of the labels.

Where d is large the term is wrong: `nas.exact` checks and replaces it there.

References: Puzzle, arXiv 2411.19146 (replace-one-block scores); Optimal Brain Damage (the second-order term); Theis et
al., arXiv 1801.05787 (diagonal Fisher of activations).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from blocks.layer import (
    FFN_NORM,
    LayerMath,
    Weights,
    attention_input,
    ffn_activation,
    ffn_input,
    layer_forward,
    project,
)
from blocks.library import LayerLibrary
from blocks.spec import AttentionSpec, LayerSpec
from blocks.sweep import Sweep

HEAD_VALUES = 1 << 26  # logits held at a time: a quarter of a GB in fp32
CHANGE_VALUES = 1 << 28  # changes of a batch of tokens by several candidates, held at a time


def head_rows(head: Tensor) -> int:
    """How many tokens' logits are held at a time."""
    return max(1, HEAD_VALUES // len(head))


@torch.no_grad()
def output_gradients(
    sweep: Sweep, last: Tensor, samples: int, seed: int, first_sequence: int = 0, parent_hidden: Tensor | None = None
) -> Tensor:
    """Gradients of log p(y) with respect to the stream leaving the last layer, y drawn from the model's own distribution:
    [N, S, K, D]; with `parent_hidden` one more, the last: that of KL(parent || model), summed over tokens.

    With z the normalised hidden states, grad_z log p(y) = W_y - sum_v p_v W_v; the final norm is differentiated by autograd.
    A label is drawn by its place in the text, so that neither batches nor ranks change it.

    Args:
        last: the stream leaving the last layer [N, S, D].
        samples: K, labels for each token.
        seed, first_sequence: of the draw; the number of the first sequence among all.
        parent_hidden: final hidden states of the parent on the same text [N, S, D], where `sweep` runs a child.
    """
    head, length = sweep.head, last.shape[1]
    slots = samples + (parent_hidden is not None)
    gradients = sweep.store.empty(*last.shape[:2], slots, last.shape[2], dtype=sweep.dtype)
    step = max(1, head_rows(head) // length)
    batches = (slice(start, start + step) for start in range(0, len(last), step))
    streams = (last,) if parent_hidden is None else (last, parent_hidden)
    for batch, (h, *own) in sweep.store.read(batches, *streams):
        numbers = range(first_sequence + batch.start, first_sequence + batch.start + len(h))
        draws = np.stack([np.random.Generator(np.random.Philox([seed, n])).random((length, samples)) for n in numbers])
        draw = torch.from_numpy(draws).to(sweep.device, torch.float32).flatten(0, 1)
        found = torch.empty(len(h) * length, slots, h.shape[2], dtype=sweep.dtype, device=sweep.device)
        flat, parents = h.flatten(0, 1), [hidden.flatten(0, 1) for hidden in own]
        for start in range(0, len(flat), head_rows(head)):
            rows = slice(start, start + head_rows(head))
            found[rows] = _label_gradients(sweep, head, flat[rows], draw[rows], *(hidden[rows] for hidden in parents))
        sweep.store.write(gradients, batch, found.view(len(h), length, slots, -1))
    return gradients


def _label_gradients(sweep: Sweep, head: Tensor, stream: Tensor, draw: Tensor, parent: Tensor | None = None) -> Tensor:
    """For tokens [T, D] and uniform draws [T, K]: gradients [T, K, D], and that of the KL to a parent if given."""
    with torch.enable_grad():
        stream = stream.detach().float().requires_grad_()
        hidden = sweep.finish(stream)
    p = torch.softmax((hidden.detach() @ head.T).float(), dim=-1)
    expected = p.to(head.dtype) @ head
    goals = []
    if parent is not None:
        goals.append(expected - torch.softmax((parent @ head.T).float(), dim=-1).to(head.dtype) @ head)
    cumulative = p.cumsum(-1)
    labels = torch.searchsorted(cumulative, draw * cumulative[:, -1:]).clamp_max(len(head) - 1)
    goals = [head[labels[:, k]] - expected for k in range(draw.shape[1])] + goals
    gradients = []
    for goal in goals:
        (gradient,) = torch.autograd.grad(hidden, stream, goal.to(hidden.dtype), retain_graph=True)
        gradients.append(gradient)
    return torch.stack(gradients, dim=1)


class CandidateOutputs:
    """What all candidates of one layer add to the stream, sharing what they share: attention and FFN activations are
    computed once for each attention candidate, and tensors of one attention candidate at a time are on the device."""

    def __init__(self, library: LayerLibrary, specs: Sequence[LayerSpec]) -> None:
        self.library, self.specs = library, specs

    def groups(self) -> Iterator[CandidateGroup]:
        for attention in dict.fromkeys(spec.attention for spec in self.specs):
            yield CandidateGroup.of(self.library, attention, self.specs)

    def __call__(self, h: Tensor, math: LayerMath) -> Iterator[tuple[int, Tensor]]:
        """(index in specs, what is added to the stream [B, S, D]) of every candidate, for the layer input h [B, S, D]."""
        for group in self.groups():
            yield from group(h, math)


@dataclass
class CandidateGroup:
    """The candidates of one layer that share an attention.

    Attributes:
        parent, own: tensors of the parent's layer and of this attention.
        order: of the FFN channels behind it.
        members: (index in specs, spec, tensors of its own).
    """

    parent: Weights
    own: Weights
    order: Tensor | None
    members: list[tuple[int, LayerSpec, dict[str, Tensor]]]

    @classmethod
    def of(cls, library: LayerLibrary, attention: AttentionSpec, specs: Sequence[LayerSpec]) -> CandidateGroup:
        order = library.order(attention) if library.has_order(attention) else None
        members = [(row, spec, _own(library, spec)) for row, spec in enumerate(specs) if spec.attention == attention]
        return cls(library.parent, library.attention_weights(attention), order, members)

    def __call__(self, h: Tensor, math: LayerMath) -> Iterator[tuple[int, Tensor]]:
        """(index in specs, what is added to the stream [B, S, D], fp32) of every member."""
        h = h.float()
        last = attention_input(self.own, h, math)
        attended = h.new_zeros(()) if last is None else project(self.own, *last).float()
        middle = h + attended
        activation: Tensor | None = None
        for row, spec, fitted in self.members:
            if spec.ffn.kind == "skip":
                # Its last matrix may be its own, and after block-local distillation all of its attention.
                whole = {**self.own, **fitted}
                read = attention_input(whole, h, math) if "self_attn.q_proj.weight" in fitted else last
                yield row, torch.zeros_like(h) if read is None else project(whole, *read).float()
                continue
            if spec.ffn.kind == "linear":
                ffn = ffn_input({FFN_NORM: self.parent[FFN_NORM], **fitted}, middle, math)
                assert ffn is not None
                yield row, attended + project(fitted, *ffn)
                continue
            if "mlp.gate_proj.weight" in fitted:  # block-local distillation gave it channels of its own
                kept = ffn_activation({**self.parent, **fitted}, middle, math)
            else:
                if activation is None:
                    activation = ffn_activation(self.parent, middle, math)
                kept = activation
                if spec.ffn.width < activation.shape[-1]:
                    assert self.order is not None
                    kept = activation[..., self.order[: spec.ffn.width]]
            yield row, attended + project({**self.parent, **fitted}, "mlp.down_proj", kept)


def _own(library: LayerLibrary, spec: LayerSpec) -> dict[str, Tensor]:
    """What a pair has of its own; with channels of its own its whole layer, because biases follow the channels."""
    own = library.own(spec)
    return library.layer_weights(spec) if "mlp.gate_proj.weight" in own else own


def one_pass_scores(
    sweep: Sweep,
    library: LayerLibrary,
    specs: Sequence[LayerSpec],
    stream: Tensor,
    gradients: Tensor,
    estimators: Sequence[str] = ("tok", "seq"),
    around: tuple[LayerSpec, Weights] | None = None,
) -> dict[str, Tensor]:
    """Scores candidates of one layer and carries the gradients to its input.

    Args:
        library: the layer's candidates over the parent's tensors.
        specs: which of them to score; may be empty, then only the gradients move.
        stream: the parent's stream entering the layer [N, S, D].
        gradients: at the layer's output [N, S, K, D]; overwritten with those at its input.
        estimators: which of them; "first" needs the gradient of the KL as the last one.
        around: the candidate that stands there in a child and its present tensors (refitted, say), where the sweep runs a
            child. Changes are then counted from that candidate as the library has it, so that it scores 0 itself, and
            gradients pass through the present tensors.

    Returns:
        For each estimator, nats per token of each candidate and sequence [specs, N].
    """
    scores = {name: torch.zeros(len(specs), len(stream), device=sweep.device) for name in estimators}
    math = sweep.math(stream.shape[1])
    present = library.parent if around is None else around[1]
    with torch.no_grad():
        own = library.parent if around is None else library.layer_weights(around[0])
        parent = _added(sweep, own, stream) if specs else stream
        for group in CandidateOutputs(library, specs).groups():
            for batch, (h, added, g) in sweep.read(stream, parent, gradients):
                for rows, changes in _changes(group, h, added, math, sweep.dtype):
                    for name, values in estimate(estimators, changes, g).items():
                        scores[name][rows, batch] = values
            del group  # before the tensors of the next one come to the device
    if present:  # an empty layer passes them on as they are
        carry_back(sweep, present, stream, gradients)
    return scores


def carry_back(sweep: Sweep, weights: Weights, stream: Tensor, gradients: Tensor) -> None:
    """Gradients [N, S, K, D] at a layer's output become those at its input."""
    math = sweep.math(stream.shape[1])
    for batch, (h, g) in sweep.read(stream, gradients):
        with torch.enable_grad():
            h = h.detach().float().requires_grad_()
            output = layer_forward(weights, h, math)
        moved = torch.empty_like(g)
        for k in range(g.shape[2]):
            (moved[:, :, k],) = torch.autograd.grad(output, h, g[:, :, k].to(output.dtype), retain_graph=True)
        sweep.store.write(gradients, batch, moved)


def _added(sweep: Sweep, weights: Weights, stream: Tensor) -> Tensor:
    """What the parent's layer adds to the stream [N, S, D]; kept apart from it, whose own size would drown the changes."""
    math, added = sweep.math(stream.shape[1]), sweep.empty_like(stream, sweep.dtype)
    for batch, (h,) in sweep.read(stream):
        h = h.float()
        sweep.store.write(added, batch, layer_forward(weights, h, math) - h)
    return added


def _changes(
    group: CandidateGroup, h: Tensor, added: Tensor, math: LayerMath, dtype: torch.dtype
) -> Iterator[tuple[list[int], Tensor]]:
    """(indices in specs, their changes to the layer's output [B, S, C, D]), as many at a time as memory should hold."""
    most = max(1, min(CHANGE_VALUES // h.numel(), len(group.members)))
    changes = torch.empty(*h.shape[:2], most, h.shape[2], dtype=dtype, device=h.device)
    rows: list[int] = []
    for row, candidate in group(h, math):
        torch.sub(candidate, added, out=changes[:, :, len(rows)])
        rows.append(row)
        if len(rows) == most:
            yield rows, changes
            rows = []
    if rows:
        yield rows, changes[:, :, : len(rows)]


def estimate(estimators: Sequence[str], changes: Tensor, gradients: Tensor) -> dict[str, Tensor]:
    """Changes [B, S, C, D] and gradients [B, S, K, D] -> scores [C, B] by estimator."""
    found: dict[str, Tensor] = {}
    if "first" in estimators:
        gradients, of_kl = gradients[:, :, :-1], gradients[:, :, -1:]
        found["first"] = torch.matmul(changes, of_kl.mT).float().mean((1, 3)).T
    if "tok" in estimators or "seq" in estimators:
        u = torch.matmul(changes, gradients.mT).float()  # [B, S, C, K]
        found["tok"] = u.pow(2).mean((1, 3)).T / 2
        found["seq"] = u.sum(1).pow(2).mean(2).T / (2 * u.shape[1])
    if "fisher" in estimators:
        energy = gradients.float().pow(2).mean(2, keepdim=True)
        found["fisher"] = torch.matmul(changes.float().pow(2), energy.mT).mean((1, 3)).T / 2
    return {name: found[name] for name in estimators}
