"""Muon for many small matrices: those of one shape are orthogonalised together.

`torch.optim.Muon` takes about twenty kernels a matrix, one after the other; a child of 30 layers has some 150 matrices of a
handful of shapes, whose layers differ but mostly not in size. The numbers are torch's up to the order of sums.

A matrix that is sharded over ranks (FSDP2) is brought together to be orthogonalised: as many at a time as there are ranks,
but no more than eight, one by each.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

AT_ONCE = 8


class Muon(torch.optim.Muon):
    """Momentum orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    Updates are scaled to the size of AdamW's, 0.2 sqrt(max(rows, columns)) (Moonshot, arXiv 2502.16982), so that one learning
    rate serves both. Arguments, state and checkpoints are those of `torch.optim.Muon` with adjust_lr_fn="match_rms_adamw".
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                update = self._directions(group, parameters)
                own = [_local(parameter) for parameter in parameters]
                if group["weight_decay"]:
                    torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(own, update, alpha=-group["lr"] * 0.2 * math.sqrt(max(shape)))

    def _directions(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """What momentum (Nesterov's) and orthogonalisation make of the gradients of parameters of one shape: this rank's part."""
        gradients = [_local(p.grad) for p in parameters if p.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        averages = [_local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = list(torch._foreach_lerp(gradients, averages, group["momentum"]))
        how = group["ns_coefficients"], group["ns_steps"], group["eps"]
        if isinstance(parameters[0], DTensor):
            return _orthogonalise_sharded(ahead, parameters, how)
        return list(orthogonalise(torch.stack(ahead), *how).to(ahead[0].dtype).unbind())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _orthogonalise_sharded(shards: list[Tensor], parameters: list[Tensor], how: tuple[Any, int, float]) -> list[Tensor]:
    """This rank's shards of the orthogonalised matrices, whose shards are sharded as `parameters` (DTensors of one mesh) are."""
    mesh, placements = parameters[0].device_mesh, parameters[0].placements  # type: ignore[attr-defined]
    shape, stride = parameters[0].shape, parameters[0].stride()
    rank, group = mesh.get_local_rank(), mesh.get_group()
    result = []
    for start in range(0, len(shards), min(mesh.size(), AT_ONCE)):
        some = shards[start : start + min(mesh.size(), AT_ONCE)]
        whole = [
            DTensor.from_local(shard, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()
            for shard in some
        ]
        if rank < len(whole):
            whole[rank] = orthogonalise(whole[rank][None], *how)[0].to(whole[rank].dtype).contiguous()
        for index, matrix in enumerate(whole):
            torch.distributed.broadcast(matrix, group=group, group_src=index)
            result.append(distribute_tensor(matrix, mesh, placements, src_data_rank=None).to_local())
    return result


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Singular values of matrices [n, rows, columns] brought near 1, singular vectors kept; bfloat16.

    Newton-Schulz: with X scaled to norm 1 and A = X X^T, X <- a X + (b A + c A^2) X.
    """
    a, b, c = coefficients
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
