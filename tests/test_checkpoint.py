"""Children on disk: counts to the byte, NVIDIA's exact keys, checked and atomic writing, and refusing damage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import TINY, spoil, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import blocks.checkpoint as checkpoint
from blocks.checkpoint import (
    as_built,
    check_child,
    child_config,
    expected_tensors,
    load_child,
    read_architecture,
    write_child,
)
from blocks.child.layout import shape_of as shape_of_config
from blocks.child.modeling_decilm import DeciLMForCausalLM
from blocks.errors import CheckpointError
from blocks.shape import ModelShape
from blocks.spec import Architecture

PUBLISHED = Path(__file__).parent / "data" / "nemotron_super_49b_v1.config.json"
MIXED = Architecture.from_list(
    ["attention:skip+ffn:256", "attention:linear+ffn:linear", "attention:kv1+ffn:skip", "attention:kv2+ffn:512"]
)


@pytest.fixture(scope="module")
def parent_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("parent"))


def random_tensors(parent_dir: Path, architecture: Architecture = MIXED) -> dict[str, Tensor]:
    """A child's tensors, random, in an unhelpful order."""
    shape = shape_of(parent_dir)
    generator = torch.Generator().manual_seed(0)
    sizes = sorted(expected_tensors(shape, architecture).items())
    return {name: torch.randn(size, generator=generator) for name, size in sizes}


def shape_of(parent_dir: Path) -> ModelShape:
    return shape_of_config(LlamaConfig.from_pretrained(parent_dir))


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_published_49b_to_the_parameter_and_byte() -> None:
    shape, architecture = read_architecture(PUBLISHED)
    assert shape.parameters(architecture) == 49_867_145_216
    assert sum(2 * shape.kv_values_per_token(layer.attention) for layer in architecture) == 200_704
    assert (shape.num_key_value_heads, shape.intermediate_size) == (8, 28672)
    assert read_architecture(json.loads(PUBLISHED.read_text())) == (shape, architecture)


def test_our_block_configs_have_exactly_the_published_keys_and_values(parent_dir: Path) -> None:
    content = json.loads(PUBLISHED.read_text())
    _, architecture = read_architecture(content)
    parent = {**content, "model_type": "llama", "intermediate_size": 28672, "num_key_value_heads": 8}
    del parent["block_configs"], parent["auto_map"], parent["architectures"]
    config = child_config(parent, architecture, "bfloat16")
    written = json.loads(config.to_json_string())
    assert read_architecture(written)[1] == architecture
    for ours, theirs in zip(written["block_configs"], content["block_configs"], strict=True):
        # several ffn_mult mean the same width; whether there is one at all must agree
        assert (ours["ffn"].pop("ffn_mult") is None) == (theirs["ffn"].pop("ffn_mult") is None)
        assert ours == theirs
    same = ("architectures", "auto_map", "model_type", "rope_theta", "rope_scaling", "torch_dtype", "vocab_size")
    assert {key: written[key] for key in same} == {key: content[key] for key in same}
    assert [*written["block_configs"][0]["attention"]] == [*content["block_configs"][0]["attention"]]


