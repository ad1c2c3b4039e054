"""Children for comparing engines: every kind of block, and random topologies, each with what transformers makes of it.

    python benchmarks/engine_children.py OUT                         children of SmolLM2-135M
    python benchmarks/engine_children.py OUT --parent tiny           random topologies of a tiny random parent
    python benchmarks/engine_children.py OUT --packed                children of SmolLM2-135M with precisions

Each child is a directory as `nas distill` writes it, in fp32 (with precisions: in bf16, and the reference rounds to nearest,
inputs and all, in fp32), with `reference.json` beside its files:

    prompt      token ids that greedy decoding starts from       tokens       what it gives, ids
    text        token ids of a fixed text                        log_probs    of text[1:], nats, given all before
    margin      smallest gap of the two best log-probs over the greedy steps: equal tokens mean little below 1e-3
    layers      the architecture                                 versions     of torch and transformers
    noise       of children with precisions: how far from log_probs, in the mean, the same model is with its embedding changed by a
                millionth (rounded inputs make much of that), or in bf16 where a format is of integers, whose kernels know no fp32

Weights are cut from the parent and not fitted: what is compared is two programs on one model, so that the model need not be good.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from blocks.checkpoint import load_child, write_child
from blocks.formats import FORMATS
from blocks.parent import Parent, open_parent
from blocks.rounded import holds
from blocks.shape import ModelShape
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec

REFERENCE = "reference.json"
GREEDY_TOKENS = 24
PROMPT = "The with statement in Python is used to"
TEXT = (
    "A file object is its own context manager: when the block ends, whether it ends well or by an exception, the file is "
    "closed. The same holds for locks, for database transactions and for temporary directories, all of which must be given back."
)
TINY = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
TINY_CHILDREN = 4
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TINY_PARENTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "tiny-biases": {"attention_bias": True, "mlp_bias": True},
    "tiny-rope-tied": {
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64},
    },
}


def make_children(out_dir: Path, parent: str = "smollm2", packed: bool = False) -> list[Path]:
    """Writes what is not there yet and returns the children's directories.

    Args:
        out_dir: where to write; children of other parents stay apart by name.
        parent: "smollm2", "tiny" (random weights, byte tokenizer), or any name that `open_parent` takes.
        packed: children with precisions, one for each number format and one with several.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    found = []
    for tag, opened in _parents(out_dir, parent).items():
        made = with_precisions(opened.shape) if packed else architectures(opened.shape, tiny=parent == "tiny")
        if packed and tag not in ("tiny", Path(parent).name):
            continue
        for child, layers in made.items() if tag in ("tiny", Path(parent).name) else [("random-0", made["random-0"])]:
            path = out_dir / f"{tag}-{child}"
            if not (path / REFERENCE).is_file():
                dtype = "bfloat16" if packed else "float32"
                write_child(path, opened.path, Architecture.from_list(layers), _cut(opened, layers), dtype)
                (path / REFERENCE).write_text(json.dumps(reference(path, opened, layers), indent=1) + "\n")
            found.append(path)
    return found


def _parents(out_dir: Path, name: str) -> dict[str, Parent]:
    if name != "tiny":
        return {Path(name).name: open_parent(name)}
    return {
        tag: open_parent(str(_tiny_parent(out_dir / f"{tag}-parent", overrides)))
        for tag, overrides in TINY_PARENTS.items()
    }


