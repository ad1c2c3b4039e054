"""Healing a real heterogeneous child, from the parent's tensors to a checkpoint that is written, healed and written back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from healing_run import CONFIG
from tiny import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from blocks.checkpoint import check_child, expected_tensors, load_child, write_child
from blocks.child.layout import shape_of
from blocks.spec import Architecture
from distill.trainer import heal

MIXED = Architecture.from_list(
    ["attention:kv2+ffn:256", "attention:linear+ffn:linear", "attention:skip+ffn:512", "attention:kv1+ffn:skip"]
)


def cut_from(parent: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a `MIXED` child: the leading rows and columns of the parent's; the identity where it has none."""
    tensors, sizes = parent.state_dict(), expected_tensors(shape_of(parent.config), MIXED)
    return {
        name: tensors[name][tuple(map(slice, size))] if name in tensors else torch.eye(*size) * 0.1
        for name, size in sizes.items()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_a_heterogeneous_child_heals_and_is_written_back(tmp_path: Path, tied: bool) -> None:
    parent_dir = tiny_llama(tmp_path / "parent", tie_word_embeddings=tied)
    parent = AutoModelForCausalLM.from_pretrained(parent_dir)
    write_child(tmp_path / "child", parent_dir, MIXED, cut_from(parent), "float32")
    child = load_child(tmp_path / "child")
    before = {name: tensor.clone() for name, tensor in child.state_dict().items()}

    tokens = np.random.default_rng(0).integers(256, size=(40, 16), dtype=np.uint16)
    result = heal(CONFIG, parent, child, tokens[:32], tokens[32:], tmp_path / "run")
    assert result.after.kl < 0.95 * result.before.kl
    unchanged = [name for name, tensor in child.state_dict().items() if torch.equal(tensor, before[name])]
    assert not unchanged, "every subblock learns"

    write_child(tmp_path / "healed", parent_dir, MIXED, child.state_dict(), "float32")
    check_child(tmp_path / "healed")
    ids = torch.from_numpy(tokens[:2].astype(np.int64))
    with torch.no_grad():
        assert torch.equal(load_child(tmp_path / "healed")(ids).logits, child.eval()(ids).logits)
