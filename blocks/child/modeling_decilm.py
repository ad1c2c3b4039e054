"""A Nemotron-style child: a Llama whose layers differ. Depends on torch and transformers alone.

This file travels inside every child checkpoint: `AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`.
A layer's attention has its own number of KV heads, or is one matrix, or is absent; its FFN has its own width, or is
one matrix, or is absent. What is absent has no tensors, no norm and no cache. All else is Llama's own code. Runs on
transformers 4.57 and 5.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from .configuration_decilm import DeciLMConfig


class DeciLMAttention(LlamaAttention):
    """Llama attention with the KV heads of its layer."""

    def __init__(self, config: DeciLMConfig, layer: int) -> None:
        super().__init__(_with(config, num_key_value_heads=config.kv_heads(layer)), layer_idx=layer)
        self.config = config  # the shared one, so that `set_attn_implementation` reaches every layer


class DeciLMNormedAttention(DeciLMAttention):
    """The same with queries and keys normalised per head before rotation, as in Qwen3."""

    def __init__(self, config: DeciLMConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """hidden_states [batch, length, hidden_size] -> the same shape, and the attention weights if eager."""
        batch_and_length = hidden_states.shape[:-1]
        heads = (*batch_and_length, -1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).view(heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            # transformers 4 needs the position for its static cache; transformers 5 ignores the argument
            position = {"cache_position": kwargs.get("cache_position")}
            key, value = past_key_values.update(key, value, self.layer_idx, position)
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.reshape(*batch_and_length, -1).contiguous()), weights


class DeciLMLinearMixer(nn.Module):
    """One matrix in the place of an attention: no mixing of positions, no cache.

    Not named an attention: transformers reads this file, and an attention class that derives from nn.Module would tell
    it that the attention implementation cannot be chosen.
    """

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return self.linear_attn(hidden_states), None


class DeciLMLinearMLP(nn.Module):
    """One matrix in the place of an FFN."""

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.linear_mlp(hidden_states)


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """One layer. `self_attn` and `mlp` are None where the layer has none, and so is the norm before each."""

    def __init__(self, config: DeciLMConfig, layer: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.counts_tokens = layer == 0 and config.kv_heads(0) == 0
        self.self_attn: Any = _attention(config, layer)
        self.mlp: Any = _ffn(config, layer)
        self.input_layernorm: Any = None if self.self_attn is None else _norm(config)
        self.post_attention_layernorm: Any = None if self.mlp is None else _norm(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [batch, length, hidden_size] -> the same shape."""
        if self.self_attn is not None:
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if self.counts_tokens and kwargs.get("past_key_values") is not None:
            _count_tokens(hidden_states, **kwargs)
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def _count_tokens(hidden_states: Tensor, past_key_values: Any, cache_position: Any = None, **_: Any) -> None:
    """Puts one number a token into the cache's entry of a layer 0 that has no attention.

    transformers asks the first entry of a cache, of any kind, how many tokens the whole cache holds. Left empty it
    would say none: positions and masks would be wrong from the second step on.
    """
    ones = hidden_states.new_ones((hidden_states.shape[0], 1, hidden_states.shape[1], 1))
    past_key_values.update(ones, ones, 0, {"cache_position": cache_position})


def _attention(config: DeciLMConfig, layer: int) -> nn.Module | None:
    kind = config.attention_kind(layer)
    if kind == "kv":
        attention = DeciLMNormedAttention if config.qk_norm else DeciLMAttention
        return attention(config, layer)
    return DeciLMLinearMixer(config) if kind == "linear" else None


def _ffn(config: DeciLMConfig, layer: int) -> nn.Module | None:
    kind = config.ffn_kind(layer)
    if kind == "width":
        return LlamaMLP(_with(config, intermediate_size=config.width(layer)))
    return DeciLMLinearMLP(config) if kind == "linear" else None


def _norm(config: DeciLMConfig) -> LlamaRMSNorm:
    return LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


def _with(config: DeciLMConfig, **sizes: int) -> DeciLMConfig:
    """A copy of `config` with this layer's sizes, for the constructors of Llama's own parts."""
    own = copy.copy(config)
    for name, size in sizes.items():
        setattr(own, name, size)
    return own


class DeciLMPreTrainedModel(LlamaPreTrainedModel):
    config_class = DeciLMConfig
    _no_split_modules = ["DeciLMDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": DeciLMDecoderLayer, "attentions": DeciLMAttention}  # noqa: RUF012


class DeciLMModel(DeciLMPreTrainedModel, LlamaModel):
    """The layers without the head. `forward` is LlamaModel's."""

    def __init__(self, config: DeciLMConfig) -> None:
        super(LlamaModel, self).__init__(config)  # past LlamaModel, which would build its uniform layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(DeciLMDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = _norm(config)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class DeciLMForCausalLM(DeciLMPreTrainedModel, LlamaForCausalLM):
    """The child with its language-model head. `forward` and `generate` are LlamaForCausalLM's."""

    def __init__(self, config: DeciLMConfig) -> None:
        super(LlamaForCausalLM, self).__init__(config)  # past LlamaForCausalLM, which would build a LlamaModel
        self.model = DeciLMModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a checkpoint that does not fit is an error, never a layer of random numbers.

        Raises:
            ValueError: naming the tensors that are missing, unexpected or of another shape.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # Mismatches are let through only to be reported below, all kinds in one line.
        kwargs["ignore_mismatched_sizes"] = True
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        faults = [
            f"{kind.split('_')[0]}: {_shortened(info[kind])}"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info.get(kind)
        ]
        if faults:
            raise ValueError(f"{pretrained_model_name_or_path} does not fit its configuration ({'; '.join(faults)})")
        return (model, info) if wants_info else model

    def _get_static_cache_init_shape(self) -> None:
        """transformers 5 alone calls this, to allocate a static cache before a prompt is read in chunks: let layers do it."""

    def _get_cache(self, *args: Any, **kwargs: Any) -> Any:
        """transformers 4 alone calls this. A static cache that it would use again must have a size in every layer."""
        vars(self).pop("_cache", None)
        parent: Any = super()
        return parent._get_cache(*args, **kwargs)


def _shortened(keys: Any, limit: int = 5) -> str:
    """The first names of `keys`; mismatched ones come as (name, shape found, shape expected)."""
    texts = sorted(key if isinstance(key, str) else f"{key[0]} {list(key[1])} for {list(key[2])}" for key in keys)
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


# Saving such a model copies this file beside the weights and writes `auto_map`.
DeciLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")
