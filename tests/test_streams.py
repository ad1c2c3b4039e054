"""Losses on the residual stream, and the student's module as a whole, against references through transformers alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_decoder import family
from test_heal_child import MIXED
from tiny import TINY, tiny_llama
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from blocks.checkpoint import expected_tensors, load_child, write_child
from blocks.child.layout import shape_of
from blocks.errors import ConfigError
from blocks.spec import Architecture
from distill.loss import chunked_kl
from distill.models import FrozenTeacher, StudentLoss, check_pair
from distill.objective import Objective
from distill.streams import CosineTerm, StreamRecord, streams_of

TOKENS = torch.randint(256, (3, 13), generator=torch.Generator().manual_seed(0))
LENGTHS = [13, 9, 4]
MASK = torch.arange(13) < torch.tensor(LENGTHS)[:, None]
WITH_EMPTY = Architecture.from_list(
    ["attention:kv2+ffn:256", "attention:linear+ffn:skip", "attention:skip+ffn:skip", "attention:skip+ffn:linear"]
)
OBJECTIVES = [
    Objective("kl"),
    Objective("jsd", jsd_beta=0.3),
    Objective("ce"),
    Objective("bld"),
    Objective("kl", cosine=0.7),
    Objective("ce", cosine=2.0),
]


def named(objective: Objective) -> str:
    return f"{objective.loss}{'+cosine' if objective.cosine else ''}"


def cut(parent: Any, architecture: Architecture) -> dict[str, Tensor]:
    """A child's tensors: the leading rows and columns of the parent's, and a tenth of the identity where it has none."""
    tensors, sizes = parent.state_dict(), expected_tensors(shape_of(parent.config), architecture)
    return {
        name: tensors[name][tuple(map(slice, size))] if name in tensors else torch.eye(*size) * 0.1
        for name, size in sizes.items()
    }


@pytest.fixture(scope="module", params=["mixed", "empty layer, tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Parent and child in fp64."""
    directory = tmp_path_factory.mktemp("pair")
    tied = request.param != "mixed"
    parent_dir = tiny_llama(directory / "parent", tie_word_embeddings=tied)
    parent = AutoModelForCausalLM.from_pretrained(parent_dir)
    architecture = WITH_EMPTY if tied else MIXED
    write_child(directory / "child", parent_dir, architecture, cut(parent, architecture), "float32")
    return parent.double(), load_child(directory / "child").double()


# References, in transformers' own words


def all_streams(model: Any, tokens: Tensor) -> list[Tensor]:
    """L + 1 streams. transformers' own list ends after the final norm: that one is had from the norm's input."""
    last: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    found = model(tokens, output_hidden_states=True).hidden_states
    handle.remove()
    assert torch.equal(found[-1], model.model.norm(last[0]))
    return [*found[:-1], last[0]]


def one_layer(model: Any, index: int, stream: Tensor) -> Tensor:
    """One layer on a stream, by transformers."""
    cos_sin = model.model.rotary_emb(stream, torch.arange(stream.shape[1])[None])
    length = stream.shape[1]
    causal = torch.full((length, length), -torch.inf, dtype=stream.dtype).triu(1)[None, None]
    layer = model.model.layers[index]
    inner = type(layer).__mro__[1] if hasattr(layer, "runs_fused") else type(layer)
    out: Tensor = inner.forward(layer, stream, attention_mask=causal, position_embeddings=cos_sin)
    return out


