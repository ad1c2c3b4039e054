"""Replace-one-block scores: what each candidate layer hurts, in nats per token of KL(parent || changed).

One-pass. KL has value and gradient zero at the parent, so its leading term is 1/2 d' J' F J d, with d the change that a
candidate makes to its layer's output and F the Fisher matrix of the output distribution. With labels y drawn from the
parent's own distribution and g = grad of log p(y) at that place, E[(g . d)^2] = d' J' F J d. One forward pass, one
backward pass per label sample (activations only) score every candidate of every layer. Two estimators are kept:
"seq", 1/2 E[(sum_t g_t . d_t)^2] / T per sequence, unbiased and noisier; "tok", 1/2 E[(g_t . d_t)^2] per token, which
leaves out the correlation between tokens and has the lower variance.

Exact. Replace one layer, run the layers behind it from the stored prefix, take the KL on every token.

References: Puzzle, arXiv 2411.19146 (replace-one-block scores); Optimal Brain Damage (the second-order term).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocks.layer import (
    FFN_NORM,
    LayerMath,
    Weights,
    add_subblock,
    attention_input,
    ffn_activation,
    ffn_input,
    layer_forward,
)
from blocks.library import LayerLibrary
from blocks.spec import LayerSpec
from blocks.sweep import Sweep

HEAD_CHUNK = 2048  # tokens whose logits are held at a time


@dataclass
class Reference:
    """The parent on the calibration text.

    Attributes:
        streams: the stream entering each layer, and last the one leaving the last layer; each [N, S, D].
        hidden: the final normalised hidden states [N, S, D].
    """

    streams: list[Tensor]
    hidden: Tensor


@dataclass
class OnePassScores:
    """Scores of the candidates of one layer, per sequence (nats per token): `seq` and `tok` [candidates, N]."""

    seq: Tensor
    tok: Tensor


@torch.no_grad()
def run_reference(sweep: Sweep, tokens: Tensor, on_layer: Callable[[int], None] | None = None) -> Reference:
    """Runs the parent once over token ids [N, S] and keeps what scoring needs."""
    streams = [sweep.embed(tokens)]
    for index in range(sweep.parent.shape.num_hidden_layers):
        streams.append(sweep.forward(sweep.layer(index), streams[-1]))
        if on_layer is not None:
            on_layer(index)
    return Reference(streams, sweep.finish(streams[-1]))


@torch.no_grad()
def output_gradients(sweep: Sweep, reference: Reference, samples: int, seed: int) -> Tensor:
    """Gradients of log p(y) with respect to the stream leaving the last layer, y drawn from the parent: [K, N, S, D].

    With z the normalised hidden states, grad_z log p(y) = W_y - sum_v p_v W_v; the final norm is differentiated by autograd.
    """
    generator = torch.Generator(sweep.device).manual_seed(seed)
    last, head = reference.streams[-1], sweep.head
    gradients = torch.empty(samples, *last.shape, device=last.device, dtype=last.dtype)
    flat, flat_gradients = last.flatten(0, 1), gradients.flatten(1, 2)
    for start in range(0, len(flat), HEAD_CHUNK):
        rows = slice(start, start + HEAD_CHUNK)
        with torch.enable_grad():
            stream = flat[rows].detach().requires_grad_()
            hidden = sweep.finish(stream)
        p = torch.softmax((hidden.detach() @ head.T).float(), dim=-1)
        expected = p.to(head.dtype) @ head
        labels = torch.multinomial(p, samples, replacement=True, generator=generator)  # [rows, K]
        for k in range(samples):
            (flat_gradients[k, rows],) = torch.autograd.grad(
                hidden, stream, head[labels[:, k]] - expected, retain_graph=True
            )
    return gradients


class CandidateOutputs:
    """Outputs of all candidates of one layer, sharing what they share: attention and FFN activations are computed once
    per attention candidate."""

    def __init__(self, library: LayerLibrary, specs: Sequence[LayerSpec]) -> None:
        self.parent = library.parent
        self.groups: list[tuple[Weights, Tensor | None, list[tuple[int, LayerSpec, dict[str, Tensor]]]]] = []
        for attention in dict.fromkeys(spec.attention for spec in specs):
            own = library.attention_weights(attention)
            order = library.order(attention) if library.has_order(attention) else None
            members = [(row, spec, library.own(spec)) for row, spec in enumerate(specs) if spec.attention == attention]
            self.groups.append((own, order, members))

    def __call__(self, h: Tensor, math: LayerMath) -> Iterator[tuple[int, Tensor]]:
        """(index in specs, output [B, S, D]) of every candidate for the layer input h [B, S, D]."""
        for own, order, members in self.groups:
            last = attention_input(own, h, math)
            middle = add_subblock(own, h, last)
            activation: Tensor | None = None
            for row, spec, fitted in members:
                if spec.ffn.kind == "width":
                    if activation is None:
                        activation = ffn_activation(self.parent, middle, math)
                    kept = activation
                    if spec.ffn.width < activation.shape[-1]:
                        assert order is not None
                        kept = activation[..., order[: spec.ffn.width]]
                    yield row, add_subblock({**self.parent, **fitted}, middle, ("mlp.down_proj", kept))
                elif spec.ffn.kind == "linear":
                    w = {FFN_NORM: self.parent[FFN_NORM], **fitted}
                    yield row, add_subblock(w, middle, ffn_input(w, middle, math))
                else:  # no FFN: the attention's last matrix may be fitted for this pair
                    yield row, add_subblock({**own, **fitted}, h, last)


def one_pass_scores(
    sweep: Sweep, library: LayerLibrary, specs: Sequence[LayerSpec], stream: Tensor, gradients: Tensor
) -> OnePassScores:
    """Scores candidates of one layer and carries the gradients to its input.

    Args:
        library: the layer's candidates over the parent's tensors.
        specs: which of them to score; may be empty, then only the gradients move.
        stream: the parent's stream entering the layer [N, S, D].
        gradients: at the layer's output [K, N, S, D]; overwritten with those at its input.
    """
    seq = torch.zeros(len(specs), len(stream), device=stream.device)
    tok = torch.zeros_like(seq)
    math = sweep.math(stream.shape[1])
    outputs = CandidateOutputs(library, specs)
    for batch in sweep.batches(stream):
        with torch.enable_grad():
            h = stream[batch].detach().requires_grad_()
            output = layer_forward(library.parent, h, math)
        g = gradients[:, batch].float()
        with torch.no_grad():
            for row, changed in outputs(h.detach(), math):
                u = torch.einsum("knsd,nsd->kns", g, (changed - output).float())
                seq[row, batch] = u.sum(2).pow(2).mean(0) / (2 * u.shape[2])
                tok[row, batch] = u.pow(2).mean((0, 2)) / 2
        for k in range(len(gradients)):
            (gradients[k, batch],) = torch.autograd.grad(output, h, gradients[k, batch], retain_graph=True)
    return OnePassScores(seq, tok)


@torch.no_grad()
def kl_to_parent(head: Tensor, parent: Tensor, children: Sequence[Tensor]) -> Tensor:
    """KL(parent || child) of each child, mean over each sequence, nats per token: [children, N].

    Args:
        head: output matrix [V, D].
        parent: final hidden states [N, S, D].
        children: the same of each child. Vocabulary work is done `HEAD_CHUNK` tokens at a time.
    """
    rows, length = parent.shape[0] * parent.shape[1], parent.shape[1]
    result = torch.empty(len(children), rows, device=parent.device)
    flat_parent, flat_children = parent.flatten(0, 1), [child.flatten(0, 1) for child in children]
    for start in range(0, rows, HEAD_CHUNK):
        chunk = slice(start, start + HEAD_CHUNK)
        log_p = torch.log_softmax((flat_parent[chunk] @ head.T).float(), dim=-1)
        p = log_p.exp()
        for row, child in enumerate(flat_children):
            # The difference first: entropies and cross-entropies apart lose 2e-4 nats to fp32 over 49,152 tokens.
            log_q = torch.log_softmax((child[chunk] @ head.T).float(), dim=-1)
            result[row, chunk] = log_q.neg_().add_(log_p).mul_(p).sum(-1)
    return result.unflatten(1, (-1, length)).mean(2)


@torch.no_grad()
def exact_scores(
    sweep: Sweep,
    candidates: Sequence[tuple[LayerLibrary, Sequence[LayerSpec]]],
    layers: Sequence[int],
    reference: Reference,
) -> list[Tensor]:
    """True replace-one-block KL of candidates of several layers, one suffix sweep for all of them.

    Args:
        candidates: for each of `layers`, its library and the specs to score.
        layers: rising layer indices.
        reference: the parent on the same text.

    Returns:
        For each of those layers, KL in nats per token [specs, N].
    """
    math = sweep.math(reference.hidden.shape[1])
    alive: list[Tensor] = []
    starting = dict(zip(layers, candidates, strict=True))
    for index in range(layers[0], sweep.parent.shape.num_hidden_layers):
        alive = [sweep.forward(sweep.layer(index), stream) for stream in alive]
        if index in starting:
            library, specs = starting[index]
            stream = reference.streams[index]
            changed = [torch.empty_like(stream) for _ in specs]
            outputs = CandidateOutputs(library, specs)
            for batch in sweep.batches(stream):
                for row, output in outputs(stream[batch], math):
                    changed[row][batch] = output
            alive += changed
    kl = kl_to_parent(sweep.head, reference.hidden, [sweep.finish(stream) for stream in alive])
    return list(kl.split([len(specs) for _, specs in candidates]))
