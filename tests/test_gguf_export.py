"""GGUF files of children: read back and computed as llama.cpp computes them, by a reader of our own and, where it is installed, by it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from numpy.typing import NDArray
from tiny import LLAMA3_ROPE, tiny_llama
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from blocks.checkpoint import load_child, write_child
from blocks.child.layout import expected_tensors
from blocks.errors import CheckpointError, ConfigError, NasError, UnsupportedModelError
from blocks.gguf_export import rope_factors, write_gguf
from blocks.gguf_vocabulary import read_vocabulary
from blocks.parent import open_parent
from blocks.spec import Architecture

Array = NDArray[np.float64]
# No attention in layer 0, attention and matrix alone, an empty layer, attention alone at the end: what llama.cpp gets wrong as it is.
LAYERS = [
    "attention:skip+ffn:512",
    "attention:kv1+ffn:skip",
    "attention:kv2+ffn:256",
    "attention:skip+ffn:skip",
    "attention:linear+ffn:skip",
    "attention:skip+ffn:1024",
    "attention:kv1+ffn:skip",
]
SIZES = {"hidden_size": 64, "num_hidden_layers": len(LAYERS), "intermediate_size": 512, "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 2.0, "original_max_position_embeddings": 64}
PARENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "own head_dim": {"head_dim": 24},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    "yarn": {"rope_parameters": YARN},
}
TEXT = "We'll see 12345 things, won't WE?\n\n  Naïve café: x=3.14; DON'T  stop…\t日本 🙂 end "
IDS = [(7 * index) % 251 for index in range(20)]


def make_child(directory: Path, layers: list[str] = LAYERS, dtype: str = "float32", **overrides: Any) -> Path:
    """A child with random tensors, norms and biases included."""
    parent_dir = tiny_llama(directory / "parent", **{**SIZES, **overrides})
    architecture = Architecture.from_list(layers)
    torch.manual_seed(3)
    tensors = {
        name: torch.randn(size) * 0.2 + ("norm" in name)
        for name, size in expected_tensors(open_parent(str(parent_dir)).shape, architecture).items()
    }
    write_child(directory / "child", parent_dir, architecture, tensors, dtype)
    return directory / "child"


def expected_log_probs(child: Path, ids: list[int] = IDS) -> Array:
    with torch.no_grad():
        return load_child(child)(torch.tensor([ids])).logits[0].double().log_softmax(-1).numpy()


def field(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(f"deci.{key}")
    return None if found is None else found.contents()


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotated(x: Array, reader: GGUFReader, factors: Array | None) -> Array:
    """Rotary embedding of neighbours, as ggml's normal mode. x: [length, heads, head_dim]."""
    length, _, dim = x.shape
    base = field(reader, "rope.freq_base")
    frequency = base ** -(np.arange(0, dim, 2) / dim) / (1.0 if factors is None else factors)
    size = 1.0
    if (kind := field(reader, "rope.scaling.type")) == "linear":
        frequency = frequency / field(reader, "rope.scaling.factor")
    elif kind == "yarn":
        factor, original = field(reader, "rope.scaling.factor"), field(reader, "rope.scaling.original_context_length")
        low, high = (dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in (32, 1))
        low, high = max(0, math.floor(low)), min(dim - 1, math.ceil(high))
        ramp = 1 - np.clip((np.arange(dim // 2) - low) / max(0.001, high - low), 0, 1)
        frequency = frequency / factor * (1 - ramp) + frequency * ramp
        size = 1 + 0.1 * math.log(factor)
    angle = np.arange(length)[:, None, None] * frequency
    one, other = x[..., 0::2], x[..., 1::2]
    cos, sin = np.cos(angle) * size, np.sin(angle) * size
    return np.stack([one * cos - other * sin, one * sin + other * cos], -1).reshape(x.shape)


def values(tensor: Any) -> Array:
    """A tensor of a GGUF file. [rows, columns], as a matrix of Hugging Face."""
    data = tensor.data
    if tensor.tensor_type.name == "BF16":
        data = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.asarray(data, dtype=np.float64).reshape([int(n) for n in tensor.shape[::-1]])


def deci_log_probs(file: Path, ids: list[int] = IDS) -> Array:
    """What llama.cpp's `deci` graph makes of a file, faults included: an attention without FFN adds nothing."""
    reader = GGUFReader(file)
    assert reader.get_field("general.architecture").contents() == "deci"  # type: ignore[union-attr]
    tensors = {tensor.name: values(tensor) for tensor in reader.tensors}
    eps, dim = field(reader, "attention.layer_norm_rms_epsilon"), field(reader, "attention.key_length")
    factors = tensors.get("rope_freqs.weight")
    counts = [field(reader, key) for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")]
    assert counts[0][0] > 0 and counts[1][0] > 0, "llama.cpp asks layer 0 for the size of a head"
    assert len(counts[0]) == field(reader, "block_count")
    x, length = tensors["token_embd.weight"][ids], len(ids)
    mask = np.triu(np.full((length, length), -np.inf), 1)
    for layer, (heads, kv_heads, width) in enumerate(zip(*counts, strict=True)):

        def project(h: Array, name: str, layer: int = layer) -> Array:
            return h @ tensors[f"blk.{layer}.{name}.weight"].T + tensors.get(f"blk.{layer}.{name}.bias", 0.0)

        after = x
        if heads and not kv_heads:
            after = x + project(rms_norm(x, tensors[f"blk.{layer}.attn_norm.weight"], eps), "attn_output")
        elif heads:
            h = rms_norm(x, tensors[f"blk.{layer}.attn_norm.weight"], eps)
            q, k, v = (project(h, f"attn_{part}").reshape(length, -1, dim) for part in "qkv")
            q, k = rotated(q, reader, factors), rotated(k, reader, factors)
            k, v = (np.repeat(part, heads // kv_heads, axis=1) for part in (k, v))
            weights = np.exp(np.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim) + mask)
            mixed = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
            after = x + project(mixed.reshape(length, -1), "attn_output")
        if not width:
            continue
        h = rms_norm(after, tensors[f"blk.{layer}.ffn_norm.weight"], eps)
        gate = project(h, "ffn_gate")
        x = after + project(gate / (1 + np.exp(-gate)) * project(h, "ffn_up"), "ffn_down")
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    logits = rms_norm(x, tensors["output_norm.weight"], eps) @ head.T
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", PARENTS)
def test_a_file_computes_what_the_child_computes(tmp_path: Path, name: str) -> None:
    child = make_child(tmp_path, **PARENTS[name])
    write_gguf(child, tmp_path / "child.gguf")
    assert np.abs(deci_log_probs(tmp_path / "child.gguf") - expected_log_probs(child)).max() < 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "child.gguf", "parent"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_matrices_in_half_precision_norms_in_full(tmp_path: Path, dtype: str) -> None:
    child = make_child(tmp_path, dtype=dtype)
    write_gguf(child, tmp_path / "child.gguf")
    kinds = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "child.gguf").tensors if len(tensor.shape) > 1}
    assert kinds == {{"bfloat16": "BF16", "float16": "F16"}[dtype]}
    norms = {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "child.gguf").tensors if "norm" in tensor.name}
    assert norms == {"F32"}
    assert np.abs(deci_log_probs(tmp_path / "child.gguf") - expected_log_probs(child)).max() < 1e-4
    write_gguf(child, tmp_path / "full.gguf", dtype="float32")
    assert {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "full.gguf").tensors} == {"F32"}
    assert np.abs(deci_log_probs(tmp_path / "full.gguf") - expected_log_probs(child)).max() < 1e-4


def test_rope_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=LLAMA3_ROPE)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = LLAMA3_ROPE["rope_theta"] ** -(torch.arange(0, 64, 2) / 64)  # type: ignore[operator]
    factors = rope_factors(LLAMA3_ROPE, 64)
    assert factors is not None
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)


