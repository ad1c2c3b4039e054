"""Is this still the run that the checkpoint belongs to? Short digests of models and token packs."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import nn

from blocks.errors import CheckpointError

_SAMPLES = 1024


def model_fingerprint(model: nn.Module) -> str:
    """Digest of every parameter's name, shape and up to 1024 evenly spaced values.

    Sampled, so that it takes no time on a large model; of values in fp32, so that the dtype it was loaded in does
    not matter. Call it before training.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        digest.update(flat[_spaced(flat.numel())].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def pack_fingerprint(pack: np.ndarray) -> str:
    """Digest of a token pack's size and up to 1024 evenly spaced tokens."""
    flat = pack.reshape(-1)
    sample = flat[_spaced(flat.size).numpy()].astype(np.int64)
    return hashlib.sha256(f"{flat.size} ".encode() + sample.tobytes()).hexdigest()[:16]


def _spaced(size: int) -> torch.Tensor:
    return torch.arange(0, size, max(1, size // _SAMPLES))


def require_same_run(saved: dict[str, Any], present: dict[str, Any], where: str) -> None:
    """Compares what a checkpoint was made from with what is given now, key by key.

    Raises CheckpointError naming the keys that differ and what to do.
    """
    differing = [key for key in sorted(saved.keys() | present.keys()) if saved.get(key) != present.get(key)]
    if differing:
        changes = ", ".join(f"{key} was {saved.get(key)!r} and is now {present.get(key)!r}" for key in differing)
        raise CheckpointError(f"{where} is of another run: {changes}. Use another --run, or --restart to begin anew")
