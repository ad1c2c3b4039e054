"""What each serving engine makes of a child: facts as data, and a verdict on one child.

    verdict(ENGINES["vllm"], shape, architecture)

`ok`: loads as it is. `ok with ...`: loads after `nas export --to ENGINE`, which does what is named, exactly.
`unsupported because ...`: no exact rewrite helps. The facts were read in the engines' sources or seen in their runs;
docs/export.md says which.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from blocks.canonical import Change, Form, canonical, layers_of
from blocks.errors import ConfigError
from blocks.shape import ModelShape
from blocks.spec import BF16, Architecture, AttentionSpec, FFNSpec

ROPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
INTEGERS = ("int4", "int4-g32", "int8")


@dataclass(frozen=True)
class Engine:
    """What one engine accepts. The names in print and in `--to`, `--engine` and `--target` are the keys of `ENGINES`.

    Attributes:
        title: its own name.
        load: what to type.
        linear_attention, linear_ffn: serves a matrix in the place of an attention, of an FFN.
        linear_name: its word for that matrix, where it is not ours (`linear_attn`, `linear_mlp`).
        first_attention: layer 0 must have an attention with a KV cache.
        ffn_after_attention: a layer with an attention must have an FFN.
        one_kv_count: all layers must have one number of KV heads.
        attention_bias, mlp_bias: reads biases there.
        qk_norm: normalises queries and keys (Qwen3).
        free_head_dim: head_dim need not be hidden_size / num_attention_heads.
        ropes: rotary embeddings it knows, as `rope_type`.
        every_key: fails on a block of `block_configs` that leaves out a key.
        gguf: reads one GGUF file, not the directory.
        precisions: formats, beside bf16, that it reads in compressed-tensors form; some need a GPU of a kind (docs/export.md).
        mixed_forms: reads several of these forms in one child, such as float-quantized beside pack-quantized.
    """

    title: str
    load: str
    linear_attention: bool = False
    linear_ffn: bool = False
    linear_name: str = ""
    first_attention: bool = True
    ffn_after_attention: bool = False
    one_kv_count: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    free_head_dim: bool = True
    ropes: tuple[str, ...] = ROPES
    every_key: bool = False
    gguf: bool = False
    precisions: tuple[str, ...] = ()
    mixed_forms: bool = False

    def form(self, portable: bool = True) -> Form:
        """The form in which this engine loads a child; `portable`: a layer's attention never stands alone."""
        return Form(self.first_attention, self.ffn_after_attention or portable, self.one_kv_count)


