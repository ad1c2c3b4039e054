"""Packed children: the bytes of compressed-tensors, what config.json says, the same logits wherever they are loaded, bytes on disk.

The package compressed-tensors is the oracle. The digests were made with it (0.20.0), so that a later version that writes
otherwise is told from a change of ours: `python tests/test_packing.py` prints them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from app import Result, nas, succeed
from safetensors.torch import load_file, save_file
from test_precision import tensors, theirs
from tiny import LLAMA3_ROPE, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from blocks.calibrated import calibrated_layers, nearest_layers
from blocks.canonical import Form, canonical
from blocks.checkpoint import load_child, write_child
from blocks.child.layout import as_config, expected_tensors, read_architecture
from blocks.engines import ENGINES, form_of, serves_precision, unsupported, verdict
from blocks.errors import CheckpointError, ConfigError
from blocks.formats import FORMATS, Format, Integer
from blocks.gptq import gptq_codes, output_error
from blocks.layer import LayerMath, layer_forward, rms_norm
from blocks.packing import PackedMatrix, pack_words, packed_sizes, quantization_config, unpack_words
from blocks.rounded import RoundedWeights, round_layer, subblock_bytes
from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from blocks.weights import WeightStore
from nas.export import open_child, verdicts

SHAPE = ModelShape(128, 512, 4, 4, 2, 32, 272)
WEIGHT_ONLY = ["nvfp4a16", "int4", "int4-g32", "int8"]
PACKED = ["fp8", "nvfp4", *WEIGHT_ONLY]
IDS = torch.randint(0, 256, (1, 11), generator=torch.Generator().manual_seed(0))
INT3 = Integer("int3", 3, group=32)


def layers_in(first: str, second: str = "bf16") -> list[str]:
    """Attentions in one format, FFNs in another, and in places neither."""
    specs = ["attention:kv2+ffn:512", "attention:kv1+ffn:256", "attention:skip+ffn:512", "attention:kv2+ffn:256"]
    layers = [LayerSpec.parse(text) for text in specs]
    return [str(layer.at(*(("bf16", "bf16") if i == 3 else (first, second)))) for i, layer in enumerate(layers)]


MIXED = [
    "attention:kv2@fp8+ffn:512@nvfp4",
    "attention:kv1@int4+ffn:256",
    "attention:skip+ffn:512@int8",
    "attention:linear@int4-g32+ffn:linear@nvfp4a16",
]


@pytest.fixture(scope="module")
def parent_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("parent"), hidden_size=128, head_dim=32, rope_parameters=LLAMA3_ROPE)


@pytest.fixture(scope="module")
def runs(parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """A run with a child of these layers in bf16, and text; made once."""
    made: dict[str, Path] = {}

    def run(layers: list[str]) -> Path:
        if str(layers) not in made:
            place = tmp_path_factory.mktemp("run")
            write_child(place / "child", parent_dir, Architecture.from_list(layers), random_tensors(layers), "bfloat16")
            (place / "data").mkdir()
            np.save(place / "data" / "fit.npy", text())
            made[str(layers)] = place
        return made[str(layers)]

    return run


@pytest.fixture(scope="module")
def exported(runs: Callable[[list[str]], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Such a child, packed; made once."""
    made: dict[str, Path] = {}

    def export(layers: list[str], *options: str, to: str = "transformers") -> Path:
        key = str((layers, options, to))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("packed") / "out"
            succeed("export", runs(layers), "--to", to, "--out", made[key], "--device", "cpu", "--json", *options)
        return made[key]

    return export


def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 48)).astype("uint16")


