"""The mathematics of one layer as pure functions of its tensors, so that layers may differ from one another.

A layer is a `Weights` mapping from Llama tensor names (relative to `model.layers.N.`) to tensors. What is absent is
skipped: no `self_attn.*` means no attention. Sizes such as the number of KV heads are read off the shapes. The same
functions serve the parent, every candidate and the child, resident or streamed.

Shapes: B sequences, S positions, D hidden_size, H heads, K KV heads, E head_dim, I FFN channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]

ATTENTION_NORM = "input_layernorm.weight"
FFN_NORM = "post_attention_layernorm.weight"
O_PROJ = "self_attn.o_proj.weight"
DOWN_PROJ = "mlp.down_proj.weight"
LINEAR_ATTENTION = "self_attn.linear_attn.weight"
LINEAR_FFN = "mlp.linear_mlp.weight"


class RoundsInputs(ABC):
    """Weights whose kernels round what they multiply (blocks/rounded.py)."""

    @abstractmethod
    def round_input(self, name: str, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class LayerMath:
    """What a layer's forward needs beside its tensors: head_dim E, the RMSNorm epsilon, and the rotary tables [S, E].

    `kv` is the dtype that keys and values are rounded to in the cache; None leaves them as they are computed.
    """

    head_dim: int
    rms_norm_eps: float
    cos: Tensor
    sin: Tensor
    kv: torch.dtype | None = None

    @classmethod
    def of(cls, config: Any, length: int, device: torch.device | str, dtype: torch.dtype) -> LayerMath:
        """Rotary tables for positions 0..length-1 by transformers' own implementation (all rope scalings)."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary = LlamaRotaryEmbedding(config).to(device)
        positions = torch.arange(length, device=device)[None]
        cos, sin = rotary(torch.empty(0, device=device, dtype=torch.float32), positions)
        return cls(head_dim, config.rms_norm_eps, cos[0].to(dtype), sin[0].to(dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x in fp32, in the dtype of `weight`, which is the precision that the layer computes in."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(weight.dtype)


def project(w: Weights, name: str, x: Tensor) -> Tensor:
    if isinstance(w, RoundsInputs):
        x = w.round_input(name, x)
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def rotate(x: Tensor, math: LayerMath) -> Tensor:
    """Rotary position embedding of x [B, heads, S, E]."""
    length = x.shape[2]
    first, second = x.chunk(2, dim=-1)
    return x * math.cos[:length] + torch.cat((-second, first), dim=-1) * math.sin[:length]


def queries_keys_values(w: Weights, h: Tensor, math: LayerMath) -> tuple[Tensor, Tensor, Tensor]:
    """Projections of the normalised input before rotation: q [B, H, S, E], k and v [B, K, S, E]."""
    x = rms_norm(h, w[ATTENTION_NORM], math.rms_norm_eps)

    def heads(name: str) -> Tensor:
        flat = project(w, f"self_attn.{name}_proj", x)
        split = flat.unflatten(-1, (-1, math.head_dim)).transpose(1, 2)
        norm = w.get(f"self_attn.{name}_norm.weight")
        return split if norm is None else rms_norm(split, norm, math.rms_norm_eps)

    return heads("q"), heads("k"), heads("v")


def round_cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of that dtype gives them back; beyond its range cut to it, as engines do without scales."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).to(x.dtype)


def attention_context(w: Weights, h: Tensor, math: LayerMath) -> Tensor:
    """What o_proj reads: causal attention over h [B, S, D] -> [B, S, H*E]."""
    q, k, v = queries_keys_values(w, h, math)
    q, k = rotate(q, math), rotate(k, math)
    if math.kv is not None:
        k, v = round_cached(k, math.kv), round_cached(v, math.kv)
    shared = q.shape[1] // k.shape[1]
    if shared > 1:  # expanded here because not every sdpa kernel takes grouped heads in fp32
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return context.transpose(1, 2).flatten(2)


def ffn_activation(w: Weights, h: Tensor, math: LayerMath) -> Tensor:
    """What down_proj reads: silu(gate) * up of the normalised input, [B, S, D] -> [B, S, I]."""
    x = rms_norm(h, w[FFN_NORM], math.rms_norm_eps)
    return F.silu(project(w, "mlp.gate_proj", x)) * project(w, "mlp.up_proj", x)


def attention_input(w: Weights, h: Tensor, math: LayerMath) -> tuple[str, Tensor] | None:
    """The name (without ".weight") of the attention's last matrix and what it multiplies; None for a skip."""
    if O_PROJ in w:
        return "self_attn.o_proj", attention_context(w, h, math)
    if LINEAR_ATTENTION in w:
        return "self_attn.linear_attn", rms_norm(h, w[ATTENTION_NORM], math.rms_norm_eps)
    return None


def ffn_input(w: Weights, h: Tensor, math: LayerMath) -> tuple[str, Tensor] | None:
    """The name (without ".weight") of the FFN's last matrix and what it multiplies; None for a skip."""
    if DOWN_PROJ in w:
        return "mlp.down_proj", ffn_activation(w, h, math)
    if LINEAR_FFN in w:
        return "mlp.linear_mlp", rms_norm(h, w[FFN_NORM], math.rms_norm_eps)
    return None


def has_ffn(w: Weights) -> bool:
    return DOWN_PROJ in w or LINEAR_FFN in w


def add_subblock(w: Weights, h: Tensor, last: tuple[str, Tensor] | None) -> Tensor:
    return h if last is None else h + project(w, *last)


def layer_forward(w: Weights, h: Tensor, math: LayerMath) -> Tensor:
    """One whole layer on the residual stream h [B, S, D], added up in fp32."""
    h = h.float()
    h = add_subblock(w, h, attention_input(w, h, math))
    return add_subblock(w, h, ffn_input(w, h, math))
