"""Children in the installed transformers, in every way that it runs a model, and in stock mlx-lm; that a difference is noticed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import TINY, byte_tokenizer

from blocks.child.configuration_decilm import DeciLMConfig, block_config
from blocks.child.modeling_decilm import DeciLMForCausalLM

SIZES = {**TINY, "num_hidden_layers": 6, "initializer_range": 0.3}
# Layer 0 has no attention, layer 1 a matrix: where caches of transformers are asked for their length.
EVERY_KIND = [
    block_config(None, 4.0),
    block_config("linear", "linear"),
    block_config(4, 6.0),
    block_config(None, None),
    block_config(2, None),
    block_config(1, "linear"),
]
# What mlx-lm loads as it is: it has another name for the matrix.
NO_MATRIX = [block_config(None, 4.0), block_config(1, None), block_config(4, 40.0), block_config(None, None)]
NO_MATRIX += [block_config(2, 6.0), block_config(None, 1.0)]
MODULE = Path(__file__).parent.parent / "benchmarks" / "clients.py"


@pytest.fixture(scope="module")
def clients() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clients", MODULE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.usefixtures("own_remote_code")


def make_child(directory: Path, blocks: list[dict[str, Any]], **fields: Any) -> Path:
    """A random child with the reference that plain forward passes give."""
    torch.manual_seed(5)
    model = DeciLMForCausalLM(DeciLMConfig(**SIZES, block_configs=blocks, **fields)).eval()
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    words = ("Once upon", "The quick brown fox jumps over the lazy dog")
    prompt, text = (byte_tokenizer()(part, add_special_tokens=False)["input_ids"] for part in words)
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(24):
            tokens.append(int(model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].argmax()))
        log_probs = model(torch.tensor([text]), use_cache=False).logits[0, :-1].log_softmax(-1)
    chosen = log_probs.gather(1, torch.tensor(text[1:])[:, None])[:, 0].tolist()
    layers = ["-"] * len(blocks)
    reference = {"prompt": prompt, "tokens": tokens, "text": text, "log_probs": chosen, "layers": layers}
    (directory / "reference.json").write_text(json.dumps(reference))
    return directory


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_installed_transformers(
    clients: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], qk_norm: bool
) -> None:
    child = make_child(tmp_path / "child", EVERY_KIND, qk_norm=qk_norm)
    status = clients.main(["transformers", str(child)])
    said = capsys.readouterr().out
    assert status == 0, said
    ways = ("dynamic cache", "static cache again", "left padding, static cache", "3 beams", "eager attention")
    assert all(way in said for way in (*ways, "hidden states", "checkpointed gradient"))
    assert said.count("24/24") == 8


def test_a_difference_is_noticed(clients: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    child = make_child(tmp_path / "child", NO_MATRIX)
    reference = json.loads((child / "reference.json").read_text())
    reference["tokens"][20] = (reference["tokens"][20] + 1) % 256
    reference["log_probs"][3] += 3e-3
    (child / "reference.json").write_text(json.dumps(reference))
    assert clients.main(["transformers", str(child)]) == 1
    said = capsys.readouterr().out
    assert "20/24" in said and "3.0e-03  missed" in said
    assert "checkpointed gradient" in said and said.splitlines()[-1].endswith("0.0e+00")  # what is right is not missed


@pytest.mark.parametrize("tied", [False, True])
def test_stock_mlx_lm(clients: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool) -> None:
    pytest.importorskip("mlx_lm")
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    child = make_child(tmp_path / "child", NO_MATRIX, tie_word_embeddings=tied, rope_parameters=rope)
    status = clients.main(["mlx", str(child)])
    said = capsys.readouterr().out
    assert status == 0, said
    assert said.count("24/24") == 1