def random_tensors(layers: list[str], shape: ModelShape = SHAPE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = expected_tensors(shape, Architecture.from_list(layers))
    return {
        name: ("norm" in name) + (0.3 if "norm" in name else 0.15) * torch.randn(size, generator=generator)
        for name, size in sizes.items()
    }


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found.float()


def packed_by_us(format: Format, weight: Tensor) -> dict[str, Tensor]:
    divisor = torch.ones(1) if format.input_bits == 4 else None
    return PackedMatrix(format.nearest(weight), divisor).tensors()


def digest(parts: Mapping[str, Tensor]) -> str:
    data = hashlib.sha256()
    for name in sorted(parts):
        each = parts[name].contiguous()
        data.update(f"{name} {each.dtype} {list(each.shape)}".encode())
        data.update(each.view(torch.uint8).numpy().tobytes())
    return data.hexdigest()[:12]


# ---- bytes

DIGESTS = {
    "fp8": "e5c08b4e5735",
    "nvfp4": "c92e23bd348b",
    "nvfp4a16": "552223b232ff",
    "int4": "e19ec8b1308b",
    "int4-g32": "9e1636ae013c",
    "int8": "412279742429",
}


def of_all(pack: Callable[[Tensor], Mapping[str, Tensor]]) -> str:
    """One digest over all test tensors."""
    return hashlib.sha256("".join(digest(pack(each)) for each in tensors().values()).encode()).hexdigest()[:12]


@pytest.mark.parametrize("name", PACKED)
def test_every_byte_is_the_stored_one(name: str) -> None:
    assert of_all(lambda weight: packed_by_us(FORMATS[name], weight)) == DIGESTS[name]


@pytest.mark.parametrize("format", [*(FORMATS[name] for name in PACKED), INT3], ids=lambda format: format.name)
def test_every_byte_is_that_of_the_package(format: Format) -> None:
    more = {f"random {seed}": torch.randn(7, 384, generator=torch.Generator().manual_seed(seed)) for seed in range(3)}
    for title, weight in (tensors() | more).items():
        ours, wanted = packed_by_us(format, weight), theirs(format, weight)[3]
        assert digest(ours) == digest(wanted), title


@pytest.mark.parametrize("format", [*(FORMATS[name] for name in PACKED), INT3], ids=lambda format: format.name)
def test_what_is_packed_comes_back_and_takes_the_bytes_that_are_priced(format: Format) -> None:
    for title, weight in tensors().items():
        done, on_disk = format.nearest(weight), packed_by_us(format, weight)
        again = PackedMatrix.of(format, on_disk).quantized
        assert torch.equal(again.weight, done.weight) and torch.equal(again.codes.float(), done.codes.float()), title
        assert torch.equal(again.codes.float().signbit(), done.codes.float().signbit()), title
        assert {name: (tuple(t.shape), t.dtype) for name, t in on_disk.items()} == packed_sizes(format, *weight.shape)
        assert sum(tensor.nbytes for tensor in on_disk.values()) == format.bytes(*weight.shape)


def test_words_by_hand() -> None:
    codes = torch.tensor([[-8, 7, 0, 1, -1, 2, 3, -3, 5]], dtype=torch.int8)
    words = pack_words(codes, 4)
    assert words.tolist() == [[0x5BA798F0, 0xD]] and words.dtype == torch.int32
    assert torch.equal(unpack_words(words, 4, 9), codes)
    codes = torch.tensor([[3, -4, 1, 0, -1, 2, -2, -3, 3, 0, 3]], dtype=torch.int8)
    bits = "".join(f"{int(code) + 4:03b}"[::-1] for code in codes[0])  # lowest bit first, across the boundary at 32
    words = pack_words(codes, 3)
    expected = [int(bits[:32][::-1], 2), int(bits[32:][::-1], 2)]
    assert [word % 2**32 for word in words[0].tolist()] == expected
    assert torch.equal(unpack_words(words, 3, 11), codes)


# ---- what config.json says


def module_names(layers: list[str]) -> list[str]:
    names = [name.removesuffix(".weight") for name in expected_tensors(SHAPE, Architecture.from_list(layers))]
    return [name for name in names if "norm" not in name and "embed" not in name]


def matched(config: Mapping[str, Any], name: str) -> list[str]:
    """The formats of the groups that match a module, or "ignored"."""
    if name in config["ignore"]:
        return ["ignored"]
    groups = config["config_groups"].values()
    return [
        group["format"]
        for group in groups
        if any(re.match(target.removeprefix("re:"), name) for target in group["targets"])
    ]


def test_every_module_is_in_one_group_or_ignored_and_so_are_those_that_engines_fuse() -> None:
    architecture = Architecture.from_list(MIXED)
    config = quantization_config(architecture)
    assert (
        config is not None and config["format"] == "mixed-precision" and config["quantization_status"] == "compressed"
    )
    for name in module_names(MIXED):
        if name == "lm_head":
            assert matched(config, name) == ["ignored"]
            continue
        layer, part = architecture[int(name.split(".")[2])], name.split(".")[3]
        precision = (layer.attention if part == "self_attn" else layer.ffn).precision
        assert matched(config, name) == ["ignored" if precision == "bf16" else form_of(precision)], name
    for layer, wanted in enumerate(["float-quantized", "pack-quantized"]):
        assert matched(config, f"model.layers.{layer}.self_attn.qkv_proj") == [wanted]
    assert matched(config, "model.layers.0.mlp.gate_up_proj") == ["nvfp4-pack-quantized"]
    assert matched(config, "model.layers.1.mlp.gate_up_proj") == ["ignored"]
    assert (
        matched(config, "model.layers.11.self_attn.q_proj")
        == matched(config, "model.layers.0.self_attn.q_proj_x")
        == []
    )


def test_one_form_is_named_at_the_top_and_nothing_is_said_of_bf16() -> None:
    assert quantization_config(Architecture.from_list(layers_in("bf16"))) is None
    for first, second, form in (("fp8", "bf16", "float-quantized"), ("int4", "int8", "pack-quantized")):
        config = quantization_config(Architecture.from_list(layers_in(first, second)))
        assert config is not None and config["format"] == form
        assert len(config["config_groups"]) == 1 + (second != "bf16")


def test_the_package_reads_the_same_schemes() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    for layers in (MIXED, layers_in("nvfp4", "fp8")):
        config = quantization_config(Architecture.from_list(layers))
        assert config is not None
        read = QuantizationConfig.model_validate({k: v for k, v in config.items() if k != "version"})
        for key, group in read.config_groups.items():
            told = config["config_groups"][key]
            assert group.format == told["format"] and group.weights.num_bits == told["weights"]["num_bits"]
            assert (group.input_activations is None) == (told["input_activations"] is None)


# ---- children


def fake_quantized_logits(master: Path, layers: list[str]) -> Tensor:
    """By `round_layer` and `layer_forward` from the master's tensors: every matrix to nearest."""
    store, config = WeightStore(master), as_config(json.loads((master / "config.json").read_text()))
    math = LayerMath.of(config, IDS.shape[1], "cpu", torch.float32)
    h = torch.nn.functional.embedding(IDS, store.embedding.float())
    with torch.no_grad():
        for index, spec in enumerate(Architecture.from_list(layers)):
            h = layer_forward(round_layer(store.layer(index, torch.float32), spec), h, math)
        return rms_norm(h, store.final_norm.float(), config.rms_norm_eps) @ store.head.float().T


@pytest.mark.parametrize("name", ["fp8", *WEIGHT_ONLY])
def test_a_packed_child_computes_what_its_fake_quantized_master_does(
    runs: Callable[..., Path], exported: Callable[..., Path], name: str
) -> None:
    layers = layers_in(name, name)
    found, master = logits(load_child(exported(layers))), runs(layers) / "child"
    assert (found - fake_quantized_logits(master, layers)).abs().max() < 1e-4
    assert (found - fake_quantized_logits(master, layers_in("bf16"))).abs().max() > 1e-2
    assert read_architecture(exported(layers))[1] == Architecture.from_list(layers)


@pytest.mark.parametrize("options", [(), ("--quantizer", "gptq")], ids=["nearest", "gptq"])
@pytest.mark.parametrize("layers", [*(layers_in(name, name) for name in PACKED), MIXED], ids=[*PACKED, "mixed"])
def test_transformers_and_the_package_give_the_same_logits(
    exported: Callable[..., Path], own_remote_code: None, layers: list[str], options: tuple[str, ...]
) -> None:
    """In fp32; of nvfp4 the package makes bf16 weights, whatever is asked for: they are loaded as such, and ours rounded so."""
    path = exported(layers, *options)
    dtype = torch.bfloat16 if "nvfp4" in str(layers) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=dtype)
    logits(model)  # the first pass unpacks
    ours = load_child(path, dtype)
    for each in (model, ours):
        nn.Module.float(each)
    assert (logits(model) - logits(ours)).abs().max() < 1e-4


