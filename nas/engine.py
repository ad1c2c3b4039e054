"""Which parts of a parent lie where while it is fitted, scored and searched: on the device, in host memory, or on disk.

`choose` takes the fastest arrangement that fits, unless told; `memory` is the arithmetic behind it and behind the plan
that `nas score` prints.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from blocks.activations import PLACES, Activations
from blocks.errors import ConfigError
from blocks.parent import Parent
from blocks.ranks import ALONE, Ranks
from blocks.shape import ModelShape
from blocks.sweep import Sweep
from distill.block_local import PARAMETERS_AT_A_TIME as LEARNING
from nas.engine_config import EngineConfig
from nas.scoring import CHANGE_VALUES, HEAD_VALUES

SPARE = 0.9  # of free memory: what an arrangement may take
GB = 1e9
FP32, FP64 = 4, 8


@dataclass(frozen=True)
class Work:
    """What there is to do on one rank, as far as memory goes.

    Attributes:
        fit_tokens, calibration_tokens, exact_tokens: of this rank.
        samples: labels per token.
        streams: children whose streams are carried through a suffix at once.
        layer_candidates, group_candidates: values of the built candidates of one layer, and of those that share an attention.
        dtype_bytes: of the precision that fits and one-pass scores compute in.
        local: whether block-local distillation refines the candidates.
    """

    fit_tokens: int
    calibration_tokens: int
    exact_tokens: int
    samples: int
    streams: int
    layer_candidates: int
    group_candidates: int
    dtype_bytes: int
    local: bool = False


@dataclass(frozen=True)
class Arrangement:
    """One answer: `every` is how many layers lie between kept streams (1 keeps all)."""

    weights: str
    activations: str
    every: int
    tokens_per_batch: int


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, on the device and where activations lie if not there."""

    weights: int
    activations: int
    working: int
    elsewhere: int

    @property
    def device(self) -> int:
        return self.weights + self.activations + self.working


