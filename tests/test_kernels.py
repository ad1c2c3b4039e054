"""The fused kernels compute what the plain forms do, and so do their gradients.

On a GPU if there is one. Without, in Triton's interpreter (pip install triton):

    TRITON_INTERPRET=1 python -m pytest tests/test_kernels.py

(Triton 3.6's interpreter fails in kernels that loop from a program's number with numpy 2.4: norms, and all that has them.)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
if not ON_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 and Triton", allow_module_level=True)
pytest.importorskip("triton")

from healing_run import CONFIG, packs, tiny_pair  # noqa: E402
from test_decoder import FAMILIES, TOKENS, family  # noqa: E402

import blocks.gptq  # noqa: E402
import blocks.kernels  # noqa: E402
import distill.loss  # noqa: E402
from blocks.formats import FORMATS, Quantized  # noqa: E402
from blocks.rounded_model import Rounding  # noqa: E402
from distill import kernels, operations  # noqa: E402
from distill.decoder import last_hidden, prepare  # noqa: E402
from distill.loss import chunked_kl  # noqa: E402
from distill.trainer import heal  # noqa: E402

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Switches between the plain forms and the kernels."""

    def switch(on: bool) -> None:
        for module in (operations, distill.loss):
            monkeypatch.setattr(module, "kernels_for", lambda tensor: kernels if on else None)

    yield switch


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def compare(
    fused: Callable[[bool], None],
    run: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: list[Tensor],
    tolerance: float,
) -> None:
    """Outputs and all gradients, by a random direction, of both forms."""
    results = []
    for on in (False, True):
        fused(on)
        outputs = run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        directions = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)) for i, o in enumerate(outputs)]
        total = sum(
            ((o.float() * d.to(DEVICE)).sum() for o, d in zip(outputs, directions, strict=True)), torch.tensor(0.0)
        )
        results.append([*outputs, *torch.autograd.grad(total, inputs)])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        scale = float(wanted.detach().abs().max())
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
@pytest.mark.parametrize("size", [48, 576])
def test_rounded_inputs_to_the_bit(
    fused: Callable[[bool], None], name: str, dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_kernels", lambda: kernels)
    rounding = Rounding(FORMATS[name], [])
    sizes = torch.tensor([1.0, 1e-3, 300.0, 0.0, 1e-30, 1e-42]).to(DEVICE)[:, None]  # of tokens
    x = random(6, size, dtype=dtype).detach() * sizes.to(dtype)
    grid = torch.linspace(-448, 448, size).to(DEVICE, dtype)  # many ties
    x = torch.stack([x, x.roll(1, 0), grid.expand(6, -1) / 64]).requires_grad_()
    wanted = rounding.inputs(x)
    fused(True)
    found = operations.round_inputs(x, rounding)
    assert found.dtype == dtype and not torch.equal(found, x)
    cut = 2**-7 if dtype == torch.bfloat16 and not ON_GPU else 0.0  # Triton's interpreter cuts to bf16, a GPU rounds
    torch.testing.assert_close(found, wanted, rtol=cut, atol=0.0)
    (gradient,) = torch.autograd.grad((found * grid).sum(), x)
    assert torch.equal(gradient, grid.expand_as(x))


@pytest.mark.parametrize("stored", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("bf16", "int4")])
@pytest.mark.parametrize(("rows", "columns"), [(40, 192), (100, 64)])
def test_gptq_of_a_block_of_columns(
    name: str, stored: torch.dtype | None, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    format = FORMATS[name]
    weight = (random(rows, columns).detach() * random(columns, seed=1).detach().exp()).bfloat16().float()
    inputs = random(500, columns, seed=2).detach() @ random(columns, columns, seed=3).detach()
    gram, nearest = (inputs.T @ inputs).double(), format.nearest(weight)
    assert blocks.kernels.rounds_to(format, stored)
    found = []
    for form in (blocks.gptq._round_block, blocks.kernels.round_block):
        monkeypatch.setattr(blocks.gptq, "_rounder", lambda *of, form=form: form)
        found.append(blocks.gptq._sweep(weight, gram, nearest, 0.01, stored))
    (plain, plain_master), (fused, fused_master) = found
    if not ON_GPU:  # there, a product and a sum are rounded once: a code in thousands falls to the other side
        assert torch.equal(plain, fused)
    assert float((plain.float() != fused.float()).float().mean()) < 0.02
    assert stored is None or torch.equal(fused_master.to(stored).float(), fused_master)
    errors = [
        float(blocks.gptq.output_error(Quantized(format, codes, nearest.scales).weight - weight, gram).sum())
        for codes in (nearest.codes, plain, fused)
    ]
    assert errors[1] < 0.9 * errors[0] and errors[2] == pytest.approx(errors[1], rel=0.02)
    assert torch.isfinite(plain_master).all()


def test_gptq_in_what_has_no_kernel_is_left_to_the_plain_form() -> None:
    assert not blocks.kernels.rounds_to(FORMATS["bf16"], None)
    assert not blocks.kernels.rounds_to(FORMATS["int8"], torch.float16)
    weight = torch.zeros(2, 2, device=DEVICE)
    assert not ON_GPU or blocks.gptq._rounder(weight, FORMATS["int8"], None) is blocks.kernels.round_block
    assert blocks.gptq._rounder(weight, FORMATS["bf16"], None) is blocks.gptq._round_block


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("size", [48, 256])
def test_add_norm(fused: Callable[[bool], None], dtype: torch.dtype, tolerance: float, size: int) -> None:
    inputs = [random(2, 7, size), random(2, 7, size, dtype=dtype, seed=1), random(size, seed=2)]
    compare(fused, lambda x, delta, w: operations.add_norm(x, delta, w, 1e-5, dtype), inputs, tolerance)
    # one of the two outputs alone
    compare(fused, lambda x, delta, w: operations.add_norm(x, delta, w, 1e-5, dtype)[1], inputs, tolerance)
    compare(fused, lambda x, delta, w: operations.add_norm(x, delta, w, 1e-5, dtype)[0] + 0 * w, inputs, tolerance)
    compare(fused, lambda x, w: operations.add_norm(x, None, w, 1e-5, dtype), [inputs[0], inputs[2]], tolerance)


def test_the_gradient_of_a_norms_weight_is_summed_over_more_tokens_than_programs(
    fused: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 4)
    inputs = [random(3, 7, 32), random(3, 7, 32, seed=1), random(32, seed=2)]
    compare(fused, lambda x, delta, w: operations.add_norm(x, delta, w, 1e-5, torch.float32), inputs, 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("heads", "turning", "size"), [(5, 4, 8), (4, 4, 16), (3, 2, 24)])
def test_rotate(
    fused: Callable[[bool], None], dtype: torch.dtype, tolerance: float, heads: int, turning: int, size: int
) -> None:
    cos, sin = (random(7, size, seed=seed).detach() for seed in (3, 4))  # any table, not only of rotations
    inputs = [random(2, 7, heads * size, dtype=dtype)]
    compare(fused, lambda x: operations.rotate(x.clone(), cos, sin, turning), inputs, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("width", [24, 1300])
def test_gated(fused: Callable[[bool], None], dtype: torch.dtype, tolerance: float, width: int) -> None:
    compare(fused, operations.gated, [random(2, 5, 2 * width, dtype=dtype)], tolerance)


@pytest.mark.parametrize(("compute", "tolerance"), [(None, 2e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("vocabulary", [101, 5000])
def test_loss(fused: Callable[[bool], None], compute: torch.dtype | None, tolerance: float, vocabulary: int) -> None:
    teacher = random(13, 24, seed=2).detach(), random(vocabulary, 24, seed=3).detach()
    weights = random(13, seed=4).detach().abs()

    def loss(hidden: Tensor, head: Tensor) -> Tensor:
        return chunked_kl(hidden, head, *teacher, weights=weights, chunk=5, compute_dtype=compute)

    compare(fused, loss, [random(13, 16), random(vocabulary, 16, seed=1)], tolerance)
    fused(True)
    with torch.no_grad():
        value = loss(random(13, 16), random(vocabulary, 16, seed=1))
    fused(False)
    assert value.item() == pytest.approx(loss(random(13, 16), random(vocabulary, 16, seed=1)).item(), rel=tolerance)


def test_equal_logits_have_no_loss_and_no_gradient(fused: Callable[[bool], None]) -> None:
    fused(True)
    hidden, head = random(6, 16), random(300, 16, seed=1)
    loss = chunked_kl(hidden, head, hidden.detach(), head.detach(), chunk=4)
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and hidden.grad.abs().max() == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_decoder(fused: Callable[[bool], None], name: str) -> None:
    model = family(name).to(DEVICE)
    assert prepare(model)
    states, gradients = [], []
    for on in (False, True):
        fused(on)
        again = copy.deepcopy(model)
        hidden = last_hidden(again, TOKENS.to(DEVICE), None)
        (hidden * random(*hidden.shape, seed=1).detach()).sum().backward()
        states.append(hidden)
        gradients.append({key: p.grad for key, p in again.named_parameters()})
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-5)
    for key, wanted in gradients[0].items():
        if wanted is not None:
            scale = float(wanted.abs().max())
            torch.testing.assert_close(gradients[1][key], wanted, rtol=1e-4, atol=1e-4 * scale, msg=key)


@pytest.mark.parametrize("name", ["llama", "biases", "qwen3"])
def test_a_whole_decoder_in_bfloat16(fused: Callable[[bool], None], name: str) -> None:
    """As near to fp32 as the plain forms: the kernels round less often (Triton's interpreter cuts off where a GPU rounds)."""
    allowed = 1.1 if ON_GPU else 2.2
    model = family(name).to(DEVICE)
    assert prepare(model)
    results = []
    for on, dtype in ((False, None), (False, torch.bfloat16), (True, torch.bfloat16)):
        fused(on)
        again = copy.deepcopy(model)
        hidden = last_hidden(again, TOKENS.to(DEVICE), dtype)
        (hidden * random(*hidden.shape, seed=1).detach()).sum().backward()
        grads = [p.grad.flatten() for p in again.parameters() if p.grad is not None]
        results.append((hidden.detach().float(), torch.cat(grads)))
    for exact, plain, found in zip(*results, strict=True):
        assert (found - exact).norm() < allowed * (plain - exact).norm()


def test_healing_with_the_kernels_is_healing_without(fused: Callable[[bool], None], tmp_path: Path) -> None:
    config = replace(CONFIG, tokens=2 * CONFIG.step_tokens, eval_tokens=32, device="auto")
    results = []
    for on in (False, True):
        fused(on)
        results.append(heal(config, *tiny_pair(), *packs(), tmp_path / str(on)))
    assert results[1].after.kl < results[1].before.kl
    assert results[1].before.kl == pytest.approx(results[0].before.kl, rel=1e-4)
    assert results[1].after.kl == pytest.approx(results[0].after.kl, rel=1e-3)


def test_what_the_kernels_cannot_compute_is_left_to_the_plain_forms() -> None:
    assert operations.kernels_for(torch.zeros(2, dtype=torch.float64, device=DEVICE)) is None
    assert operations.kernels_for(torch.zeros(2)) is None
    assert not ON_GPU or operations.kernels_for(torch.zeros(2, device=DEVICE)) is kernels