@pytest.mark.parametrize("layers", [*(layers_in(name, name) for name in PACKED), MIXED], ids=[*PACKED, "mixed"])
def test_bytes_on_disk_are_those_that_the_search_counts(exported: Callable[..., Path], layers: list[str]) -> None:
    tensors = load_file(exported(layers) / "model.safetensors")
    wanted = 2 * SHAPE.fixed_parameters
    for layer in Architecture.from_list(layers):
        wanted += subblock_bytes(SHAPE, layer.attention, 2) + subblock_bytes(SHAPE, layer.ffn, 2)
    assert sum(tensor.nbytes for tensor in tensors.values()) == wanted


def test_what_export_says_is_saved_is_saved(runs: Callable[..., Path], tmp_path: Path) -> None:
    before = sum(t.nbytes for t in load_file(runs(MIXED) / "child" / "model.safetensors").values())
    made = succeed("export", runs(MIXED), "--to", "transformers", "--out", tmp_path / "out", "--json").json
    after = sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert made["added_bytes"] == after - before < 0
    assert made["packed"] == ["fp8", "int4", "int4-g32", "int8", "nvfp4", "nvfp4a16"] and made["quantizer"] == "nearest"
    shown = " ".join(succeed("export", runs(MIXED), "--to", "transformers", "--out", tmp_path / "out").out.split())
    assert "rounded to nearest" in shown and "the same logits" not in shown and "MB)" in shown


