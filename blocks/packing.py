"""Rounded matrices as tensors on disk, in compressed-tensors form, and back.

    PackedMatrix(FORMATS["nvfp4"].nearest(weight), input_divisor).tensors()     # weight_packed, weight_scale, ...
    quantization_config(architecture)                                           # what config.json says of them

Bit for bit what the package compressed-tensors writes of the same codes and scales:

    float-quantized       weight (E4M3), weight_scale
    nvfp4-pack-quantized  weight_packed (two E2M1 codes a byte, the first in the low half), weight_scale (E4M3),
                          weight_global_scale, and of W4A4 input_global_scale: both divisors, 6 * 448 / amax
    pack-quantized        weight_packed (codes + 2^(bits - 1), dense from the lowest bit of int32 words), weight_scale,
                          weight_shape

The master of a child, in bf16, names its formats and holds none of this; `nas export` packs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blocks.child.layout import expected_tensors
from blocks.errors import CheckpointError
from blocks.formats import Float8, Format, Integer, NvFloat4, Quantized, Scales, format_named
from blocks.rounded import SHARED, precision_of
from blocks.shape import ModelShape
from blocks.spec import BF16, Architecture, LayerSpec

WORD = 32
E2M1_CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # in the order of their three bits; the fourth is the sign
WEIGHT, PACKED, SCALE, SHAPE = "weight", "weight_packed", "weight_scale", "weight_shape"
DIVISOR, INPUT_DIVISOR = "weight_global_scale", "input_global_scale"
VERSION = "0.20.0"  # of compressed-tensors, whose form this is
FUSED = {"self_attn.q_proj": "self_attn.qkv_proj", "mlp.gate_proj": "mlp.gate_up_proj"}  # what engines run as one
MATRICES = tuple(name for group in SHARED for name in group)

Sizes = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors by name."""


@dataclass(frozen=True)
class PackedMatrix:
    """A rounded matrix as it is served.

    Attributes:
        quantized: its codes and scales.
        input_divisor: [1], of inputs in nvfp4 (W4A4): 6 * 448 / the largest in calibration text.
    """

    quantized: Quantized
    input_divisor: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """What lies on disk, by the names within the module."""
        format, codes, scales = self.quantized.format, self.quantized.codes, self.quantized.scales
        found = {SCALE: scales.values.to(_scale_dtype(format))}
        if isinstance(format, Float8):
            return {WEIGHT: codes.to(torch.float8_e4m3fn), **found}
        if isinstance(format, Integer):
            shape = torch.tensor(codes.shape, device=codes.device)
            return {PACKED: pack_words(codes, format.bits), **found, SHAPE: shape}
        assert isinstance(format, NvFloat4) and scales.divisor is not None
        found |= {PACKED: pack_e2m1(codes), DIVISOR: scales.divisor}
        if format.input_bits == 4:
            assert self.input_divisor is not None, "W4A4 needs the largest input"
            found[INPUT_DIVISOR] = self.input_divisor
        return found

    @classmethod
    def of(cls, format: Format, tensors: Mapping[str, Tensor]) -> PackedMatrix:
        """From what lies on disk; codes and scales are what they were. Shapes are taken to be right."""
        scales = Scales(tensors[SCALE].float(), tensors.get(DIVISOR))
        if isinstance(format, Float8):
            codes = tensors[WEIGHT].float()
        elif isinstance(format, Integer):
            columns = int(tensors[SHAPE][1])
            codes = unpack_words(tensors[PACKED], format.bits, columns)
        else:
            codes = unpack_e2m1(tensors[PACKED])
        return cls(Quantized(format, codes, scales), tensors.get(INPUT_DIVISOR))


