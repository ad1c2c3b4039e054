"""Models that compute as they will be served, over master weights that stay what they are and may learn.

    model = round_model(load_child(path, rounded=False))
    model(tokens)                    # as `round_layer` and `layer_forward` of blocks/rounded.py, for whole models
    unround_model(model)             # the master again

A linear module that is not bf16 becomes a `RoundedLinear` where it is: parameters, their names and what is saved stay. Each
forward pass multiplies the weight rounded to nearest, with scales made from the master weight of that moment, and inputs rounded
where the format says so. Gradients pass straight through both roundings (the straight-through estimator, arXiv 1308.3432).

They do so everywhere, and are not set to zero where a value was cut to its range: scales follow the largest values, so nothing
lies more than half a step outside, and a weight without a gradient would be one that sets the scale of all its group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blocks.errors import CheckpointError, UnsupportedModelError
from blocks.formats import Format, format_named
from blocks.rounded import SHARED, precision_of
from blocks.spec import BF16, Architecture

AT_ONCE = 1 << 24
"""Weights that are rounded in one go; rounding takes about 30 bytes of working memory for each."""


class Rounding:
    """Matrices that engines run as one (q, k and v of a layer, say), in one format.

    What they are rounded to is kept until one of them changes, which its version counter tells; or until `forget`, for those
    who change weights behind that counter's back, as torch's fused optimizers do.

    Attributes:
        format: of all of them.
        modules: the linear modules, of equal inputs.
        through: the dtype that the master weights will have on disk, to which they are rounded first; None: the one they have.
        keeps: whether rounded values are kept. Not where weights come and go, as under FSDP2.
        together: all matrices that are rounded in one go when one has changed, these among them.
    """

    def __init__(self, format: Format, modules: Sequence[RoundedLinear], through: torch.dtype | None = None) -> None:
        self.format = format
        self.modules = tuple(modules)
        self.through = through
        self.keeps = True
        self.together: list[Rounding] = [self]
        self._kept: Tensor | None = None
        self._kept_of: object = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps nothing, and is no copy of a whole model if it is one of a layer."""
        return {**self.__dict__, "together": [self], "_kept": None, "_kept_of": None}

    @property
    def weights(self) -> list[Tensor]:
        return [module.weight for module in self.modules]

    @property
    def rows(self) -> list[int]:
        return [len(weight) for weight in self.weights]

    def inputs(self, x: Tensor) -> Tensor:
        """What the matrices multiply [..., columns], as their kernel sees it."""
        if self.format.input_bits == 16:
            return x
        rounded: Tensor = _RoundInputs.apply(x, self.format)
        return rounded

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The rounded matrices one below the other [rows of all, columns]; its gradient is theirs."""
        return self._passing(self.values(dtype), self.weights)

    def weight_of(self, module: RoundedLinear) -> Tensor:
        """The rounded matrix of one module."""
        index = self.modules.index(module)
        values = self.values(module.weight.dtype).split(self.rows)[index]
        return self._passing(values, [module.weight])

    def _passing(self, values: Tensor, weights: list[Tensor]) -> Tensor:
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            passing: Tensor = _StraightThrough.apply(values, *weights)
            return passing
        return values

    def values(self, dtype: torch.dtype) -> Tensor:
        """`weight` without a gradient."""
        if not self.keeps:
            return _round([self], dtype)[0]
        if self._kept is None or self._kept_of != self._state(dtype):
            device = self.weights[0].device
            batch = [each for each in self.together if each.keeps and each.weights[0].device == device]
            for each in batch:
                each._kept = None
            for each, values in zip(batch, _round(batch, dtype), strict=True):
                each._kept, each._kept_of = values, each._state(dtype)
        assert self._kept is not None
        return self._kept

    def forget(self) -> None:
        """Rounds anew at the next use."""
        self._kept = self._kept_of = None

    def _state(self, dtype: torch.dtype) -> object:
        """Equal as long as what is kept holds."""
        return dtype, [(weight.data_ptr(), weight._version, weight.dtype) for weight in self.weights]


class RoundedLinear(nn.Linear):
    """A linear module that computes in a number format; `weight` is the master."""

    rounding: Rounding

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.rounding.inputs(input), self.rounding.weight_of(self), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.rounding.format.name}"


def round_model(model: Any, architecture: Architecture | None = None, through: torch.dtype | None = None) -> Any:
    """The model with the matrices of its layers rounded in place; what was rounded otherwise before is rounded anew.

    Args:
        model: a child as `load_child` gives it, or a parent with the modules of Llama.
        architecture: whose precisions are meant; that of the model's own configuration if None. Structures do not matter.
        through: the dtype that the weights will be written in, if they are of a higher one now: they are rounded to it first,
            so that what is computed is what the written child will compute.

    Raises:
        ConfigError: a format that is not known, or that a matrix's inputs are no multiple of.
        CheckpointError: an architecture of another model.
        UnsupportedModelError: a layer whose matrices are no plain linear modules.
    """
    unround_model(model)
    architecture = _own_architecture(model) if architecture is None else architecture
    layers = model.model.layers
    if len(layers) != len(architecture):
        raise CheckpointError(
            f"the architecture has {len(architecture)} layers, the model {len(layers)}: another model's"
        )
    found: list[Rounding] = []
    for index, (layer, spec) in enumerate(zip(layers, architecture, strict=True)):
        for names in SHARED:
            modules = [module for name in names if (module := _module(layer, name)) is not None]
            format = format_named(precision_of(spec, names[0]))
            if modules and format.name != BF16:
                format.check(modules[0].in_features, f"model.layers.{index}.{names[0]}")
                found.append(_rounded(modules, format, through))
    _join(found)
    return model


def unround_model(model: nn.Module) -> nn.Module:
    """The model with its master weights alone, in place."""
    for module in model.modules():
        if isinstance(module, RoundedLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
            del module.rounding
    return model


def roundings(model: nn.Module) -> Iterator[Rounding]:
    """How the matrices of a model are rounded; nothing of one that is not."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, RoundedLinear) and id(module.rounding) not in seen:
            seen.add(id(module.rounding))
            yield module.rounding


