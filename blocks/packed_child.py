"""Packed children read back: their files checked to the last scale, and their model as it is served.

`load_packed` needs no other package: codes become weights here, and modules round their inputs as kernels do. transformers
does the same with the package compressed-tensors installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from blocks.child.layout import expected_tensors, read_architecture, read_config
from blocks.errors import CheckpointError, some_of
from blocks.packing import (
    DIVISOR,
    INPUT_DIVISOR,
    SCALE,
    SHAPE,
    WEIGHT,
    PackedMatrix,
    check_quantization_config,
    format_of,
    packed_sizes,
    packed_tensors,
)
from blocks.shape import ModelShape
from blocks.spec import Architecture
from blocks.weights import WeightStore

if TYPE_CHECKING:
    from blocks.child.modeling_decilm import DeciLMForCausalLM
    from blocks.formats import Format

_AGAIN = "export the child again"


def check_packed(store: WeightStore, content: Mapping[str, Any], shape: ModelShape, architecture: Architecture) -> None:
    """Compares a packed child's files with its config.json: names, shapes and dtypes, and that scales can be scales.

    Raises:
        CheckpointError: in one line, naming the first few that are wrong.
    """
    check_quantization_config(content, architecture, str(store.path / "config.json"))
    sizes = packed_tensors(shape, architecture, store.dtype)
    store.check({name: size for name, (size, _) in sizes.items()}, only=True)
    for name, (_, dtype) in sizes.items():
        found = store.get(name)
        if found.dtype != dtype:
            raise CheckpointError(
                f"{store.path}: {name} is stored as {_word(found.dtype)}, its format says {_word(dtype)}; {_AGAIN}"
            )
        if name.endswith((SCALE, DIVISOR, INPUT_DIVISOR)):
            values = found.float()
            if not bool((values.isfinite() & (values > 0)).all()):
                raise CheckpointError(f"{store.path}: {name} holds what is no scale (zero, negative or NaN); {_AGAIN}")
    _check_shapes(store, shape, architecture)


def _check_shapes(store: WeightStore, shape: ModelShape, architecture: Architecture) -> None:
    wrong = []
    for name, size in expected_tensors(shape, architecture).items():
        stored = f"{name.removesuffix(WEIGHT)}{SHAPE}"
        if stored in store.shapes and store.get(stored).tolist() != list(size):
            wrong.append(f"{stored} {store.get(stored).tolist()} instead of {list(size)}")
    if wrong:
        raise CheckpointError(f"{store.path} contradicts its config.json: {some_of(wrong)}; {_AGAIN}")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def packed_matrix(store: WeightStore, format: Format, name: str, size: tuple[int, ...]) -> PackedMatrix:
    """The codes and scales of a matrix by the name that its weight would have."""
    module = name.removesuffix(WEIGHT)
    return PackedMatrix.of(format, {part: store.get(f"{module}{part}") for part in packed_sizes(format, *size)})


def load_packed(path: Path, dtype: torch.dtype) -> DeciLMForCausalLM:
    """The model of a packed child that has been checked, in evaluation mode on the CPU: its weights are what the codes stand
    for, and its modules round their inputs where the format does.

    Raises CheckpointError if a code is no number.
    """
    from blocks.child.configuration_decilm import DeciLMConfig
    from blocks.child.modeling_decilm import DeciLMForCausalLM

    content = {key: value for key, value in read_config(path).items() if key != "quantization_config"}
    store, (shape, architecture) = WeightStore(path), read_architecture(path)
    tensors: dict[str, Tensor] = {}
    rounding: dict[str, tuple[Format, Tensor | None]] = {}
    for name, size in expected_tensors(shape, architecture).items():
        if (format := format_of(architecture, name)) is None:
            tensors[name] = store.get(name, dtype)
            continue
        matrix = packed_matrix(store, format, name, size)
        tensors[name] = matrix.quantized.weight.to(dtype)
        if not bool(tensors[name].isfinite().all()):
            raise CheckpointError(f"{path}: {name.removesuffix(WEIGHT)}* hold codes that are no numbers; {_AGAIN}")
        if format.input_bits < 16:
            rounding[name.removesuffix(f".{WEIGHT}")] = format, matrix.input_divisor
    with torch.device("meta"):
        model = DeciLMForCausalLM(DeciLMConfig(**content))
    nn.Module.to(model, dtype)
    model.load_state_dict(tensors, strict=not shape.tie_word_embeddings, assign=True)
    _finish(model)
    for name, (format, divisor) in rounding.items():
        model.get_submodule(name).register_forward_pre_hook(_InputRounding(format, divisor))
    return model.eval()


def _finish(model: DeciLMForCausalLM) -> None:
    """What a model built without memory lacks: its rotary tables, and a tied head."""
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    model.tie_weights()


class _InputRounding:
    """A hook that gives a linear module its inputs as a kernel of its format sees them."""

    def __init__(self, format: Format, divisor: Tensor | None) -> None:
        self.format, self.divisor = format, divisor

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        divisor = None if self.divisor is None else self.divisor.to(x.device)
        return (self.format.fake_input(x, divisor).to(x.dtype), *inputs[1:])
