"""Qwen2 and Qwen2.5 (dense): q, k and v always carry a bias, o never does; config.json does not say so."""

from __future__ import annotations

from blocks.families.family import Family

QWEN2 = Family("qwen2", "Qwen2ForCausalLM", lambda config: {"qkv_bias": True})
