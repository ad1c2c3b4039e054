"""Children on disk: write one whole or not at all, check one, load one.

A child directory is what stock engines expect of a Nemotron model: config.json, the two model files named by its
`auto_map`, safetensors (in shards of 5 GB, with an index if more than one), and the parent's tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from blocks.child.layout import (
    as_built,
    as_config,
    child_config,
    expected_tensors,
    is_packed,
    read_architecture,
    read_config,
    shape_of,
)
from blocks.errors import CheckpointError, some_of
from blocks.files import replace_directory, write_tensors
from blocks.packing import Sizes, packed_tensors, quantization_config
from blocks.shape import ModelShape
from blocks.spec import Architecture
from blocks.weights import EMBEDDING, HEAD, INDEX, SINGLE, WeightStore

if TYPE_CHECKING:
    from blocks.child.modeling_decilm import DeciLMForCausalLM

__all__ = [
    "as_built",
    "check_child",
    "child_config",
    "expected_tensors",
    "load_child",
    "read_architecture",
    "write_child",
]

SHARD_BYTES = 5_000_000_000
MODEL_CODE = ("configuration_decilm.py", "modeling_decilm.py")
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def write_child(
    path: Path | str,
    parent_dir: Path | str,
    architecture: Architecture,
    state_dict: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    config: Mapping[str, Any] | None = None,
    rename: Callable[[str], str] = str,
    packed: bool = False,
) -> None:
    """Writes a child checkpoint; `path` holds the whole child afterwards, or what it held before.

    Args:
        path: the directory to write. A child that stands there is replaced once the new one is complete.
        parent_dir: the parent's directory: its config.json and tokenizer.
        architecture: one spec per layer of the parent.
        state_dict: tensors under Llama names on any device, in any order, each FFN of the spec's width or padded to
            256 already. Given as pairs they are consumed one by one, and at most one shard is held in memory.
        dtype: of the weights on disk, as torch spells it ("bfloat16").
        shard_bytes: largest size of one safetensors file.
        config: stands in for the parent's config.json, where the child has other sizes than `parent_dir`.
        rename: from Llama's names to those on disk, for an engine that has its own.
        packed: the tensors are those of `blocks.packing.packed_tensors`, FFNs padded to 256 and all, and config.json says so;
            else they are master weights, whatever the precisions of the architecture.

    Raises:
        CheckpointError: if tensors are missing, left over or of another shape (packed: or dtype), or the disk refuses.
    """
    path, parent_dir = Path(path), Path(parent_dir)
    parent_config = as_config(read_config(parent_dir) if config is None else config)
    written = child_config(parent_config, architecture, dtype)
    pairs = state_dict.items() if isinstance(state_dict, Mapping) else state_dict
    parent = shape_of(parent_config)
    if packed:
        written.quantization_config = quantization_config(architecture)
        fitted = _packed(pairs, packed_tensors(*as_built(parent, architecture), getattr(torch, dtype)))
    else:
        converted = getattr(torch, dtype)
        fitted = ((name, tensor.to(converted)) for name, tensor in _fitted(pairs, parent, architecture))
    with replace_directory(path) as directory:
        _write_shards(directory, ((rename(name), tensor) for name, tensor in fitted), shard_bytes)
        (directory / "config.json").write_text(written.to_json_string())
        for name in MODEL_CODE:
            shutil.copyfile(Path(__file__).parent / "child" / name, directory / name)
        for name in COPIED_FILES:
            if (parent_dir / name).is_file():
                shutil.copyfile(parent_dir / name, directory / name)


def _fitted(
    pairs: Iterable[tuple[str, Tensor]], parent: ModelShape, architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """Checks names and shapes as the tensors pass, and pads them to what the published form can say."""
    shape, built = as_built(parent, architecture)
    given, needed = expected_tensors(parent, architecture), expected_tensors(shape, built)
    awaited, tables = dict(needed), {}
    for name, tensor in pairs:
        if shape.tie_word_embeddings and name in (HEAD, EMBEDDING):
            tables[name] = tensor
            if name == HEAD:
                continue
        if name not in awaited:
            raise CheckpointError(
                f"{name} is {'given twice' if name in needed else 'not a tensor of this architecture'}"
            )
        size = awaited.pop(name)
        if tuple(tensor.shape) not in (size, given.get(name)):
            raise CheckpointError(f"{name} has shape {list(tensor.shape)}, the architecture needs {list(size)}")
        yield name, _zero_padded(tensor, size)
    if missing := [name for name in awaited if name in given]:
        raise CheckpointError(f"tensors are missing: {some_of(missing)}")
    if len(tables) == 2 and not torch.equal(tables[HEAD], tables[EMBEDDING]):
        raise CheckpointError(f"{HEAD} differs from {EMBEDDING}, but the parent ties them")
    # What is still awaited are biases that the parent does not have and the published form cannot leave out.
    yield from ((name, torch.zeros(size)) for name, size in awaited.items())


def _packed(pairs: Iterable[tuple[str, Tensor]], sizes: Sizes) -> Iterator[tuple[str, Tensor]]:
    """Checks names, shapes and dtypes as the tensors pass."""
    awaited = dict(sizes)
    for name, tensor in pairs:
        if name not in awaited:
            raise CheckpointError(
                f"{name} is {'given twice' if name in sizes else 'not a tensor of this packed child'}"
            )
        size, dtype = awaited.pop(name)
        if tuple(tensor.shape) != size or tensor.dtype != dtype:
            raise CheckpointError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, the packed child needs {dtype} {list(size)}"
            )
        yield name, tensor
    if awaited:
        raise CheckpointError(f"tensors are missing: {some_of(list(awaited))}")


def _zero_padded(tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    """Zero rows of gate and up, zero columns of down: channels that add exactly nothing."""
    if tuple(tensor.shape) == size:
        return tensor
    lacking = [want - have for want, have in zip(size, tensor.shape, strict=True)]
    return F.pad(tensor, [end for extra in reversed(lacking) for end in (0, extra)])


def _write_shards(directory: Path, pairs: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = filled = 0

    def flush() -> None:
        write_tensors(directory / f"shard-{len(shards)}", shard)
        shards.append(list(shard))
        shard.clear()

    for name, tensor in pairs:
        # A copy, because safetensors refuses tensors that share memory, as slices of a fused matrix do.
        kept = tensor.detach().to("cpu", copy=True).contiguous()
        if shard and filled + kept.nbytes > shard_bytes:
            flush()
            filled = 0
        shard[name] = kept
        filled += kept.nbytes
        total += kept.nbytes
    flush()
    _name_shards(directory, shards, total)


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Gives the shards the names that transformers looks for, which contain their number."""
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{index}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def check_child(path: Path | str) -> None:
    """Compares a child's files with its configuration, reading only the headers of the tensors; of a packed one its scales, too.

    Raises:
        CheckpointError: if a file is damaged or absent, or a tensor is missing, left over or of another shape.
    """
    store, (shape, architecture) = WeightStore(path), read_architecture(path)
    if is_packed(content := read_config(Path(path))):
        from blocks.packed_child import check_packed

        return check_packed(store, content, shape, architecture)
    store.check(expected_tensors(shape, architecture), only=True)


def load_child(
    path: Path | str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    *,
    rounded: bool = True,
) -> DeciLMForCausalLM:
    """Loads a child in evaluation mode with this package's own code, never that of the checkpoint.

    Args:
        path: a child's directory.
        dtype: of the loaded weights.
        device: where to put them; the CPU by default.
        rounded: a child with precisions computes in them, as it will be served (blocks/rounded_model.py); else in its
            master weights.

    Raises:
        CheckpointError: as `check_child`.
    """
    from blocks.child.modeling_decilm import DeciLMForCausalLM

    check_child(path)
    if is_packed(read_config(Path(path))):
        from blocks.packed_child import load_packed

        packed = load_packed(Path(path), dtype)
        return packed if device is None else nn.Module.to(packed, device)
    try:
        model: DeciLMForCausalLM = DeciLMForCausalLM.from_pretrained(Path(path), dtype=dtype, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error
    if device is not None:
        nn.Module.to(model, device)
    if rounded and getattr(model.config, "marquetry_precisions", None):
        from blocks.rounded_model import round_model

        round_model(model)
    return model
