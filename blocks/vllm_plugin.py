"""Plugin of vLLM (entry point group `vllm.general_plugins`): `vllm serve CHILD` needs no --trust-remote-code.

vLLM has the model; what it lacks is the configuration class, without which it would have to run the checkpoint's own.
"""

from __future__ import annotations


def register() -> None:
    """Makes transformers' AutoConfig know children. May be called in each of an engine's processes, and twice in one."""
    from transformers import AutoConfig

    from blocks.child.configuration_decilm import DeciLMConfig

    AutoConfig.register(DeciLMConfig.model_type, DeciLMConfig, exist_ok=True)