def memory(shape: ModelShape, stored_bytes: int, work: Work, how: Arrangement, on_cpu: bool = False) -> Memory:
    """Peak bytes of `nas score` in an arrangement: the largest of its moments, on top of what is always there.

    Args:
        stored_bytes: of one weight on disk (and on the device, when resident).
        on_cpu: statistics are fp64 there.
    """
    hidden, wide = shape.hidden_size, shape.intermediate_size
    layer = shape.layer_parameters(shape.parent_layer)
    head = shape.vocab_size * hidden
    both = stored_bytes + work.dtype_bytes * (stored_bytes != work.dtype_bytes)  # a cast copy beside the stored one
    if how.weights == "resident":
        weights = shape.parameters(shape.parent_architecture) * stored_bytes + layer * (both - stored_bytes)
    else:
        weights = 2 * layer * stored_bytes + layer * (both - stored_bytes)
    kept = -(-(shape.num_hidden_layers + 1) // how.every) + (how.every if how.every > 1 else 0)
    per_token = hidden * work.dtype_bytes
    streams = per_token * (kept * (work.fit_tokens + work.calibration_tokens) + 2 * work.fit_tokens)
    streams += per_token * work.samples * work.calibration_tokens
    streams += hidden * FP32 * work.exact_tokens * (-(-(shape.num_hidden_layers + 1) // how.every) + 1)

    on_device = how.activations == "device"
    batch, streamed = how.tokens_per_batch, how.weights == "streamed"
    activations = batch * (3 * wide * work.dtype_bytes + 8 * hidden * FP32)
    sums = FP64 if on_cpu else FP32
    gram, cross = sums * wide * wide, sums * wide * hidden
    # The Gram beside the copy that the greedy order works on; beside what becomes its fp64 factor; then the factor without
    # the Gram, and either the temporaries of its inversion by halves or the right-hand side and the fits.
    squares = FP64 * wide * wide
    solve = squares + max(squares * 3 // 4, (2 * FP64 + 2 * FP32) * wide * hidden)
    fitting = cross + max(2 * gram + cross, gram + squares, solve, gram + activations)
    learning = work.local * (14 * min(LEARNING, work.layer_candidates) + 3 * activations)
    changes = min(CHANGE_VALUES, batch * hidden * 8) * work.dtype_bytes
    scoring = 2 * activations + changes + (2 + 2 * work.samples) * batch * hidden * FP32
    scoring += work.group_candidates * work.dtype_bytes
    logits = 5 * FP32 * min(HEAD_VALUES, max(work.calibration_tokens, work.exact_tokens) * shape.vocab_size)
    vocabulary = logits + head * (streamed * stored_bytes + both - stored_bytes)
    exact = max(
        logits + head * (streamed * stored_bytes + FP32 * (stored_bytes != FP32)),
        FP32 * (work.group_candidates + batch * (3 * wide + 8 * hidden)) + layer * FP32 * (stored_bytes != FP32),
    )
    queue = work.streams * work.exact_tokens * hidden * FP32
    library = work.layer_candidates * 2 if on_device else 0
    working = queue + library + max(vocabulary, fitting, learning, scoring, exact * bool(work.streams))
    return Memory(weights, streams if on_device else 0, working, 0 if on_device else streams)


def choose(
    shape: ModelShape, stored_bytes: int, work: Work, config: EngineConfig, device: torch.device, directory: Path | None
) -> tuple[Arrangement, Memory]:
    """The first arrangement, fastest first, that fits the device and the host.

    Raises ConfigError with what is missing if none does, or if the one asked for does not.
    """
    batch = config.tokens_per_batch or _tokens_per_batch(shape, device)
    root = max(1, round(math.sqrt(shape.num_hidden_layers)))
    options = [
        Arrangement(weights, activations, every, batch)
        for weights in ("resident", "streamed")
        for activations in PLACES
        for every in (1, root)
        if config.weights in ("auto", weights) and config.activations in ("auto", activations)
    ]
    on_cpu = device.type == "cpu"
    if on_cpu:  # host memory is the device's
        options = [option for option in options if option.activations != "host" or config.activations == "host"]
    room = free_memory(device)
    place = {"device": math.inf, "host": SPARE * free_memory(torch.device("cpu")), "disk": free_disk(directory)}
    for option in options:
        need = memory(shape, stored_bytes, work, option, on_cpu)
        if need.device <= SPARE * room and need.elsewhere <= place[option.activations]:
            return option, need
    raise ConfigError(
        f"scoring this parent needs {need.device / GB:.1f} GB on {device} (weights {need.weights / GB:.1f}, working "
        f"{need.working / GB:.1f}) and {need.elsewhere / GB:.1f} GB of activations on {option.activations}, but "
        f"{room / GB:.1f} GB are free on {device}; lower --fit-tokens or --calibration-tokens, set a smaller engine.tokens_per_batch, "
        "or use --weights streamed --activations disk"
    )


def make_sweep(
    parent: Parent,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    how: Arrangement | None = None,
    ranks: Ranks = ALONE,
    directory: Path | None = None,
) -> Sweep:
    """The engine in an arrangement; everything on the device if none is given."""
    how = how or Arrangement("resident", "device", 1, _tokens_per_batch(parent.shape, device))
    store = Activations(device, how.activations, directory)
    return Sweep(parent, device, dtype, how.tokens_per_batch, how.weights == "resident", store, ranks)


def _tokens_per_batch(shape: ModelShape, device: torch.device) -> int:
    if device.type == "cpu":
        return 2048
    return min(32768, max(1024, 1 << (2**30 // (8 * shape.intermediate_size)).bit_length() - 1))


def free_memory(device: torch.device) -> float:
    """Bytes free on a device, or of host memory for the CPU, of which the ranks on this host have equal shares."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return float(psutil.virtual_memory().available) / ranks_here


def free_disk(directory: Path | None) -> float:
    return float(shutil.disk_usage(directory or tempfile.gettempdir()).free)


def resident_memory(device: torch.device) -> int:
    """Bytes that the process takes already, where it shares the device's memory."""
    import psutil

    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0