def test_q_k_and_v_share_a_divisor_and_so_do_gate_and_up(exported: Callable[..., Path]) -> None:
    for options in ((), ("--quantizer", "gptq")):
        tensors = load_file(exported(layers_in("nvfp4", "nvfp4"), *options) / "model.safetensors")
        for kind in ("weight_global_scale", "input_global_scale"):
            at = {
                n.split(".")[-2]: t for n, t in tensors.items() if n.startswith("model.layers.0.") and n.endswith(kind)
            }
            assert at["q_proj"] == at["k_proj"] == at["v_proj"] != at["o_proj"]
            assert at["gate_proj"] == at["up_proj"] != at["down_proj"]


class Inputs:
    """The inputs of modules over the calibration text, before they are rounded."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.seen: dict[str, Tensor] = {}
        model = load_child(path)
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(self._hook(name), prepend=True)
        with torch.no_grad():
            model(torch.from_numpy(text().astype("int64")), use_cache=False)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.seen[name] = inputs[0].flatten(0, -2)

        return keep


@pytest.mark.parametrize("options", [(), ("--quantizer", "gptq")], ids=["nearest", "gptq"])
def test_input_scales_are_those_of_the_largest_inputs_that_the_packed_child_sees(
    exported: Callable[..., Path], options: tuple[str, ...]
) -> None:
    path = exported(layers_in("nvfp4", "nvfp4"), *options)
    places = [
        f"model.layers.{n}" for n in ("0.self_attn.k_proj", "1.self_attn.o_proj", "1.mlp.up_proj", "2.mlp.down_proj")
    ]
    inputs, tensors = Inputs(path, places), load_file(path / "model.safetensors")
    for name in places:
        wanted = 448 * 6 / inputs.seen[name].abs().max()
        torch.testing.assert_close(tensors[f"{name}.input_global_scale"], wanted.reshape(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["int4", "nvfp4a16", "fp8"])
def test_gptq_is_that_of_the_inputs_that_the_packed_child_sees(
    runs: Callable[..., Path], exported: Callable[..., Path], name: str
) -> None:
    """Layer by layer, and within one: Grams of the packed child's own inputs give its codes again."""
    layers, format = layers_in(name, name), FORMATS[name]
    path, master = exported(layers, "--quantizer", "gptq"), WeightStore(runs(layers) / "child")
    stored, store = load_file(path / "model.safetensors"), master.get
    groups = [
        ["1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"],
        ["1.self_attn.o_proj"],
        ["2.mlp.down_proj"],
    ]
    inputs = Inputs(path, [f"model.layers.{group[0]}" for group in groups]).seen
    for group in groups:
        names = [f"model.layers.{each}" for each in group]
        x = inputs[names[0]].double()
        stacked = torch.cat([store(f"{each}.weight").float() for each in names])
        done = gptq_codes(stacked, x.T @ x, format)
        found = [
            PackedMatrix.of(format, {p: stored[f"{each}.{p}"] for p in packed_sizes(format, 1, len(x.T))}).quantized
            for each in names
        ]
        assert torch.equal(torch.cat([each.scales.values for each in found]), done.scales.values)
        assert (torch.cat([each.codes for each in found]) == done.codes).float().mean() > 0.995  # sums in another order
        better = output_error(torch.cat([each.weight for each in found]) - stacked, x.T @ x).sum()
        assert better < 0.95 * output_error(format.fake(stacked) - stacked, x.T @ x).sum()


