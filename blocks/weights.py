"""A checkpoint's tensors, read one by one when they are asked for. Parents and children alike."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightStore:
    """The safetensors of one directory: `model.safetensors`, or shards named by their index.

    Opening reads only the headers. Tensors are memory-mapped, and nothing is kept of them.

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
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            handle = _open(file)
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                if not name.endswith(_IGNORED):
                    self._handles[name] = handle
                    self.shapes[name] = tuple(handle.get_slice(name).get_shape())

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
        prefix = f"model.layers.{index}."
        return {
            name.removeprefix(prefix): self.get(name, dtype, device) for name in self.shapes if name.startswith(prefix)
        }

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
        return self.get(HEAD if HEAD in self.shapes else EMBEDDING)

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


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; {_AGAIN}") from error