def architectures(shape: ModelShape, tiny: bool = False) -> dict[str, list[str]]:
    """By name: the text form of one spec a layer."""
    n, heads, width = shape.num_hidden_layers, shape.num_key_value_heads, shape.intermediate_size
    full, half = f"attention:kv{heads}+ffn:{width}", f"attention:kv1+ffn:{width // 2 // 256 * 256}"
    if tiny:
        drawn = {f"random-{seed}": _random(shape, seed, linear=seed % 2 == 1) for seed in range(TINY_CHILDREN)}
        return drawn | {"ffn-first": [f"attention:skip+ffn:{width}", *drawn["random-2"][1:]]}

    def changed(**at: str) -> list[str]:
        return [at.get(f"l{layer}", full) for layer in range(n)]

    return {
        # Widths and head counts differ, every layer whole: what every engine serves.
        "mild": [full if layer % 3 else half for layer in range(n)],
        # Every way of leaving something out: an empty layer, attention alone beside FFN alone, attention alone in the
        # middle and as the last layer, runs without attention.
        "skips": changed(
            l1=half,
            l4="attention:skip+ffn:skip",
            l5=f"attention:skip+ffn:{width}",
            l8=f"attention:kv{heads}+ffn:skip",
            l9=f"attention:skip+ffn:{width}",
            l12="attention:kv1+ffn:skip",
            l13="attention:skip+ffn:256",
            l16="attention:kv1+ffn:skip",
            l20=f"attention:skip+ffn:{width // 2}",
            l21="attention:skip+ffn:skip",
            l22=f"attention:skip+ffn:{width}",
            **{f"l{n - 1}": "attention:kv1+ffn:skip"},
        ),
        # As after fusing FFNs: runs without attention that end in one wider than the parent's.
        "wide": changed(l10=f"attention:skip+ffn:{2 * width}", l20=f"attention:kv1+ffn:{3 * width}"),
        "linear-attention": changed(l6="attention:linear+ffn:768", l12=f"attention:linear+ffn:{width}", l18=half),
        "linear-ffn": changed(l6="attention:kv1+ffn:linear", l12=f"attention:kv{heads}+ffn:linear"),
        "linear-both": changed(l6="attention:linear+ffn:linear", l13="attention:skip+ffn:linear"),
        "ffn-first": changed(
            l0=f"attention:skip+ffn:{width}"
        ),  # only repaired: a search keeps the attention of layer 0
        "random-0": _random(shape, 0, linear=False),
        "random-1": _random(shape, 1, linear=True),
    }


def with_precisions(shape: ModelShape) -> dict[str, list[str]]:
    """By name: nearly the parent, so that it speaks, in each format; and in several: attentions, FFNs and layers differ."""
    whole, n = shape.parent_layer, shape.num_hidden_layers
    skips = {
        2 * n // 3: LayerSpec(AttentionSpec("skip"), whole.ffn),
        2 * n // 5: LayerSpec(whole.attention, FFNSpec("skip")),
    }
    layers = [skips.get(index, whole) for index in range(n)]
    found = {name: [layer.at(name) for layer in layers] for name in FORMATS if name not in ("bf16", "int3")}
    found["mixed"] = [
        layer.at("fp8", "int4-g32") if index % 4 else layer.at("bf16", "fp8") for index, layer in enumerate(layers)
    ]
    held = {name: each for name, each in found.items() if all(_held(shape, layer) for layer in each)}
    return {f"packed-{name}": [str(layer) for layer in each] for name, each in held.items()}


def _held(shape: ModelShape, layer: LayerSpec) -> bool:
    return holds(shape, layer.attention) and holds(shape, layer.ffn)


def _random(shape: ModelShape, seed: int, linear: bool) -> list[str]:
    """Layer 0 keeps an attention; all else is drawn. SmolLM2 keeps three of four layers whole, lest it babble."""
    draw = random.Random(seed)
    counts = [n for n in range(1, shape.num_key_value_heads + 1) if shape.num_key_value_heads % n == 0]
    attentions = [f"kv{n}" for n in counts] + ["skip"] + ["linear"] * linear
    ffns = [str(w) for w in range(256, shape.intermediate_size + 1, 256)] + ["skip"] + ["linear"] * linear
    whole = str(shape.parent_layer)
    keep = 0.0 if shape.num_hidden_layers < 12 else 0.75
    return [
        whole
        if draw.random() < keep
        else f"attention:{draw.choice(attentions if layer else attentions[: len(counts)])}+ffn:{draw.choice(ffns)}"
        for layer in range(shape.num_hidden_layers)
    ]


def _cut(parent: Parent, layers: list[str]) -> dict[str, Tensor]:
    """The tensors of such a child of `parent`, in fp32."""
    store, shape = parent.weights(), parent.shape
    tensors = {name: store.get(name, torch.float32) for name in store.names() if not name.startswith("model.layers.")}
    for index, text in enumerate(layers):
        spec, own = LayerSpec.parse(text), store.layer(index, torch.float32)
        kept = _cut_attention(own, spec, shape) | _cut_ffn(store.layer, index, spec, shape)
        tensors |= {f"model.layers.{index}.{name}": tensor for name, tensor in kept.items()}
    return tensors


