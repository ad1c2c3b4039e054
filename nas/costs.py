"""What a child costs: weights + KV cache for a scenario + a stated reserve, in whole bytes; with a clock, time too.

    bytes = parameters * weight bytes + batch * context * KV values per token * KV bytes + reserve

A matrix in another number format than bf16 takes what it takes on disk, scales included (blocks/formats.py). GB is 1e9 bytes, GiB is 2^30. Tied embeddings count once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from blocks.errors import ConfigError
from blocks.shape import ModelShape, as_built
from blocks.spec import BF16, NO_ATTENTION, NO_FFN, Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.limits import cost_field

if TYPE_CHECKING:
    from nas.clock import Clock

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KV_DTYPE_BYTES = {**DTYPE_BYTES, "float8": 1}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8", "float8_e4m3fn": "float8"}


@dataclass(frozen=True)
class Scenario:
    """What the child must serve at once.

    Attributes:
        batch: sequences at a time.
        context: tokens each of them holds in the KV cache.
        prompt, output: tokens of a request that are read and that are generated, for latency and throughput; half of
            `context` each if None.
        tp: GPUs that share each layer (tensor parallelism). KV heads are replicated where there are fewer of them.
        weight_dtype: "bfloat16", "float16" or "float32": of what has no precision of its own. Short names (bf16) are known.
        kv_dtype: of the KV cache: the same, or "float8" (E4M3, no scales). Several, "bfloat16,float8": a search takes the better.
        reserve_gb: GB kept free for activations, CUDA context and the like.
    """

    batch: int = 4
    context: int = 2048
    prompt: int | None = None
    output: int | None = None
    tp: int = 1
    weight_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"
    reserve_gb: float = 0.0

    def __post_init__(self) -> None:
        for name in ("batch", "context", "prompt", "output", "tp"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, not {value}")
        if self.prompt_tokens + self.output_tokens > max(self.context, 2):
            raise ConfigError(
                f"--prompt {self.prompt_tokens} and --output {self.output_tokens} exceed --context {self.context}"
            )
        for name, known in (("weight_dtype", DTYPE_BYTES), ("kv_dtype", KV_DTYPE_BYTES)):
            given = [text.strip() for text in getattr(self, name).split(",")]
            meant = [SHORT_DTYPES.get(text, text) for text in given]
            for text, dtype in zip(given, meant, strict=True):
                if dtype not in known or (name == "weight_dtype" and len(given) > 1):
                    flag = f"--{name.replace('_', '-')} {getattr(self, name)}"
                    raise ConfigError(f"{flag}: {text!r} is not a dtype we price; known: {', '.join(known)}")
            object.__setattr__(self, name, ",".join(meant))
        if not 0 <= self.reserve_gb < math.inf:
            raise ConfigError(f"--reserve-gb must be 0 or more, not {self.reserve_gb}")

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a request's prompt."""
        if self.prompt is not None:
            return self.prompt
        return max(1, self.context // 2 if self.output is None else self.context - self.output)

    @property
    def output_tokens(self) -> int:
        """Tokens generated for a request."""
        return self.output if self.output is not None else max(1, self.context - self.prompt_tokens)

    @property
    def reserve_bytes(self) -> int:
        return round(self.reserve_gb * 1e9)

    @property
    def by_kv_dtype(self) -> list[Scenario]:
        """This scenario with each of its KV dtypes."""
        return [replace(self, kv_dtype=dtype) for dtype in dict.fromkeys(self.kv_dtype.split(","))]

    @property
    def kv_value_bytes(self) -> int:
        """Bytes of one cached value. Raises ConfigError where several dtypes are to be chosen from."""
        if self.kv_dtype not in KV_DTYPE_BYTES:
            raise ConfigError(f"--kv-dtype {self.kv_dtype}: only `nas search` on a run chooses among several; give one")
        return KV_DTYPE_BYTES[self.kv_dtype]

    def request_ns(self, prefill_ns: int, decode_ns: int) -> int:
        """A whole request: the prompts read, and every output token."""
        return prefill_ns + self.output_tokens * decode_ns

    def tokens_per_s(self, request_ns: float) -> float:
        """Generated tokens a second of a whole batch of requests."""
        return self.batch * self.output_tokens / request_ns * 1e9

    def to_json(self) -> dict[str, Any]:
        """With what prompt and output come to."""
        return asdict(self) | {"prompt": self.prompt_tokens, "output": self.output_tokens}


@dataclass(frozen=True)
class Cost:
    """What one architecture costs in one scenario: bytes by kind and, with a clock, nanoseconds of a whole batch."""

    parameters: int
    fixed_bytes: int
    attention_bytes: int
    ffn_bytes: int
    kv_bytes: int
    reserve_bytes: int
    ttft_ns: int | None = None
    tpot_ns: int | None = None
    request_ns: int | None = None
    tokens_per_s: float | None = None

    @property
    def weight_bytes(self) -> int:
        return self.fixed_bytes + self.attention_bytes + self.ffn_bytes

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes

    @property
    def gb(self) -> float:
        return self.total_bytes / 1e9

    def to_json(self) -> dict[str, Any]:
        times = {
            f"{name}_ms": None if ns is None else ns / 1e6
            for name, ns in (("prefill", self.ttft_ns), ("decode", self.tpot_ns))
        }
        totals = {"weight_bytes": self.weight_bytes, "total_bytes": self.total_bytes, "gb": self.gb}
        return asdict(self) | totals | times

    def total(self, limit: str) -> int:
        """By the name of a limit (nas/limits.py)."""
        value = getattr(self, cost_field(limit))
        assert value is not None, f"{limit} needs a clock"
        return int(value)


class CostModel:
    """Prices layers and architectures of one parent in one scenario, in bytes and, with a clock, in time."""

    def __init__(self, shape: ModelShape, scenario: Scenario, clock: Clock | None = None) -> None:
        self.shape, self.scenario, self.clock = shape, scenario, clock
        self.weight_bytes = DTYPE_BYTES[scenario.weight_dtype]
        self.kv_bytes_per_value = scenario.batch * scenario.context * scenario.kv_value_bytes

    def layer_kv_bytes(self, layer: LayerSpec) -> int:
        """Of all GPUs together: where they are more than the KV heads, each holds one."""
        heads = layer.attention.kv_heads
        copies = -(-max(heads, self.scenario.tp) // heads) if heads else 1
        return self.shape.kv_values_per_token(layer.attention) * copies * self.kv_bytes_per_value

    def layer_total(self, limit: str, layer: LayerSpec) -> int:
        """What one layer of a child takes of what a limit counts (nas/limits.py)."""
        if limit == "memory":
            return self.layer_bytes(layer)
        if limit == "kv":
            return self.layer_kv_bytes(layer)
        if limit == "parameters":
            shape, (built,) = as_built(self.shape, Architecture((layer,)))
            return shape.layer_parameters(built)
        return self._times(limit, self._clock.layer(layer))

    def fixed_total(self, limit: str) -> int:
        """What no choice changes of what a limit counts."""
        known = {"memory": self.fixed_bytes, "kv": 0, "parameters": self.shape.fixed_parameters}
        return known[limit] if limit in known else self._times(limit, self._clock.fixed)

    @property
    def _clock(self) -> Clock:
        if self.clock is None:
            raise ConfigError(
                "limits of time need a clock: --clock profiles/NAME.json (made by `nas bench`) or a datasheet, --clock H100"
            )
        return self.clock

    def _times(self, limit: str, times: Any) -> int:
        whole = self.scenario.request_ns(times.prefill_ns, times.decode_ns)
        return int({"ttft": times.prefill_ns, "tpot": times.decode_ns, "request": whole}[limit])

    def divides(self, layer: LayerSpec) -> bool:
        """Whether `tp` GPUs can share a layer as it is on disk: heads and channels divide, KV heads divide or are replicated, and no group of
        weights that share a scale is cut."""
        if (tp := self.scenario.tp) == 1:
            return True
        shape, (built,) = as_built(self.shape, Architecture((layer,)))
        heads = built.attention.kv_heads
        queries = built.attention.kind != "kv" or shape.num_attention_heads % tp == 0
        whole = queries and (heads % tp == 0 or tp % heads == 0 if heads else True) and built.ffn.width % tp == 0
        return whole and (layer == layer.structure or self._groups_divide(shape, built))

    def _groups_divide(self, shape: ModelShape, built: LayerSpec) -> bool:
        """Whether each GPU has whole groups of the inputs of o_proj and down_proj, which are shared out among them."""
        from blocks.formats import format_named

        heads = shape.num_attention_heads * shape.head_dim if built.attention.kind == "kv" else 0
        shared_out = ((built.attention, heads), (built.ffn, built.ffn.width))
        return all(
            inputs % (self.scenario.tp * (format_named(part.precision).group or 1)) == 0 for part, inputs in shared_out
        )

    def layer_bytes(self, layer: LayerSpec) -> int:
        """Weights and KV cache of one layer of a child, as it is on disk."""
        shape, (built,) = as_built(self.shape, Architecture((layer,)))
        weights = sum(self._subblock_bytes(shape, spec) for spec in (built.attention, built.ffn))
        return weights + self.layer_kv_bytes(layer)

    def holds(self, layer: LayerSpec) -> bool:
        """Whether the precisions of a layer can hold its matrices, as they are fitted and, channels padded, on disk."""
        if layer == layer.structure:
            return True
        from blocks.rounded import holds

        shape, (built,) = as_built(self.shape, Architecture((layer,)))
        parts = ((self.shape, layer.attention), (self.shape, layer.ffn), (shape, built.attention), (shape, built.ffn))
        return all(holds(*part) for part in parts)

    def _subblock_bytes(self, shape: ModelShape, spec: AttentionSpec | FFNSpec) -> int:
        """Weights of a subblock as built, in its precision."""
        if spec.precision == BF16:  # without torch, which the formats need
            return self.weight_bytes * shape.subblock_parameters(spec)
        from blocks.rounded import subblock_bytes

        return subblock_bytes(shape, spec, self.weight_bytes)

    def kept(self, spec: AttentionSpec | FFNSpec) -> float:
        """The share of the parent's bytes that one subblock keeps: weights, and KV cache of an attention."""
        own = self.shape.parent_layer
        if isinstance(spec, AttentionSpec):
            return self.layer_bytes(LayerSpec(spec, NO_FFN)) / self.layer_bytes(LayerSpec(own.attention, NO_FFN))
        return self.layer_bytes(LayerSpec(NO_ATTENTION, spec)) / self.layer_bytes(LayerSpec(NO_ATTENTION, own.ffn))

    @property
    def fixed_bytes(self) -> int:
        """What no choice changes: embedding, head, final norm, and the reserve."""
        return self.shape.fixed_parameters * self.weight_bytes + self.reserve_bytes

    @property
    def reserve_bytes(self) -> int:
        return self.scenario.reserve_bytes

    def cost(self, architecture: Architecture) -> Cost:
        """Of a child, as it is on disk."""
        return self._cost(*as_built(self.shape, architecture))

    def parent_cost(self) -> Cost:
        """Of the parent as it is."""
        return self._cost(self.shape, self.shape.parent_architecture)

    def _cost(self, shape: ModelShape, architecture: Architecture) -> Cost:
        return Cost(
            parameters=shape.parameters(architecture),
            fixed_bytes=self.shape.fixed_parameters * self.weight_bytes,
            attention_bytes=sum(self._subblock_bytes(shape, layer.attention) for layer in architecture),
            ffn_bytes=sum(self._subblock_bytes(shape, layer.ffn) for layer in architecture),
            kv_bytes=sum(self.layer_kv_bytes(layer) for layer in architecture),
            reserve_bytes=self.reserve_bytes,
            **self._time(architecture),
        )

    def _time(self, architecture: Architecture) -> dict[str, Any]:
        if self.clock is None:
            return {}
        layers = [self.clock.layer(layer) for layer in architecture]
        ttft, tpot, request = (
            self.fixed_total(name) + sum(self._times(name, times) for times in layers)
            for name in ("ttft", "tpot", "request")
        )
        rate = self.scenario.tokens_per_s(request)
        return {"ttft_ns": ttft, "tpot_ns": tpot, "request_ns": request, "tokens_per_s": rate}

    def budget_for_share(self, share: float) -> int:
        """Bytes of the budget that keeps `share` of what can change of the parent: attention and FFN weights and KV cache.

        A cache in float8 is a saving, not a smaller parent: the parent's counts in the dtype of the weights.
        """
        costs = self
        if self.scenario.kv_dtype == "float8":
            costs = CostModel(self.shape, replace(self.scenario, kv_dtype=self.scenario.weight_dtype))
        parent = costs.cost(self.shape.parent_architecture)  # as built, so that a share of 1 admits it
        return self.fixed_bytes + int(share * (parent.total_bytes - self.fixed_bytes))

    def formula(self, architecture: Architecture) -> str:
        """The budget formula filled in, in bytes, GB and GiB."""
        cost, s = self.cost(architecture), self.scenario
        values = cost.kv_bytes // self.kv_bytes_per_value
        kv_bytes = s.kv_value_bytes
        names = architecture.precisions
        how = f"in {', '.join(names)} with their scales" if architecture.rounded else f"x {self.weight_bytes} B"
        return (
            f"weights {cost.parameters:,} {how} = {cost.weight_bytes:,} B"
            f" + KV {s.batch} x {s.context:,} tokens x {values:,} values x {kv_bytes} B = {cost.kv_bytes:,} B"
            f" + reserve {cost.reserve_bytes:,} B = {cost.total_bytes:,} B = {cost.gb:.4f} GB = {cost.total_bytes / 2**30:.4f} GiB"
        )
