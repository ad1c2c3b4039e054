"""Writes a child as a GGUF file, for llama.cpp and what is built on it.

    write_gguf(Path("runs/a/healed"), Path("child.gguf"))

The architecture is llama.cpp's `deci`, whose head counts and FFN widths are arrays over the layers. llama.cpp's own converter takes
one vocabulary alone; this one takes every BPE vocabulary that llama.cpp splits alike (blocks/gguf_vocabulary.py). The layers are put
into the form that llama.cpp computes rightly (blocks/canonical.py): it drops an attention that stands without FFN, and
needs an attention in layer 0. Tensors are read and written one by one.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blocks.canonical import Form, Rewrite, canonical
from blocks.child.layout import expected_tensors, read_architecture, read_config
from blocks.errors import ConfigError, UnsupportedModelError
from blocks.files import write_atomically
from blocks.gguf_vocabulary import Vocabulary, read_vocabulary
from blocks.weights import WeightStore

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

FORM = Form(first_attention=True, ffn_after_attention=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.linear_attn": "attn_output",  # an attention of no KV heads: llama.cpp's form of a matrix
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# What llama.cpp does when a file says nothing, and this writer does not say.
_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}
_ROPE_FREQS = "rope_freqs.weight"


def write_gguf(child_dir: Path, out: Path, dtype: str | None = None) -> None:
    """Writes one GGUF file, whole or not at all.

    Args:
        child_dir: a child's checkpoint with its tokenizer.
        out: the file to write.
        dtype: of the matrices: "float32", "bfloat16" or "float16"; as stored if None. Norms and biases are fp32.

    Raises:
        ConfigError: if the package `gguf` is missing, or there is no such dtype.
        UnsupportedModelError: if llama.cpp has no form of the child.
        CheckpointError: if the child is damaged or the file cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("writing a GGUF file needs the package gguf: pip install gguf")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"no such dtype: {dtype}; write {', '.join(DTYPES)}")
    child_dir = Path(child_dir)
    shape, architecture = read_architecture(child_dir)
    config = dict(read_config(child_dir))
    if obstacles := list(gguf_obstacles(config)):
        raise UnsupportedModelError(f"llama.cpp cannot run {child_dir}: {'; '.join(obstacles)}")
    store = WeightStore(child_dir)
    store.check(expected_tensors(shape, architecture), only=True)
    rewrite = canonical(shape, architecture, FORM)
    vocabulary = read_vocabulary(child_dir, shape.vocab_size)
    matrices = DTYPES[dtype] if dtype else store.dtype
    write_atomically(
        Path(out), lambda temporary: _write(temporary, child_dir.name, config, rewrite, store, vocabulary, matrices)
    )


