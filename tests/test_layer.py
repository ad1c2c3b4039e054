"""Parity: the layer functions swept over a parent give the hidden states of transformers' own model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import LLAMA3_ROPE, TINY
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from blocks.layer import LayerMath, layer_forward
from blocks.parent import open_parent
from blocks.sweep import Sweep

YARN_ROPE = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 64}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama gqa": LlamaConfig(**TINY),
    "llama mha": LlamaConfig(**{**TINY, "num_key_value_heads": 4}),
    "llama mqa, tied": LlamaConfig(**{**TINY, "num_key_value_heads": 1}, tie_word_embeddings=True),
    "llama own head_dim": LlamaConfig(**TINY, head_dim=24),
    "llama biases": LlamaConfig(**TINY, attention_bias=True, mlp_bias=True),
    "llama3 rope": LlamaConfig(**TINY, rope_parameters=LLAMA3_ROPE),
    "yarn rope": LlamaConfig(**TINY, rope_parameters=YARN_ROPE),
    "mistral": MistralConfig(**TINY, sliding_window=None),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=24),
}
LENGTH = 96  # beyond the 64 positions that the scaled rotary embeddings above were made for


def tokens(sequences: int = 5) -> Tensor:
    return torch.randint(0, 256, (sequences, LENGTH), generator=torch.Generator().manual_seed(1))


def sweep_and_model(directory: Path, config: PretrainedConfig) -> tuple[Sweep, torch.nn.Module]:
    """A random model of `config` with random biases and norms; the sweep takes two sequences at a time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(mean=1.0, std=0.3)
    model.save_pretrained(directory)
    return Sweep(open_parent(str(directory)), torch.device("cpu"), tokens_per_batch=2 * LENGTH), model


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_sweep_equals_transformers(tmp_path: Path, config: PretrainedConfig) -> None:
    sweep, model = sweep_and_model(tmp_path, config)
    with torch.no_grad():
        hidden = model.model(tokens()).last_hidden_state
        logits = model(tokens()).logits
    ours = sweep.run(tokens())
    assert hidden.std() > 0.3  # the comparison is of numbers of order one
    torch.testing.assert_close(ours, hidden, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours @ sweep.head.T, logits, rtol=1e-5, atol=1e-4)  # sums of 64 products


def test_the_streams_between_the_layers_equal_transformers(tmp_path: Path) -> None:
    sweep, model = sweep_and_model(tmp_path, CONFIGS["llama gqa"])
    with torch.no_grad():
        theirs = model.model(tokens(), output_hidden_states=True).hidden_states
    stream = sweep.embed(tokens())
    for index in range(3):  # transformers' last entry is normalised already
        torch.testing.assert_close(stream, theirs[index], rtol=1e-5, atol=1e-5)
        stream = sweep.forward(sweep.layer(index), stream)


def test_batch_size_and_residency_change_nothing(tmp_path: Path) -> None:
    sweep, _ = sweep_and_model(tmp_path, CONFIGS["qwen2"])
    streamed = Sweep(sweep.parent, sweep.device, tokens_per_batch=1, resident=False)
    torch.testing.assert_close(streamed.run(tokens()), sweep.run(tokens()), rtol=0, atol=1e-5)
    assert streamed._kept.keys() == {"model.norm.weight"}
    assert len(sweep._kept) == 4 + 2  # the layers, the embedding and the final norm


def test_an_absent_subblock_is_skipped(tmp_path: Path) -> None:
    sweep, model = sweep_and_model(tmp_path, CONFIGS["llama gqa"])
    h = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(3))
    weights, math, theirs = sweep.layer(0), sweep.math(LENGTH), model.model.layers[0]
    only_ffn = {name: tensor for name, tensor in weights.items() if name.startswith(("mlp.", "post_attention"))}
    with torch.no_grad():
        expected = h + theirs.mlp(theirs.post_attention_layernorm(h))
    torch.testing.assert_close(layer_forward(only_ffn, h, math), expected, rtol=1e-5, atol=1e-5)
    assert sweep.forward({}, h) is h


def test_rotary_tables_do_not_depend_on_the_longest_sequence(tmp_path: Path) -> None:
    sweep, _ = sweep_and_model(tmp_path, CONFIGS["llama3 rope"])
    long, short = sweep.math(LENGTH), LayerMath.of(sweep.parent.config, 10, "cpu", torch.float32)
    assert torch.equal(long.cos[:10], short.cos)
    assert torch.equal(long.sin[:10], short.sin)