def reference(objective: Objective, parent: Any, child: Any) -> Tensor:
    """Sequence by sequence, without padding: the sum over predicting positions over their count."""
    total: Any = 0.0
    for row, length in zip(TOKENS, LENGTHS, strict=True):
        tokens = row[None, :length]
        theirs, ours = [s[0, :-1].detach() for s in all_streams(parent, tokens)], all_streams(child, tokens)
        if objective.loss == "bld":
            whole = [s.detach() for s in all_streams(parent, tokens)]
            for index, layer in enumerate(child.model.layers):
                if list(layer.parameters()):
                    error = (one_layer(child, index, whole[index])[0, :-1] - theirs[index + 1]).pow(2).sum(-1)
                    total = total + (error / (theirs[index + 1] - theirs[index]).pow(2).sum(-1)).sum()
            continue
        logits, target = child(tokens).logits[0, :-1], parent(tokens).logits[0, :-1].detach()
        q, p = F.softmax(logits, -1), F.softmax(target, -1)
        if objective.loss == "kl":
            total = total + (p * (p / q).log()).sum()
        elif objective.loss == "jsd":
            m = objective.jsd_beta * p + (1 - objective.jsd_beta) * q
            total = total + objective.jsd_beta * (p * (p / m).log()).sum()
            total = total + (1 - objective.jsd_beta) * (q * (q / m).log()).sum()
        else:
            total = total + F.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        kept = [index for index, layer in enumerate(child.model.layers) if list(layer.parameters())]
        for index in kept if objective.cosine else []:
            cosine = F.cosine_similarity(ours[index + 1][0, :-1], theirs[index + 1], dim=-1)
            total = total + objective.cosine * (1 - cosine).sum() / len(kept)
    result: Tensor = total / sum(length - 1 for length in LENGTHS)
    return result


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    for name, gradient in wanted.items():
        scale = max(1e-3, float(gradient.abs().max()))
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)
    assert all(float(found[name].abs().max()) == 0 for name in found.keys() - wanted.keys())


def as_trained(loss: StudentLoss, teacher: FrozenTeacher, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
    objective = loss.objective
    target = teacher(tokens, objective.needs_streams) if objective.needs_teacher else None
    value: Tensor = loss(tokens, target, mask_BT=mask, **options)
    return value


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "transformers"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_every_objective_is_what_transformers_gives(
    pair: tuple[Any, Any], objective: Objective, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient; with masks, in one batch and in micro-batches, with checkpointing, both ways of computing."""
    expected_child = copy.deepcopy(pair[1])
    expected = reference(objective, pair[0], expected_child)
    expected.backward()
    wanted = gradients(expected_child)
    if not fused:
        monkeypatch.setattr("distill.models.prepare", lambda model: False)
    parent, child = copy.deepcopy(pair)
    teacher, count = FrozenTeacher(parent), sum(length - 1 for length in LENGTHS)
    for checkpointing in (False, True):
        loss = StudentLoss(child, chunk_tokens=5, objective=objective, checkpointing=checkpointing).train()
        value = as_trained(loss, teacher, TOKENS, MASK)
        value.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)  # rotary tables are fp32
        assert_close(gradients(child), wanted, 1e-5)
    parts = [as_trained(loss, teacher, TOKENS[r], MASK[r], normaliser=count) for r in (slice(0, 1), slice(1, 3))]
    torch.stack(parts).sum().backward()
    assert sum(parts).item() == pytest.approx(value.item(), rel=1e-10)  # type: ignore[union-attr]
    assert_close(gradients(child), wanted, 1e-5)
    other = torch.where(MASK, TOKENS, 7)
    padded = as_trained(loss, teacher, other, MASK)
    assert padded.item() == pytest.approx(value.item(), rel=1e-12), "padding does not count"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_checkpointing_gives_identical_gradients(pair: tuple[Any, Any], objective: Objective) -> None:
    results = []
    for checkpointing in (False, True):
        parent, child = copy.deepcopy(pair)
        loss = StudentLoss(child.float(), "bfloat16", objective=objective, checkpointing=checkpointing).train()
        as_trained(loss, FrozenTeacher(parent.float(), "bfloat16"), TOKENS, MASK).backward()
        results.append(gradients(child))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_checkpointing_keeps_less_for_the_backward_pass(pair: tuple[Any, Any]) -> None:
    kept = []
    for checkpointing in (False, True):
        parent, child = copy.deepcopy(pair)
        loss, sizes = StudentLoss(child, checkpointing=checkpointing).train(), {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        target = FrozenTeacher(parent)(TOKENS)
        weights = {p.untyped_storage().data_ptr() for p in child.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss(TOKENS, target)
        kept.append(sum(size for at, size in sizes.items() if at not in weights))
    assert kept[1] < 0.5 * kept[0]


def test_a_parent_taught_by_itself_has_nothing_to_learn(pair: tuple[Any, Any]) -> None:
    parent = pair[0]
    teacher = FrozenTeacher(copy.deepcopy(parent))
    for objective in (Objective("kl", cosine=1.0), Objective("jsd", cosine=1.0), Objective("bld")):
        student = copy.deepcopy(parent).requires_grad_()
        loss = StudentLoss(student, objective=objective)
        value = loss(TOKENS, teacher(TOKENS, streams=True))
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-10)
        assert all(float(p.grad.abs().max()) < 1e-7 for p in student.parameters())


def test_block_local_error_of_layers_that_do_nothing_is_their_number(pair: tuple[Any, Any]) -> None:
    parent, child = copy.deepcopy(pair)
    with torch.no_grad():
        for name, parameter in child.named_parameters():
            if any(last in name for last in ("o_proj", "down_proj", "linear_attn", "linear_mlp")):
                parameter.zero_()
    count = sum(bool(list(layer.parameters())) for layer in child.model.layers)
    loss = StudentLoss(child, objective=Objective("bld"))
    assert loss(TOKENS, FrozenTeacher(parent)(TOKENS, True)).item() == pytest.approx(count, rel=1e-6)


def test_block_local_layers_do_not_hear_of_each_other(pair: tuple[Any, Any]) -> None:
    """Another first layer changes no other layer's gradient; and every parameter has one, as DDP wants."""
    parent, child = copy.deepcopy(pair)
    loss, target = StudentLoss(child, objective=Objective("bld")), FrozenTeacher(parent)(TOKENS, True)
    loss(TOKENS, target).backward()
    assert all(p.grad is not None for p in child.parameters())
    before = gradients(child)
    with torch.no_grad():
        for parameter in child.model.layers[0].parameters():
            parameter.mul_(1.5)
    loss(TOKENS, target).backward()
    after = gradients(child)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.layers.0.") for name in changed)


def test_frozen_layers_are_left_out_of_block_local_learning(pair: tuple[Any, Any]) -> None:
    parent, child = copy.deepcopy(pair)
    target = FrozenTeacher(parent)(TOKENS, True)
    loss = StudentLoss(child, objective=Objective("bld"))
    whole = loss(TOKENS, target)
    child.model.layers[0].requires_grad_(False)
    rest = loss(TOKENS, target)
    rest.backward()
    assert rest.item() < whole.item()
    assert all(p.grad is None for p in child.model.layers[0].parameters())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "transformers"])
