"""Published children: counted against models that are built, loaded again with our model code, refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from app import nas, succeed
from tiny import LLAMA3_ROPE, byte_tokenizer
from transformers import AutoModelForCausalLM

from blocks.checkpoint import load_child
from blocks.child.configuration_decilm import DeciLMConfig
from blocks.child.layout import read_architecture
from blocks.child.modeling_decilm import DeciLMForCausalLM
from nas.importing import kinds_in_words, read_import

SUPER = Path(__file__).parent / "data" / "nemotron_super_49b_v1.config.json"
NO_ATTENTION, NO_FFN = {"n_heads_in_group": None, "no_op": True}, {"ffn_mult": None, "no_op": True}
LINEAR = {"n_heads_in_group": None, "replace_with_linear": True}


def block(attention: dict[str, Any] | int, ffn: dict[str, Any] | float) -> dict[str, Any]:
    """An entry of block_configs as NVIDIA publishes it; a number is a group size or an ffn_mult."""
    own_attention = {
        "n_heads_in_group": attention if isinstance(attention, int) else None,
        "no_op": False,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    own_ffn = {
        "ffn_mult": None if isinstance(ffn, dict) else ffn,
        "no_op": False,
        "replace_with_linear": False,
        "sparsify": None,
    }
    own_attention |= attention if isinstance(attention, dict) else {}
    return {
        "attention": own_attention,
        "ffn": own_ffn | (ffn if isinstance(ffn, dict) else {}),
        "parallel_blocks": None,
    }


def published(blocks: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A config.json as those of transformers 4.4x: global sizes null, the rotary embedding in its older spelling."""
    return {
        "_name_or_path": "published",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "attention_bias": False,
        "block_configs": blocks,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "hidden_act": "silu",
        "hidden_size": 8192,
        "intermediate_size": None,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "nemotron-nas",
        "num_attention_heads": 64,
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": None,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.48.3",
        "use_cache": True,
        "vocab_size": 128256,
        **fields,
    }


# As the child of the 405B: FFNs of runs without attention fused into one of several times the usual width, empty layers about it.
FUSED = published(
    [block(16, 4.875)] * 6
    + [block(NO_ATTENTION, NO_FFN)] * 3
    + [block(NO_ATTENTION, 39.0), block(16, 1.0)]
    + [block(NO_ATTENTION, NO_FFN), block(NO_ATTENTION, 14.625), block(16, 4.875)],
    hidden_size=16384,
    num_attention_heads=128,
)
# As the first of the children of the 70B: attentions replaced by a matrix, and several group sizes.
LINEARS = published(
    [block(8, 5.25), block(LINEAR, 2.625), block(16, 3.28125), block(64, 1.3125), block(LINEAR, NO_FFN)]
)


def built_parameters(config: dict[str, Any]) -> int:
    """Of the model that is really built, without memory."""
    with torch.device("meta"):
        model = DeciLMForCausalLM(DeciLMConfig(**config))
    return sum(parameter.numel() for parameter in model.parameters())


