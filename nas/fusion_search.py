"""Which runs of FFNs are fused: proposed by dependency, decided by true KL and time.

    1. every length in every stretch: the runs of least dependency (the paper's measure) are proposed
    2. each is fused alone and its KL taken, to the parent and to the unfused child
    3. greedily, the proposal that saves most time per KL added is fused, as long as all together stay within `max_kl`;
       it is measured on the model so far before it is kept, and a longer run may take the place of the one within it

Nothing in front of the first fused layer is run twice: the streams that enter each stretch are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.fuse import Run, dependency_matrix, ffn_stretches, fused_layers, span
from blocks.spec import Architecture
from blocks.sweep import Sweep
from nas.clock import MS, Times
from nas.costs import Scenario
from nas.fusion_times import FFNTimes, run_times
from nas.progress import Advance, Reporter
from nas.scoring import head_rows

Kept = frozenset[Run]
NOTHING: Kept = frozenset()
LEAST_KL = 1e-6  # nats per token: below it, a proposal adds nothing that can be told from rounding


@dataclass(frozen=True)
class Proposal:
    """A run that may be fused.

    Attributes:
        dependency: the largest M[i, j] within it; the paper proposes the runs where it is least.
        dependency_sum: the sum of them.
    """

    run: Run
    dependency: float
    dependency_sum: float


def count_proposals(stretches: Iterable[Run], include_last: bool, max_length: int | None, per_length: int) -> int:
    """How many runs `propose` returns for these stretches."""
    usable = [len(stretch) - (not include_last) for stretch in stretches]
    return sum(
        min(per_length, length - size + 1)
        for length in usable
        for size in range(2, min(max_length or length, length) + 1)
    )


def propose(
    stretch: Run, matrix: Tensor, include_last: bool = False, max_length: int | None = None, per_length: int = 2
) -> list[Proposal]:
    """Runs of every length within a stretch, those of least dependency: `per_length` of each length.

    The last FFN of the stretch is in none unless `include_last` (the paper found it to be the one that cannot be spared).
    """
    usable = stretch if include_last else stretch[:-1]
    proposals: list[Proposal] = []
    for length in range(2, min(max_length or len(usable), len(usable)) + 1):
        runs = []
        for start in range(len(usable) - length + 1):
            within = matrix[start : start + length, start : start + length]
            runs.append(Proposal(usable[start : start + length], float(within.max()), float(within.sum())))
        proposals += sorted(runs, key=lambda proposal: proposal.dependency)[:per_length]
    return proposals


@dataclass(frozen=True)
class Divergence:
    """KL of each sequence [N], nats per token: of a model to the parent, and to the unfused child."""

    parent: Tensor
    unfused: Tensor

    @property
    def kl(self) -> float:
        return float(self.parent.mean())

    @property
    def kl_unfused(self) -> float:
        return float(self.unfused.mean())


@dataclass
class FusingChild:
    """A child whose runs are fused and measured on some text.

    Args:
        sweep: the child's own.
        tokens: token ids [N, S].
        parent_hidden, parent_head: the parent's last hidden states on them [N, S, D], and its head [V, D].
    """

    sweep: Sweep
    architecture: Architecture
    tokens: Tensor
    parent_hidden: Tensor
    parent_head: Tensor
    kept: Kept = NOTHING
    _streams: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _measured: dict[Kept, Divergence] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.stretches = ffn_stretches(self.architecture)
        stream = self._run_from(0, NOTHING, self.sweep.embed(self.tokens, torch.float32), self._streams)
        self._hidden = self.sweep.hidden(stream)
        self._measured[NOTHING] = self.divergence(self._hidden)

    @property
    def unfused(self) -> Divergence:
        """Nothing fused."""
        return self._measured[NOTHING]

    def dependencies(self, advance: Advance = lambda: None) -> dict[Run, Tensor]:
        """M of each stretch, see `dependency_matrix`; `advance` is called after each stretch."""
        found: dict[Run, Tensor] = {}
        for stretch in self.stretches:
            stream = self._streams[stretch[0]]
            layers = [self.sweep.layer(index) for index in stretch]
            with self.sweep.fast_products():
                batches = (h for _, (h,) in self.sweep.read(stream))
                found[stretch] = dependency_matrix(layers, batches, self.sweep.math(stream.shape[1]))
            advance()
        return found

    def measure(self, runs: Kept) -> Divergence:
        """The child with exactly these runs fused; what was measured once is not run again."""
        if runs not in self._measured:
            start = self._first_difference(runs)
            stream = self._run_from(start, runs, self._streams[start])
            self._measured[runs] = self.divergence(self.sweep.hidden(stream))
        return self._measured[runs]

    def keep(self, runs: Kept) -> None:
        """Makes these runs the model so far: others are then measured from its streams."""
        if runs != self.kept:
            start = self._first_difference(runs)
            self._run_from(start, runs, self._streams[start], self._streams)
            self.kept = runs

    def _first_difference(self, runs: Kept) -> int:
        """The first layer of the first stretch that is fused otherwise than in the model so far."""
        changed = {index for run in runs ^ self.kept for index in run}
        return next(stretch[0] for stretch in self.stretches if changed & set(stretch))

    @torch.no_grad()
    def _run_from(self, start: int, runs: Kept, stream: Tensor, seen: dict[int, Tensor] | None = None) -> Tensor:
        """Layers from `start` on with these runs fused; the streams that enter stretches are put into `seen`."""
        heads = {stretch[0] for stretch in self.stretches}
        for index, weights in fused_layers(self.sweep.layers(range(start, len(self.architecture))), runs):
            if seen is not None and index in heads:
                seen[index] = stream
            stream = self.sweep.forward(weights, stream)
        return stream

    @torch.no_grad()
    def divergence(self, hidden: Tensor) -> Divergence:
        """KL(parent || model) and KL(unfused child || model) of last hidden states [N, S, D], a few tokens at a time."""
        own, parent = self.sweep.head, self.parent_head
        length, result = hidden.shape[1], torch.empty(2, hidden.shape[0] * hidden.shape[1], device=self.sweep.device)
        flat = [h.flatten(0, 1) for h in (hidden, self.parent_hidden, self._hidden)]
        step = head_rows(own)
        chunks = (slice(start, start + step) for start in range(0, len(flat[0]), step))
        with self.sweep.fast_products():
            for chunk, (h, parent_h, unfused_h) in self.sweep.store.read(chunks, *flat):
                log_q = torch.log_softmax((h @ own.T).float(), dim=-1)
                for row, logits in enumerate((parent_h @ parent.T, unfused_h @ own.T)):
                    log_p = torch.log_softmax(logits.float(), dim=-1)
                    result[row, chunk] = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        per_sequence = result.unflatten(1, (-1, length)).mean(2)
        return Divergence(per_sequence[0], per_sequence[1])


# ---- the choice


@dataclass(frozen=True)
class Row:
    """A proposal with all that was measured of it.

    Attributes:
        alone: KLs of the child with this run alone fused.
        apart, fused: times of its FFNs in sequence, and of the fused one.
        added: KL to the parent that it added to the model so far when last measured there, nats per token.
        kept, why: the decision.
    """

    proposal: Proposal
    alone: Divergence
    apart: Times
    fused: Times
    added: float
    kept: bool = False
    why: str = ""

    @property
    def run(self) -> Run:
        return self.proposal.run


@dataclass
class Chooser:
    """The greedy choice among proposals.

    Args:
        child: what is fused.
        max_kl: nats per token that all fusions together may add to the child's KL to the parent.
    """

    child: FusingChild
    scenario: Scenario
    times: FFNTimes
    max_kl: float
    reporter: Reporter
    rows: dict[Run, Row] = field(default_factory=dict)

    def choose(self, proposals: Sequence[Proposal]) -> list[Row]:
        """Measures and decides; the child is left with the kept runs fused. Rows come back in the order of layers."""
        with self.reporter.task("Measuring fused runs", len(proposals)) as advance:
            for proposal in proposals:
                alone = self.child.measure(frozenset([proposal.run]))
                widths = [self.child.architecture[index].ffn.width for index in proposal.run]
                apart, fused = run_times(self.times, widths)
                added = alone.kl - self.child.unfused.kl
                self.rows[proposal.run] = Row(proposal, alone, apart, fused, added)
                advance()
        with self.reporter.bar("Fusing", len(proposals)) as (bar, task):
            while (run := self._step()) is not None:
                decided = sum(bool(row.why) for row in self.rows.values())
                bar.update(task, completed=decided, note=f"{span(run)}: {self.rows[run].why}")
        self._tell_the_rest()
        return [replace(row, kept=row.run in self.child.kept) for _, row in sorted(self.rows.items())]

    def saved_ns(self, run: Run) -> int:
        """Of a whole request, against its FFNs in sequence."""
        row = self.rows[run]
        return self._request(row.apart) - self._request(row.fused)

    def _request(self, times: Times) -> int:
        return self.scenario.request_ns(times.prefill_ns, times.decode_ns)

    def _step(self) -> Run | None:
        """Decides one proposal: the best by what it added alone, if it still is once measured on the model so far."""
        measured: dict[Run, float] = {}
        while options := [run for run in self.rows if self._open(run)]:
            added = {run: measured.get(run, self._foreseen(run)) for run in options}
            run = max(options, key=lambda option: self._gain(option) / max(added[option], LEAST_KL))
            if run in measured:
                return self._decide(run, measured[run])
            measured[run] = self.child.measure(self._with(run)).kl - self.child.measure(self.child.kept).kl
        return None

    def _foreseen(self, run: Run) -> float:
        """KL that a run would add to the model so far, if what runs add alone were additive."""
        return self._alone(run) - sum(self._alone(other) for other in self.child.kept if set(other) < set(run))

    def _alone(self, run: Run) -> float:
        return self.rows[run].alone.kl - self.child.unfused.kl

    def _open(self, run: Run) -> bool:
        """Undecided, faster than what is there, and either apart from all kept runs or around those that it meets."""
        if self.rows[run].why:
            return False
        meets = [other for other in self.child.kept if set(other) & set(run)]
        return all(set(other) < set(run) for other in meets) and self._gain(run) > 0

    def _with(self, run: Run) -> Kept:
        """The kept runs with this one in the place of those within it."""
        return frozenset(other for other in self.child.kept if not set(other) & set(run)) | {run}

    def _gain(self, run: Run) -> int:
        """Nanoseconds saved of a request beyond what the runs within it save already."""
        return self.saved_ns(run) - sum(self.saved_ns(other) for other in self.child.kept if set(other) <= set(run))

    def _decide(self, run: Run, added: float) -> Run:
        total = self.child.measure(self._with(run)).kl - self.child.unfused.kl
        if total <= self.max_kl:
            self.child.keep(self._with(run))
            why = f"saves {self.saved_ns(run) / MS:.3g} ms a request for {added:+.4f} nats"
        else:
            why = f"all together would add {total:.4f} nats, more than {self.max_kl:g}"
        self.rows[run] = replace(self.rows[run], added=added, why=why)
        return run

    def _tell_the_rest(self) -> None:
        for run, row in self.rows.items():
            meets = [other for other in self.child.kept if set(other) & set(run)]
            if row.why and run in self.child.kept:
                continue
            if larger := [other for other in meets if set(run) <= set(other)]:
                self.rows[run] = replace(row, why=f"within {span(larger[0])}, which was kept")
            elif not row.why:
                around = [span(other) for other in meets if set(other) < set(run)]
                faster = f"no faster than {' and '.join(around)}, which was kept" if around else "no faster"
                crossing = next((span(other) for other in meets if not set(other) < set(run)), None)
                why = f"shares layers with {crossing}, which was kept" if crossing else faster
                self.rows[run] = replace(row, why=why)


def fused_runs(rows: Iterable[Row]) -> list[Run]:
    """The runs that were kept, in the order of layers."""
    return sorted(row.run for row in rows if row.kept)
