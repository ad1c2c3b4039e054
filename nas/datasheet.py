"""Times without the device: a roofline from a named GPU's datasheet. Always an estimate, and a lower bound.

    time = max(FLOP / peak FLOP/s, bytes / bandwidth)            for each subblock and phase

after Williams, Waterman and Patterson, "Roofline" (CACM 52(4), 2009). Kernels reach 50 to 90 % of either roof, so absolute
times are too short; what it is for is the order of candidates. FLOPs are those of matrix products and attention, bytes those
of weights and KV cache; norms, rotary embedding, activations and what GPUs say to one another are not counted. Formulas and
worked examples: docs/clocks.md.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from functools import cached_property

from blocks.errors import ConfigError
from blocks.shape import ModelShape
from blocks.spec import BF16, AttentionSpec, FFNSpec, LayerSpec
from nas.clock import Times, attended_tokens, built_layer, part_of, rank_kv_heads
from nas.costs import DTYPE_BYTES, Scenario

UNITS = {
    "fp8": "float8",
    "nvfp4": "float4",
}  # matrix units that take both inputs in a format; the others are weight-only


@dataclass(frozen=True)
class Datasheet:
    """One GPU as its vendor states it, dense (without structured sparsity).

    Attributes:
        device: in full.
        bandwidth: bytes per second of device memory.
        flops: peak FLOP/s by dtype; matrix units with fp32 accumulation, but plain fp32 for float32. No float8, float4: no such units.
        memory_gb: GB of device memory.
        source: the document.
    """

    device: str
    bandwidth: float
    flops: dict[str, float]
    memory_gb: float
    source: str

    def peak(self, dtype: str) -> float:
        """FLOP/s. Raises ConfigError for a dtype that the device has no units for."""
        if dtype not in self.flops:
            raise ConfigError(f"the {self.device} has no {dtype} units; choose one of {', '.join(self.flops)}")
        return self.flops[dtype]


def _sheet(
    device: str,
    tb_per_s: float,
    half: float,
    float8: float | None,
    float32: float,
    gb: float,
    source: str,
    float4: float | None = None,
) -> Datasheet:
    """A datasheet out of TB/s, and TFLOP/s at 16, 8, 32 and 4 bits."""
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": float32 * 1e12}
    if float8 is not None:
        flops["float8"] = float8 * 1e12
    if float4 is not None:
        flops["float4"] = float4 * 1e12
    return Datasheet(device, tb_per_s * 1e12, flops, gb, source)


# Where a datasheet prints a figure "with sparsity", half of it stands here.
DATASHEETS: dict[str, Datasheet] = {
    "A100": _sheet(
        "NVIDIA A100 80GB SXM",
        2.039,
        312,
        None,
        19.5,
        80,
        "NVIDIA A100 Tensor Core GPU datasheet, https://www.nvidia.com/en-us/data-center/a100/",
    ),
    "H100": _sheet(
        "NVIDIA H100 SXM",
        3.35,
        989.5,
        1979,
        67,
        80,
        "NVIDIA H100 Tensor Core GPU datasheet, https://www.nvidia.com/en-us/data-center/h100/",
    ),
    "H200": _sheet(
        "NVIDIA H200 SXM",
        4.8,
        989.5,
        1979,
        67,
        141,
        "NVIDIA H200 Tensor Core GPU datasheet, https://www.nvidia.com/en-us/data-center/h200/",
    ),
    "B200": _sheet(
        "NVIDIA B200 (HGX, 1000 W)",
        8.0,
        2250,
        4500,
        80,
        180,
        "NVIDIA Blackwell datasheet, HGX B200 per GPU, https://www.nvidia.com/en-us/data-center/hgx/",
        float4=9000,
    ),
    "L40S": _sheet(
        "NVIDIA L40S",
        0.864,
        362.05,
        733,
        91.6,
        48,
        "NVIDIA L40S GPU datasheet, https://www.nvidia.com/en-us/data-center/l40s/",
    ),
    "RTX4090": _sheet(
        "NVIDIA GeForce RTX 4090",
        1.008,
        165.2,
        330.3,
        82.6,
        24,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A (fp32 accumulation), "
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
}


def _plain(text: str) -> str:
    return re.sub(r"[\s_-]", "", text).upper().removeprefix("NVIDIA").removeprefix("GEFORCE")


def find_datasheet(text: str) -> Datasheet | None:
    """The datasheet of that name, whatever its case, spaces and dashes; None if there is none."""
    return DATASHEETS.get(_plain(text))


def nearest_datasheet(text: str) -> str:
    """ " (did you mean 'H200'?)", or nothing."""
    close = difflib.get_close_matches(_plain(text), DATASHEETS, n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one subblock in one phase."""

    flops: int
    bytes: int

    def nanoseconds(self, sheet: Datasheet, dtype: str) -> int:
        return round(1e9 * max(self.flops / sheet.peak(dtype), self.bytes / sheet.bandwidth))