def test_the_teachers_streams_are_transformers(pair: tuple[Any, Any], fused: bool, monkeypatch: Any) -> None:
    if not fused:
        monkeypatch.setattr("distill.models.prepare", lambda model: False)
    parent = copy.deepcopy(pair[0]).float()
    expected = all_streams(parent, TOKENS)
    target = FrozenTeacher(parent)(TOKENS, streams=True)
    assert FrozenTeacher(parent)(TOKENS).streams is None
    assert target.streams is not None and len(target.streams) == TINY["num_hidden_layers"] + 1
    for found, wanted in zip(streams_of(target.streams), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target.hidden, parent.model.norm(expected[-1]), rtol=1e-5, atol=1e-5)


def test_a_model_of_another_family_has_streams_and_learns_block_locally() -> None:
    """Gemma scales its embedding and its norms otherwise; its layers are transformers' own."""
    torch.manual_seed(0)
    fields = {**TINY, "model_type": "gemma", "head_dim": 16}
    parent, child = (AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields)) for _ in range(2))
    expected = all_streams(parent, TOKENS)
    teacher = FrozenTeacher(parent)
    target = teacher(TOKENS, True)
    assert target.streams is not None
    for found, wanted in zip(streams_of(target.streams), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    loss = StudentLoss(child, objective=Objective("bld"), checkpointing=True).train()
    wanted = torch.zeros(())
    for index in range(len(child.model.layers)):
        error = (one_layer(child, index, expected[index].detach()) - expected[index + 1])[:, :-1].pow(2).sum(-1)
        wanted = wanted + (error / (expected[index + 1] - expected[index])[:, :-1].pow(2).sum(-1)).mean()
    assert loss(TOKENS, target).item() == pytest.approx(wanted.item(), rel=1e-4)


# Precision


def test_a_record_in_bfloat16_keeps_what_is_added_to_huge_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(2, 3, 64, generator=generator)]
    streams[0][0, 0, 5] = 3000.0
    for _ in range(30):
        streams.append(streams[-1] + 0.1 * torch.randn(2, 3, 64, generator=generator))
    record = StreamRecord(torch.bfloat16)
    for stream in streams:
        record(stream)
    assert all(entry.dtype == torch.bfloat16 for entry in record.entries)
    found = list(streams_of(record.entries))
    rounded = [stream.bfloat16().float() for stream in streams]

    def worst(of: list[Tensor]) -> float:
        """What is wrong of an addition, at most, of its length."""
        pairs = [((of[n + 1] - of[n]), (streams[n + 1] - streams[n])) for n in range(30)]
        return max(float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max()) for a, b in pairs[1:])

    assert worst(found) < 0.05 and worst(rounded) > 1
    assert (found[-1] - streams[-1]).abs().max() < 2e-3, "roundings do not pile up"


