"""What healing takes on one rank: bytes by what takes them, and FLOPs of a step. Integers, no torch.

Shapes: n tokens of a micro-batch, D hidden size, V vocabulary, C channels of q, k and v, E head_dim, H heads, I FFN channels.
The peak is the largest of three moments:

    the vocabulary loss        activations, rounded weights, a chunk's logits and the gradients of the loss
    a layer's backward pass    (activations recomputed) what layers keep, one layer's activations, the gradient of the head
    the optimizer's step       all gradients, and what the optimizer makes on its way

All gradients lie beside the activations when several micro-batches are accumulated. Not
counted: the CUDA context (about 0.5 GB), NCCL's buffers, and what the allocator cannot reuse. `python benchmarks/healing.py memory`
compares it with what is measured (docs/memory.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from blocks.shape import ModelShape
from blocks.spec import BF16, Architecture, AttentionSpec, FFNSpec, LayerSpec
from distill.config import DistillConfig

FP32 = 4
MUON_AT_ONCE = 8  # `distill.muon.AT_ONCE`, which is not imported: it would bring torch along


@dataclass(frozen=True)
class HealingMemory:
    """Bytes on one rank. `parts` lie there all the time."""

    parts: dict[str, int]
    loss: dict[str, int]
    """What comes on top when the vocabulary loss is made."""
    backward: dict[str, int]
    """What comes on top in the backward pass of a layer whose activations are made again."""
    update: dict[str, int]
    """What comes on top in the optimizer's step."""

    @property
    def peak(self) -> int:
        return sum(self.parts.values()) + max(
            sum(moment.values()) for moment in (self.loss, self.backward, self.update)
        )


