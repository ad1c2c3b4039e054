"""The block library: the fitted candidates of every layer, on disk, only what differs from the parent.

One safetensors file a layer, `library/layer_007.safetensors`. Names inside, T a Llama tensor name within the layer:

    attention:kv1/T              tensors of this attention candidate that differ from the parent's
    attention:kv1/order          FFN channels [I] by falling importance when this attention stands before the FFN
    attention:kv1+ffn:768/T      tensors fitted for the pair: down_proj [D, 768], or o_proj where the FFN is skipped; after
                                 block-local distillation gate, up and down_proj, or q, k, v and o_proj

Matrices are kept in bf16, the precision children are served in; scores are taken with what is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blocks.errors import CheckpointError
from blocks.files import save_tensors
from blocks.layer import ATTENTION_NORM, DOWN_PROJ, FFN_NORM, LINEAR_ATTENTION, LINEAR_FFN, Weights
from blocks.spec import AttentionSpec, LayerSpec

LIBRARY_DTYPE = torch.bfloat16


@dataclass
class LayerLibrary:
    """The candidates of one layer over the parent's tensors `parent` of that layer.

    `place` is where what is put lies: None for the parent's device, or the CPU (page-locked memory), because the candidates
    of a very wide layer are larger than the layer by far.
    """

    parent: Weights
    entries: dict[str, Tensor] = field(default_factory=dict)
    place: torch.device | None = None

    def at(self, parent: Weights) -> LayerLibrary:
        """The same candidates over the parent's tensors in another precision."""
        return LayerLibrary(parent, self.entries, self.place)

    def only(self, specs: Collection[LayerSpec]) -> LayerLibrary:
        """What these candidates need, and nothing else."""
        owners = {str(spec) for spec in specs} | {str(spec.attention) for spec in specs}
        return LayerLibrary(self.parent, {k: v for k, v in self.entries.items() if k.rpartition("/")[0] in owners})

    def put(self, owner: AttentionSpec | LayerSpec, name: str, tensor: Tensor) -> Tensor:
        """Keeps a matrix at library precision and returns it as it will be read back."""
        kept = tensor.to(LIBRARY_DTYPE)
        if self.place is None or self.place == kept.device:
            self.entries[f"{owner}/{name}"] = kept
        else:
            away = torch.empty(kept.shape, dtype=kept.dtype, device=self.place, pin_memory=kept.is_cuda)
            self.entries[f"{owner}/{name}"] = away.copy_(kept, non_blocking=True)
        return kept.to(self._dtype)

    def put_order(self, attention: AttentionSpec, order: Tensor) -> None:
        self.entries[f"{attention}/order"] = order.to(torch.int32)

    def order(self, attention: AttentionSpec) -> Tensor:
        return self.entries[f"{attention}/order"].to(self._device, torch.long)

    def has_order(self, attention: AttentionSpec) -> bool:
        return f"{attention}/order" in self.entries

    def own(self, owner: AttentionSpec | LayerSpec) -> dict[str, Tensor]:
        """The tensors kept for an attention candidate or a pair, by their names within the layer."""
        prefix = f"{owner}/"
        found = {k.removeprefix(prefix): v for k, v in self.entries.items() if k.startswith(prefix)}
        found.pop("order", None)
        return {name: tensor.to(self._device, self._dtype, non_blocking=True) for name, tensor in found.items()}

    def attention_weights(self, spec: AttentionSpec) -> dict[str, Tensor]:
        """All tensors of an attention candidate: none for a skip, the parent's with what differs otherwise."""
        if spec.kind == "skip":
            return {}
        own = self.own(spec)
        if spec.kind == "linear":
            if LINEAR_ATTENTION not in own:
                raise _not_built(spec)
            return {ATTENTION_NORM: self.parent[ATTENTION_NORM], LINEAR_ATTENTION: own[LINEAR_ATTENTION]}
        kept = {k: v for k, v in self.parent.items() if k.startswith("self_attn.") or k == ATTENTION_NORM}
        return kept | own

    def layer_weights(self, spec: LayerSpec) -> dict[str, Tensor]:
        """All tensors of one candidate layer, ready for `layer_forward`. Raises CheckpointError if it was never built."""
        weights = self.attention_weights(spec.attention)
        own = self.own(spec)
        narrower = spec.ffn.kind == "width" and spec.ffn.width < self.parent[DOWN_PROJ].shape[1]
        if (narrower and DOWN_PROJ not in own) or (spec.ffn.kind == "linear" and LINEAR_FFN not in own):
            raise _not_built(spec)
        if spec.ffn.kind == "linear":
            weights |= {FFN_NORM: self.parent[FFN_NORM], LINEAR_FFN: own[LINEAR_FFN]}
        elif spec.ffn.kind == "width":
            weights |= {k: v for k, v in self.parent.items() if k.startswith("mlp.") or k == FFN_NORM}
            if narrower:
                channels = self.order(spec.attention)[: spec.ffn.width]
                for name in ("gate_proj", "up_proj"):
                    weights |= {k: v[channels] for k, v in weights.items() if k.startswith(f"mlp.{name}.")}
        return weights | own

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self.parent.values())).dtype

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parent.values())).device


def _not_built(spec: AttentionSpec | LayerSpec) -> CheckpointError:
    return CheckpointError(f"the block library holds no {spec}; run `nas score` with a recipe that lists it")


class BlockLibrary:
    """The directory of layer files. Opening a layer needs the parent's tensors of that layer."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, layer: int, spec: LayerSpec | None = None) -> Path:
        """Of all candidates of a layer, or of one that was built alone."""
        alone = "" if spec is None else f".{str(spec).replace(':', '-')}"
        return self.directory / f"layer_{layer:03d}{alone}.safetensors"

    def has(self, layer: int, spec: LayerSpec | None = None) -> bool:
        """Whether all candidates of a layer are there, or the one asked for."""
        return self._found(layer, spec).is_file()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.stat().st_size for file in self.directory.glob("layer_*.safetensors"))

    def _found(self, layer: int, spec: LayerSpec | None) -> Path:
        """The file of the whole layer if there is one, else that of the candidate asked for."""
        whole = self.path(layer)
        return whole if spec is None or whole.is_file() else self.path(layer, spec)

    def save(self, layer: int, library: LayerLibrary, spec: LayerSpec | None = None) -> None:
        entries = library.entries if spec is None else library.only([spec]).entries
        save_tensors(self.path(layer, spec), entries)

    def open(self, layer: int, parent: Mapping[str, Tensor], spec: LayerSpec | None = None) -> LayerLibrary:
        """Reads one layer (or one candidate of it, if that is all there is) onto the parent tensors' device.

        Raises CheckpointError if the file is damaged or missing.
        """
        device = next(iter(parent.values())).device
        path = self._found(layer, spec)
        try:
            return LayerLibrary(parent, load_file(path, device=str(device)))
        except (OSError, SafetensorError) as error:
            message = f"{path} cannot be read ({error}); delete it and run `nas score` again to rebuild that layer"
            raise CheckpointError(message) from error
