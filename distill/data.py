"""Batches out of a token pack, addressed by index.

Which sequences a rank sees at a step is a pure function of (seed, step, rank, world): nothing has to be saved to
resume, and the global batch is the same on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from blocks.errors import ConfigError, DataError


class TokenStream:
    """A token pack seen as sequences of another length: the flat stream re-cut, a short rest dropped.

    Args:
        pack: [sequences, length] of token ids, any integer dtype, possibly memory-mapped; never copied.
        sequence_length: tokens per sequence here.
        vocab_size: ids must be below it.
        name: what error messages call the pack.
    """

    def __init__(self, pack: np.ndarray, sequence_length: int, vocab_size: int, name: str = "token pack") -> None:
        if not np.issubdtype(pack.dtype, np.integer):
            raise DataError(f"the {name} holds {pack.dtype}, not token ids")
        sequences = pack.size // sequence_length
        if not sequences:
            wanted = f"one sequence of {sequence_length}"
            raise DataError(
                f"the {name} holds {pack.size} tokens, less than {wanted}; give more text or a shorter sequence_length"
            )
        self._rows = pack.reshape(-1)[: sequences * sequence_length].reshape(sequences, sequence_length)
        self._vocab_size = vocab_size
        self._name = name

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    def read(self, indices: np.ndarray) -> Tensor:
        """The sequences at `indices` ([B]): [B, sequence_length] int64. Raises DataError for ids out of range."""
        rows = self._rows[indices].astype(np.int64)
        outside = (rows < 0) | (rows >= self._vocab_size)
        if outside.any():
            sequence = int(indices[outside.any(1).argmax()])
            raise DataError(
                f"sequence {sequence} of the {self._name} has token {int(rows[outside][0])}, outside the vocabulary of "
                f"{self._vocab_size}; it was made with another tokenizer"
            )
        return torch.from_numpy(rows)


def batch_indices(seed: int, step: int, sequences: int, batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Indices of the sequences that `rank` trains on in global step `step` (0-based): [batch / world].

    Every epoch is one seeded permutation of all sequences; a batch may end one epoch and begin the next. The
    ranks' parts, in order, are the batch of one rank alone. Raises ConfigError if the batch does not divide.
    """
    if batch % world:
        raise ConfigError(f"distill.batch_sequences is {batch}, which {world} ranks cannot share evenly")
    share = batch // world
    positions = step * batch + rank * share + np.arange(share)
    return np.array(
        [_permutation(seed, int(p // sequences), sequences)[p % sequences] for p in positions], dtype=np.int64
    )


def to_device(tokens: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; to a GPU through page-locked memory, without waiting for it."""
    if device.type != "cuda":
        return tokens.to(device)
    return tokens.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=2)  # a batch touches at most the epoch it ends and the one it begins (of any pack worth training on)
def _permutation(seed: int, epoch: int, sequences: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(sequences)


def heldout_batches(
    stream: TokenStream, tokens: int, sequence_length: int, micro_batch: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one evaluation: (tokens [B, T] int64, mask [B, T] bool), as many on every rank.

    About `tokens` tokens (0: all), evenly spaced over the pack so that every part of it counts. Ranks with a
    sequence less than others repeat one, masked out: under FSDP all ranks must make the same forward calls.
    """
    wanted = min(len(stream), max(1, tokens // sequence_length)) if tokens else len(stream)
    chosen = np.linspace(0, len(stream) - 1, wanted).round().astype(np.int64)
    padded = np.concatenate([chosen, np.repeat(chosen[:1], -wanted % world)])
    counted = np.arange(len(padded)) < wanted
    own, own_counted = padded[rank::world], counted[rank::world]
    for start in range(0, len(own), micro_batch):
        rows = slice(start, start + micro_batch)
        batch = stream.read(own[rows])
        yield batch, torch.from_numpy(own_counted[rows, None]).expand(batch.shape).contiguous()