@dataclass(frozen=True)
class RooflineClock:
    """The clock of a datasheet. Every time is one of `scenario.tp` ranks'."""

    sheet: Datasheet
    shape: ModelShape
    scenario: Scenario
    estimate: bool = True

    def __post_init__(self) -> None:
        part_of("num_attention_heads", self.shape.num_attention_heads, self.scenario.tp)

    @property
    def name(self) -> str:
        short = next(name for name, sheet in DATASHEETS.items() if sheet is self.sheet)
        return f"{short} datasheet"

    @property
    def device(self) -> str:
        return self.sheet.device

    @cached_property
    def fixed(self) -> Times:
        """The head, for the last token of each sequence, and the rows that the embedding reads."""
        s, hidden, size = self.scenario, self.shape.hidden_size, DTYPE_BYTES[self.scenario.weight_dtype]
        head = -(-self.shape.vocab_size // s.tp) * hidden
        return self._times(
            Work(2 * s.batch * head, (head + s.batch * s.prompt_tokens * hidden) * size),
            Work(2 * s.batch * head, (head + s.batch * hidden) * size),
        )

    def layer(self, spec: LayerSpec) -> Times:
        built = built_layer(self.shape, spec)
        return self.subblock(built.attention) + self.subblock(built.ffn)

    def subblock(self, spec: AttentionSpec | FFNSpec) -> Times:
        """One attention or FFN as built. Raises ConfigError if `tp` does not divide it."""
        prefill, decode = self.work(spec)
        return self._times(prefill, decode)

    def work(self, spec: AttentionSpec | FFNSpec) -> tuple[Work, Work]:
        """FLOPs and bytes of prefill and of decode.

        With B batch, P prompt, S attended tokens, N weights of the matrices: prefill takes 2*B*P*N FLOPs, decode 2*B*N, each
        reads N weights once. Causal attention adds 4*H*E*B*P*(P+1)/2 and writes the cache; decode adds 4*H*E*B*S and reads it.
        In another precision weights are read in its bytes; if it also rounds inputs, and the device has units for it, its
        products count as the fewer FLOPs of the weight dtype that would take as long.
        """
        s, (size, speed) = self.scenario, self._precision(spec)
        tokens, weights = s.batch * s.prompt_tokens, self._weights(spec)
        prefill, decode = (
            Work(round(2 * count * weights / speed), round(weights * size)) for count in (tokens, s.batch)
        )
        if not isinstance(spec, AttentionSpec) or spec.kind != "kv":
            return prefill, decode
        per_pair = 4 * part_of("num_attention_heads", self.shape.num_attention_heads, s.tp) * self.shape.head_dim
        per_token = 2 * rank_kv_heads(spec, s.tp) * self.shape.head_dim * s.kv_value_bytes
        pairs, cached = tokens * (s.prompt_tokens + 1) // 2, s.batch * attended_tokens(s)
        return (
            Work(prefill.flops + per_pair * pairs, prefill.bytes + tokens * per_token),
            Work(decode.flops + per_pair * cached, decode.bytes + cached * per_token),
        )

    def _precision(self, spec: AttentionSpec | FFNSpec) -> tuple[float, float]:
        """Bytes of one weight with its part of the scales, and how much faster products are than in the weight dtype."""
        dtype = self.scenario.weight_dtype
        if spec.precision == BF16:
            return DTYPE_BYTES[dtype], 1.0
        from blocks.formats import format_named

        format, matrices = format_named(spec.precision), self.shape.matrices(spec)
        own = UNITS.get(format.name)
        speed = self.sheet.flops[own] / self.sheet.peak(dtype) if own in self.sheet.flops else 1.0
        return sum(format.bytes(*m) for m in matrices) / sum(rows * columns for rows, columns in matrices), speed

    def _weights(self, spec: AttentionSpec | FFNSpec) -> int:
        """Weights in the matrices of one rank."""
        hidden, tp = self.shape.hidden_size, self.scenario.tp
        if spec.kind == "skip":
            return 0
        if spec.kind == "linear":
            return hidden * part_of("hidden_size", hidden, tp)
        if isinstance(spec, FFNSpec):
            return 3 * hidden * part_of(f"the width of {spec}", spec.width, tp)
        heads = part_of("num_attention_heads", self.shape.num_attention_heads, tp)
        return 2 * hidden * self.shape.head_dim * (heads + rank_kv_heads(spec, tp))

    def _times(self, prefill: Work, decode: Work) -> Times:
        dtype = self.scenario.weight_dtype
        return Times(prefill.nanoseconds(self.sheet, dtype), decode.nanoseconds(self.sheet, dtype))