def test_cosine_of_nearly_equal_streams_keeps_its_digits_in_fp32() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 5, 64, generator=generator, dtype=torch.float64)
    student = teacher + 1e-3 * torch.randn(2, 5, 64, generator=generator, dtype=torch.float64)
    exact = student.clone().requires_grad_()
    expected = (1 - F.cosine_similarity(exact, teacher, dim=-1)).sum()
    expected.backward()
    rounded = student.float().requires_grad_()
    term = CosineTerm([torch.zeros(2, 5, 64), teacher.float()], torch.ones(2, 5), [0])
    term(torch.zeros(2, 5, 64))
    term(rounded)
    term.total.backward()
    assert term.total.item() == pytest.approx(expected.item(), rel=1e-3)  # 1 - cos itself would be off by a tenth
    assert exact.grad is not None and rounded.grad is not None
    torch.testing.assert_close(rounded.grad.double(), exact.grad, rtol=1e-3, atol=1e-3 * float(exact.grad.abs().max()))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=named)
def test_bfloat16_is_near_fp32(pair: tuple[Any, Any], objective: Objective) -> None:
    values = []
    for dtype in ("float32", "bfloat16"):
        parent, child = copy.deepcopy(pair)
        loss = StudentLoss(child.float(), dtype, objective=objective)
        values.append(as_trained(loss, FrozenTeacher(parent.float(), dtype), TOKENS, MASK).item())
    assert values[1] == pytest.approx(values[0], rel=0.03)


# What is asked


def test_the_old_call_still_works(pair: tuple[Any, Any]) -> None:
    parent, child = copy.deepcopy(pair)
    teacher, loss = FrozenTeacher(parent), StudentLoss(child)
    target = teacher(TOKENS)
    assert torch.equal(loss(TOKENS, *target), loss(TOKENS, target))
    assert torch.equal(loss(TOKENS, target.hidden, target.head), loss(TOKENS, target))
    hidden = child.model(TOKENS).last_hidden_state[:, :-1].flatten(0, 1)
    dense = chunked_kl(hidden, child.lm_head.weight, target.hidden[:, :-1].flatten(0, 1), target.head)
    assert loss(TOKENS, target).item() == pytest.approx(dense.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"loss": "mse"}, "kl, jsd, ce or bld"),
        ({"loss": "jsd", "jsd_beta": 0.0}, "jsd_beta"),
        ({"loss": "jsd", "jsd_beta": 1.0}, "jsd_beta"),
        ({"cosine": -1.0}, "cosine"),
        ({"cosine": float("inf")}, "cosine"),
        ({"loss": "bld", "cosine": 1.0}, "cosine"),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Objective(**fields)


def test_what_an_objective_needs() -> None:
    needs = {named(o): (o.needs_teacher, o.needs_streams) for o in OBJECTIVES}
    assert needs == {
        "kl": (True, False),
        "jsd": (True, False),
        "ce": (False, False),
        "bld": (True, True),
        "kl+cosine": (True, True),
        "ce+cosine": (True, True),
    }


def test_streams_need_layers_side_by_side(tmp_path: Path) -> None:
    parent = family("llama")
    other: Any = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "other", num_hidden_layers=2))
    assert check_pair(parent, other) == TINY["vocab_size"]
    assert check_pair(parent, parent, Objective("bld")) == TINY["vocab_size"]
    with pytest.raises(ConfigError, match="4 layers of hidden_size 64 and 2 layers of hidden_size 64"):
        check_pair(parent, other, Objective(cosine=1.0))