def changed(child: Path, **fields: Any) -> Path:
    config = json.loads((child / "config.json").read_text())
    (child / "config.json").write_text(json.dumps({**config, **fields}))
    return child


def test_what_llama_cpp_cannot_compute_is_refused(tmp_path: Path) -> None:
    child = make_child(tmp_path, ["attention:kv2+ffn:512"] * 6 + ["attention:kv2+ffn:linear"])
    with pytest.raises(UnsupportedModelError, match="its FFN is one matrix in layers 6"):
        write_gguf(child, tmp_path / "child.gguf")
    child = make_child(tmp_path / "2")
    rope = {**YARN, "beta_fast": 16}
    with pytest.raises(UnsupportedModelError, match=r"qk_norm.*YaRN with beta_fast of its own"):
        write_gguf(changed(child, qk_norm=True, rope_parameters=rope), tmp_path / "child.gguf")
    with pytest.raises(ConfigError, match="no such dtype: int4"):
        write_gguf(child, tmp_path / "child.gguf", dtype="int4")
    assert not (tmp_path / "child.gguf").exists()


def test_a_damaged_child_writes_nothing(tmp_path: Path) -> None:
    child = make_child(tmp_path)
    (child / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        write_gguf(child, tmp_path / "child.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "parent"]


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def bytes_tokenizer(kind: str) -> Tokenizer:
    """A byte-level BPE trained on this file, its text split as `kind` says."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    split = {"llama-bpe": WORDS % r"\p{N}{1,3}", "qwen2": WORDS % r"\p{N}"}
    own_split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in split)
    steps: list[Any] = [own_split]
    if kind in split:
        from tokenizers import Regex

        steps.insert(0, pre_tokenizers.Split(Regex(split[kind]), "isolated"))
    elif kind == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else own_split
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"])
    tokenizer.train([__file__], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return tokenizer


def characters_tokenizer() -> Tokenizer:
    """As of Llama 2: characters, spaces written as a bar, bytes as a last resort."""
    unknown = ["<unk>", "<bos>", "<eos>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    named = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=unknown + named, limit_alphabet=90)
    tokenizer.train([__file__], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in unknown]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def save_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_vocabularies_over_bytes(tmp_path: Path, kind: str) -> None:
    tokenizer = bytes_tokenizer(kind)
    save_tokenizer(tmp_path, tokenizer)
    found = read_vocabulary(tmp_path, 512)
    assert (found.model, found.pre, found.add_bos, found.add_eos) == ("gpt2", kind, True, False)
    assert [tokenizer.token_to_id(token) for token in found.tokens[:501]] == list(range(501))
    assert found.tokens[501:] == [f"[PAD{index}]" for index in range(501, 512)]
    assert found.types == [3, 3] + [1] * 498 + [4] + [5] * 11  # control, normal, user-defined, unused
    assert found.special == {"bos": 0, "eos": 1}
    assert all(len(merge.split(" ")) == 2 for merge in found.merges) and not found.scores


def test_vocabularies_over_characters(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, characters_tokenizer())
    found = read_vocabulary(tmp_path, 600)
    assert (found.model, found.pre, found.merges) == ("llama", None, [])
    assert found.types[:3] == [2, 3, 3] and found.types[3:259] == [6] * 256
    merges = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"]
    earlier, later = (found.tokens.index("".join(merges[index])) for index in (0, -1))
    assert found.scores[earlier] == 0.0 > found.scores[later]


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, 512, "splits text in a way that llama.cpp is not known to"),
        ({"model": {"type": "Unigram", "vocab": []}}, 512, "of type 'Unigram'"),
        ({}, 300, "has a token 500, the embedding has 300 rows"),
    ],
)
def test_other_vocabularies_are_refused(tmp_path: Path, change: dict[str, Any], size: int, message: str) -> None:
    save_tokenizer(tmp_path, bytes_tokenizer("gpt-2"))
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(NasError, match=message):
        read_vocabulary(tmp_path, size)


def opened_by_llama_cpp(file: Path) -> Any:
    llama_cpp = pytest.importorskip("llama_cpp")
    # an fp32 cache: half precision alone would be an error of 1e-3
    return llama_cpp.Llama(str(file), logits_all=True, n_ctx=128, type_k=0, type_v=0, n_threads=1, verbose=False)


@pytest.mark.parametrize("name", PARENTS)
def test_llama_cpp_computes_what_the_child_computes(tmp_path: Path, name: str) -> None:
    child = make_child(tmp_path, **PARENTS[name])
    write_gguf(child, tmp_path / "child.gguf")
    model = opened_by_llama_cpp(tmp_path / "child.gguf")
    model.eval(IDS)
    found = torch.tensor(model.scores[: len(IDS)]).double().log_softmax(-1)
    assert (found - torch.from_numpy(expected_log_probs(child))).abs().max() < 2e-3


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "characters"])
def test_llama_cpp_reads_text_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    tokenizer = characters_tokenizer() if kind == "characters" else bytes_tokenizer(kind)
    child = make_child(tmp_path, vocab_size=600)
    save_tokenizer(child, tokenizer)
    write_gguf(child, tmp_path / "child.gguf")
    model = opened_by_llama_cpp(tmp_path / "child.gguf")
    wanted = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert model.tokenize(TEXT.encode(), add_bos=False, special=True) == wanted
    assert (model.token_bos(), model.token_eos()) == (tokenizer.token_to_id("<bos>"), tokenizer.token_to_id("<eos>"))


def test_q_and_k_rows_change_places_within_a_head() -> None:
    from blocks.gguf_export import interleaved

    rows: Tensor = torch.arange(16)[:, None]
    assert interleaved(rows, 8)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