def test_the_text_of_a_member_of_a_family_is_that_of_its_run(runs: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs(layers_in("nvfp4", "nvfp4")), run)
    member = run / "family" / "0.900"
    member.mkdir(parents=True)
    (run / "child").rename(member / "child")
    succeed("export", member / "child", "--to", "transformers", "--out", tmp_path / "out")
    assert read_architecture(tmp_path / "out")[1].rounded == ["nvfp4"]


def test_layers_come_out_of_a_sweep_as_they_are_served(tiny_sweep: Callable[..., Any]) -> None:
    sweep = tiny_sweep(hidden_size=128, head_dim=32)
    architecture = Architecture.from_list(["attention:kv2@nvfp4+ffn:512@fp8", *["attention:kv2+ffn:512@int4"] * 3])
    tokens, seen = torch.from_numpy(text().astype("int64")), []
    made = list(calibrated_layers(sweep, architecture, tokens, on_layer=seen.append))
    assert seen == [0, 1, 2, 3] and all(isinstance(layer.weights, RoundedWeights) for layer in made)
    stream, math = sweep.embed(tokens[:1], torch.float32), sweep.math(48)
    for layer in made:
        stream = layer_forward(layer.weights, stream, math)
    kept = made[0].weights.to(torch.float64)
    assert kept.input_divisors == made[0].weights.input_divisors and len(kept.input_divisors) == 4
    assert set(made[1].matrices) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert torch.equal(made[1].weights["self_attn.q_proj.weight"], sweep.layer(1)["self_attn.q_proj.weight"])
    with pytest.raises(ConfigError, match="nvfp4 rounds inputs with scales from calibration text"):
        list(nearest_layers([sweep.layer(0)], architecture))


