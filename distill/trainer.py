"""Healing: the training loop that brings a child (student) back to its parent (teacher).

One call of `heal` is one stage (distill/stages.py runs several). On several ranks it is started by `accelerate launch` or
`torchrun`, unchanged: the global batch, its order and the loss are the same on any number of ranks, whole or sharded. Killed at
any instant and called again, on as many ranks or others, it goes on from its newest checkpoint and ends with the same weights
as if never killed (bit for bit on the CPU, with the same number of threads and ranks).

    out_dir/metrics.jsonl                    one JSON object a line
    out_dir/checkpoints/step-000123/         the newest `keep_last`
    out_dir/best/student.safetensors         lowest held-out KL (cross-entropy, if that is learned), step 0 included
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blocks.errors import ConfigError, NasError
from blocks.files import clear_leftovers
from blocks.rounded_model import round_model, roundings, unround_model
from distill.checkpoint import CheckpointStore, load_best, read_best, write_best
from distill.config import DistillConfig
from distill.data import TokenStream, batch_indices, heldout_batches, to_device
from distill.evaluation import EvalStats, sequence_statistics
from distill.fingerprint import model_fingerprint, pack_fingerprint, require_same_run
from distill.interrupt import HealingStopped, StopRequest
from distill.metrics import MetricsLog, peak_memory
from distill.models import FrozenTeacher, StudentLoss, check_pair, keep_master_weights
from distill.parallel import Parallel
from distill.progress import HealResult, Progress, SessionClock
from distill.schedule import build_optimizers, learning_rate, set_learning_rate
from distill.watch import LossWatch, has_settled


def heal(
    config: DistillConfig,
    teacher: nn.Module,
    student: nn.Module,
    train_pack: np.ndarray,
    heldout_pack: np.ndarray,
    out_dir: Path,
    *,
    on_step: Callable[[Progress], None] | None = None,
    resume: bool = True,
    until: int | None = None,
    eval_at: Collection[int] = (),
    other_texts: Mapping[str, np.ndarray] | None = None,
    log: Path | None = None,
    stage: str | None = None,
) -> HealResult:
    """Trains `student` in place towards `teacher`, by `config.loss`, and leaves it with its best weights.

    On several ranks all call it. If sharding, both models may lie on the meta device but on rank 0, and stay sharded
    afterwards.

    Args:
        config: how.
        teacher: the parent, a Hugging Face causal LM. Frozen and moved to the training device.
        student: the child, likewise, with the same vocabulary; half-precision weights are raised to fp32. With `config.qad`
            it is rounded by its own configuration, unless it is rounded already; without, its master weights are taken.
        train_pack: [sequences, length] of token ids, any length, possibly memory-mapped.
        heldout_pack: the same, of other documents.
        out_dir: where metrics, checkpoints and the best student go.
        on_step: told how it goes (on the main process).
        resume: go on from the newest checkpoint in `out_dir`; if False, what lies there is removed.
        until: stop once this step is done, evaluated there and with a checkpoint; the schedule stays that of all of
            `config.tokens`. Called again (with the child as it was at the very first call) and a later `until`, or
            none, it goes on as if never stopped: a short heal is a beginning of the long one. (Its evaluation there is
            one more candidate for the best student.)
        eval_at: steps to evaluate at, besides those of `config.eval_every`.
        other_texts: packs by name, measured at each evaluation and not deciding anything.
        log: where metrics go, if not to `out_dir`; several stages may share it.
        stage: the name that its lines in the log carry.

    Raises:
        ConfigError, DataError: a pair or packs that do not fit each other or the configuration.
        CheckpointError: the checkpoint there is of another run or damaged, or the disk is full.
        HealingStopped: SIGTERM or Ctrl-C, after a checkpoint was written; also if the last step was done by then.
        NasError: the loss is not finite or leaped up (`config.spike`); nothing was overwritten.
    """
    if until is not None and until < 1:
        raise ConfigError(f"until is {until}; healing can stop after step 1 or a later one")
    run = _Healing(config, (teacher, student), (train_pack, {HELD_OUT: heldout_pack, **(other_texts or {})}), out_dir)
    run.on_step, run.log_path, run.stage = on_step, log or out_dir / "metrics.jsonl", stage
    run.last = min(config.steps, until or config.steps)
    run.eval_at = frozenset(eval_at)
    with StopRequest() as stop:
        try:
            run.start(resume)
            run.train(stop)
            return run.finish(stop)
        finally:
            run.close()


HELD_OUT = "held-out"


def prepare_rounding(config: DistillConfig, student: nn.Module) -> None:
    """Makes the student compute as the stage wants it to, in place. Raises ConfigError if it has no precisions to learn in."""
    if not config.qad:
        unround_model(student)
    elif not any(True for _ in roundings(student)):
        if getattr(student.config, "marquetry_precisions", None) is None:
            raise ConfigError("qad: the child has no precisions; leave it out, or search a child with --precisions")
        round_model(student)


class _Healing:
    """One run: the prepared models, the optimizer, and what has been measured so far."""

    def __init__(
        self,
        config: DistillConfig,
        pair: tuple[nn.Module, nn.Module],
        packs: tuple[np.ndarray, Mapping[str, np.ndarray]],
        out_dir: Path,
    ) -> None:
        (teacher, student), (train_pack, texts) = pair, packs
        prepare_rounding(config, student)
        vocab_size = check_pair(teacher, student, config.objective)
        self.config = config
        length = config.sequence_length
        self.train_stream = TokenStream(train_pack, length, vocab_size, "training pack")
        self.texts = {name: TokenStream(pack, length, vocab_size, f"{name} pack") for name, pack in texts.items()}
        self.parallel = Parallel(config, out_dir)
        self.ranks = self.parallel.ranks
        self.identity: dict[str, Any] = self.ranks.agree(
            config.trajectory()
            | {
                "parent": model_fingerprint(teacher),
                "child": model_fingerprint(student),
                "training pack": pack_fingerprint(train_pack),
                "held-out pack": pack_fingerprint(texts[HELD_OUT]),
            }
            | ({"formats": [str(rounding.format) for rounding in roundings(student)]} if config.qad else {})
            if self.ranks.main
            else None
        )
        self.student = self.parallel.place(keep_master_weights(student))
        loss = StudentLoss(
            self.student,
            config.compute_dtype,
            config.chunk_tokens,
            config.objective,
            checkpointing=config.checkpoint_activations,
        ).train()
        target = FrozenTeacher(self.parallel.place(teacher), config.compute_dtype, sharded=self.parallel.sharded)
        self.roundings = list(roundings(self.student))
        for rounding in self.roundings:
            rounding.keeps = not self.parallel.sharded  # whole matrices come and go, and their versions do not tell
        self.teacher = self.parallel.spread(target, teacher)
        self.model = self.parallel.spread(loss, self.student)
        self.optimizers = build_optimizers(config, self.student)
        self.store = CheckpointStore(out_dir / "checkpoints", config.keep_last, self.ranks)
        self.best_path = out_dir / "best" / "student.safetensors"
        self.best = math.inf
        self.log_path = out_dir / "metrics.jsonl"
        self.stage: str | None = None
        self.on_step: Callable[[Progress], None] | None = None
        self.log: MetricsLog | None = None  # on the main process only
        self.evaluations: dict[int, EvalStats] = {}
        self.watch = LossWatch(config.spike)
        self.step = 0
        self.last = config.steps
        """The step to stop after."""
        self.eval_at: frozenset[int] = frozenset()
        self.session = SessionClock()

    # Beginning and end

    def start(self, resume: bool) -> None:
        """Takes up the newest checkpoint, or begins anew with the evaluation of step 0."""
        if self.ranks.main:
            self.store.clean() if resume else self.store.clear()
            clear_leftovers(self.best_path.parent)
        self.ranks.wait()
        found = self.store.newest()
        if found is not None:
            self._restore(*found)
        if self.ranks.main:
            self.log = MetricsLog(self.log_path, -1 if found is None else self.step, self.stage)
        if found is None:
            self._report(math.nan, self._evaluate())

    def train(self, stop: StopRequest) -> None:
        """Steps to the end, evaluating and writing checkpoints on the way."""
        while self.step < self.last and not self._has_settled:
            loss, signal_number = self._train_step(stop)
            evaluates = self._due(self.config.eval_every) or self.step in self.eval_at
            stats = self._evaluate() if evaluates else None
            if self._due(self.config.checkpoint_every) or signal_number or self._has_settled:
                self._write_checkpoint()
            self._report(loss, stats)
            if signal_number and self.step < self.last:
                written = self.store.path(self.step)
                text = f"healing stopped at step {self.step} of {self.last}; {written} is written"
                raise HealingStopped(f"{text}. Run the same command again to go on", signal_number)
        if self.step == self.last and self.step not in self.evaluations:  # a signal had ended an earlier session here
            self._evaluate()
            self._write_checkpoint()

    def finish(self, stop: StopRequest) -> HealResult:
        """Leaves the best weights in the student, and tells all ranks of a signal that any received."""
        self.ranks.wait()
        load_best(self.best_path, self.student, self.parallel)
        received = torch.tensor([stop.signal_number], device=self.parallel.device)
        stop.signal_number = int(self.ranks.gather(received).max())
        best_step, best = read_best(self.best_path)
        return HealResult(
            before=self.evaluations[0],
            after=self.evaluations[max(self.evaluations)],
            best=EvalStats.from_dict(best),
            best_step=best_step,
            best_path=self.best_path,
            evaluations=dict(self.evaluations),
            steps=self.step,
            tokens=self.step * self.config.step_tokens,
            seconds=self.session.total_seconds,
            tokens_per_s=self._tokens_per_s,
        )

    def close(self) -> None:
        self.parallel.close()
        if self.log is not None:
            self.log.close()

    # One step

    def _train_step(self, stop: StopRequest) -> tuple[float, int]:
        """One optimizer step. Returns the global loss, and the signal that any rank received (0: none)."""
        started = time.perf_counter()
        rate = self._rate(self.step)
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, rate)
        own_loss = self._accumulate_gradient()
        own_norm = self.parallel.clip(self.model.parameters(), self.config.grad_clip or math.inf)
        loss, norm, signal_number = self._over_ranks(own_loss, own_norm, stop.signal_number)
        if fault := self.watch.fault(loss, norm):
            raise NasError(self._not_taken(fault))
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        for rounding in self.roundings:
            rounding.forget()  # torch's fused AdamW does not raise the versions that it goes by
        self.step += 1
        seconds = time.perf_counter() - started
        self.session.add_step(seconds)
        tokens_per_s, memory = self.config.step_tokens / seconds, peak_memory(self.parallel.device)
        values = {"loss": loss, "lr": rate, "grad_norm": norm, "tokens_per_s": tokens_per_s, "memory": memory}
        self._log("train", values)
        return loss, signal_number

    def _accumulate_gradient(self) -> Tensor:
        """Forward and backward over this rank's share of the batch, in micro-batches.

        Every micro-batch is divided by the global count of predicted tokens, so neither their size nor the number
        of ranks changes the gradient. DDP and FSDP average over ranks what should be summed, hence the factor.
        """
        world, rank = self.ranks.count, self.ranks.rank
        tokens = to_device(self.train_stream.read(self._batch_indices(rank, world)), self.parallel.device)
        micro_batches = tokens.split(self.config.micro_batch)
        total = torch.zeros((), device=self.parallel.device)
        objective = self.config.objective
        for number, micro_batch in enumerate(micro_batches, start=1):
            with self.parallel.accumulate(self.model, last=number == len(micro_batches)):
                target = self.teacher(micro_batch, objective.needs_streams) if objective.needs_teacher else None
                loss = self.model(micro_batch, target, normaliser=self.config.step_predictions)
                (loss * world).backward()
            total += loss.detach()
        return total

    def _not_taken(self, fault: str) -> str:
        sequences = ", ".join(str(index) for index in self._batch_indices(0, 1))
        return (
            f"{fault} at step {self.step + 1}, on sequences {sequences} of the training pack; nothing was overwritten. "
            "Look at those sequences, or lower the learning rate and use --restart"
        )

    # Measuring, keeping, telling

    def _evaluate(self) -> EvalStats:
        """Evaluates all texts, logs them, and keeps the student if it is the best so far on the held-out one."""
        measured = {name: self._measure(stream) for name, stream in self.texts.items()}
        for name, other in measured.items():
            values = other.to_dict() | ({} if name == HELD_OUT else {"text": name})
            self._log("eval", {"eval_tokens": values.pop("tokens")} | values)
        stats = measured[HELD_OUT]
        if not math.isfinite(stats.kl):
            raise NasError(f"the held-out KL is {stats.kl} at step {self.step}; nothing was overwritten")
        self.evaluations[self.step] = stats
        if self._distance(stats) < self.best:
            self.best = self._distance(stats)
            write_best(self.best_path, self.student, self.parallel, self.step, stats.to_dict())
        return stats

    def _measure(self, text: TokenStream) -> EvalStats:
        config, ranks = self.config, self.ranks
        batches = heldout_batches(
            text, config.eval_tokens, config.sequence_length, config.micro_batch, ranks.rank, ranks.count
        )
        sums = sequence_statistics(self.teacher, self.model, batches)
        return EvalStats.from_sequences(ranks.gather(sums.T.contiguous()).T.cpu())

    def _write_checkpoint(self) -> None:
        record = {
            "run": self.identity,
            "evaluations": {str(step): stats.to_dict() for step, stats in self.evaluations.items()},
            "seconds": self.session.total_seconds,
            "losses": self.watch.recent,
        }
        rng = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        self.store.write(self.step, self.student, self.optimizers, rng, record)

    def _restore(self, path: Path, record: dict[str, Any]) -> None:
        require_same_run(record["run"], self.identity, str(path))
        rng = self.store.read(path, self.student, self.optimizers)
        torch.set_rng_state(rng["cpu"])
        if len(rng["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(rng["cuda"])
        self.step = record["step"]
        self.evaluations = {int(step): EvalStats.from_dict(stats) for step, stats in record["evaluations"].items()}
        self.best = self._distance(EvalStats.from_dict(read_best(self.best_path)[1]))
        self.watch = LossWatch(self.config.spike, record["losses"])
        self.session = SessionClock(record["seconds"])

    def _report(self, loss: float, stats: EvalStats | None) -> None:
        if self.on_step is None or not self.ranks.main:
            return
        eta = self.session.seconds_per_step * (self.last - self.step)
        rate = self._rate(max(0, self.step - 1))
        self.on_step(Progress(self.step, self.last, loss, rate, self._tokens_per_s, eta, stats))

    def _log(self, kind: str, values: Mapping[str, Any]) -> None:
        text = values.get("text")
        prefix = kind if text is None else f"{kind} {text}"
        self.parallel.track({f"{prefix}/{name}": value for name, value in values.items()}, self.step)
        if self.log is not None:
            self.log.write(kind=kind, step=self.step, tokens=self.step * self.config.step_tokens, **values)

    # Small answers

    @property
    def _has_settled(self) -> bool:
        distances = {step: self._distance(stats) for step, stats in self.evaluations.items()}
        return has_settled(distances, self.config.patience)

    def _rate(self, step: int) -> float:
        """Learning rate of update number `step`."""
        return learning_rate(self.config, step) * self.config.rate_share(self.evaluations[0].kl)

    def _distance(self, stats: EvalStats) -> float:
        """What the best student has the least of: the held-out KL; or, where the text itself is learned, its cross-entropy."""
        return stats.student_ce if self.config.loss == "ce" else stats.kl

    @property
    def _tokens_per_s(self) -> float:
        return self.session.steps_per_training_second * self.config.step_tokens

    def _due(self, every: int) -> bool:
        return self.step == self.last or (every > 0 and self.step % every == 0)

    def _batch_indices(self, rank: int, world: int) -> np.ndarray:
        config = self.config
        return batch_indices(config.seed, self.step, len(self.train_stream), config.batch_sequences, rank, world)

    def _over_ranks(self, loss: Tensor, norm: Tensor, signal_number: int) -> tuple[float, float, int]:
        """The sum of the ranks' losses, the gradient's norm (theirs are equal) and the highest of their signals.

        The one place of a step where the CPU waits for the GPU.
        """
        own = torch.stack([loss.double(), norm.double(), loss.new_full((), signal_number, dtype=torch.float64)])
        losses, norms, signals = self.ranks.gather(own[:, None]).tolist()
        return sum(losses), norms[0], int(max(signals))
