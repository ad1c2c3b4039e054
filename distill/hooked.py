"""What distill/decoder.py gives, for models that it does not know: transformers' own forward, with hooks around its layers.

Shapes: B sequences, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from distill.decoder import Entering, Leaving, Visit

Replace = Callable[[int, Tensor], Tensor | None]
STREAM = "hidden_states"


def last_hidden(model: Any, tokens_BT: Tensor, visit: Visit | None = None) -> Tensor:
    """The last hidden states [B, T, D]; `visit` is shown the residual stream that enters the first layer, and that after
    every layer. (transformers' `output_hidden_states` has the last of them after the final norm.)"""

    def before(index: int, stream: Tensor) -> None:
        if visit is not None and index == 0:
            visit(stream)

    def after(_: int, stream: Tensor) -> None:
        if visit is not None:
            visit(stream)

    if visit is None:
        return _forward(model, tokens_BT)
    with _around_layers(model, before, after):
        return _forward(model, tokens_BT)


def layers_apart(model: Any, tokens_BT: Tensor, entering: Entering, leaving: Leaving) -> None:
    """Runs every layer on a stream given to it, as distill/decoder.py's function of this name does."""
    given: dict[int, Tensor] = {}

    def before(index: int, stream: Tensor) -> Tensor | None:
        chosen = entering(index)
        if chosen is None:
            return None
        given[index] = chosen.to(stream.dtype)
        return given[index]

    def after(index: int, stream: Tensor) -> None:
        if given.pop(index, None) is not None:
            leaving(index, stream)

    with _around_layers(model, before, after):
        _forward(model, tokens_BT)


def _forward(model: Any, tokens_BT: Tensor) -> Tensor:
    hidden: Tensor = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state
    return hidden


@contextmanager
def _around_layers(model: Any, before: Replace, after: Leaving) -> Iterator[None]:
    """Shows the stream before and after each layer; what `before` returns, if anything, enters in its place."""
    handles = []
    for index, layer in enumerate(model.model.layers):

        def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> Any:
            stream = args[0] if args else kwargs[STREAM]
            replacement = before(index, stream)
            if replacement is None:
                return None
            return ((replacement, *args[1:]), kwargs) if args else (args, {**kwargs, STREAM: replacement})

        def leave(_: Any, args: Any, output: Any, index: int = index) -> None:
            after(index, output[0] if isinstance(output, tuple) else output)

        handles += [layer.register_forward_pre_hook(enter, with_kwargs=True), layer.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
