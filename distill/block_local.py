"""Block-local distillation: gradient steps that refine the fitted candidates of one layer, in place in its library.

Every candidate learns what the parent's layer adds to the residual stream, apart from all other layers and from the
other candidates ("decoupled BLD"). The subblocks are decoupled, too:

    1. each changed attention a       towards what the parent's attention adds
       each pair with a skipped FFN   an attention of its own, towards the whole layer, h_out - h_in
    2. with a as it is kept,
       each other pair                its FFN, towards h_out - h_mid^a, what a left undone of the layer

The loss is ||added - wanted||^2 / ||wanted||^2. All candidates learn from the same minibatches, the parent's side of
which is computed once. New tensors are kept only where they lower the error on the whole fitting text as they are kept,
rounded to the library's precision.

Reference: Puzzle, arXiv 2411.19146, section 3 (block library construction with decoupled BLD).
Shapes: N sequences, B of them in a minibatch, S positions, D hidden_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blocks.layer import (
    DOWN_PROJ,
    FFN_NORM,
    LINEAR_ATTENTION,
    LINEAR_FFN,
    O_PROJ,
    LayerMath,
    Weights,
    attention_input,
    ffn_input,
    project,
)
from blocks.library import LayerLibrary
from blocks.spec import NO_ATTENTION, AttentionSpec, LayerSpec
from blocks.sweep import Sweep

Owner = AttentionSpec | LayerSpec
Read = Callable[[Weights, Tensor, LayerMath], tuple[str, Tensor] | None]  # `attention_input` or `ffn_input`

ATTENTION_MATRICES = (*(f"self_attn.{name}_proj.weight" for name in "qkv"), O_PROJ)
FFN_MATRICES = ("mlp.gate_proj.weight", "mlp.up_proj.weight", DOWN_PROJ)
PARAMETERS_AT_A_TIME = 1 << 30


@dataclass(frozen=True)
class LocalConfig:
    """How much and how fast the candidates of a layer learn."""

    tokens: int
    """Training tokens, counted over all epochs of the fitting text and over all ranks."""
    learning_rate: float
    """Peak of Adam's: a linear warm-up, then a cosine down to zero."""
    seed: int
    """Of the order of the minibatches."""
    batch_tokens: int = 4096
    """Tokens in a minibatch, over all ranks; whole sequences, at least one a rank."""
    warmup_share: float = 0.05
    """Share of the steps that the learning rate rises for."""
    parameters_at_a_time: int = PARAMETERS_AT_A_TIME
    """How many parameters learn together (12 bytes of memory each, and 2 for a copy); more of them take turns."""

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step number `step` (0-based) of `steps`."""
        warmup = round(self.warmup_share * steps)
        rise = (step + 1) / (warmup + 1)
        return self.learning_rate * min(rise, (1 + math.cos(math.pi * step / steps)) / 2)


def distill_layer(
    sweep: Sweep, library: LayerLibrary, stream: Tensor, specs: Sequence[LayerSpec], config: LocalConfig
) -> None:
    """Refines the candidates of one layer in `library`, those that have tensors of their own there.

    Pairs that have none, such as plain skips, follow their attention. No candidate that learns gets worse on the fitting
    text. Where a pair would, because its FFN stood better behind the attention as it was, that attention goes back to what
    it was and the FFNs behind it learn once more. A pair with a skipped FFN needs another attention than its siblings, so it gets q, k, v and o of its own (with o_proj alone it would
    gain nothing: the closed form has solved that).

    Args:
        sweep: the engine whose batches and precision are used; gradients are averaged over its ranks.
        library: the candidates over the parent's tensors, filled by `blocks.candidates.fit_layer`.
        stream: the parent's residual stream entering the layer, this rank's share of the fitting text [N, S, D].
        specs: the candidate layers, in any order.
        config: tokens, learning rate, seed.
    """
    layer, start = _Layer(sweep, library, stream, config), replace(library, entries=dict(library.entries))
    owners = {_owner(key) for key in library.entries if not key.endswith("/order")}
    attentions = [a for a in dict.fromkeys(spec.attention for spec in specs) if str(a) in owners]
    pairs = [spec for spec in dict.fromkeys(specs) if str(spec) in owners]
    alone = [spec for spec in pairs if spec.ffn.kind == "skip"]
    pairs = [spec for spec in pairs if spec.ffn.kind != "skip"]
    behind = [spec for spec in pairs if spec.attention in attentions]
    with sweep.fast_products():
        before = layer.errors(behind, library)
        layer.improve([*alone, *attentions])  # those alone first: they start from the attentions as these were
        _keep_attention(library, start, alone)
        after = layer.improve(pairs)
        worse = {spec.attention for spec in behind if after[spec] > before[spec]}
        again = [spec for spec in pairs if spec.attention in worse]
        _put_back(library, start, {str(owner) for owner in (*worse, *again)})
        layer.improve(again)


def _keep_attention(library: LayerLibrary, start: LayerLibrary, pairs: Iterable[LayerSpec]) -> None:
    """Gives pairs that found no better attention the one they had in `start`, where that moved away from under them."""
    for pair in pairs:
        shared, own = (f"{owner}/{ATTENTION_MATRICES[0]}" for owner in (pair.attention, pair))
        moved = library.entries.get(shared) is not start.entries.get(shared)
        if moved and own not in library.entries:
            weights = start.layer_weights(pair)
            for name in ATTENTION_MATRICES:
                library.put(pair, name, weights[name])


def _put_back(library: LayerLibrary, start: LayerLibrary, owners: Collection[str]) -> None:
    """Gives some owners the tensors of `start`, and no others."""
    for key in [key for key in library.entries if _owner(key) in owners]:
        del library.entries[key]
    library.entries.update({key: tensor for key, tensor in start.entries.items() if _owner(key) in owners})


def _owner(key: str) -> str:
    """Of an entry of the library, as text."""
    return key.rpartition("/")[0]


def _added(w: Weights, read: Read, x: Tensor, math: LayerMath) -> Tensor:
    """What a subblock adds to the stream, in fp32: its input x [B, S, D] -> [B, S, D], zeros if it is skipped."""
    last = read(w, x, math)
    return torch.zeros_like(x) if last is None else project(w, *last).float()


@dataclass(frozen=True)
class _Subblock:
    """The part of a candidate that learns: an attention, or what a pair has behind its attention.

    Attributes:
        owner: of its tensors in the library.
        behind: the attention that stands before it; None where it is to do what the parent's attention does.
        read: how it is computed.
        names: of the matrices that learn.
        weights: all its tensors, in the precision of the computation.
    """

    owner: Owner
    behind: AttentionSpec | None
    read: Read
    names: tuple[str, ...]
    weights: Weights

    @classmethod
    def of(cls, library: LayerLibrary, owner: Owner) -> _Subblock:
        if isinstance(owner, AttentionSpec):
            names = ATTENTION_MATRICES if owner.kind == "kv" else (LINEAR_ATTENTION,)
            return cls(owner, None, attention_input, names, library.attention_weights(owner))
        weights = library.layer_weights(owner)
        if owner.ffn.kind == "skip":  # the attention answers for the whole layer, and nothing stands before it
            names = ATTENTION_MATRICES if owner.attention.kind == "kv" else (LINEAR_ATTENTION,)
            return cls(owner, NO_ATTENTION, attention_input, names, weights)
        names = FFN_MATRICES if owner.ffn.kind == "width" else (LINEAR_FFN,)
        own = {name: tensor for name, tensor in weights.items() if name.startswith("mlp.") or name == FFN_NORM}
        return cls(owner, owner.attention, ffn_input, names, own)


class _Learner:
    """A subblock in training: fp32 masters of its matrices and their optimizer."""

    def __init__(self, subblock: _Subblock) -> None:
        self.subblock = subblock
        self.masters = {name: subblock.weights[name].float().clone().requires_grad_() for name in subblock.names}
        # Normalised losses of many parameters have gradients below Adam's usual epsilon, which would stop the smallest.
        self.optimizer = torch.optim.Adam(self.masters.values(), betas=(0.9, 0.95), eps=1e-15, fused=True)

    def step(self, x: Tensor, wanted: Tensor, sweep: Sweep, rate: float) -> None:
        """One step from the subblock's input and what it has to add [B, S, D]. Gradients do not outlive it."""
        subblock = self.subblock
        with torch.enable_grad():
            copies = {name: master.to(sweep.dtype) for name, master in self.masters.items()}
            error = _added({**subblock.weights, **copies}, subblock.read, x, sweep.math(x.shape[1])) - wanted
            (error.pow(2).sum() / wanted.pow(2).sum().clamp_min(1e-30)).backward()
        for master in self.masters.values():
            assert master.grad is not None
            sweep.ranks.sum_(master.grad).div_(sweep.ranks.count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Layer:
    """The parent's layer on the fitting text, and the library whose candidates learn from it."""

    def __init__(self, sweep: Sweep, library: LayerLibrary, stream: Tensor, config: LocalConfig) -> None:
        self.sweep, self.library, self.stream, self.config = sweep, library, stream, config
        self.math = sweep.math(stream.shape[1])

    def improve(self, owners: Sequence[Owner]) -> dict[Owner, float]:
        """Trains what some owners have of their own and keeps what got better; returns their errors afterwards."""
        errors: dict[Owner, float] = {}
        for turn in self._turns(owners):
            trained = self._train(turn)
            before = self.errors(turn, self.library)
            after = self.errors(turn, replace(self.library, entries=self.library.entries | trained))
            better = [owner for owner in turn if after[owner] < before[owner]]  # never one with NaN
            errors |= before | {owner: after[owner] for owner in better}
            texts = {str(owner) for owner in better}
            self.library.entries.update({key: tensor for key, tensor in trained.items() if _owner(key) in texts})
        return errors

    def _turns(self, owners: Sequence[Owner]) -> Iterator[list[Owner]]:
        """As many owners at a time as may learn together, at least one."""
        turn: list[Owner] = []
        for owner in owners:
            if turn and sum(map(self._parameters, [*turn, owner])) > self.config.parameters_at_a_time:
                yield turn
                turn = []
            turn.append(owner)
        if turn:
            yield turn

    def _parameters(self, owner: Owner) -> int:
        """How many of an owner learn: known without its tensors, which may lie off the device."""
        hidden = self.stream.shape[-1]
        if isinstance(owner, LayerSpec) and owner.ffn.kind != "skip":
            return hidden * (3 * owner.ffn.width if owner.ffn.kind == "width" else hidden)
        attention = owner if isinstance(owner, AttentionSpec) else owner.attention
        if attention.kind == "linear":
            return hidden**2
        return 2 * self.library.parent[O_PROJ].numel() + 2 * hidden * attention.kv_heads * self.math.head_dim

    def _train(self, owners: Sequence[Owner]) -> dict[str, Tensor]:
        """All steps of some owners; returns what is to be kept of them, as library entries."""
        learners = [_Learner(_Subblock.of(self.library, owner)) for owner in owners]
        batches = list(self._minibatches())
        for step, (_, (h,)) in enumerate(self.sweep.store.read(batches, self.stream)):
            rate = self.config.rate(step, len(batches))
            for x, wanted, members in self._places(h, [learner.subblock for learner in learners]):
                for number in members:
                    learners[number].step(x, wanted, self.sweep, rate)
        kept = replace(self.library, entries={})
        for learner in learners:
            for name, master in learner.masters.items():
                kept.put(learner.subblock.owner, name, master.detach())
        return kept.entries

    def _minibatches(self) -> Iterator[slice]:
        """This rank's sequences of each step: runs of neighbours, which can be read ahead, in a new order every epoch."""
        (sequences, length), ranks = self.stream.shape[:2], self.sweep.ranks
        size = min(max(1, self.config.batch_tokens // (length * ranks.count)), sequences)
        size, steps = ranks.agree((size, math.ceil(self.config.tokens / (size * length * ranks.count))))
        generator = torch.Generator().manual_seed(self.config.seed)
        starts = torch.arange(0, sequences, size)
        for _ in range(math.ceil(steps / len(starts))):
            for start in starts[torch.randperm(len(starts), generator=generator)][:steps].tolist():
                yield slice(start, start + size)
            steps -= len(starts)

    @torch.no_grad()
    def errors(self, owners: Sequence[Owner], library: LayerLibrary) -> dict[Owner, float]:
        """Squared error of each owner's subblock, with its tensors in `library`, summed over the whole fitting text."""
        found: dict[Owner, float] = {}
        for turn in self._turns(owners):
            subblocks = [_Subblock.of(library, owner) for owner in turn]
            sums = torch.zeros(len(turn), dtype=torch.float64, device=self.sweep.device)
            for _, (h,) in self.sweep.read(self.stream):
                for x, wanted, members in self._places(h, subblocks):
                    for number in members:
                        subblock = subblocks[number]
                        sums[number] += (_added(subblock.weights, subblock.read, x, self.math) - wanted).pow(2).sum()
            found |= zip(turn, self.sweep.ranks.sum_(sums).tolist(), strict=True)
        return found

    def _places(self, h: Tensor, subblocks: Sequence[_Subblock]) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
        """For a layer input h [B, S, D]: (input, what has to be added, the numbers of the subblocks that stand there)."""
        h = h.float()
        attended, whole = self._parent(h)
        for behind in dict.fromkeys(subblock.behind for subblock in subblocks):
            members = [number for number, subblock in enumerate(subblocks) if subblock.behind == behind]
            if behind is None:
                yield h, attended, members
                continue
            with torch.no_grad():
                output = _added(self.library.attention_weights(behind), attention_input, h, self.math)
            yield h + output, whole - output, members

    @torch.no_grad()
    def _parent(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """What the parent's attention, and its whole layer, add to the stream [B, S, D]."""
        attended = _added(self.library.parent, attention_input, h, self.math)
        return attended, attended + _added(self.library.parent, ffn_input, h + attended, self.math)