def healing_memory(
    config: DistillConfig, parent: ModelShape, child: Architecture, *, ranks: int = 1, teacher_bytes: int = 2
) -> HealingMemory:
    """What `distill.trainer.heal` takes on each of `ranks`, in bytes.

    Args:
        config: of the stage.
        parent: the parent's shape.
        child: the child's architecture, FFN widths as on disk.
        teacher_bytes: bytes of a weight of the parent as loaded (2 if it is stored in half precision and computed so).
    """
    sharded = ranks > 1 and config.sharding == "full"
    shards = ranks if sharded else 1
    half = 2 if config.compute_dtype == "bfloat16" else FP32
    tokens = min(config.micro_batch, -(-config.batch_sequences // ranks)) * config.sequence_length
    accumulates = config.batch_sequences > config.micro_batch * ranks
    learned = parent.parameters(child)
    matrices = sum(_matrices(parent, layer) for layer in child)
    table = parent.vocab_size * parent.hidden_size
    gradients = FP32 * learned // shards
    parts = {
        "teacher": _teacher_bytes(parent, teacher_bytes, half, shards),
        "student": FP32 * learned // shards,
        "optimizer": FP32 * (2 * learned - (matrices if config.optimizer == "muon" else 0)) // shards,
    }
    if ranks > 1:
        layer = max(parent.layer_parameters(each) for each in (*child, parent.parent_layer))
        whole = 2 * half * layer + half * (parent.fixed_parameters + table) if sharded else 0
        parts["shared between ranks"] = whole or gradients  # layers brought together; or DDP's buckets
    recomputes = config.checkpoint_activations
    in_formats = sum(_matrices(parent, _only_rounded(layer)) for layer in child) if config.qad else 0
    again = 0 if recomputes else matrices
    rounded = 0 if half == FP32 or sharded else half * (table + max(again, in_formats))
    if sharded or half == FP32:  # of a child in number formats: kept for a step, or for the backward pass if sharded
        rounded += 0 if sharded and recomputes else half * in_formats
    layers = [tokens * _layer_activations(parent, layer, half) for layer in child]
    ends = tokens * parent.hidden_size * (FP32 + 4 * half)  # embedding, final norm, last hidden states of both
    kept = {
        "activations": ends + (_layer_inputs(parent, child, tokens, half) if recomputes else sum(layers)),
        "rounded weights": rounded,
        "gradients": gradients if accumulates else 0,
    }
    if config.cosine or config.loss == "bld":
        streams = tokens * parent.hidden_size * (len(child) + 1)
        kept["streams"] = streams * (half + (half if config.cosine else 0))
    of_hidden = half * tokens * parent.hidden_size
    chunk = min(config.chunk_tokens, tokens) * parent.vocab_size * (2 * FP32 + half)
    loss = kept | {"vocabulary loss": FP32 * table + of_hidden + max(chunk, FP32 * table)}
    backward = (
        kept | {"a layer": max(layers, default=0), "vocabulary loss": 2 * FP32 * table + of_hidden}
        if recomputes
        else {}
    )
    update = {"gradients": gradients, "Muon": _muon(parent, child, shards) if config.optimizer == "muon" else 0}
    return HealingMemory(parts, loss, backward, update)


def step_flops(config: DistillConfig, parent: ModelShape, child: Architecture) -> int:
    """Matrix products of a whole step, all ranks together: 2 per weight and token forward, 4 backward; attention is causal.

    Evaluations, recomputed activations and the optimizer are not counted: the "model FLOPs" of Chowdhery et al. (arXiv 2204.02311).
    """
    tokens = config.step_tokens
    whole = Architecture.uniform(parent.num_hidden_layers, parent.parent_layer)
    teacher = _forward_flops(parent, whole, config.sequence_length) if config.objective.needs_teacher else 0
    return tokens * (teacher + 3 * _forward_flops(parent, child, config.sequence_length))


def _forward_flops(parent: ModelShape, architecture: Architecture, length: int) -> int:
    """Of one token, on average over a sequence of `length`."""
    weights = sum(_matrices(parent, layer) for layer in architecture) + parent.vocab_size * parent.hidden_size
    attending = sum(layer.attention.kind == "kv" for layer in architecture)
    return 2 * weights + attending * 4 * parent.num_attention_heads * parent.head_dim * (length + 1) // 2


def _matrices(parent: ModelShape, layer: LayerSpec) -> int:
    """Weights of a layer but its norms."""
    skipped = (layer.attention.kind == "skip") + (layer.ffn.kind == "skip")
    return parent.layer_parameters(layer) - (2 - skipped) * parent.hidden_size


def _only_rounded(layer: LayerSpec) -> LayerSpec:
    """The layer without what stays in bf16."""
    attention = AttentionSpec("skip") if layer.attention.precision == BF16 else layer.attention
    return LayerSpec(attention, FFNSpec("skip") if layer.ffn.precision == BF16 else layer.ffn)


def _teacher_bytes(parent: ModelShape, loaded: int, half: int, shards: int) -> int:
    """Its weights; and, loaded in fp32 for half precision, a rounded copy of its matrices and head besides."""
    weights = parent.parameters(parent.parent_architecture)
    matrices = parent.num_hidden_layers * _matrices(parent, parent.parent_layer)
    rounded = half * (matrices + parent.vocab_size * parent.hidden_size) if loaded > half and shards == 1 else 0
    return loaded * weights // shards + rounded


def _layer_inputs(parent: ModelShape, child: Architecture, tokens: int, half: int) -> int:
    """What is kept of each layer where the rest is made again: the stream, and what the layer before adds to it."""
    return sum(tokens * parent.hidden_size * (FP32 + half) for layer in child if not _is_empty(layer))


def _is_empty(layer: LayerSpec) -> bool:
    return layer.attention.kind == layer.ffn.kind == "skip"


def _layer_activations(parent: ModelShape, layer: LayerSpec, half: int) -> int:
    """Bytes a token: residual sums (fp32), normed inputs, q, k, v, attention's output, gate and up, their product."""
    hidden, heads, size = parent.hidden_size, parent.num_attention_heads, parent.head_dim
    # Kept by the norm: the stream and its scale; by the matrices: their input.
    entering = hidden * (FP32 + half) + FP32
    attention = {
        "kv": entering + half * size * (heads + 2 * layer.attention.kv_heads) + half * heads * size + FP32 * heads,
        "linear": entering,
        "skip": 0,
    }[layer.attention.kind]
    ffn = {"width": entering + 3 * half * layer.ffn.width, "linear": entering, "skip": 0}[layer.ffn.kind]
    return attention + ffn


def _muon(parent: ModelShape, child: Architecture, shards: int) -> int:
    """The matrices of the most numerous shape: looked ahead and stacked in fp32, four of them in bfloat16."""
    hidden, size = parent.hidden_size, parent.head_dim
    numbers: dict[tuple[int, int], int] = {}
    for layer in child:
        shapes = []
        if layer.attention.kind == "kv":
            shapes += 2 * [(parent.num_attention_heads * size, hidden)] + 2 * [
                (layer.attention.kv_heads * size, hidden)
            ]
        if layer.ffn.kind == "width":
            shapes += 3 * [(layer.ffn.width, hidden)]
        for shape in shapes:
            numbers[shape] = numbers.get(shape, 0) + 1
    largest = max((rows * columns * count for (rows, columns), count in numbers.items()), default=0)
    if shards > 1:
        largest = max((rows * columns for rows, columns in numbers), default=0) * min(shards, MUON_AT_ONCE)
    return largest * (2 * FP32 + 4 * 2)
