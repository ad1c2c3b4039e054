"""Mistral (dense, full attention): a Llama without biases. Its early releases have an active sliding window."""

from __future__ import annotations

from blocks.families.family import Family

MISTRAL = Family("mistral", "MistralForCausalLM", lambda config: {})
