"""The child's model code: parity with its parent, caches, masks, gradients, and loading without this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA3_ROPE, TINY, spoil, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config, Qwen3Config

from blocks.checkpoint import load_child, write_child
from blocks.child.configuration_decilm import DeciLMConfig, block_config
from blocks.child.modeling_decilm import DeciLMForCausalLM
from blocks.spec import Architecture

PARENTS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4},
    "own head_dim": {"head_dim": 24},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "padded width": {"intermediate_size": 300, "mlp_bias": True},
}
MIXED = DeciLMConfig(
    **{**TINY, "num_hidden_layers": 6},
    block_configs=[
        block_config(None, 4.0),
        block_config("linear", "linear"),
        block_config(4, 6.0),
        block_config(None, None),
        block_config(2, None),
        block_config(1, "linear"),
    ],
)


def mixed_child(implementation: str = "sdpa", **fields: object) -> DeciLMForCausalLM:
    """A random child with every kind of subblock; its first two layers have no attention."""
    torch.manual_seed(1)
    config = DeciLMConfig.from_dict({**MIXED.to_dict(), **fields})
    config._attn_implementation = implementation
    return DeciLMForCausalLM(config).eval()


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(2))


def parent_architecture(config: object) -> Architecture:
    layer = f"attention:kv{config.num_key_value_heads}+ffn:{config.intermediate_size}"  # type: ignore[attr-defined]
    return Architecture.from_list([layer] * config.num_hidden_layers)  # type: ignore[attr-defined]


def assert_child_equals_parent(parent_dir: Path, child_dir: Path) -> DeciLMForCausalLM:
    parent = AutoModelForCausalLM.from_pretrained(parent_dir)
    write_child(child_dir, parent_dir, parent_architecture(parent.config), parent.state_dict(), "float32")
    child = load_child(child_dir)
    with torch.no_grad():
        torch.testing.assert_close(child(tokens()).logits, parent(tokens()).logits, rtol=0, atol=1e-5)
    return child


@pytest.mark.parametrize("overrides", PARENTS.values(), ids=PARENTS.keys())
def test_all_parent_child_equals_parent(tmp_path: Path, overrides: dict[str, object]) -> None:
    assert_child_equals_parent(tiny_llama(tmp_path / "parent", **overrides), tmp_path / "child")


@pytest.mark.parametrize("config_class", [Qwen2Config, Qwen3Config])
def test_qwen_parents(tmp_path: Path, config_class: type) -> None:
    torch.manual_seed(0)
    parent = AutoModelForCausalLM.from_config(config_class(**TINY))
    for name, parameter in parent.named_parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    parent.save_pretrained(tmp_path / "parent")
    assert_child_equals_parent(tmp_path / "parent", tmp_path / "child")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_generation_with_cache_equals_without(implementation: str, qk_norm: bool) -> None:
    child, prompt = mixed_child(implementation, qk_norm=qk_norm), tokens()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        child.generate(prompt, use_cache=True, **settings), child.generate(prompt, use_cache=False, **settings)
    )
    assert torch.equal(
        child.generate(prompt, cache_implementation="static", disable_compile=True, **settings),
        child.generate(prompt, use_cache=False, **settings),
    )


def test_cached_steps_give_the_logits_of_one_pass() -> None:
    child, ids = mixed_child(), tokens()
    cache = DynamicCache(config=child.config)
    with torch.no_grad():
        whole = child(ids).logits
        steps = [child(part, past_key_values=cache).logits for part in (ids[:, :7], ids[:, 7:8], ids[:, 8:])]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padding_changes_nothing(implementation: str) -> None:
    child, ids = mixed_child(implementation), tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    padded = child.generate(ids, attention_mask=mask, **settings)
    alone = child.generate(ids[:1, 4:], **settings)
    assert torch.equal(padded[0, 12:], alone[0, 8:])


def test_only_attentions_fill_the_cache_each_at_its_layer() -> None:
    child = mixed_child()
    assert [layer.self_attn.layer_idx for layer in child.model.layers if hasattr(layer.self_attn, "layer_idx")] == [
        2,
        4,
        5,
    ]
    cache = child(tokens(), use_cache=True).past_key_values
    values = {
        index: layer.keys.shape[1] * layer.keys.shape[3]
        for index, layer in enumerate(cache.layers)
        if layer.is_initialized
    }
    assert values == {0: 1, 2: 1 * 16, 4: 2 * 16, 5: 4 * 16}  # layer 0 has no attention and counts tokens
    assert cache.get_seq_length() == 12


def test_a_child_without_any_attention_generates() -> None:
    child = mixed_child(block_configs=[block_config(None, 6.0)] * 6)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(child.generate(tokens(), **settings), child.generate(tokens(), use_cache=False, **settings))


def test_sdpa_equals_eager_and_hidden_states_are_one_per_layer() -> None:
    child = mixed_child()
    with torch.no_grad():
        sdpa = child(tokens(), output_hidden_states=True)
        child.set_attn_implementation("eager")
        eager = child(tokens(), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(sdpa.logits, eager.logits, rtol=0, atol=1e-4)
    assert len(sdpa.hidden_states) == 7
    assert torch.equal(sdpa.hidden_states[3], sdpa.hidden_states[4])  # layer 3 is empty
    assert len(eager.attentions) == 3


def test_logits_to_keep() -> None:
    child = mixed_child()
    torch.testing.assert_close(child(tokens(), logits_to_keep=1).logits, child(tokens()).logits[:, -1:])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        child = mixed_child().train()
        if checkpointing:
            child.gradient_checkpointing_enable()
        child(tokens(), labels=tokens()).loss.backward()
        return [parameter.grad for parameter in child.parameters() if parameter.grad is not None]

    plain, checkpointed = gradients(False), gradients(True)
    assert len(plain) == len(list(mixed_child().parameters()))
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_save_and_load_round_trip(tmp_path: Path, tied: bool) -> None:
    child = mixed_child(tie_word_embeddings=tied, qk_norm=True)
    child.save_pretrained(tmp_path)
    loaded = load_child(tmp_path)
    assert torch.equal(loaded(tokens()).logits, child(tokens()).logits)
    assert loaded.config.block_configs == child.config.block_configs
    assert (tmp_path / "modeling_decilm.py").is_file() and (tmp_path / "configuration_decilm.py").is_file()


def test_loads_in_a_process_that_has_only_transformers(tmp_path: Path) -> None:
    child = mixed_child()
    child.save_pretrained(tmp_path / "child")
    torch.save((tokens(), child(tokens()).logits.detach()), tmp_path / "expected.pt")
    program = f"""
import sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM
ids, logits = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "child")!r}, trust_remote_code=True)
assert "blocks" not in sys.modules
torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
model.save_pretrained({str(tmp_path / "again")!r})
from safetensors.torch import load_file, save_file
tensors = load_file({str(tmp_path / "child" / "model.safetensors")!r})
tensors.pop("model.layers.2.mlp.up_proj.weight")
save_file(tensors, {str(tmp_path / "child" / "model.safetensors")!r}, metadata={{"format": "pt"}})
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path / "child")!r}, trust_remote_code=True)
except ValueError as error:
    assert "missing: model.layers.2.mlp.up_proj.weight" in str(error), error
else:
    raise SystemExit("a missing tensor was not noticed")
"""
    # -I hides this repository (the current directory and PYTHONPATH) from the process
    environment = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    load_child(tmp_path / "again")


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path: Path, fault: str) -> None:
    mixed_child().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(spoil(load_file(file), fault, layer=2), file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{fault}: model.layers.\d.self_attn.k_proj.weight"):
        DeciLMForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_callers_loading_info_is_honoured(tmp_path: Path) -> None:
    mixed_child().save_pretrained(tmp_path)
    _, info = DeciLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


def with_attention(key: str, value: object) -> list[dict]:
    blocks = [block_config(2, 12.0) for _ in range(4)]
    blocks[1]["attention"][key] = value
    return blocks


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([block_config(2, 12.0)] * 3, "3 entries for num_hidden_layers = 4"),
        (with_attention("colour", "red"), r"block_configs\[1\].attention has unknown keys: colour"),
        (with_attention("n_heads_in_group", 3), "n_heads_in_group = 3 does not divide 4 attention heads"),
        (with_attention("n_heads_in_group", None), "n_heads_in_group = None does not divide"),
        (with_attention("window_length", 512), "uses window_length, which this model code does not implement"),
        ([block_config(2, 12.0)] * 3 + [block_config(2, -1.0)], r"block_configs\[3\].ffn.ffn_mult = -1.0"),
        ([{"attention": {}}] * 4, r"block_configs\[0\]"),
    ],
)
def test_wrong_block_configs_are_named(blocks: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeciLMConfig(**TINY, block_configs=blocks)