ENGINES = {
    "vllm": Engine(
        "vLLM",
        "vllm serve CHILD (with marquetry installed there, else --trust-remote-code)",
        precisions=("fp8", "nvfp4", "nvfp4a16", *INTEGERS),
        mixed_forms=True,
    ),
    "sglang": Engine(
        "SGLang",
        "python -m sglang.launch_server --model-path CHILD --trust-remote-code",
        one_kv_count=True,
        mlp_bias=False,
        precisions=("fp8", "nvfp4", *INTEGERS),
    ),
    "trtllm": Engine(
        "TensorRT-LLM",
        "trtllm-serve CHILD --trust_remote_code",
        linear_attention=True,
        linear_ffn=True,
        first_attention=False,
        attention_bias=False,
        mlp_bias=False,
        every_key=True,
        precisions=("fp8",),
    ),
    "llamacpp": Engine(
        "llama.cpp",
        "llama-server -m CHILD.gguf",
        linear_attention=True,
        ffn_after_attention=True,
        ropes=("default", "linear", "yarn", "llama3"),
        gguf=True,
    ),
    "mlx": Engine(
        "mlx-lm",
        "mlx_lm.generate --model CHILD",
        linear_attention=True,
        linear_ffn=True,
        linear_name="linear",
        free_head_dim=False,
        ropes=("default", "linear", "llama3", "yarn", "longrope"),
    ),
    "exllamav3": Engine("ExLlamaV3", "convert.py -i CHILD -o ...", first_attention=False),
    "transformers": Engine(
        "transformers",
        "AutoModelForCausalLM.from_pretrained(CHILD, trust_remote_code=True)",
        linear_attention=True,
        linear_ffn=True,
        first_attention=False,
        qk_norm=True,
        precisions=("fp8", "nvfp4", "nvfp4a16", *INTEGERS, "int3"),
        mixed_forms=True,
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What an engine makes of a child.

    Attributes:
        engine: a key of `ENGINES`.
        because: why it cannot serve the child; empty if it can.
        changes: what `nas export` has to do first; empty if the child loads as it is.
    """

    engine: str
    because: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()

    @property
    def status(self) -> str:
        """ "ok", "ok with" or "unsupported"."""
        return "unsupported" if self.because else "ok with" if self.changes else "ok"

    def text(self, weight_bytes: int) -> str:
        """The verdict in words, with what the changes cost in bytes. `weight_bytes`: of one weight on disk."""
        if self.because:
            return f"unsupported because {'; '.join(self.because)}"
        if self.changes:
            return "ok with " + "; ".join(in_words(**change) for change in changes_json(self.changes, weight_bytes))
        return "ok"

    def to_json(self, weight_bytes: int) -> dict[str, Any]:
        return {
            "status": self.status,
            "because": list(self.because),
            "changes": changes_json(self.changes, weight_bytes),
            "load": ENGINES[self.engine].load,
        }


def engine_of(name: str, option: str) -> Engine:
    """An engine by its name. Raises ConfigError that offers the nearest one."""
    if name not in ENGINES:
        close = difflib.get_close_matches(name, list(ENGINES), n=1)
        nearest = f" (did you mean {close[0]!r}?)" if close else ""
        raise ConfigError(f"{option} {name}: not known{nearest}; known: {', '.join(ENGINES)}")
    return ENGINES[name]


def serves_precision(engine: str, name: str) -> bool:
    """Whether an engine serves matrices in a format by its name; `engine` is a key of `ENGINES`."""
    return name == BF16 or name in ENGINES[engine].precisions


def form_of(precision: str) -> str:
    """The form of compressed-tensors that a format lies on disk in, as `blocks.packing` writes it."""
    if precision.startswith("nvfp4"):
        return "nvfp4-pack-quantized"
    return "float-quantized" if precision == "fp8" else "pack-quantized"


def verdict(
    name: str,
    shape: ModelShape,
    architecture: Architecture,
    rope: str = "default",
    linear_name: str = "",
    written: bool = False,
    packed: bool = False,
) -> Verdict:
    """What an engine makes of a child as it lies on disk.

    Args:
        name: a key of `ENGINES`.
        rope: the child's `rope_type`.
        linear_name: the word that its linear replacements are stored under, "" for ours.
        written: whether a GGUF file of it stands beside the directory.
        packed: whether its weights are packed, so that nothing in it can be changed any more.
    """
    engine = ENGINES[name]
    if because := unsupported(engine, shape, architecture, rope):
        return Verdict(name, tuple(because))
    if engine.gguf and written:
        return Verdict(name)
    linear = any("linear" in (layer.attention.kind, layer.ffn.kind) for layer in architecture)
    changes = list(canonical(shape, architecture, engine.form(portable=False)).changes)
    # Empty layers and bare neighbours load where nothing else is asked for: `nas export` tidies them, but need not.
    if not engine.ffn_after_attention:
        changes = [change for change in changes if change.parameters > 0]
    if linear and engine.linear_name != linear_name:
        changes.append(_renamed(engine))
    if engine.gguf:
        changes.append(Change("a GGUF file"))
    if packed and changes:
        needed = "; ".join(change.text for change in changes)
        return Verdict(name, (f"it is packed, and would need {needed}: export its bf16 child to this engine",))
    return Verdict(name, (), tuple(changes))


def unsupported(engine: Engine, shape: ModelShape, architecture: Architecture, rope: str = "default") -> list[str]:
    """What no exact rewrite can mend, in words."""

    def where(kind: AttentionSpec | FFNSpec) -> str:
        return layers_of([i for i, layer in enumerate(architecture) if kind in (layer.attention, layer.ffn)])

    linear_attention, linear_ffn = AttentionSpec("linear"), FFNSpec("linear")
    reasons = []
    if not engine.linear_attention and any(layer.attention == linear_attention for layer in architecture):
        reasons.append(f"it knows no linear attention ({where(linear_attention)})")
    if not engine.linear_ffn and any(layer.ffn == linear_ffn for layer in architecture):
        reasons.append(f"it knows no linear FFN ({where(linear_ffn)})")
    if shape.qk_norm and not engine.qk_norm:
        reasons.append("it knows no query and key norms in this form")
    if (shape.qkv_bias or shape.o_bias) and not engine.attention_bias:
        reasons.append("it drops the biases of attentions")
    if shape.mlp_bias and not engine.mlp_bias:
        reasons.append("it drops the biases of FFNs")
    if engine.linear_name and shape.o_bias and any(layer.attention == linear_attention for layer in architecture):
        reasons.append("its linear attention has a bias where attentions have one")
    odd = shape.head_dim * shape.num_attention_heads != shape.hidden_size
    if engine.gguf and odd and (shape.qkv_bias or shape.o_bias):
        reasons.append("it takes biases of queries to be as many as hidden_size")
    if not engine.free_head_dim and odd:
        reasons.append(f"it takes head_dim to be hidden_size / num_attention_heads, not {shape.head_dim}")
    if rope not in engine.ropes:
        reasons.append(f"it knows no rotary embedding of type {rope} in this form")
    return reasons + _unread_formats(engine, architecture)


def _unread_formats(engine: Engine, architecture: Architecture) -> list[str]:
    """What of a child's precisions an engine does not read, in words."""
    used = [name for name in architecture.precisions if name != BF16]
    if not used:
        return []
    instead = "`nas export --no-pack` writes bf16"
    if not engine.precisions:
        return [f"it reads no weights in compressed-tensors form, here {and_list(used)} ({instead})"]
    if unknown := [name for name in used if name not in engine.precisions]:
        return [f"it reads no {and_list(unknown)} weights in compressed-tensors form ({instead})"]
    forms = sorted({form_of(name) for name in used})
    if len(forms) > 1 and not engine.mixed_forms:
        return [f"it reads one form of packed weights in a model, not {and_list(forms)} ({instead})"]
    return []


def and_list(names: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def changes_json(changes: Iterable[Change], weight_bytes: int) -> list[dict[str, Any]]:
    """Changes for machines: `text`, `bytes` of weights more, `kv_values` more a token."""
    return [
        {"text": c.text, "bytes": c.parameters * weight_bytes + c.more_bytes, "kv_values": c.kv_values} for c in changes
    ]


def in_words(text: str, bytes: int, kv_values: int) -> str:
    """A change with what it costs: "... (+0.90 MB, +128 values a token in the KV cache)"."""
    cost = [f"{bytes / 1e6:+,.2f} MB"] if bytes else []
    cost += [f"{kv_values:+,} values a token in the KV cache"] if kv_values else []
    return f"{text} ({', '.join(cost)})" if cost else text


def _renamed(engine: Engine) -> Change:
    return Change(f"linear replacements under the name {engine.linear_name or 'linear_attn and linear_mlp'}")
