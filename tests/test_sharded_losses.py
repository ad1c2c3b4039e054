"""Every loss under DDP and FSDP2, on two processes, with the teacher sharded: value and gradient of one process."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_decoder import family
from torch import Tensor, nn

from distill.models import FrozenTeacher, StudentLoss
from distill.objective import Objective

OBJECTIVES = [Objective("kl", cosine=0.5), Objective("jsd"), Objective("ce"), Objective("bld")]
WAYS = {"ddp": [0, 3], "fsdp": [0, 1, 2, 3]}
TOKENS = torch.randint(256, (4, 11), generator=torch.Generator().manual_seed(0))
COUNT = 4 * 10


def pair() -> tuple[Any, Any]:
    """Teacher and student with tied weights and one wholly empty layer, in fp64."""
    teacher, student = family("many heads").double(), family("many heads").double()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    student.model.layers[2] = Empty()  # type: ignore[union-attr, operator, index]
    return teacher, student


class Empty(nn.Module):
    """A layer without subblocks, as a child has it."""

    self_attn = mlp = input_layernorm = post_attention_layernorm = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def run(loss: nn.Module, teacher: nn.Module, objective: Objective, tokens: Tensor, world: int) -> Tensor:
    target = teacher(tokens, objective.needs_streams) if objective.needs_teacher else None
    value: Tensor = loss(tokens, target, normaliser=COUNT)
    (value * world).backward()
    return value.detach()


def results(student: nn.Module, value: Tensor) -> dict[str, Tensor]:
    from torch.distributed.tensor import DTensor

    found = {"loss": value}
    for name, parameter in student.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found


def one_rank(rank: int, port: int, directory: str) -> None:
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    for way, numbers in WAYS.items():
        for number in numbers:
            objective, (parent, child) = OBJECTIVES[number], pair()
            loss: Any = StudentLoss(child, objective=objective, checkpointing=number % 2 == 0).train()
            teacher: Any = FrozenTeacher(parent)
            if way == "ddp":
                loss = DistributedDataParallel(loss)
            else:
                for module, model in ((loss, child), (teacher, parent)):
                    for layer in model.model.layers:
                        if list(layer.parameters()):
                            fully_shard(layer)
                    fully_shard(module)
                teacher.sharded = True
            values = []
            for _ in range(2):  # a second step finds weights as they are sharded after a first
                loss.zero_grad()
                values.append(run(loss, teacher, objective, TOKENS[2 * rank : 2 * rank + 2], world=2))
            assert torch.equal(*values)
            dist.all_reduce(values[0])
            found = results(child, values[0])
            if rank == 0:
                torch.save(found, Path(directory) / f"{way}-{number}.pt")
    dist.destroy_process_group()


def test_two_processes_give_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(one_rank, (port, str(tmp_path)), nprocs=2)
    for number, objective in enumerate(OBJECTIVES):
        parent, child = copy.deepcopy(pair())
        value = run(StudentLoss(child, objective=objective), FrozenTeacher(parent), objective, TOKENS, world=1)
        expected = results(child, value)
        assert sum(name != "loss" for name in expected) == sum(1 for _ in child.parameters())
        for way in (way for way, numbers in WAYS.items() if number in numbers):
            found = torch.load(tmp_path / f"{way}-{number}.pt")
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(
                    found[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda text, at=(way, number, name): f"{at}: {text}"
                )
