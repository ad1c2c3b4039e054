"""Tiny random parents and architectures that every test can build in milliseconds, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TINY = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.2,  # large enough that every subblock matters to the logits
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte (ids 0..255), then <bos> 256, <eos> 257, <pad> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def tiny_llama(directory: Path | str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Writes a random Llama with its byte tokenizer as a Hugging Face directory and returns its path.

    `overrides` are `LlamaConfig` fields (defaults in `TINY`). All parameters, biases and norms included, are random,
    so that a test notices when one of them is lost.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **overrides})).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return Path(directory)


def spoil(tensors: dict[str, torch.Tensor], fault: str, layer: int) -> dict[str, torch.Tensor]:
    """A child's tensors with one "missing", one "unexpected" (in layer 0) or one "mismatched" k_proj."""
    names = [f"model.layers.{index}.self_attn.k_proj.weight" for index in (0, layer)]
    kept = {name: tensor for name, tensor in tensors.items() if name != names[1]}
    if fault == "missing":
        return kept
    if fault == "unexpected":
        return {**tensors, names[0]: torch.zeros(16, 64)}
    return {**kept, names[1]: tensors[names[1]][:8].clone()}
