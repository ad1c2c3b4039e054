"""Is this still the run that the checkpoint belongs to? Short digests of models and token packs."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import nn

from blocks.digest import sample_values
from blocks.errors import CheckpointError


def model_fingerprint(model: nn.Module) -> str:
    """Digest of every parameter's name, shape and sampled values, whatever dtype it was loaded in.

    Call it before training.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode() + sample_values(parameter))
    return digest.hexdigest()[:16]


def pack_fingerprint(pack: np.ndarray) -> str:
    """Digest of a token pack's shape and sampled tokens."""
    return sample_values(pack).hex()[:16]


def require_same_run(saved: dict[str, Any], present: dict[str, Any], where: str) -> None:
    """Compares what a checkpoint was made from with what is given now, key by key.

    Raises CheckpointError naming the keys that differ and what to do.
    """
    differing = [key for key in sorted(saved.keys() | present.keys()) if saved.get(key) != present.get(key)]
    if differing:
        changes = ", ".join(f"{key} was {saved.get(key)!r} and is now {present.get(key)!r}" for key in differing)
        raise CheckpointError(f"{where} is of another run: {changes}. Use another --run, or --restart to begin anew")
