"""Subblocks as an engine runs them: prefill of a prompt and one decode step, with random weights. What `nas bench` times.

The mathematics is that of blocks/layer.py; the form is an engine's: one matrix for q, k and v, one for gate and up, a static
KV cache written in place, the residual stream in the weight dtype, and an attention that never repeats its KV heads when it
decodes. Weights are taken from a `Ring`, so that a model larger than memory can be timed too.

Shapes: B sequences, P prompt tokens, L cache length, S attended tokens, D hidden_size, H query and K key/value heads of one
rank, E head_dim, I FFN channels of one rank, V rows of the vocabulary of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from blocks.errors import ConfigError
from blocks.shape import ModelShape, as_built
from blocks.spec import Architecture, AttentionSpec, FFNSpec
from nas.clock import attended_tokens, part_of, rank_kv_heads
from nas.costs import DTYPE_BYTES, Scenario

PREFILL_TOKENS = 8192  # prompts are read a few sequences at a time, as engines do: no more tokens at once than this
EPS = 1e-5
ROPE_THETA = 10_000.0
WEIGHT_SCALE = 0.02  # of random weights: activations of ordinary size, which draw ordinary power
ALIGNMENT = 256  # elements; a matrix multiplication is chosen by alignment, too


@dataclass(frozen=True)
class Sizes:
    """What one rank of a scenario computes with. `sequences` are read at a time, `batch // sequences` times."""

    shape: ModelShape
    scenario: Scenario
    device: torch.device

    @property
    def heads(self) -> int:
        return part_of("num_attention_heads", self.shape.num_attention_heads, self.scenario.tp)

    @property
    def vocabulary(self) -> int:
        return -(-self.shape.vocab_size // self.scenario.tp)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.scenario.weight_dtype)

    @property
    def kv_dtype(self) -> torch.dtype:
        if self.scenario.kv_dtype not in DTYPE_BYTES:
            raise ConfigError(f"--kv-dtype {self.scenario.kv_dtype}: nas bench runs caches in {', '.join(DTYPE_BYTES)}")
        dtype: torch.dtype = getattr(torch, self.scenario.kv_dtype)
        return dtype

    @property
    def cache_length(self) -> int:
        return self.scenario.prompt_tokens + self.scenario.output_tokens

    @property
    def attended(self) -> int:
        return attended_tokens(self.scenario)

    @property
    def sequences(self) -> int:
        """The largest divisor of the batch that keeps within `PREFILL_TOKENS`, at least 1."""
        batch, most = self.scenario.batch, max(1, PREFILL_TOKENS // self.scenario.prompt_tokens)
        return max(n for n in range(1, batch + 1) if batch % n == 0 and n <= most)

    @property
    def slices(self) -> int:
        return self.scenario.batch // self.sequences

    def weight_values(self, architecture: Architecture) -> int:
        """Values in the matrices of one rank: what a `Ring` must hold so that no two layers share weights."""
        layers = sum(self.shape.layer_parameters(layer) for layer in architecture)
        return self.shape.fixed_parameters // self.scenario.tp + layers // self.scenario.tp

    def cache_values(self, spec: AttentionSpec) -> int:
        """Values in the KV cache of one attention of one rank."""
        if spec.kind != "kv":
            return 0
        heads = rank_kv_heads(spec, self.scenario.tp)
        return 2 * self.scenario.batch * heads * self.cache_length * self.shape.head_dim


class Ring:
    """Random values of which tensors are taken one after another, and from the front again at the end.

    A ring of the parent's size gives every layer weights of its own. Where memory holds less, layers far apart share; a
    cache that did not keep the one will not keep the other.
    """

    def __init__(self, values: int, dtype: torch.dtype, device: torch.device, scale: float, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.flat = torch.empty(max(values, ALIGNMENT), dtype=dtype, device=device)
        block = torch.randn(min(self.flat.numel(), 1 << 24), generator=generator, device=device).mul_(scale).to(dtype)
        for piece in self.flat.split(block.numel()):
            piece.copy_(block[: piece.numel()])
        self.offset = 0

    def take(self, *size: int) -> Tensor:
        """The next tensor of this size, contiguous. Raises ConfigError if the whole ring is smaller."""
        count = math.prod(size)
        if count > self.flat.numel():
            raise ConfigError(
                f"no memory for one tensor of {' x '.join(map(str, size))}; lower --batch, --prompt or --output, or raise --tp"
            )
        if self.offset + count > self.flat.numel():
            self.offset = 0
        taken = self.flat[self.offset : self.offset + count].view(size)
        self.offset += -(-count // ALIGNMENT) * ALIGNMENT
        return taken


@dataclass(frozen=True)
class Rotary:
    """Tables of the rotary embedding, [P, 1, E] for a prompt and [1, 1, E] for the token that is decoded.

    `sin` carries the sign of the rotation: x cos + (second half, first half) sin.
    """

    prompt: tuple[Tensor, Tensor]
    token: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, sizes: Sizes) -> Rotary:
        half = sizes.shape.head_dim // 2
        frequencies = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(sizes.cache_length, dtype=torch.float64)[:, None] * frequencies
        cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)

        def rows(start: int, end: int) -> tuple[Tensor, Tensor]:
            return tuple(t[start:end, None].to(sizes.device, sizes.dtype) for t in (cos, sin))  # type: ignore[return-value]

        return cls(rows(0, sizes.scenario.prompt_tokens), rows(sizes.attended - 1, sizes.attended))


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of x [B, S, heads, E]."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * table[0], torch.cat((second, first), dim=-1), table[1])


class Subblock(Protocol):
    """An attention or an FFN with its norm and its residual connection."""

    def prefill(self, h: Tensor) -> Tensor:
        """h [B, P, D] -> the same shape, and the cache filled."""
        ...

    def decode(self, h: Tensor) -> Tensor:
        """h [B, 1, D] -> the same shape, one token later."""
        ...


class Attention:
    """Grouped-query attention over a static cache [B, K, L, E]."""

    def __init__(self, sizes: Sizes, spec: AttentionSpec, weights: Ring, cache: Ring, rotary: Rotary) -> None:
        shape, self.sizes, self.rotary = sizes.shape, sizes, rotary
        self.heads, self.kv_heads, width = sizes.heads, rank_kv_heads(spec, sizes.scenario.tp), shape.head_dim
        rows = (self.heads + 2 * self.kv_heads) * width
        self.norm = torch.ones(shape.hidden_size, dtype=sizes.dtype, device=sizes.device)
        self.qkv = weights.take(rows, shape.hidden_size)
        self.qkv_bias = weights.take(rows) if shape.qkv_bias else None
        self.o = weights.take(shape.hidden_size, self.heads * width)
        self.o_bias = weights.take(shape.hidden_size) if shape.o_bias else None
        self.qk_norm = (
            torch.ones(self.heads + self.kv_heads, width, dtype=sizes.dtype, device=sizes.device)
            if shape.qk_norm
            else None
        )
        cached = (sizes.scenario.batch, self.kv_heads, sizes.cache_length, width)
        self.keys, self.values = cache.take(*cached), cache.take(*cached)

    def prefill(self, h: Tensor) -> Tensor:
        q, k, v = self._queries_keys_values(h, self.rotary.prompt)
        sequences, tokens = h.shape[:2]
        self.keys[:sequences, :, :tokens].copy_(k)
        self.values[:sequences, :, :tokens].copy_(v)
        return self._output(h, causal_attention(q, k, v))

    def decode(self, h: Tensor) -> Tensor:
        q, k, v = self._queries_keys_values(h, self.rotary.token)
        end = self.sizes.attended
        self.keys[:, :, end - 1 : end].copy_(k)
        self.values[:, :, end - 1 : end].copy_(v)
        # The queries of a group share their keys: as rows of one query they are exact without a mask, and nothing is repeated.
        grouped = q.reshape(q.shape[0], self.kv_heads, -1, q.shape[-1]).to(self.keys.dtype)
        context = F.scaled_dot_product_attention(grouped, self.keys[:, :, :end], self.values[:, :, :end])
        return self._output(h, context.reshape(q.shape).to(h.dtype))

    def _queries_keys_values(self, h: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, S, E], k and v [B, K, S, E], rotated."""
        x = F.linear(norm(h, self.norm), self.qkv, self.qkv_bias).unflatten(-1, (-1, self.sizes.shape.head_dim))
        qk, v = x.split((self.heads + self.kv_heads, self.kv_heads), dim=2)
        if self.qk_norm is not None:
            qk = F.rms_norm(qk, (qk.shape[-1],), eps=EPS) * self.qk_norm
        q, k = rotate(qk, table).split((self.heads, self.kv_heads), dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _output(self, h: Tensor, context: Tensor) -> Tensor:
        """context [B, H, S, E] through the output matrix, added to h."""
        return h + F.linear(context.transpose(1, 2).flatten(2), self.o, self.o_bias)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, P, E] on k, v [B, K, P, E]. Only the half-precision kernels of a GPU take grouped heads as they are."""
    grouped = q.shape[1] != k.shape[1]
    if grouped and not (q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)):
        repeats = q.shape[1] // k.shape[1]
        k, v, grouped = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1), False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class FFN:
    """silu(gate) * up, and down."""

    def __init__(self, sizes: Sizes, spec: FFNSpec, weights: Ring) -> None:
        hidden, width = sizes.shape.hidden_size, part_of(f"the width of {spec}", spec.width, sizes.scenario.tp)
        bias = sizes.shape.mlp_bias
        self.norm = torch.ones(hidden, dtype=sizes.dtype, device=sizes.device)
        self.gate_up = weights.take(2 * width, hidden)
        self.gate_up_bias = weights.take(2 * width) if bias else None
        self.down = weights.take(hidden, width)
        self.down_bias = weights.take(hidden) if bias else None

    def prefill(self, h: Tensor) -> Tensor:
        gate, up = F.linear(norm(h, self.norm), self.gate_up, self.gate_up_bias).chunk(2, dim=-1)
        return h + F.linear(F.silu(gate) * up, self.down, self.down_bias)

    def decode(self, h: Tensor) -> Tensor:
        return self.prefill(h)


class Linear:
    """One matrix in the place of a subblock; a rank multiplies its part of the input."""

    def __init__(self, sizes: Sizes, weights: Ring) -> None:
        hidden = sizes.shape.hidden_size
        self.norm = torch.ones(hidden, dtype=sizes.dtype, device=sizes.device)
        self.matrix = weights.take(hidden, part_of("hidden_size", hidden, sizes.scenario.tp))

    def prefill(self, h: Tensor) -> Tensor:
        return h + F.linear(norm(h, self.norm)[..., : self.matrix.shape[1]], self.matrix)

    def decode(self, h: Tensor) -> Tensor:
        return self.prefill(h)


class Ends:
    """Embedding before the layers; final norm, head and the choice of a token after them."""

    def __init__(self, sizes: Sizes, weights: Ring) -> None:
        hidden = sizes.shape.hidden_size
        self.norm = torch.ones(hidden, dtype=sizes.dtype, device=sizes.device)
        self.head = weights.take(sizes.vocabulary, hidden)
        self.table = self.head if sizes.shape.tie_word_embeddings else weights.take(sizes.vocabulary, hidden)

    def enter(self, tokens: Tensor) -> Tensor:
        """Ids [B, S] -> h [B, S, D]."""
        return F.embedding(tokens, self.table)

    def leave(self, h: Tensor) -> Tensor:
        """h [B, S, D] -> the likeliest token after the last one, [B]."""
        return F.linear(norm(h[:, -1], self.norm), self.head).argmax(-1)


def norm(h: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(h, weight.shape, weight, EPS)


@dataclass(frozen=True)
class Workshop:
    """Builds subblocks and models of one scenario out of two rings."""

    sizes: Sizes
    weights: Ring
    cache: Ring
    rotary: Rotary

    @classmethod
    def open(cls, shape: ModelShape, scenario: Scenario, device: torch.device, memory: float) -> Workshop:
        """For a parent of this shape, as a child would have it on disk, within `memory` bytes of the device."""
        built_shape, built = as_built(shape, shape.parent_architecture)
        sizes = Sizes(built_shape, scenario, device)
        gaps = 16 * ALIGNMENT * (len(built) + 1)  # between tensors, at most
        weights = min(sizes.weight_values(built) + gaps, int(0.7 * memory) // DTYPE_BYTES[scenario.weight_dtype])
        layer = sizes.cache_values(built[0].attention)
        cache = min(layer * len(built) + gaps, max(layer + gaps, int(0.3 * memory) // scenario.kv_value_bytes))
        return cls(
            sizes,
            Ring(max(weights, largest_tensor(sizes)), sizes.dtype, device, WEIGHT_SCALE),
            Ring(cache, sizes.kv_dtype, device, 1.0, seed=1),
            Rotary.of(sizes),
        )

    def subblock(self, spec: AttentionSpec | FFNSpec) -> Subblock | None:
        """A new subblock with weights and a cache of its own; None for a skip."""
        if spec.kind == "skip":
            return None
        if spec.kind == "linear":
            return Linear(self.sizes, self.weights)
        if isinstance(spec, AttentionSpec):
            return Attention(self.sizes, spec, self.weights, self.cache, self.rotary)
        return FFN(self.sizes, spec, self.weights)

    def subblocks(self, specs: Sequence[AttentionSpec | FFNSpec]) -> list[Subblock]:
        return [subblock for spec in specs if (subblock := self.subblock(spec)) is not None]

    def ends(self) -> Ends:
        return Ends(self.sizes, self.weights)

    def stream(self, phase: str) -> Tensor:
        """A residual stream of ordinary size: [sequences, P, D], or [B, 1, D]."""
        rows = self.tokens(phase).shape
        generator = torch.Generator(self.sizes.device).manual_seed(2)
        noise = torch.randn(*rows, self.sizes.shape.hidden_size, generator=generator, device=self.sizes.device)
        return noise.to(self.sizes.dtype)

    def tokens(self, phase: str) -> Tensor:
        """Token ids: of the prompts of the sequences that are read at a time, or one a sequence."""
        s, sizes = self.sizes.scenario, self.sizes
        rows = (sizes.sequences, s.prompt_tokens) if phase == "prefill" else (s.batch, 1)
        ids = torch.arange(math.prod(rows), device=sizes.device) * 7919 % sizes.vocabulary
        return ids.view(rows)


def largest_tensor(sizes: Sizes) -> int:
    """Values of the largest matrix of a rank."""
    shape = sizes.shape
    rows = max(sizes.vocabulary, 2 * shape.intermediate_size // sizes.scenario.tp, 3 * sizes.heads * shape.head_dim)
    return rows * shape.hidden_size


def run_chain(chain: Sequence[Subblock], phase: str, h: Tensor) -> Tensor:
    """Subblocks one after another on a residual stream."""
    for subblock in chain:
        h = subblock.prefill(h) if phase == "prefill" else subblock.decode(h)
    return h


def run_model(ends: Ends, chain: Sequence[Subblock], phase: str, tokens: Tensor) -> Tensor:
    """A whole model on token ids [B, S] -> the next token of each sequence."""
    return ends.leave(run_chain(chain, phase, ends.enter(tokens)))


@contextmanager
def inference() -> Iterator[None]:
    """No gradients, and the same attention kernels from one torch version to the next."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with torch.no_grad(), sdpa_kernel(backends):
        yield