def _own_architecture(model: Any) -> Architecture:
    from blocks.child.layout import read_architecture

    return read_architecture(model.config.to_dict())[1]


def _module(layer: nn.Module, name: str) -> nn.Linear | None:
    """A layer's linear module by its name within the layer; None if it has none."""
    found: Any = layer
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not None and type(found) is not nn.Linear:
        raise UnsupportedModelError(f"{name} is a {type(found).__name__}; only plain linear modules can be rounded")
    return found


def _rounded(modules: list[nn.Linear], format: Format, through: torch.dtype | None) -> Rounding:
    for module in modules:
        module.__class__ = RoundedLinear
    rounding = Rounding(format, modules, through)  # type: ignore[arg-type]
    for module in modules:
        module.rounding = rounding  # type: ignore[assignment]
    return rounding


def _join(found: Sequence[Rounding]) -> None:
    """Lets matrices of one format and as many inputs be rounded together, `AT_ONCE` weights at most: few large kernels."""
    filling: dict[object, list[Rounding]] = {}
    size: dict[object, int] = {}
    for rounding in found:
        weight = rounding.weights[0]
        kind = rounding.format, weight.shape[1], weight.dtype, rounding.through
        own = sum(rounding.rows) * weight.shape[1]
        if kind not in filling or size[kind] + own > AT_ONCE:
            filling[kind], size[kind] = [], 0
        filling[kind].append(rounding)
        size[kind] += own
        rounding.together = filling[kind]


@torch.no_grad()
def _round(roundings: Sequence[Rounding], dtype: torch.dtype) -> list[Tensor]:
    """The values of matrices of one format and as many inputs, each [rows of all its modules, columns]."""
    format, through = roundings[0].format, roundings[0].through
    weights = [weight for rounding in roundings for weight in rounding.weights]
    whole = weights[0] if len(weights) == 1 else torch.cat(weights)
    whole = whole if through is None else whole.to(through)
    rows = [sum(rounding.rows) for rounding in roundings]
    largest = torch.linalg.vector_norm(whole, math.inf, dim=1)
    divisors = format.divisors(torch.stack([part.amax() for part in largest.split(rows)]))
    by_row = None
    if divisors is not None:
        by_row = torch.cat([divisor.expand(count, 1) for divisor, count in zip(divisors, rows, strict=True)])
    out = torch.empty(whole.shape, dtype=dtype, device=whole.device)
    step = max(1, AT_ONCE // whole.shape[1])
    for start in range(0, len(whole), step):
        part = slice(start, start + step)
        out[part] = format.fake(whole[part], None if by_row is None else by_row[part])
    return list(out.split(rows))


class _StraightThrough(torch.autograd.Function):
    """Values for matrices one below the other; the gradient goes to the matrices as it is."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, *weights: Tensor) -> Tensor:
        ctx.rows = [len(weight) for weight in weights]
        ctx.dtypes = [weight.dtype for weight in weights]
        return values.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(gradient.split(ctx.rows), ctx.dtypes, ctx.needs_input_grad[1:], strict=True)
        return None, *(part.to(dtype) if needed else None for part, dtype, needed in parts)


class _RoundInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: Format) -> Tensor:
        return format.fake_input(x).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
