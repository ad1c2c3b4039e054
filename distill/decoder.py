"""The decoder of parent and child as distillation runs it: transformers' numbers in fewer and larger kernels.

transformers' own forward launches about forty small kernels a layer, rounds weights anew at each use, and runs q, k, v,
gate and up as five matrix products; a GPU waits for the next launch most of the time. Here a layer is four matrix products,
an attention and four fused operations (`distill/operations.py`), weights are rounded once a pass (those of the parent once
and for all, those of a child in number formats of its own once a step: blocks/rounded_model.py), and the residual stream stays fp32 as it does under autocast. The modules and parameters are transformers'.

A layer's class is replaced by a subclass that takes this way when it is called with a `Pass`, and transformers' otherwise:
hooks of DDP and FSDP around a layer, and gradient checkpointing, act in both. Models of other families, or with a feature
that is not computed here, keep transformers' way (distill/hooked.py).

Shapes: B sequences, T positions, D hidden size, C channels of q, k and v together, E head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from blocks.child.configuration_decilm import DeciLMConfig
from blocks.families import FAMILIES
from blocks.rounded_model import RoundedLinear
from distill.operations import add_norm, gated, pack, rotate, round_inputs

Packed = dict[int, tuple[Tensor, Tensor | None]]
Visit = Callable[[Tensor], None]
Entering = Callable[[int], Tensor | None]
Leaving = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Pass:
    """What all layers of one forward pass share."""

    dtype: torch.dtype
    """Of the matrix products."""
    cos: Tensor
    """Rotary tables [T, E], fp32."""
    sin: Tensor
    packed: Packed | None
    """Packed weights by the id of the first module that they are of, if they may be kept from pass to pass."""
    checkpointing: bool = False
    """Whether a layer keeps its input alone for the backward pass, and is computed again there."""

    def project(self, x: Tensor, modules: Sequence[Any]) -> Tensor:
        """The outputs of linear modules of one input, side by side."""
        if isinstance(modules[0], RoundedLinear):  # these are rounded as one
            rounding, biases = modules[0].rounding, [module.bias for module in modules]
            bias = None if biases[0] is None else pack(biases, self.dtype)
            return F.linear(round_inputs(x, rounding), rounding.weight(self.dtype), bias)
        packs_once = self.packed is not None and self.dtype.itemsize == 2
        if not packs_once and all(module.weight.dtype == self.dtype for module in modules):
            outputs = [module(x) for module in modules]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return F.linear(x, *self._packed_weights(modules))

    def _packed_weights(self, modules: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        if self.packed is not None and id(modules[0]) in self.packed:
            return self.packed[id(modules[0])]
        biases = [module.bias for module in modules]
        bias = None if biases[0] is None else pack(biases, self.dtype)
        weight = pack([module.weight for module in modules], self.dtype)
        if self.packed is not None:
            self.packed[id(modules[0])] = weight, bias
            for module, part in zip(modules, weight.split([len(module.weight) for module in modules]), strict=True):
                if module.weight.dtype == self.dtype:  # the same numbers: the model need not hold them twice
                    module.weight.data = part
        return weight, bias


def last_hidden(
    model: Any,
    tokens_BT: Tensor,
    dtype: torch.dtype | None,
    packed: Packed | None = None,
    *,
    visit: Visit | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """The last hidden states [B, T, D] of a model that `prepare` took, in `dtype` (None: that of its weights).

    Args:
        packed: where packed weights are kept from call to call; only for a model that does not learn.
        visit: shown the residual stream [B, T, D] that enters the first layer, and that after every layer.
        checkpointing: keep the input of each layer alone for the backward pass.
    """
    decoder = model.model
    x_BTD, shared = _start(decoder, tokens_BT, dtype, packed, checkpointing)
    delta = None
    if visit is not None:
        visit(x_BTD)
    for layer in decoder.layers:
        x_BTD, delta = layer(x_BTD, delta, shared=shared)
        if visit is not None:  # without it, the sum is left to the next norm, which does it on its way
            x_BTD, delta = x_BTD if delta is None else x_BTD + delta, None
            visit(x_BTD)
    return add_norm(x_BTD, delta, decoder.norm.weight, decoder.norm.variance_epsilon, shared.dtype)[1]


def layers_apart(
    model: Any,
    tokens_BT: Tensor,
    dtype: torch.dtype | None,
    entering: Entering,
    leaving: Leaving,
    *,
    checkpointing: bool = False,
) -> None:
    """Runs every layer of a model that `prepare` took on a residual stream given to it: no gradient crosses layers.

    Args:
        entering: gives the stream [B, T, D] that enters a layer, by its number; None passes the layer over.
        leaving: shown the stream that leaves the layer, before the next one is entered.
    """
    x_BTD, shared = _start(model.model, tokens_BT, dtype, None, checkpointing)
    for index, layer in enumerate(model.model.layers):
        given = entering(index)
        if given is not None:
            stream, delta = layer(given.to(x_BTD.dtype), None, shared=shared)
            leaving(index, stream if delta is None else stream + delta)


def _start(
    decoder: Any, tokens_BT: Tensor, dtype: torch.dtype | None, packed: Packed | None, checkpointing: bool
) -> tuple[Tensor, Pass]:
    """The stream that enters the first layer, fp32 unless `dtype` is None, and what all layers share."""
    x_BTD = decoder.embed_tokens(tokens_BT)
    if dtype is None:
        dtype = x_BTD.dtype
    else:
        x_BTD = x_BTD.float()
    positions = torch.arange(tokens_BT.shape[1], device=x_BTD.device)[None]
    cos, sin = decoder.rotary_emb(x_BTD.float(), positions)
    return x_BTD, Pass(dtype, cos[0], sin[0], packed, checkpointing)


def prepare(model: Any) -> bool:
    """Makes a causal LM ready for `last_hidden`; False if it computes something that is not known here."""
    config = getattr(model, "config", None)
    if not _is_known(config) or not all(hasattr(layer, "input_layernorm") for layer in model.model.layers):
        return False
    for layer in model.model.layers:
        if not hasattr(layer, "runs_fused"):
            kind: Any = type(layer)
            layer.__class__ = _fused_class(kind)
    return True


def _is_known(config: Any) -> bool:
    return (
        getattr(config, "model_type", None) in {*FAMILIES, DeciLMConfig.model_type}
        and getattr(config, "hidden_act", None) == "silu"
        and not getattr(config, "attention_dropout", 0.0)
        and (getattr(config, "sliding_window", None) is None or not getattr(config, "use_sliding_window", True))
    )


@cache
def _fused_class(kind: Any) -> type:
    """A layer class that computes as here if it is given a `Pass`."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, shared: Pass | None = None, **kwargs: Any) -> Any:
        if shared is None:
            return kind.forward(self, hidden_states, *args, **kwargs)
        if shared.checkpointing and torch.is_grad_enabled():  # in here, so that hooks around the layer act once
            states = (self, hidden_states, args[0], shared)
            return checkpoint(_layer, *states, use_reentrant=False, preserve_rng_state=False)
        return _layer(self, hidden_states, args[0], shared)

    return type(kind.__name__, (kind,), {"forward": forward, "runs_fused": True, "__module__": kind.__module__})