def _cut_attention(own: dict[str, Tensor], spec: LayerSpec, shape: ModelShape) -> dict[str, Tensor]:
    if spec.attention.kind == "skip":
        return {}
    norm = {"input_layernorm.weight": own["input_layernorm.weight"]}
    if spec.attention.kind == "linear":  # what attending to oneself alone would do
        values = own["self_attn.v_proj.weight"].view(shape.num_key_value_heads, shape.head_dim, -1)
        values = values.repeat_interleave(shape.num_attention_heads // shape.num_key_value_heads, 0).flatten(0, 1)
        return norm | {"self_attn.linear_attn.weight": own["self_attn.o_proj.weight"] @ values}
    kept = {name: tensor for name, tensor in own.items() if name.startswith("self_attn.")}
    for name in kept.keys() & {f"self_attn.{part}_proj.{kind}" for part in "kv" for kind in ("weight", "bias")}:
        kept[name] = kept[name].unflatten(0, (spec.attention.kv_heads, -1, shape.head_dim)).mean(1).flatten(0, 1)
    return norm | kept


def _cut_ffn(
    layer: Callable[[int, torch.dtype], dict[str, Tensor]], index: int, spec: LayerSpec, shape: ModelShape
) -> dict[str, Tensor]:
    """Leading channels; beyond the parent's width those of the layers after it as well, halved, as fusion would stack them."""
    if spec.ffn.kind == "skip":
        return {}
    own = layer(index, torch.float32)
    norm = {"post_attention_layernorm.weight": own["post_attention_layernorm.weight"]}
    if spec.ffn.kind == "linear":
        return norm | {"mlp.linear_mlp.weight": 0.1 * own["mlp.down_proj.weight"] @ own["mlp.up_proj.weight"]}
    stacked = [layer(index + more, torch.float32) for more in range(-(-spec.ffn.width // shape.intermediate_size))]
    down = torch.cat([part["mlp.down_proj.weight"] for part in stacked], 1) / len(stacked)
    rows = {
        name: torch.cat([part[name] for part in stacked])[: spec.ffn.width]
        for name in own
        if name.startswith(("mlp.gate_proj.", "mlp.up_proj."))
    }
    bias = {name: tensor for name, tensor in own.items() if name == "mlp.down_proj.bias"}
    return norm | rows | bias | {"mlp.down_proj.weight": down[:, : spec.ffn.width]}


def reference(path: Path, parent: Parent, layers: list[str]) -> dict[str, object]:
    """What transformers with this package's model code makes of a child, in fp32, without a KV cache."""
    tokenizer, model = parent.tokenizer(), load_child(path)
    prompt, text = (tokenizer(words, add_special_tokens=False)["input_ids"] for words in (PROMPT, TEXT))
    tokens: list[int] = []
    margin = float("inf")
    with torch.no_grad():
        for _ in range(GREEDY_TOKENS):
            last = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
            best = last.topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
    log_probs = _log_probs(model, text)
    return {
        "prompt": prompt,
        "tokens": tokens,
        "text": text,
        "log_probs": log_probs.tolist(),
        "margin": margin,
        "noise": float((_log_probs(_nearby(path, model, layers), text) - log_probs).abs().mean()),
        "layers": layers,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


@torch.no_grad()
def _nearby(path: Path, model: Any, layers: list[str]) -> Any:
    """The model as other arithmetic might compute it; itself where nothing is rounded."""
    if "@int" in str(layers):
        return load_child(path, torch.bfloat16)
    if "@" in str(layers):
        table = model.model.embed_tokens.weight
        table.mul_(1 + 1e-6 * torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
    return model


@torch.no_grad()
def _log_probs(model: Any, text: list[int]) -> Tensor:
    found: Tensor = model(torch.tensor([text]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return found.gather(1, torch.tensor(text[1:])[:, None])[:, 0]


def _tiny_parent(path: Path, overrides: dict[str, Any]) -> Path:
    """A random Llama with four query heads, large weights, biases that are not zero and a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (path / "config.json").is_file():
        return path
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(TINY | overrides)))
    for tensor_name, parameter in model.named_parameters():
        if tensor_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(path)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--parent", default="smollm2")
    parser.add_argument("--packed", action="store_true", help="children with precisions")
    arguments = parser.parse_args()
    for path in make_children(arguments.out, arguments.parent, arguments.packed):
        made = json.loads((path / REFERENCE).read_text())
        print(
            f"{path}  margin {made['margin']:.4f}  mean log-prob {sum(made['log_probs']) / len(made['log_probs']):.3f}"
        )


if __name__ == "__main__":
    main()