def test_widths_are_padded_before_weights_are_rounded(tmp_path: Path) -> None:
    """320 channels become 512 on disk, and those of zeros add nothing, in whatever group they are."""
    parent = tiny_llama(tmp_path / "parent", hidden_size=128, head_dim=32, intermediate_size=320)
    shape = ModelShape(128, 320, 4, 4, 2, 32, 272)
    layers = [f"attention:kv2+ffn:320@{name}" for name in ("int4", "nvfp4a16", "fp8", "int8")]
    write_child(tmp_path / "child", parent, Architecture.from_list(layers), random_tensors(layers, shape), "bfloat16")
    succeed("export", tmp_path / "child", "--to", "vllm", "--out", tmp_path / "out")
    state = load_child(tmp_path / "out").state_dict()
    for layer in range(4):
        assert not state[f"model.layers.{layer}.mlp.down_proj.weight"][:, 320:].any()
        assert not state[f"model.layers.{layer}.mlp.gate_proj.weight"][320:].any()
        assert state[f"model.layers.{layer}.mlp.down_proj.weight"][:, :320].any()
    wanted = fake_quantized_logits(tmp_path / "child", layers)
    assert (logits(load_child(tmp_path / "out")) - wanted).abs().max() < 1e-4


def test_a_biased_tied_child_keeps_what_is_not_rounded(tmp_path: Path) -> None:
    more = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    parent = tiny_llama(tmp_path / "parent", hidden_size=128, head_dim=32, **more)
    shape = ModelShape(128, 512, 4, 4, 2, 32, 272, True, True, True, True)
    layers = layers_in("fp8", "int8")
    write_child(tmp_path / "child", parent, Architecture.from_list(layers), random_tensors(layers, shape), "bfloat16")
    succeed("export", tmp_path / "child", "--to", "vllm", "--out", tmp_path / "out")
    before, after = (load_file(tmp_path / place / "model.safetensors") for place in ("child", "out"))
    assert "lm_head.weight" not in after
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.down_proj.bias", "model.norm.weight"):
        assert torch.equal(before[name], after[name])
    wanted = fake_quantized_logits(tmp_path / "child", layers)
    assert (logits(load_child(tmp_path / "out")) - wanted).abs().max() < 1e-4