def _layer(layer: Any, x_BTD: Tensor, delta_BTD: Tensor | None, shared: Pass) -> tuple[Tensor, Tensor | None]:
    """The residual stream, and what the layer's last subblock adds to it: the next norm does the sum."""
    subblocks = ((layer.self_attn, layer.input_layernorm), (layer.mlp, layer.post_attention_layernorm))
    for subblock, norm in subblocks:
        if subblock is None:
            continue
        x_BTD, h_BTD = add_norm(x_BTD, delta_BTD, norm.weight, norm.variance_epsilon, shared.dtype)
        delta_BTD = _subblock(subblock, h_BTD, shared)
    return x_BTD, delta_BTD


def _subblock(module: Any, h_BTD: Tensor, shared: Pass) -> Tensor:
    if hasattr(module, "o_proj"):
        return shared.project(_attend(module, h_BTD, shared), [module.o_proj])
    if hasattr(module, "down_proj"):
        return shared.project(gated(shared.project(h_BTD, [module.gate_proj, module.up_proj])), [module.down_proj])
    return shared.project(h_BTD, [module.linear_attn if hasattr(module, "linear_attn") else module.linear_mlp])


def _attend(attention: Any, h_BTD: Tensor, shared: Pass) -> Tensor:
    """What o_proj reads [B, T, H * E]."""
    size = attention.head_dim
    qkv_BTC = shared.project(h_BTD, [attention.q_proj, attention.k_proj, attention.v_proj])
    channels = [attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features]
    if hasattr(attention, "q_norm"):
        q, k, v = qkv_BTC.split(channels, dim=-1)
        qkv_BTC = torch.cat([_norm_heads(attention.q_norm, q), _norm_heads(attention.k_norm, k), v], dim=-1)
    qkv_BTC = rotate(qkv_BTC, shared.cos, shared.sin, (channels[0] + channels[1]) // size)
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in qkv_BTC.split(channels, dim=-1))
    context = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=channels[0] > channels[1]
    )
    return context.transpose(1, 2).flatten(2)


def _norm_heads(norm: Any, x_BTC: Tensor) -> Tensor:
    """RMSNorm of each head."""
    heads = x_BTC.unflatten(-1, (-1, len(norm.weight)))
    return add_norm(heads, None, norm.weight, norm.variance_epsilon, x_BTC.dtype)[1].flatten(-2)