def gguf_obstacles(config: dict[str, Any]) -> Iterator[str]:
    """What of a child's config.json llama.cpp has no form of, in words; nothing if it serves the child."""
    linear = [index for index, block in enumerate(config["block_configs"]) if block["ffn"].get("replace_with_linear")]
    if linear:
        yield f"its FFN is one matrix in layers {', '.join(map(str, linear))}"
    if config.get("qk_norm"):
        yield "it normalises queries and keys (qk_norm)"
    if (kind := _rope(config).get("rope_type", "default")) not in ("default", "linear", "llama3", "yarn"):
        yield f"its rotary embedding is of type {kind}"
    if kind == "yarn" and (
        own := sorted(key for key, usual in _YARN.items() if _rope(config).get(key, usual) != usual)
    ):
        yield f"its rotary embedding is YaRN with {', '.join(own)} of its own"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"its activation is {config['hidden_act']}"


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary parameters, from the newer spelling or the older one."""
    old = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
    found = {**old, **(config.get("rope_parameters") or {})}
    return {"rope_type": found.get("type", "default"), **found}


def _write(
    path: Path,
    name: str,
    config: dict[str, Any],
    rewrite: Rewrite,
    store: WeightStore,
    vocabulary: Vocabulary,
    matrices: torch.dtype,
) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "deci")
    writer.add_name(name)
    _add_sizes(writer, config, rewrite, matrices)
    _add_rope(writer, config, rewrite.shape.head_dim)
    _add_vocabulary(writer, vocabulary)
    factors = rope_factors(_rope(config), rewrite.shape.head_dim)
    if factors is not None:
        _announce(writer, _ROPE_FREQS, tuple(factors.shape), torch.float32)
    # Every tensor is announced before the first is written, so that one at a time is held.
    for tensor, size in expected_tensors(rewrite.shape, rewrite.architecture).items():
        _announce(writer, gguf_name(tensor), size, _stored_as(size, matrices))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for tensor, values in rewrite.tensors(store.get):
        if ".q_proj." in tensor or ".k_proj." in tensor:
            values = interleaved(values, rewrite.shape.head_dim)
        writer.write_tensor_data(_array(values.to(_stored_as(tuple(values.shape), matrices))))
    writer.close()


def _stored_as(size: tuple[int, ...], matrices: torch.dtype) -> torch.dtype:
    return matrices if len(size) > 1 else torch.float32


def _announce(writer: GGUFWriter, name: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    import numpy as np

    nbytes = math.prod(size) * dtype.itemsize
    writer.add_tensor_info(name, size, np.dtype(np.float32), nbytes, raw_dtype=_ggml(dtype))


def _ggml(dtype: torch.dtype) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType as Type

    return {torch.float32: Type.F32, torch.bfloat16: Type.BF16, torch.float16: Type.F16}[dtype]


def _array(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor; numpy has no bfloat16."""
    return tensor.contiguous().view(torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype).numpy()


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order: it rotates neighbours, Hugging Face the halves of a head."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def gguf_name(tensor: str) -> str:
    """GGUF's name for a tensor of a child: model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    part, _, kind = tensor.rpartition(".")
    if part in _WHOLE:
        return f"{_WHOLE[part]}.{kind}"
    layer, _, within = part.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_NAMES[within]}.{kind}"


def _add_sizes(writer: GGUFWriter, config: dict[str, Any], rewrite: Rewrite, matrices: torch.dtype) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    shape, layers = rewrite.shape, list(rewrite.architecture)
    writer.add_block_count(len(layers))
    writer.add_context_length(int(config.get("max_position_embeddings", 2048)))
    writer.add_embedding_length(shape.hidden_size)
    writer.add_vocab_size(shape.vocab_size)
    # A matrix in the place of an attention has query heads and no KV heads; no attention has neither.
    writer.add_head_count([0 if layer.attention.kind == "skip" else shape.num_attention_heads for layer in layers])
    writer.add_head_count_kv([layer.attention.kv_heads for layer in layers])
    writer.add_feed_forward_length([layer.ffn.width for layer in layers])
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    types = {
        torch.float32: LlamaFileType.ALL_F32,
        torch.float16: LlamaFileType.MOSTLY_F16,
        torch.bfloat16: LlamaFileType.MOSTLY_BF16,
    }
    writer.add_file_type(types[matrices])
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_rope(writer: GGUFWriter, config: dict[str, Any], head_dim: int) -> None:
    """llama3's scaling is a tensor (`rope_factors`), the others are keys."""
    from gguf import RopeScalingType

    rope = _rope(config)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))


def rope_factors(rope: dict[str, Any], head_dim: int) -> Tensor | None:
    """What llama3's scaling divides each rotary frequency by, [head_dim / 2]; None for other kinds.

    Wavelengths below original / high_freq_factor are kept, above original / low_freq_factor divided by `factor`, and
    between the two blended, as in Llama 3.1.
    """
    if rope["rope_type"] != "llama3":
        return None
    frequency = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).float()


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.model == "gpt2":
        # An empty list would be left out, which llama.cpp refuses; this pair never stands in a text.
        writer.add_token_merges(vocabulary.merges or ["<none> <none>"])
    add = {"bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id, "unk": writer.add_unk_token_id}
    for role, index in vocabulary.special.items():
        {**add, "pad": writer.add_pad_token_id}[role](index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
