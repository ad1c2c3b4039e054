"""Llama: `attention_bias` puts a bias on q, k, v and o, `mlp_bias` on all three FFN projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocks.families.family import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, bool]:
    bias = bool(config.attention_bias)
    return {"qkv_bias": bias, "o_bias": bias, "mlp_bias": bool(config.mlp_bias)}


LLAMA = Family("llama", "LlamaForCausalLM", _flags)
