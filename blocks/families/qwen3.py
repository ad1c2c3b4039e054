"""Qwen3 (dense): queries and keys are RMS-normalised per head, and head_dim is independent of hidden_size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocks.families.family import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _flags(config: PretrainedConfig) -> dict[str, bool]:
    bias = bool(config.attention_bias)
    return {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}


QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _flags)