def packed_sizes(format: Format, rows: int, columns: int) -> Sizes:
    """What a matrix takes on disk, by the names within its module. Raises ConfigError if the format cannot hold it."""
    format.check(columns)
    found: Sizes = {SCALE: ((rows, columns // format.group if format.group else 1), _scale_dtype(format))}
    if isinstance(format, Float8):
        return {WEIGHT: ((rows, columns), torch.float8_e4m3fn), **found}
    if isinstance(format, Integer):
        words = -(-columns * format.bits // WORD)
        return {PACKED: ((rows, words), torch.int32), **found, SHAPE: ((2,), torch.int64)}
    divisors = (DIVISOR, INPUT_DIVISOR) if format.input_bits == 4 else (DIVISOR,)
    found |= {name: ((1,), torch.float32) for name in divisors}
    return {PACKED: ((rows, columns // 2), torch.uint8), **found}


def packed_tensors(shape: ModelShape, architecture: Architecture, dtype: torch.dtype) -> Sizes:
    """Every tensor of a packed child by its name; what is not rounded is in `dtype`. Sizes are taken as built."""
    found: Sizes = {}
    for name, size in expected_tensors(shape, architecture).items():
        if (format := format_of(architecture, name)) is None:
            found[name] = size, dtype
        else:
            module = name.removesuffix(WEIGHT)
            found |= {f"{module}{part}": each for part, each in packed_sizes(format, *size).items()}
    return found


def format_of(architecture: Architecture, name: str) -> Format | None:
    """The format of a tensor by its full name; None if it is not rounded: embeddings, norms, biases, what is bf16."""
    if not name.startswith("model.layers.") or not name.endswith(f".{WEIGHT}"):
        return None
    layer, part = name.removeprefix("model.layers.").split(".", 1)
    module = part.removesuffix(f".{WEIGHT}")
    precision = precision_of(architecture[int(layer)], module) if module in MATRICES else BF16
    return None if precision == BF16 else format_named(precision)


# ---- what config.json says


def quantization_config(architecture: Architecture) -> dict[str, Any] | None:
    """`quantization_config` of a packed child; None if all of it is bf16.

    One group for each format, whose targets are regular expressions over the layers. They match the fused modules of engines
    (qkv_proj, gate_up_proj), too, for not all of them know which modules of a nemotron-nas model they have fused. `ignore`
    names one by one what stays as it is, for not all of them read regular expressions there.
    """
    groups: dict[str, dict[str, Any]] = {}
    ignored = ["lm_head"]
    for precision in architecture.precisions:
        format = format_named(precision)
        if precision != BF16:
            groups[f"group_{len(groups)}"] = _scheme(format) | {"targets": list(_targets(architecture, precision))}
    for index, layer in enumerate(architecture):
        ignored += [f"model.layers.{index}.{name}" for name in _modules(layer, BF16)]
    if not groups:
        return None
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def check_quantization_config(content: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    """Raises CheckpointError if `quantization_config` says something else than the precisions of the architecture."""
    found, wanted = content.get("quantization_config"), quantization_config(architecture)
    if wanted is None:
        raise CheckpointError(
            f"{where} has a quantization_config but no marquetry_precisions: another program packed it; give the bf16 child"
        )
    if not isinstance(found, Mapping) or _meaning(found) != _meaning(wanted):
        raise CheckpointError(
            f"{where} contradicts itself: quantization_config is not that of marquetry_precisions; export the child again"
        )


def _meaning(config: Mapping[str, Any]) -> Any:
    """What decides how tensors are read; a program that writes config.json again may add what it likes."""
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        return None
    keys = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic")

    def of(part: Any) -> Any:
        return tuple(part.get(key) for key in keys) if isinstance(part, Mapping) else None

    return {
        str(target): (of(group.get("weights")), of(group.get("input_activations")))
        for group in groups.values()
        for target in group.get("targets") or ()
    }


def _scheme(format: Format) -> dict[str, Any]:
    """One of `config_groups`, without its targets."""
    common: dict[str, Any] = {"num_bits": format.bits, "symmetric": True, "dynamic": False}
    if isinstance(format, NvFloat4):
        types = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        weights = common | types | {"type": "float", "strategy": "tensor_group", "group_size": format.group}
        form, inputs = "nvfp4-pack-quantized", weights | {"dynamic": "local"}
    else:
        kind = "int" if isinstance(format, Integer) else "float"
        strategy = "group" if format.group else "channel"
        weights = common | {"type": kind, "strategy": strategy, "group_size": format.group}
        form = "pack-quantized" if kind == "int" else "float-quantized"
        inputs = common | {"type": kind, "strategy": "token", "group_size": None, "dynamic": True}
    return {
        "format": form,
        "weights": weights,
        "input_activations": None if format.input_bits == 16 else inputs,
        "output_activations": None,
    }


def _targets(architecture: Architecture, precision: str) -> Iterator[str]:
    """A regular expression for the attentions in that precision, and one for the FFNs."""
    for part in ("self_attn", "mlp"):
        layers, names = [], dict[str, None]()
        for index, layer in enumerate(architecture):
            modules = [name.split(".")[1] for name in _modules(layer, precision) if name.startswith(part)]
            layers += [str(index)] * bool(modules)
            names |= dict.fromkeys(modules)
        if layers:
            yield f"re:^model[.]layers[.]({'|'.join(layers)})[.]{part}[.]({'|'.join(names)})$"


def _modules(layer: LayerSpec, precision: str) -> list[str]:
    """The modules of a layer in that precision, by their names within it, and what engines fuse of them."""
    kinds = {"kv": SHARED[0] + SHARED[1], "linear": SHARED[2], "width": SHARED[3] + SHARED[4]}
    found: list[str] = []
    if layer.attention.precision == precision:
        found += kinds.get(layer.attention.kind, ())
    if layer.ffn.precision == precision:
        found += SHARED[5] if layer.ffn.kind == "linear" else kinds.get(layer.ffn.kind, ())
    return found + [FUSED[name] for name in found if name in FUSED]


# ---- bits


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Signed integers of so many bits [rows, columns] -> int32 [rows, ceil(columns * bits / 32)], without a gap."""
    offset = codes.to(torch.int64) + (1 << (bits - 1))
    columns = codes.shape[1]
    padded = torch.nn.functional.pad(offset, (0, -columns % WORD)).unflatten(1, (-1, WORD))
    words = torch.zeros(*padded.shape[:2], bits, dtype=torch.int64, device=codes.device)
    for i in range(WORD):  # 32 codes fill `bits` words
        word, shift = divmod(i * bits, WORD)
        words[..., word] |= padded[..., i] << shift
        if shift + bits > WORD:
            words[..., word + 1] |= padded[..., i] >> (WORD - shift)
    low = words.flatten(1)[:, : -(-columns * bits // WORD)] & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def unpack_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_words`: int8 [rows, columns]."""
    padded = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, -words.shape[1] % bits))
    grouped = padded.unflatten(1, (-1, bits))
    codes = torch.empty(*grouped.shape[:2], WORD, dtype=torch.int8, device=words.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = grouped[..., word] >> shift
        if shift + bits > WORD:
            code = code | grouped[..., word + 1] << (WORD - shift)
        codes[..., i] = (code & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.flatten(1)[:, :columns].contiguous()


def pack_e2m1(codes: Tensor) -> Tensor:
    """Values of E2M1 [rows, columns] -> bytes [rows, columns / 2]."""
    magnitudes = torch.tensor(E2M1_CODES, device=codes.device)
    nibbles = torch.bucketize(codes.abs(), magnitudes).to(torch.uint8) | codes.signbit().to(torch.uint8) << 3
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The inverse of `pack_e2m1`, in fp32; a negative zero is one again."""
    nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1).long()
    values = torch.tensor((*E2M1_CODES, *(-code for code in E2M1_CODES)), device=packed.device)
    return values[nibbles]


def _scale_dtype(format: Format) -> torch.dtype:
    if isinstance(format, NvFloat4):
        return torch.float8_e4m3fn
    assert isinstance(format, Float8 | Integer), format.name
    return format.scale_dtype
