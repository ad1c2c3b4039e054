"""One model on many ranks: DDP (a whole copy on each) or FSDP2 (a shard on each), for the student and the frozen teacher.

`accelerate` joins the ranks that `accelerate launch`, `torchrun` or nobody started, and wraps the student for DDP. Under FSDP2
it can prepare one model only, so both are sharded here with `fully_shard`: layer by layer, and what is outside of layers
(embedding, final norm, head) together. A rank holds 1/N of the weights, gradients and optimizer states, and one layer whole.

A model need be real on rank 0 alone: on the others it may lie on the meta device, and gets its shards from rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from blocks.errors import ConfigError
from blocks.ranks import Ranks
from distill.config import DistillConfig
from distill.models import FrozenTeacher, StudentLoss

AVAILABLE = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}


class Parallel:
    """The ranks of a run, and how the models lie on them."""

    def __init__(self, config: DistillConfig, out_dir: Path) -> None:
        if config.track is not None and not AVAILABLE[config.track]():
            raise ConfigError(f"--track {config.track}: it is not installed; pip install {config.track}")
        self.accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision="no", log_with=config.track, project_dir=out_dir
        )
        if config.track is not None:
            settings = {name: value for name, value in asdict(config).items() if isinstance(value, (int, float, str))}
            self.accelerator.init_trackers("tracked", config=settings)
        self.ranks = Ranks(self.accelerator.process_index, self.accelerator.num_processes)
        by_launcher = str(self.accelerator.distributed_type).endswith("FSDP")
        self.sharded = self.ranks.count > 1 and (config.sharding == "full" or by_launcher)
        self._half = config.compute_dtype == "bfloat16"

    def track(self, values: Mapping[str, Any], step: int) -> None:
        """Tells TensorBoard or W&B, if one of them was asked for."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)

    def close(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def place(self, module: nn.Module) -> nn.Module:
        """The module on this rank's device, whole; if sharding, where it is (`spread` shares it out)."""
        if self.sharded:
            return module
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ConfigError("a model on the meta device needs sharding; without it every rank holds the whole of it")
        return module.to(self.device)

    def spread(self, module: StudentLoss | FrozenTeacher, model: nn.Module) -> nn.Module:
        """`module`, which computes with `model`, ready to be called on every rank."""
        if self.sharded:
            self._shard(module, model)
            return module
        if isinstance(module, FrozenTeacher) or self.ranks.count == 1:
            return module
        prepared: nn.Module = self.accelerator.prepare(module)
        return prepared

    def _shard(self, module: nn.Module, model: Any) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        model.tie_weights()  # moving a model to the meta device unties it
        half = torch.bfloat16 if self._half else None
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        layers = [layer for layer in model.model.layers if any(True for _ in layer.parameters())]
        for part in (*layers, module):  # one whole at a time
            self._bring(part)
            fully_shard(part, mesh=self._mesh, mp_policy=policy)

    @torch.no_grad()
    def _bring(self, module: nn.Module) -> None:
        """Makes the parameters and buffers of `module` rank 0's, on this rank's device; those that are sharded stay."""
        # By the id of the old one, which is kept so that its id is not used anew.
        brought: dict[int, tuple[Tensor, Tensor]] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, old in tensors.items():
                    if old is None or isinstance(old, DTensor):
                        continue
                    if id(old) not in brought:
                        new = self._from_main(old.detach())
                        is_parameter = isinstance(old, nn.Parameter)
                        brought[id(old)] = old, nn.Parameter(new, old.requires_grad) if is_parameter else new
                    tensors[name] = brought[id(old)][1]  # type: ignore[assignment]

    def _from_main(self, tensor: Tensor) -> Tensor:
        """Rank 0's values of a tensor that may lie on the meta device here."""
        whole = tensor.to(self.device) if self.ranks.main else torch.empty_like(tensor, device=self.device)
        torch.distributed.broadcast(whole, src=0)
        return whole

    @cached_property
    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.device.type, (self.ranks.count,))

    @torch.no_grad()
    def fill(self, parameter: Tensor, value: Tensor | None) -> None:
        """Copies rank 0's `value` (None on the others) into a parameter, of which each rank may hold a shard; all must call it."""
        if self.ranks.count == 1:
            parameter.copy_(value)  # type: ignore[arg-type]
            return
        whole = self._from_main(
            torch.empty(parameter.shape, device="meta", dtype=parameter.dtype)
            if value is None
            else value.to(parameter.dtype)
        )
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, self._mesh, parameter.placements, src_data_rank=None).to_local()
            parameter = parameter.to_local()
        parameter.copy_(whole)

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Within it a backward pass adds to the gradient; only the last one of a step is shared with the other ranks."""
        if self.sharded:
            model.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last or self.ranks.count == 1 else model.no_sync()  # type: ignore[operator]

    def clip(self, parameters: Iterator[nn.Parameter], most: float) -> Tensor:
        """Scales the whole gradient to a norm of at most `most`, and returns what its norm was."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole(self, tensor: Tensor) -> Tensor | None:
        """A parameter as a whole on the CPU, on rank 0; None on the others. All ranks must call it."""
        full = tensor.detach()
        full = full.full_tensor() if isinstance(full, DTensor) else full
        return full.cpu() if self.ranks.main else None
