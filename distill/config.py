"""What healing is told: one frozen dataclass, defaults here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from blocks.errors import ConfigError
from blocks.spec import Architecture
from distill.objective import Objective

COMPUTE_DTYPES = ("float32", "bfloat16")
SHARDINGS = ("none", "full")
TRACKERS = ("tensorboard", "wandb")
SCHEDULES = ("cosine", "constant", "wsd")
OPTIMIZERS = ("adamw", "muon")
DEVICES = ("auto", "cpu")
TEACHERS = ("parent", "healed")

FREE_ON_RESUME = frozenset(
    {
        "micro_batch",
        "chunk_tokens",
        "checkpoint_activations",
        "sharding",
        "eval_every",
        "patience",
        "spike",
        "checkpoint_every",
        "keep_last",
        "track",
        "general",
        "device",
    }
)
"""Fields that may change between a run and its resumption: they move memory, time and disk, not the trajectory."""


@dataclass(frozen=True)
class DistillConfig:
    """How a child is healed: one stage of it. Raises ConfigError for a value that cannot be meant."""

    loss: str = "kl"
    """What is learned: "kl" (forward KL to the parent, full vocabulary), "jsd" (generalised Jensen-Shannon), "ce" (the text
    itself, without the parent: continual pretraining) or "bld" (each layer apart, from the parent's stream to the parent's)."""

    qad: bool = False
    """Quantization-aware distillation: the child computes in its precisions while it learns, matrices and inputs rounded in
    each forward pass, gradients straight through, and is evaluated so. Without it a child with precisions learns, and is
    evaluated, as the master weights that it is rounded from. A small step suits it: see `nas.heal_stages.qad_rate`."""

    teacher: str = "parent"
    """Whom it learns from: the "parent"; or, with qad, "healed": the weights that the stage starts from, frozen and in bf16."""

    jsd_beta: float = 0.5
    """Of "jsd": the parent's share of the mixture. Near 0 it is forward KL, near 1 reverse KL (arXiv 2306.13649)."""

    cosine: float | None = None
    """Weight of 1 - cosine between the residual streams of child and parent, averaged over the layers that both have. None
    leaves it to what was cut: 1 if an attention or a whole layer is gone, else 0, and with qad 0 (`suited_to`)."""

    data: str | None = None
    """Text to train on, as for `nas score --data`; the run's own training text if None."""

    general: str | None = None
    """Other text, as for `nas score --data`, measured at each evaluation beside the held-out text; never trained on."""

    tokens: int = 1_000_000
    """Training tokens in all; rounded up to whole steps. The text is repeated in a new order if it is shorter."""

    sequence_length: int = 256
    """Tokens per sequence. The pack is re-cut to it, so it need not be the length that the pack was made with."""

    batch_sequences: int = 8
    """Sequences per optimizer step, over all micro-batches and all ranks."""

    micro_batch: int = 4
    """Sequences per forward and backward on one rank. Changes memory and speed, not the result."""

    learning_rate: float = 3e-4
    """Peak learning rate. 3e-4 suits the default batch of 8 x 256 tokens and short runs; with 32 x 1024 tokens
    and millions of them, 6e-4 was better in prototypes (SmolLM2-135M at half its weights)."""

    full_rate_kl: float | None = None
    """Held-out KL before healing from which on the peak is `learning_rate`; a child that is hurt less learns at the root of the
    ratio, since KL grows with the square of what the weights are off. None: at all of it."""

    warmup_share: float = 0.05
    """Share of the steps over which the learning rate rises from 0, linearly."""

    schedule: str = "cosine"
    """After the warmup: "cosine" down to `final_lr_share`, "constant", or "wsd" (constant, then linearly down to
    `final_lr_share` over the last `decay_share` of the steps)."""

    final_lr_share: float = 0.05
    """Learning rate at the end of the cosine or of the decay, as a share of the peak."""

    decay_share: float = 0.2
    """Of "wsd": the share of the steps that decay."""

    optimizer: str = "adamw"
    """"adamw", or "muon": Muon for the matrices inside layers, its updates of AdamW's size, and AdamW for all else."""

    embedding_lr_scale: float = 1.0
    """Learning rate of embedding and head, as a multiple."""

    norm_lr_scale: float = 1.0
    """Learning rate of norms and biases, as a multiple."""

    weight_decay: float = 0.0
    """Decoupled decay of the matrices inside layers (never of norms, biases, embeddings, head). 0: the child starts
    near its goal, which is not the origin."""

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment; Muon's momentum is 0.95."""

    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    seed: int = 0
    """Order of the sequences."""

    compute_dtype: str = "float32"
    """Dtype of activations and matrix products: "float32" or "bfloat16". Master weights are fp32 either way."""

    eval_tokens: int = 16_384
    """Held-out tokens per evaluation, spread evenly over the held-out pack; 0 takes all of it."""

    eval_every: int = 50
    """Steps between evaluations; 0 evaluates only before the first and after the last step."""

    checkpoint_every: int = 50
    """Steps between checkpoints; 0 writes only the last one (and one when stopped by a signal)."""

    keep_last: int = 2
    """Checkpoints kept; older ones are removed. The best student by held-out KL is kept besides."""

    patience: int = 0
    """Evaluations in a row without a lower held-out KL (cross-entropy, of "ce") after which healing ends; 0 goes on."""

    spike: float = 4.0
    """A training loss this many times the mean of the last 50 steps stops healing, as one that is not finite does; 0 lets
    it pass."""

    sharding: str = "none"
    """Over several ranks: "none" keeps a whole copy of both models on each (DDP), "full" shards them (FSDP2)."""

    checkpoint_activations: bool = False
    """Whether a layer's activations are computed anew in the backward pass instead of kept. Memory for a third more time."""

    track: str | None = None
    """Besides metrics.jsonl: "tensorboard" or "wandb"."""

    chunk_tokens: int = 512
    """Tokens whose logits are held at once: 3 x chunk_tokens x vocabulary x 4 bytes of working memory."""

    device: str = "auto"
    """"auto" leaves the choice to `accelerate` (a GPU if there is one); "cpu" forces the CPU."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_sequences", "micro_batch", "keep_last", "chunk_tokens"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("sequence_length", self.sequence_length >= 2, "at least 2 (one token predicts the next)")
        for name in ("eval_tokens", "eval_every", "checkpoint_every", "weight_decay", "grad_clip", "seed", "patience"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("learning_rate", 0 < self.learning_rate < math.inf, "a positive number")
        above = self.full_rate_kl is None or 0 < self.full_rate_kl < math.inf
        self._require("full_rate_kl", above, "a positive number, or null for the full rate always")
        for name in ("embedding_lr_scale", "norm_lr_scale"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "0 or a positive number")
        self._require("spike", self.spike == 0 or self.spike > 1, "above 1, or 0 to let every loss pass")
        for name in ("warmup_share", "final_lr_share", "decay_share"):
            self._require(name, 0 <= getattr(self, name) <= 1, "between 0 and 1")
        betas_valid = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        self._require("betas", betas_valid, "two numbers in [0, 1)")
        if self.schedule == "wsd":
            fits = self.warmup_share + self.decay_share <= 1
            self._require("decay_share", fits, f"at most {1 - self.warmup_share:g}, what the warmup leaves")
        choices: dict[str, tuple[str | None, ...]] = {
            "schedule": SCHEDULES,
            "optimizer": OPTIMIZERS,
            "sharding": SHARDINGS,
        }
        choices |= {"compute_dtype": COMPUTE_DTYPES, "device": DEVICES, "track": (None, *TRACKERS), "teacher": TEACHERS}
        for name, known in choices.items():
            self._require(name, getattr(self, name) in known, " or ".join(map(str, known)))
        of_itself = self.teacher == "healed" and not self.qad
        self._require("teacher", not of_itself, "parent without qad: what is healed would teach itself")
        object.__setattr__(self, "betas", tuple(self.betas))
        _ = self.objective

    def _require(self, name: str, valid: bool, wanted: str) -> None:
        if not valid:
            raise ConfigError(f"distill.{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def objective(self) -> Objective:
        """What the student is taught."""
        return Objective(self.loss, self.jsd_beta, self.cosine or 0.0)

    def suited_to(self, child: Architecture) -> DistillConfig:
        """This configuration with what is left to the child decided. Raises ConfigError if it has nothing to round for qad."""
        if self.qad and not child.rounded:
            raise ConfigError("qad: all matrices of this child are bf16; leave it out, or search one with --precisions")
        if self.cosine is not None:
            return self
        cut = any(layer.attention.kind == "skip" for layer in child)
        return replace(self, cosine=1.0 if cut and self.loss in ("kl", "jsd") and not self.qad else 0.0)

    def rate_share(self, kl: float) -> float:
        """Of `learning_rate`, what a child of this held-out KL before healing learns at."""
        return 1.0 if self.full_rate_kl is None else min(1.0, math.sqrt(max(kl, 0.0) / self.full_rate_kl))

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step."""
        return self.batch_sequences * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return -(-self.tokens // self.step_tokens)

    @property
    def step_predictions(self) -> int:
        """Positions per optimizer step that predict a token: what a step's loss is averaged over."""
        return self.batch_sequences * (self.sequence_length - 1)

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide the result, as JSON has them. A resumed run must have the same."""
        unused = set() if self.qad else {"qad", "teacher"}  # older checkpoints do not have these
        if self.full_rate_kl is None:
            unused.add("full_rate_kl")
        fields = {name: value for name, value in asdict(self).items() if name not in FREE_ON_RESUME | unused}
        return {**fields, "betas": list(self.betas)}