def test_config_has_both_spellings_and_global_integers(parent_dir: Path, tmp_path: Path) -> None:
    write_child(tmp_path / "child", parent_dir, MIXED, random_tensors(parent_dir), "bfloat16")
    config = json.loads((tmp_path / "child" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert (config["num_key_value_heads"], config["intermediate_size"], config["marquetry_format"]) == (2, 512, 1)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_counts_equal_the_built_model_to_the_byte(tmp_path: Path, overrides: dict[str, Any], dtype: str) -> None:
    parent = tiny_llama(tmp_path / "parent", **overrides)
    write_child(tmp_path / "child", parent, MIXED, random_tensors(parent), dtype)
    shape, architecture = read_architecture(tmp_path / "child")
    assert (shape, architecture) == as_built(shape_of(parent), MIXED)
    model = load_child(tmp_path / "child", getattr(torch, dtype))
    assert sum(p.numel() for p in model.parameters()) == shape.parameters(architecture)
    with safe_open(tmp_path / "child" / "model.safetensors", framework="pt") as tensors:
        stored = sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert stored == shape.parameters(architecture) * getattr(torch, dtype).itemsize


def test_expected_tensors_are_those_of_the_model(parent_dir: Path) -> None:
    shape = dataclasses.replace(shape_of(parent_dir), qk_norm=True, qkv_bias=True, o_bias=True)
    parent = {**TINY, "model_type": "nemotron-nas", "qk_norm": True, "attention_bias": True}
    parent["block_configs"] = child_config(
        {**TINY, "model_type": "llama"}, shape.parent_architecture, "float32"
    ).block_configs
    model = DeciLMForCausalLM(child_config(parent, MIXED, "float32"))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected_tensors(shape, MIXED)


def test_widths_off_256_are_padded_exactly(tmp_path: Path) -> None:
    parent = tiny_llama(tmp_path / "parent", intermediate_size=300)
    shape = shape_of(parent)
    built_shape, built = as_built(shape, shape.parent_architecture)
    assert built_shape.intermediate_size == 512
    tensors = AutoModelForCausalLM.from_pretrained(parent).state_dict()
    write_child(tmp_path / "child", parent, shape.parent_architecture, tensors, "float32")
    child = load_child(tmp_path / "child")
    assert sum(p.numel() for p in child.parameters()) == built_shape.parameters(built)
    assert not child.model.layers[0].mlp.down_proj.weight[:, 300:].any()
    # a healed child is written from its padded tensors
    write_child(tmp_path / "again", parent, shape.parent_architecture, child.state_dict(), "float32")
    check_child(tmp_path / "again")


def test_shards_have_an_index_and_pairs_may_stream(parent_dir: Path, tmp_path: Path) -> None:
    tensors = random_tensors(parent_dir)
    write_child(tmp_path / "child", parent_dir, MIXED, iter(tensors.items()), "float32", shard_bytes=100_000)
    index = json.loads((tmp_path / "child" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in tensors.values())
    for name, tensor in load_child(tmp_path / "child").state_dict().items():
        assert torch.equal(tensor, tensors[name])
    (tmp_path / "child" / files[-1]).unlink()
    with pytest.raises(CheckpointError, match=files[-1]):
        check_child(tmp_path / "child")


def test_slices_of_one_matrix_can_be_written(parent_dir: Path, tmp_path: Path) -> None:
    tensors = random_tensors(parent_dir)
    fused = torch.randn(1024, 64)
    tensors["model.layers.3.mlp.gate_proj.weight"], tensors["model.layers.3.mlp.up_proj.weight"] = fused.split(512)
    write_child(tmp_path / "child", parent_dir, MIXED, tensors, "float32")
    assert torch.equal(load_child(tmp_path / "child").model.layers[3].mlp.up_proj.weight, fused[512:])


def test_the_tokenizer_comes_along(parent_dir: Path, tmp_path: Path) -> None:
    write_child(tmp_path / "child", parent_dir, MIXED, random_tensors(parent_dir), "float32")
    text = "Layers differ."
    child, parent = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "child", parent_dir))
    assert child(text)["input_ids"] == parent(text)["input_ids"]
    assert files_of(tmp_path / "child")["tokenizer.json"] == files_of(parent_dir)["tokenizer.json"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "missing: model.layers.3.self_attn.k_proj.weight"),
        ("unexpected", "layers.0.self_attn.k_proj.weight is not a tensor of this architecture"),
        ("mismatched", r"k_proj.weight has shape \[8, 64\], the architecture needs \[32, 64\]"),
    ],
)
def test_wrong_tensors_leave_the_old_child(parent_dir: Path, tmp_path: Path, fault: str, message: str) -> None:
    write_child(tmp_path / "child", parent_dir, MIXED, random_tensors(parent_dir), "float32")
    before = files_of(tmp_path / "child")
    with pytest.raises(CheckpointError, match=message):
        write_child(tmp_path / "child", parent_dir, MIXED, spoil(random_tensors(parent_dir), fault, layer=3), "float32")
    assert files_of(tmp_path / "child") == before
    assert [file.name for file in tmp_path.iterdir()] == ["child"]


def test_a_full_disk_leaves_nothing(parent_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_child(tmp_path / "child", parent_dir, MIXED, random_tensors(parent_dir), "float32")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_child_and_the_next_replaces_it(parent_dir: Path, tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from list(random_tensors(parent_dir).items())[:5]
        raise KeyboardInterrupt

    write_child(tmp_path / "child", parent_dir, MIXED, random_tensors(parent_dir), "float32")
    before = files_of(tmp_path / "child")
    with pytest.raises(KeyboardInterrupt):
        write_child(tmp_path / "child", parent_dir, MIXED, interrupted(), "float32")
    assert files_of(tmp_path / "child") == before
    (tmp_path / ".child.tmp").mkdir()  # as a killed process leaves it
    write_child(tmp_path / "child", parent_dir, MIXED, random_tensors(parent_dir), "bfloat16")
    assert files_of(tmp_path / "child") != before
    assert [file.name for file in tmp_path.iterdir()] == ["child"]


def test_a_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    parent = tiny_llama(tmp_path / "parent", tie_word_embeddings=True)
    tensors = random_tensors(parent)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    write_child(tmp_path / "child", parent, MIXED, tensors, "float32")
    check_child(tmp_path / "child")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match="the parent ties them"):
        write_child(tmp_path / "child", parent, MIXED, tensors, "float32")


def test_an_architecture_of_another_parent_is_refused(parent_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 layers, its parent 4"):
        write_child(tmp_path / "child", parent_dir, Architecture(MIXED.layers[:2]), {}, "float32")


def test_damaged_children_are_refused(parent_dir: Path, tmp_path: Path) -> None:
    child = tmp_path / "child"
    write_child(child, parent_dir, MIXED, random_tensors(parent_dir), "float32")
    weights = (child / "model.safetensors").read_bytes()
    (child / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load_child(child)
    (child / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_child(child)
    (child / "model.safetensors").write_bytes(weights)
    config = json.loads((child / "config.json").read_text())
    config["block_configs"][0]["ffn"] = config["block_configs"][3]["ffn"]
    (child / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"do not fit its config.json: model\.layers\.0\.mlp\.gate_proj\.weight"):
        load_child(child)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"marquetry_format": 3}, "written by a newer version"),
        ({"model_type": "llama"}, "is of model_type 'llama', not a child"),
        ({"block_configs": None}, "has no block_configs"),
        ({"num_hidden_layers": 79}, "80 entries for num_hidden_layers = 79"),
    ],
)
def test_configurations_of_other_kinds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_architecture({**json.loads(PUBLISHED.read_text()), **changes})


def test_an_unreadable_configuration_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json"):
        read_architecture(tmp_path)
