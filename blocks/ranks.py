"""Many processes, one result: sequences are shared out, sums are added up, values come back in their own order.

Under `torchrun` or `accelerate launch` every rank holds an even share of the sequences and runs the same code on it.
Statistics (Grams, crosses) are summed over the ranks before anything is solved, so each rank solves the same problem; values
of single sequences are gathered. One process alone needs no process group and pays nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blocks.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process among `count` of them; rank 0 is the one that writes and prints."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, sequences: int) -> slice:
        """Which of `sequences` this rank holds: contiguous, and even up to one."""
        return slice(self.rank * sequences // self.count, (self.rank + 1) * sequences // self.count)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Adds `tensor` up over the ranks, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, values: Tensor) -> Tensor:
        """Values of this rank's sequences [..., N_rank] -> those of all sequences [..., N], in the order of `share`."""
        if self.count == 1:
            return values
        sizes = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.count)]
        torch.distributed.all_gather(sizes, torch.tensor([values.shape[-1]], device=values.device))
        padded = values.new_zeros(*values.shape[:-1], max(map(int, sizes)))  # gloo gathers equal sizes only
        padded[..., : values.shape[-1]] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[..., : int(size)] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    def agree(self, value: Any) -> Any:
        """Rank 0's value, on every rank: for decisions that read the disk or a clock."""
        if self.count == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            torch.distributed.barrier()

    def leave(self) -> None:
        """Ends the process group, on all ranks at once; nothing is shared afterwards."""
        if self.count > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


ALONE = Ranks()


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """The ranks that torchrun or accelerate started (alone if none did), and this rank's device.

    NCCL between GPUs (each rank takes cuda:LOCAL_RANK), gloo between CPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(torch.distributed.get_rank(), count), device


def require_one_process(command: str) -> None:
    """Raises ConfigError if torchrun or accelerate started several."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"{command} runs in one process; start it without torchrun")
