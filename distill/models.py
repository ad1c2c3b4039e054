"""Teacher and student as modules whose `forward` is all of their work.

DDP and FSDP act in hooks around a module's `forward`, and parameters touched outside of it (such as a head used
by a loss) would be left unsynchronised or sharded. So the student's loss is computed inside the wrapped module.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blocks.errors import ConfigError
from distill import decoder, hooked
from distill.decoder import Entering, Leaving, Packed, Visit, prepare
from distill.loss import (
    accumulation_dtype,
    chunked_ce,
    chunked_jsd,
    chunked_kl,
    next_tokens,
    predicting_mask,
    predicting_positions,
    token_statistics,
)
from distill.objective import Objective
from distill.streams import CosineTerm, LocalTerm, StreamRecord


class Target(NamedTuple):
    """What a student learns of its teacher on a batch."""

    hidden: Tensor
    """Last hidden states [B, T, D_t]."""
    head: Tensor
    """[V, D_t]."""
    streams: Sequence[Tensor] | None = None
    """The residual stream as a `StreamRecord` keeps it: what enters the first layer, and what each layer adds, [B, T, D_t]."""


class FrozenTeacher(nn.Module):
    """The parent: gives last hidden states and head, never a gradient.

    Args:
        model: a Hugging Face causal LM, `model.model` its decoder and `model.lm_head` its head.
        compute_dtype: dtype of its matrix products; see `DistillConfig.compute_dtype`. Weights of another dtype are held
            a second time in this one, unless they are sharded; weights that have it already are not.
        sharded: whether its layers and this module are under `fully_shard` (may be set later, before the first call).
            Then weights are whole only during a layer's forward, and nothing made of them is kept.
    """

    def __init__(self, model: nn.Module, compute_dtype: str = "float32", *, sharded: bool = False) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.compute_dtype = compute_dtype
        self.sharded = sharded
        self._fused = prepare(model)
        self._packed: Packed = {}
        self._rounded_head: Tensor | None = None

    @torch.no_grad()
    def forward(self, tokens_BT: Tensor, streams: bool = False) -> Target:
        """What the student is to learn of these tokens; `streams` as `Objective.needs_streams` says."""
        dtype = _dtype(self.compute_dtype)
        record = StreamRecord(dtype) if streams else None
        if self._fused:
            packed = None if self.sharded else self._packed
            hidden_BTD = decoder.last_hidden(self.model, tokens_BT, dtype, packed, visit=record)
        else:
            with autocast(tokens_BT.device, self.compute_dtype):
                hidden_BTD = hooked.last_hidden(self.model, tokens_BT, record)
        return Target(hidden_BTD, self._head_in(dtype), None if record is None else record.entries)

    def _head_in(self, dtype: torch.dtype | None) -> Tensor:
        """The head in the compute dtype; made at the first call, once the model lies where it stays.

        FSDP2 leaves the weights of its outermost module, of which the head is one, whole after a forward.
        """
        if self.sharded or self._rounded_head is None:
            head = _head(self.model)
            rounded = head.to(dtype or head.dtype)
            if self.sharded:
                return rounded
            self._rounded_head = rounded
        return self._rounded_head


class StudentLoss(nn.Module):
    """The student together with its loss: tokens and what the teacher makes of them in, one scalar out.

    Args:
        student: a Hugging Face causal LM.
        compute_dtype: see `DistillConfig.compute_dtype`.
        chunk_tokens: tokens whose logits are held at once.
        objective: what is learned.
        checkpointing: keep the input of each layer alone for the backward pass, and compute the layer again there.
    """

    def __init__(
        self,
        student: nn.Module,
        compute_dtype: str = "float32",
        chunk_tokens: int = 512,
        objective: Objective = Objective(),
        *,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.compute_dtype = compute_dtype
        self.chunk_tokens = chunk_tokens
        self.objective = objective
        self.checkpointing = checkpointing
        self._fused = prepare(student)
        if checkpointing and not self._fused:
            student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def forward(
        self,
        tokens_BT: Tensor,
        target: Target | Tensor | None = None,
        *more: Any,
        mask_BT: Tensor | None = None,
        normaliser: float | None = None,
        statistics: bool = False,
    ) -> Tensor:
        """The batch's summed loss over `normaliser`; or, if `statistics`, what an evaluation reports of each sequence.

        Args:
            target: the teacher's; may be None where the objective needs no teacher. Its fields one after another will do.
            mask_BT: True where a token is real; None if all are.
            normaliser: predicting positions of the global batch; this batch's own if None.

        Returns:
            A scalar; or [B, 5] fp64, the sums of `token_statistics` over each sequence and their count.
        """
        if isinstance(target, Tensor):
            target = Target(target, *more)
        if statistics:
            assert target is not None
            return self._statistics(tokens_BT, target, mask_BT)
        if normaliser is None:
            normaliser = max(1.0, float(predicting_mask(tokens_BT, mask_BT).sum()))
        if self.objective.loss == "bld":
            return self._local_loss(tokens_BT, target, mask_BT, normaliser)
        return self._loss(tokens_BT, target, mask_BT, normaliser)

    def _loss(self, tokens_BT: Tensor, target: Target | None, mask_BT: Tensor | None, normaliser: float) -> Tensor:
        """The vocabulary loss, and the cosine if it counts."""
        cosine = None
        if self.objective.cosine > 0:
            weight_BT = self._token_weights(tokens_BT, mask_BT, normaliser / self.objective.cosine)
            layers = [index for index, parameters in enumerate(self._parameters_of_layers()) if parameters]
            cosine = CosineTerm(_streams(target), weight_BT, layers, _dtype(self.compute_dtype))
        hidden = predicting_positions(self._hidden(tokens_BT, cosine), mask_BT)
        settings: dict[str, Any] = {"normaliser": normaliser, "chunk": self.chunk_tokens}
        settings["compute_dtype"] = _dtype(self.compute_dtype)
        if self.objective.loss == "ce":
            loss = chunked_ce(hidden, _head(self.student), next_tokens(tokens_BT, mask_BT), **settings)
        else:
            assert target is not None
            divergence = partial(chunked_jsd, beta=self.objective.jsd_beta)
            of_teacher = predicting_positions(target.hidden, mask_BT), target.head
            divergence_of = chunked_kl if self.objective.loss == "kl" else divergence
            loss = divergence_of(hidden, _head(self.student), *of_teacher, **settings)
        return loss if cosine is None else loss + cosine.total

    def _local_loss(
        self, tokens_BT: Tensor, target: Target | None, mask_BT: Tensor | None, normaliser: float
    ) -> Tensor:
        """The sum of the layers' own errors."""
        learning = [
            index
            for index, parameters in enumerate(self._parameters_of_layers())
            if any(parameter.requires_grad for parameter in parameters)
        ]
        term = LocalTerm(_streams(target), self._token_weights(tokens_BT, mask_BT, normaliser), learning)
        self._apart(tokens_BT, term.entering, term.leaving)
        # DDP waits for a gradient of every parameter, so those outside of layers (embedding, final norm, head) get zeros.
        inside = {id(parameter) for parameters in self._parameters_of_layers() for parameter in parameters}
        outside = [p for p in self.student.parameters() if p.requires_grad and id(p) not in inside]
        return term.total + sum((p[:0].sum() for p in outside), start=term.total.new_zeros(()))

    def _statistics(self, tokens_BT: Tensor, target: Target, mask_BT: Tensor | None) -> Tensor:
        student = predicting_positions(self._hidden(tokens_BT), mask_BT), _head(self.student)
        teacher = predicting_positions(target.hidden, mask_BT), target.head
        labels, dtype = next_tokens(tokens_BT, mask_BT), _dtype(self.compute_dtype)
        values = token_statistics(*student, *teacher, labels, chunk=self.chunk_tokens, compute_dtype=dtype)
        return _sums_of_sequences(values, mask_BT, tokens_BT)

    def _hidden(self, tokens_BT: Tensor, visit: Visit | None = None) -> Tensor:
        if self._fused:
            dtype, again = _dtype(self.compute_dtype), self.checkpointing
            return decoder.last_hidden(self.student, tokens_BT, dtype, visit=visit, checkpointing=again)
        with autocast(tokens_BT.device, self.compute_dtype):
            return hooked.last_hidden(self.student, tokens_BT, visit)

    def _apart(self, tokens_BT: Tensor, entering: Entering, leaving: Leaving) -> None:
        if self._fused:
            dtype, ways = _dtype(self.compute_dtype), (entering, leaving)
            decoder.layers_apart(self.student, tokens_BT, dtype, *ways, checkpointing=self.checkpointing)
            return
        with autocast(tokens_BT.device, self.compute_dtype):
            hooked.layers_apart(self.student, tokens_BT, entering, leaving)

    def _token_weights(self, tokens_BT: Tensor, mask_BT: Tensor | None, normaliser: float) -> Tensor:
        """1 / normaliser for the positions that predict a token, else 0: [B, T]."""
        dtype = accumulation_dtype(_head(self.student))
        return predicting_mask(tokens_BT, mask_BT).to(dtype) / normaliser

    def _parameters_of_layers(self) -> list[list[nn.Parameter]]:
        return [list(layer.parameters()) for layer in self.student.model.layers]  # type: ignore[union-attr]