def test_several_shards_hold_the_same(parent_dir: Path, tmp_path: Path, exported: Callable[..., Path]) -> None:
    layers, whole = layers_in("int4", "fp8"), load_file(exported(layers_in("int4", "fp8")) / "model.safetensors")
    pairs = list(whole.items())
    write_child(tmp_path / "out", parent_dir, Architecture.from_list(layers), pairs, "bfloat16", 100_000, packed=True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_child(tmp_path / "out")), logits(load_child(exported(layers))))
    for spoilt, words in (
        (pairs[:-1], "tensors are missing"),
        ([*pairs, pairs[0]], "given twice"),
        (
            [*pairs, ("model.layers.0.self_attn.q_proj.weight", torch.zeros(128, 128))],
            "not a tensor of this packed child",
        ),
        ([(n, t.float() if "norm" in n else t) for n, t in pairs], "needs torch.bfloat16"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write_child(tmp_path / "bad", parent_dir, Architecture.from_list(layers), spoilt, "bfloat16", packed=True)
    assert not (tmp_path / "bad").exists()


# ---- engines, commands and refusals


def one_line(result: Result, *parts: str, code: int = 1) -> None:
    assert result.code == code and result.err.count("\n") == 1 and "Traceback" not in result.err
    for part in parts:
        assert part in result.err


def test_what_engines_read_is_one_fact_everywhere() -> None:
    assert {name for name in ENGINES if serves_precision(name, "bf16")} == set(ENGINES)
    assert {name for name in ENGINES if serves_precision(name, "fp8")} == {"vllm", "sglang", "trtllm", "transformers"}
    assert {name for name in ENGINES if serves_precision(name, "nvfp4a16")} == {"vllm", "transformers"}
    for name, engine in ENGINES.items():
        for precision in PACKED:
            because = unsupported(engine, SHAPE, Architecture.from_list(["attention:kv2+ffn:512"] * 4).at(precision))
            assert (not because) == serves_precision(name, precision)
            assert not because or precision in because[0]
    for name in PACKED:
        config = quantization_config(Architecture.from_list(["attention:kv2+ffn:512"]).at(name))
        assert config is not None and config["format"] == form_of(name)
    mixed = Architecture.from_list(["attention:kv2@fp8+ffn:512@int4"] * 4)
    assert verdict("sglang", SHAPE, mixed).because == (
        "it reads one form of packed weights in a model, not float-quantized and pack-quantized (`nas export --no-pack` writes bf16)",
    )
    assert verdict("sglang", SHAPE, Architecture.from_list(["attention:kv2@int8+ffn:512@int4"] * 4)).because == ()


def test_a_master_with_precisions_is_packed_first(runs: Callable[..., Path]) -> None:
    layers = layers_in("fp8", "int4")
    found = verdicts(open_child(runs(layers)))
    assert found["vllm"].status == "ok with" and "weights packed as fp8 and int4 (-" in found["vllm"].text(2)
    assert found["llamacpp"].status == found["trtllm"].status == found["sglang"].status == "unsupported"
    assert "no int4 weights" in found["trtllm"].text(2)
    shown = " ".join(succeed("check", runs(layers)).out.split())
    assert "packing rounds weights as the architecture says" in shown
    assert nas("check", runs(layers), "--engine", "mlx").code == 1


def test_no_pack_writes_the_bf16_master(runs: Callable[..., Path], tmp_path: Path) -> None:
    layers = layers_in("fp8", "int4")
    succeed("export", runs(layers), "--to", "mlx", "--no-pack", "--out", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and "marquetry_precisions" not in config
    assert config["marquetry_format"] == 1
    succeed("export", runs(layers), "--to", "llamacpp", "--no-pack", "--out", tmp_path / "child.gguf")
    one_line(nas("export", runs(layers), "--to", "llamacpp", "--json"), "llama.cpp cannot serve", "--no-pack")
    one_line(nas("export", runs(layers), "--to", "trtllm", "--json"), "no int4 weights", "--no-pack")


def test_a_packed_child_is_checked_and_not_exported_again(exported: Callable[..., Path], tmp_path: Path) -> None:
    path = exported(layers_in("fp8", "int4"), to="vllm")
    found = succeed("check", path, "--engine", "vllm", "--json").json
    assert found["packed"] and found["engines"]["vllm"]["status"] == "ok" and found["layers"][0].endswith("@int4")
    assert "packed, tensors and configuration as they must be" in succeed("check", path).out
    one_line(nas("export", path, "--to", "vllm", "--out", tmp_path / "out", "--json"), "packed already", code=2)
    child = open_child(exported(layers_in("fp8", "fp8")))
    assert "export its bf16 child" in verdicts(child)["sglang"].text(2)  # KV heads of packed weights are not repeated
    assert not (tmp_path / "out").exists()


def test_layers_that_are_merged_or_repeated_keep_their_precisions() -> None:
    layers = Architecture.from_list(
        ["attention:kv2@fp8+ffn:skip", "attention:skip+ffn:256@int4", "attention:kv1@nvfp4+ffn:skip"]
    )
    rewrite = canonical(SHAPE, layers, Form(ffn_after_attention=True, one_kv_count=True))
    assert rewrite.architecture.to_list() == ["attention:kv2@fp8+ffn:256@int4", "attention:kv2@nvfp4+ffn:256"]


def test_text_is_needed_for_gptq_and_for_nvfp4_inputs_and_said_so(
    runs: Callable[..., Path], parent_dir: Path, tmp_path: Path
) -> None:
    for name, options, words in (("nvfp4", (), "nvfp4 scales inputs"), ("int4", ("--quantizer", "gptq"), "GPTQ takes")):
        layers = layers_in(name)
        shutil.copytree(runs(layers) / "child", tmp_path / name)
        command = ("export", tmp_path / name, "--to", "vllm", "--json", *options)
        one_line(nas(*command), words, "--run", code=2)
        succeed(*command, "--run", runs(layers))
    one_line(
        nas("export", tmp_path / "int4", "--to", "vllm", "--quantizer", "gtpq", "--json"), "nearest or gptq", code=2
    )
    (tmp_path / "other" / "data").mkdir(parents=True)
    np.save(tmp_path / "other" / "data" / "fit.npy", text() + 300)
    one_line(nas(*command, "--run", tmp_path / "other"), "of another parent", code=2)


def test_a_format_that_cannot_hold_a_matrix_is_one_line(parent_dir: Path, tmp_path: Path) -> None:
    shape = ModelShape(64, 512, 1, 4, 2, 16, 272)
    parent = tiny_llama(tmp_path / "parent", num_hidden_layers=1)
    layers = ["attention:kv2@int4+ffn:512"]
    write_child(tmp_path / "child", parent, Architecture.from_list(layers), random_tensors(layers, shape), "bfloat16")
    one_line(nas("export", tmp_path / "child", "--to", "vllm", "--json"), "attention:kv2@int4", "128", code=2)


SPOILT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing scale": (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight_scale"), "q_proj.weight_scale"),
    "missing input scale": (
        lambda t: t.pop("model.layers.0.mlp.up_proj.input_global_scale"),
        "up_proj.input_global_scale",
    ),
    "left over": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.zeros(128, 128)}),
        "q_proj.weight",
    ),
    "zero scale": (lambda t: t["model.layers.0.self_attn.q_proj.weight_scale"].zero_(), "no scale"),
    "nan divisor": (lambda t: t["model.layers.0.mlp.up_proj.weight_global_scale"].fill_(torch.nan), "no scale"),
    "nan block scale": (
        lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].view(torch.uint8)[3].fill_(127),
        "up_proj.weight_scale holds what is no scale",
    ),
    "another shape": (
        lambda t: t["model.layers.0.self_attn.q_proj.weight_shape"].fill_(7),
        "q_proj.weight_shape [7, 7]",
    ),
    "another dtype": (
        lambda t: t.update({n: x.float() for n, x in t.items() if n == "model.layers.0.self_attn.q_proj.weight_scale"}),
        "stored as float32, its format says bfloat16",
    ),
    "short codes": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight_packed": torch.zeros(512, 32, dtype=torch.uint8)}),
        "up_proj.weight_packed [512, 32] instead of [512, 64]",
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_packed_child_that_is_damaged_is_one_line(exported: Callable[..., Path], tmp_path: Path, fault: str) -> None:
    path = Path(shutil.copytree(exported(layers_in("int4", "nvfp4")), tmp_path / "out"))
    tensors = load_file(path / "model.safetensors")
    spoil, words = SPOILT[fault]
    spoil(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    one_line(nas("check", path), words)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        load_child(path)


def test_a_code_that_is_no_number_is_found_when_it_is_loaded(exported: Callable[..., Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(exported(layers_in("fp8", "int4")), tmp_path / "out"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"].view(torch.uint8)[0, 0] = 127
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"o_proj\.\* hold codes that are no numbers"):
        load_child(path)


def test_a_configuration_that_contradicts_its_precisions_is_one_line(
    exported: Callable[..., Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(exported(layers_in("int4", "fp8")), tmp_path / "out"))
    content = json.loads((path / "config.json").read_text())
    for change, words in (
        ({"marquetry_precisions": [["int8", "fp8"], *content["marquetry_precisions"][1:]]}, "contradicts itself"),
        ({"marquetry_precisions": None}, "another program packed it"),
        ({"quantization_config": content["quantization_config"] | {"config_groups": {}}}, "contradicts itself"),
    ):
        (path / "config.json").write_text(json.dumps({k: v for k, v in (content | change).items() if v is not None}))
        one_line(nas("check", path), words)
        with pytest.raises(CheckpointError, match=words):
            load_child(path)


if __name__ == "__main__":
    for each in PACKED:
        print(f'    "{each}": "{of_all(lambda weight, each=each: theirs(FORMATS[each], weight)[3])}",')  # type: ignore[misc]
