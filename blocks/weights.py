"""A checkpoint's tensors, read one by one when they are asked for. Parents and children alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blocks.errors import CheckpointError, UnsupportedModelError, some_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_IGNORED = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")  # buffers that old exporters left behind
_AGAIN = "copy, download or write it again"
_PIECE, _READERS = 1 << 24, 8  # bytes that one thread reads at a time, and how many threads do
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightStore:
    """The safetensors of one directory: `model.safetensors`, or shards named by their index.

    Opening reads only the headers. `get` maps one tensor into memory, `read` reads several; nothing is kept of them.

    Args:
        path: a Hugging Face directory, of a parent or of a child.

    Raises:
        CheckpointError: if a file is absent, truncated or no safetensors file.
        UnsupportedModelError: if the weights are in another format.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.files = _weight_files(self.path)
        self._handles: dict[str, Any] = {}
        self._places: dict[str, tuple[Path, int, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if not name.endswith(_IGNORED):
                    self._handles[name] = handle
                    self.shapes[name] = tuple(handle.get_slice(name).get_shape())
            self._places |= _places(file)

    def names(self) -> list[str]:
        return sorted(self.shapes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored embedding. Raises UnsupportedModelError if it is not fp32, fp16 or bf16."""
        self.check([EMBEDDING])
        stored = self._handles[EMBEDDING].get_slice(EMBEDDING).get_dtype()
        if stored not in _DTYPES:
            raise UnsupportedModelError(
                f"{self.path} stores its weights as {stored}; give a checkpoint in bf16, fp16 or fp32"
            )
        return _DTYPES[stored]

    def get(self, name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """One tensor by its full name, as stored or converted. Raises CheckpointError if it is not there."""
        self.check([name])
        try:
            tensor: Tensor = self._handles[name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {name} from {self.path}: {error}; {_AGAIN}") from error
        return tensor.to(device=device, dtype=dtype)

    def layer(
        self, index: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> dict[str, Tensor]:
        """All tensors of one layer by their names within it ("self_attn.q_proj.weight"); empty for an emptied layer."""
        return {key: self.get(name, dtype, device) for key, name in self.layer_names(index).items()}

    def layer_names(self, index: int) -> dict[str, str]:
        """Names within one layer -> full names; none for an emptied layer."""
        prefix = f"model.layers.{index}."
        return {name.removeprefix(prefix): name for name in self.shapes if name.startswith(prefix)}

    def read(self, names: Mapping[str, str], pinned: bool = False) -> dict[str, Tensor]:
        """Tensors as stored, read by several threads into fresh (page-locked) memory, under the keys of `names`: for streaming.

        A memory-mapped tensor would come in page by page, several times slower than a disk or its cache allows.
        """
        self.check(names.values())
        tensors: dict[str, Tensor] = {}
        with ThreadPoolExecutor(_READERS) as pool:
            jobs = []
            for key, name in names.items():
                file, offset, dtype = self._places[name]
                tensor = torch.empty(self.shapes[name], dtype=_DTYPES[dtype], pin_memory=pinned)
                content = tensor.view(-1).view(torch.uint8).numpy().data
                jobs += [
                    pool.submit(_read, file, offset + start, content[start : start + _PIECE])
                    for start in range(0, len(content), _PIECE)
                ]
                tensors[key] = tensor
            for job in jobs:
                job.result()
        return tensors

    @property
    def head_name(self) -> str:
        """Of the output matrix: the embedding's where no head is stored."""
        return HEAD if HEAD in self.shapes else EMBEDDING

    @property
    def embedding(self) -> Tensor:
        """[vocab_size, hidden_size], as stored."""
        return self.get(EMBEDDING)

    @property
    def final_norm(self) -> Tensor:
        """[hidden_size], as stored."""
        return self.get(FINAL_NORM)

    @property
    def head(self) -> Tensor:
        """[vocab_size, hidden_size], as stored; the embedding where no head is stored."""
        return self.get(self.head_name)

    def check(self, expected: Mapping[str, tuple[int, ...]] | Iterable[str], only: bool = False) -> None:
        """Raises CheckpointError naming the first few of `expected` that are missing or of another shape.

        Args:
            expected: names, or names with their shapes.
            only: refuse tensors that are not expected, too, instead of leaving them alone.
        """
        expected = expected if isinstance(expected, Mapping) else dict.fromkeys(expected)
        if missing := [name for name in expected if name not in self.shapes]:
            raise CheckpointError(f"{self.path} lacks {some_of(missing)}; {_AGAIN}")
        wrong = [
            f"{name} {list(self.shapes[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if shape is not None and self.shapes[name] != tuple(shape)
        ]
        if wrong:
            raise CheckpointError(f"the tensors in {self.path} do not fit its config.json: {some_of(wrong)}; {_AGAIN}")
        if only and (unexpected := sorted(self.shapes.keys() - expected.keys())):
            raise CheckpointError(
                f"{self.path} holds tensors that are not of its model: {some_of(unexpected)}; {_AGAIN}"
            )


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path / INDEX} is not an index of tensors; {_AGAIN}") from error
        return [path / name for name in names]
    if any(path.glob("pytorch_model*.bin")):
        raise UnsupportedModelError(
            f"{path} holds pytorch_model.bin only; convert it to safetensors "
            "(load it with transformers, then save_pretrained)"
        )
    raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}")


def _places(file: Path) -> dict[str, tuple[Path, int, str]]:
    """Where each tensor of a safetensors file begins, and its dtype: from the header, JSON behind its own length."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    return {
        name: (file, 8 + size + entry["data_offsets"][0], entry["dtype"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _read(file: Path, offset: int, content: memoryview) -> None:
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(offset)
            filled = 0
            while filled < len(content):
                count = opened.readinto(content[filled:])
                if not count:
                    raise OSError("the file ends early")
                filled += count
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}; {_AGAIN}") from error


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; {_AGAIN}") from error