def _streams(target: Target | None) -> Sequence[Tensor]:
    assert target is not None and target.streams is not None, "this objective needs the teacher's streams"
    return target.streams


def _sums_of_sequences(values_NC: Tensor, mask_BT: Tensor | None, tokens_BT: Tensor) -> Tensor:
    """Adds up the rows that belong to each sequence, and counts them: [B, C + 1] fp64."""
    sequence_BT = torch.arange(len(tokens_BT), device=tokens_BT.device)[:, None].expand(tokens_BT.shape)
    rows = torch.nn.functional.pad(values_NC.double(), (0, 1), value=1.0)
    sums = rows.new_zeros(len(tokens_BT), rows.shape[1])
    return sums.index_add_(0, predicting_positions(sequence_BT, mask_BT), rows)


def check_pair(teacher: nn.Module, student: nn.Module, objective: Objective = Objective()) -> int:
    """The common vocabulary size. Raises ConfigError if the student was not cut from such a teacher."""
    sizes = _head(teacher).shape[0], _head(student).shape[0]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"parent and child have different vocabularies ({sizes[0]} and {sizes[1]}): not parent and child"
        )
    streams = [(_head(model).shape[1], len(model.model.layers)) for model in (teacher, student)]  # type: ignore[union-attr, arg-type]
    if objective.needs_streams and streams[0] != streams[1]:
        needs = "bld" if objective.loss == "bld" else "cosine"
        sizes_text = " and ".join(f"{layers} layers of hidden_size {size}" for size, layers in streams)
        raise ConfigError(f"{needs} compares parent and child layer by layer, but they have {sizes_text}; leave it out")
    return int(sizes[0])


def keep_master_weights(student: nn.Module) -> nn.Module:
    """The student with half-precision parameters raised to fp32, in place; small updates vanish in bfloat16."""
    halves = (torch.bfloat16, torch.float16)
    return student.float() if any(p.dtype in halves for p in student.parameters()) else student


def autocast(device: torch.device, compute_dtype: str) -> AbstractContextManager[None]:
    """Autocast to `compute_dtype` on `device`; nothing for float32.

    Ours rather than `Accelerator(mixed_precision=...)`, whose setting is a process-wide singleton: training and a
    standalone `evaluate` must use the same arithmetic, and one process may heal twice with different dtypes.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype == "bfloat16")


def _dtype(compute_dtype: str) -> torch.dtype | None:
    """Of matrix products; None leaves that of the weights."""
    return torch.bfloat16 if compute_dtype == "bfloat16" else None


def _head(model: nn.Module) -> Tensor:
    head: Tensor = model.lm_head.weight  # type: ignore[union-attr, assignment]
    return head