def saved(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory / "config.json"


def test_super_49b_to_the_parameter(tmp_path: Path) -> None:
    made = succeed("import", SUPER, "--run", tmp_path / "run", "--batch", 1, "--context", 131072, "--json").json
    found = made["architecture"]
    assert found["parameters"] == 49_867_145_216 == built_parameters(json.loads(SUPER.read_text()))
    assert found["kv_bytes_per_token"] == 200_704
    assert found["cost"]["kv_bytes"] == 200_704 * 131072
    assert found["cost"]["total_bytes"] == 2 * 49_867_145_216 + 200_704 * 131072
    assert len(found["layers"]) == 80
    assert (found["layers"][0], found["layers"][6]) == ("attention:kv8+ffn:14336", "attention:skip+ffn:14336")
    assert found["child"] is None


@pytest.mark.parametrize(("config", "kv_values"), [(FUSED, 8 * 8 * 2 * 128), (LINEARS, (8 + 4 + 1) * 2 * 128)])
def test_other_topologies_to_the_parameter(tmp_path: Path, config: dict[str, Any], kv_values: int) -> None:
    file = saved(tmp_path, config)
    found = succeed("import", file, "--run", tmp_path / "run", "--kv-dtype", "float32", "--json").json["architecture"]
    assert found["parameters"] == built_parameters(config)
    assert found["kv_bytes_per_token"] == 4 * kv_values
    shape, architecture = read_architecture(file)
    assert found["layers"] == architecture.to_list()
    assert shape.intermediate_size == max(layer.ffn.width for layer in architecture)


def test_fused_and_empty_layers_are_drawn_and_timed(tmp_path: Path) -> None:
    file = saved(tmp_path, FUSED)
    said = succeed("import", file, "--run", tmp_path / "run", "--clock", "H100")
    again = succeed("show", "--run", tmp_path / "run")
    assert said.out.startswith(again.out.rsplit("draw it again", 1)[0])
    assert "14: attention kv8 8, skip 6; FFNs 11,008 to 425,984 channels, skip 4; 4 layers empty" in " ".join(
        said.out.split()
    )
    assert "426k" in said.out and "(estimate)" in said.out
    # against the usual width, not against the widest: whole layers are drawn as whole
    found = read_import(tmp_path / "run")
    assert found is not None and found["shape"]["intermediate_size"] == 53248
    assert succeed("show", "--run", tmp_path / "run", "--json").json["architecture"] == found


def test_words_for_layers() -> None:
    _, architecture = read_architecture(LINEARS)
    assert kinds_in_words(architecture) == (
        "5: attention linear 2, kv8 1, kv4 1, kv1 1; FFNs 7,168 to 28,672 channels, skip 1; 0 layers empty"
    )


TINY_BLOCKS = [
    block(2, 4.0),
    block(NO_ATTENTION, NO_FFN),
    block(NO_ATTENTION, 40.0),
    block(LINEAR, 6.0),
    block(4, NO_FFN),
    block(1, 6.0),
]


def published_checkpoint(directory: Path) -> tuple[Path, torch.Tensor]:
    """A tiny checkpoint as it is published, with model code that no transformers of today runs; and its logits."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 272, "max_position_embeddings": 256}
    config = published(TINY_BLOCKS, **sizes, torch_dtype="float32", initializer_range=0.2)
    torch.manual_seed(4)
    model = DeciLMForCausalLM(DeciLMConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.save_pretrained(directory, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(directory)
    saved(directory, config)
    for name in ("configuration_decilm.py", "modeling_decilm.py"):
        (directory / name).write_text("raise ImportError('of an older transformers')\n")
    with torch.no_grad():
        return directory, model(torch.arange(12)[None]).logits


@pytest.mark.usefixtures("own_remote_code")
def test_a_published_checkpoint_loads_with_our_model_code(tmp_path: Path) -> None:
    source, logits = published_checkpoint(tmp_path / "published")
    before = {path.name: path.stat().st_mtime_ns for path in source.iterdir()}
    said = succeed("import", source, "--run", tmp_path / "run")
    child = tmp_path / "run" / "child"
    assert str(child) in said.out.replace("\n", "")
    assert {path.name: path.stat().st_mtime_ns for path in source.iterdir()} == before
    assert all(path.is_symlink() for path in child.glob("*.safetensors")) and len(list(child.glob("*.safetensors"))) > 1
    with torch.no_grad():
        torch.testing.assert_close(load_child(child)(torch.arange(12)[None]).logits, logits, rtol=0, atol=1e-5)
    config = json.loads((child / "config.json").read_text())
    assert config["block_configs"] == TINY_BLOCKS  # as they were, parallel_blocks included
    assert (config["num_key_value_heads"], config["intermediate_size"], config["eos_token_id"]) == (4, 1792, [2, 3])
    assert config["rope_scaling"]["rope_type"] == "llama3" and config["rope_theta"] == 500000.0
    model = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(12)[None]).logits, logits, rtol=0, atol=1e-5)


def test_importing_again_replaces_and_other_runs_are_kept(tmp_path: Path) -> None:
    source, _ = published_checkpoint(tmp_path / "published")
    for _ in range(2):
        succeed("import", source, "--run", tmp_path / "run")
    (tmp_path / "scored").mkdir()
    (tmp_path / "scored" / "config.yaml").write_text("parent: x\n")
    failed = nas("import", source, "--run", tmp_path / "scored")
    assert failed.code == 1 and "is a run that `nas score` began; import into another --run" in failed.err
    assert [path.name for path in (tmp_path / "scored").iterdir()] == ["config.yaml"]


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    source, _ = published_checkpoint(tmp_path / "published")
    saved(
        source, json.loads((source / "config.json").read_text()) | {"block_configs": [block(4, 4.0), *TINY_BLOCKS[1:]]}
    )
    failed = nas("import", source, "--run", tmp_path / "run")
    assert failed.code == 1 and len(failed.err.strip().splitlines()) == 1
    assert "model.layers.0.self_attn.k_proj.weight" in failed.err
    assert not (tmp_path / "run" / "child").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (published([block({**LINEAR, "colour": "red"}, 1.0)]), "block_configs[0].attention has unknown keys: colour"),
        (
            published([block({"n_heads_in_group": 8, "window_length": 512}, 1.0)]),
            "uses window_length, which this model",
        ),
        (published([{**block(8, 1.0), "parallel_blocks": [1]}]), "uses parallel_blocks, which this model"),
        (published([block(7, 1.0)]), "n_heads_in_group = 7 does not divide 64 attention heads"),
        (published([block(8, 1.0)] * 2, num_hidden_layers=3), "2 entries for num_hidden_layers = 3"),
        ({"model_type": "llama", "hidden_size": 64}, "is of model_type 'llama', not a child (nemotron-nas)"),
        (published([block(8, 1.0)]) | {"block_configs": None}, "has no block_configs"),
        (published([block(8, 1.0)], marquetry_format=9), "upgrade with `pip install -U marquetry`"),
    ],
)
def test_what_cannot_be_imported_is_one_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    failed = nas("import", saved(tmp_path, config), "--run", tmp_path / "run")
    assert failed.code == 1
    assert len(failed.err.strip().splitlines()) == 1
    assert message in failed.err
    assert not (tmp_path / "run").exists()


def test_nothing_there_is_one_line(tmp_path: Path) -> None:
    failed = nas("import", tmp_path / "none", "--run", tmp_path / "run")
    assert failed.code == 1 and "cannot read" in failed.err and len(failed.err.strip().splitlines()) == 1
