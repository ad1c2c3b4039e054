"""`nas export` and `nas check`: what each engine is known to trip over, on tiny children; files, refusals, the plugin."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from app import Result, nas, succeed
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tiny import LLAMA3_ROPE, spoil, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from blocks.canonical import canonical
from blocks.checkpoint import COPIED_FILES, load_child, read_architecture, write_child
from blocks.child import configuration_decilm, layout
from blocks.child.configuration_decilm import block_config, ffn_width
from blocks.child.layout import expected_tensors
from blocks.engines import ENGINES, unsupported, verdict
from blocks.errors import CheckpointError
from blocks.shape import ModelShape, ffn_mult
from blocks.spec import Architecture
from nas.export import find_child, open_child, verdicts

ROOT = Path(__file__).parent.parent
PUBLISHED = Path(__file__).parent / "data" / "nemotron_super_49b_v1.config.json"
SHAPE = ModelShape(64, 512, 4, 4, 2, 16, 272)
UNEVEN = ["attention:kv2+ffn:skip", "attention:skip+ffn:512", "attention:skip+ffn:skip", "attention:kv1+ffn:skip"]
WHOLE = ["attention:kv2+ffn:512", "attention:kv1+ffn:256", "attention:skip+ffn:512", "attention:kv2+ffn:256"]
LINEAR = ["attention:kv2+ffn:512", "attention:linear+ffn:256", "attention:kv1+ffn:linear", "attention:skip+ffn:256"]
FFN_FIRST = ["attention:skip+ffn:512", "attention:kv1+ffn:256", "attention:skip+ffn:512", "attention:kv2+ffn:256"]
IDS = torch.randint(0, 256, (1, 11), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parent_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("parent"), rope_parameters=LLAMA3_ROPE)


@pytest.fixture(scope="module")
def children(parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("children")
    made = {"uneven": UNEVEN, "whole": WHOLE, "linear": LINEAR, "ffn-first": FFN_FIRST}
    for name, layers in made.items():
        write_child(place / name, parent_dir, Architecture.from_list(layers), random_tensors(layers), "float32")
    return {name: place / name for name in made}


@pytest.fixture
def child(children: dict[str, Path], tmp_path: Path) -> Path:
    """A child that may be spoilt."""
    return Path(shutil.copytree(children["whole"], tmp_path / "child"))


def random_tensors(layers: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = expected_tensors(SHAPE, Architecture.from_list(layers))
    return {name: 0.2 * torch.randn(size, generator=generator) for name, size in sizes.items()}


def logits(path: Path) -> Tensor:
    with torch.no_grad():
        return load_child(path, torch.float64)(IDS, use_cache=False).logits


def config_of(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "config.json").read_text())
    return content


def change_config(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps(config_of(path) | changes))


def export(child: Path, to: str, out: Path, *more: str) -> dict[str, Any]:
    return succeed("export", child, "--to", to, "--out", out, "--json", *more).json


def one_line(result: Result, *parts: str) -> None:
    assert result.code == 1 and result.err.count("\n") == 1 and "Traceback" not in result.err
    for part in parts:
        assert part in result.err


@pytest.mark.parametrize("name", ["uneven", "whole", "ffn-first"])
@pytest.mark.parametrize("to", ["vllm", "sglang", "transformers"])
def test_an_export_gives_the_same_logits_and_is_ok(
    children: dict[str, Path], name: str, to: str, tmp_path: Path
) -> None:
    made = export(children[name], to, tmp_path / "out")
    assert (logits(tmp_path / "out") - logits(children[name])).abs().max() < 1e-10
    assert made["engines"][to]["status"] == "ok"
    assert succeed("check", tmp_path / "out", "--engine", to, "--json").json["engines"][to]["status"] == "ok"


# What engines trip over, one by one.


def test_layer_0_without_attention_gets_one_of_zeros_where_the_engine_needs_it(
    children: dict[str, Path], tmp_path: Path
) -> None:
    found = verdicts(open_child(children["ffn-first"]))
    for name in ("vllm", "sglang", "llamacpp", "mlx"):
        assert found[name].status == "ok with"
        assert "an attention of zeros with 1 KV head in layer 0" in found[name].text(4)
    assert found["transformers"].status == found["trtllm"].status == found["exllamav3"].status == "ok"
    made = export(children["ffn-first"], "vllm", tmp_path / "out")
    assert not config_of(tmp_path / "out")["block_configs"][0]["attention"]["no_op"]
    assert made["added_kv_values"] == 2 * 16
    zeros = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert zeros.shape == (64, 64) and not zeros.any()


@pytest.mark.parametrize("hidden", [576, 1024, 2048, 2560, 3072, 4096, 5120, 8192, 16384])
def test_every_width_survives_json_and_the_rounding_of_engines(hidden: int) -> None:
    """ceil256(int(2 * ffn_mult * h / 3)), of a double in all engines, of one rounded to six digits in mlx-lm."""
    for width in (*range(256, 4096 + 1, 256), 14336, 28672, 53248, 106496, 425984):
        mult = json.loads(json.dumps(block_config(1, ffn_mult(width, hidden))))["ffn"]["ffn_mult"]
        assert isinstance(mult, float)
        assert ffn_width(mult, hidden) == ffn_width(round(mult, 6), hidden) == width


def test_empty_layers_and_bare_neighbours_become_fewer_layers(children: dict[str, Path], tmp_path: Path) -> None:
    made = export(children["uneven"], "vllm", tmp_path / "out")
    assert made["layers"] == {"before": 4, "after": 2}
    config = config_of(tmp_path / "out")
    assert config["num_hidden_layers"] == len(config["block_configs"]) == 2
    wanted = Architecture.from_list(["attention:kv2+ffn:512", "attention:kv1+ffn:256"])
    assert read_architecture(tmp_path / "out")[1] == wanted


def test_an_attention_alone_is_padded_for_llama_cpp_and_the_cost_is_shown(
    children: dict[str, Path], tmp_path: Path
) -> None:
    cost = (3 * 64 * 256 + 64) * 4
    made = export(children["uneven"], "vllm", tmp_path / "portable")
    assert [change["bytes"] for change in made["changes"]] == [0, 0, cost] and made["added_bytes"] == cost
    assert made["engines"]["llamacpp"]["changes"] == [{"text": "a GGUF file", "bytes": 0, "kv_values": 0}]
    shown = succeed("export", children["uneven"], "--to", "vllm", "--out", tmp_path / "portable").out
    assert f"(+{cost / 1e6:.2f} MB)" in shown
    made = export(children["uneven"], "vllm", tmp_path / "bare", "--no-portable")
    assert made["added_bytes"] == 0 and made["engines"]["vllm"]["status"] == "ok"
    assert "an FFN of 256 zero channels in layer 1" in str(made["engines"]["llamacpp"]["changes"])
    assert "model.layers.1.mlp.up_proj.weight" not in load_file(tmp_path / "bare" / "model.safetensors")
    result = nas("export", children["uneven"], "--to", "llamacpp", "--no-portable")
    assert result.code == 2 and "needs an FFN beside every attention" in result.err


def test_the_keys_of_each_block_are_nvidias(children: dict[str, Path], tmp_path: Path) -> None:
    export(children["uneven"], "trtllm", tmp_path / "out")
    theirs = json.loads(PUBLISHED.read_text())["block_configs"][0]
    for block in config_of(tmp_path / "out")["block_configs"]:
        assert block.keys() == {"attention", "ffn"} == theirs.keys() & {"attention", "ffn"}
        assert block["attention"].keys() == theirs["attention"].keys()
        assert block["ffn"].keys() == theirs["ffn"].keys()


def test_both_spellings_of_rope_and_dtype_are_written(children: dict[str, Path], tmp_path: Path) -> None:
    export(children["whole"], "mlx", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    scaling = {key: value for key, value in config["rope_parameters"].items() if key != "rope_theta"}
    assert config["rope_scaling"] == scaling and scaling["rope_type"] == "llama3"
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_kv_heads_and_width_are_the_largest_as_integers(children: dict[str, Path], tmp_path: Path) -> None:
    export(children["whole"], "vllm", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["num_key_value_heads"], config["intermediate_size"]) == (2, 512)
    assert type(config["num_key_value_heads"]) is type(config["intermediate_size"]) is int


def test_tokenizer_files_are_the_parents_to_the_byte(
    children: dict[str, Path], parent_dir: Path, tmp_path: Path
) -> None:
    export(children["whole"], "vllm", tmp_path / "out")
    copied = [name for name in COPIED_FILES if (parent_dir / name).is_file()]
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(copied)
    for name in copied:
        assert (tmp_path / "out" / name).read_bytes() == (parent_dir / name).read_bytes()


def test_tensors_of_skipped_parts_are_absent_and_no_other(children: dict[str, Path], tmp_path: Path) -> None:
    export(children["whole"], "vllm", tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any(name.startswith(("model.layers.2.self_attn", "model.layers.2.input_layernorm")) for name in names)
    assert names == expected_tensors(SHAPE, Architecture.from_list(WHOLE)).keys()


def test_sglang_gets_one_number_of_kv_heads(children: dict[str, Path], tmp_path: Path) -> None:
    found = verdicts(open_child(children["whole"]))["sglang"]
    assert (
        found.text(4) == "ok with KV heads repeated to 2 in every layer (+0.01 MB, +32 values a token in the KV cache)"
    )
    export(children["whole"], "sglang", tmp_path / "out")
    groups = {block["attention"]["n_heads_in_group"] for block in config_of(tmp_path / "out")["block_configs"]}
    assert groups == {2, None}
    before, after = (load_file(path / "model.safetensors") for path in (children["whole"], tmp_path / "out"))
    key = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(after[key], torch.cat((before[key], before[key])))


def test_linear_replacements_go_only_where_they_are_served(children: dict[str, Path], tmp_path: Path) -> None:
    found = verdicts(open_child(children["linear"]))
    status = {name: found[name].status for name in found}
    assert status == {
        "vllm": "unsupported",
        "sglang": "unsupported",
        "trtllm": "ok",
        "llamacpp": "unsupported",
        "mlx": "ok with",
        "exllamav3": "unsupported",
        "transformers": "ok",
    }
    assert found["llamacpp"].because == ("it knows no linear FFN (layer 2)",)
    assert len(found["vllm"].because) == 2
    attention_only = Architecture.from_list([LINEAR[0], LINEAR[1], WHOLE[1], LINEAR[3]])
    assert verdict("llamacpp", SHAPE, attention_only).status == "ok with"
    one_line(
        nas("export", children["linear"], "--to", "vllm", "--out", tmp_path / "out"), "vLLM cannot serve", "layer 1"
    )
    assert not (tmp_path / "out").exists()


def test_mlx_gets_linear_replacements_under_its_own_names(children: dict[str, Path], tmp_path: Path) -> None:
    made = export(children["linear"], "mlx", tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert {"model.layers.1.self_attn.linear.weight", "model.layers.2.mlp.linear.weight"} <= names
    assert not any("linear_attn" in name or "linear_mlp" in name for name in names)
    assert made["engines"]["mlx"]["status"] == "ok"
    assert made["engines"]["transformers"]["changes"][0]["text"].endswith("name linear_attn and linear_mlp")
    back = export(tmp_path / "out", "transformers", tmp_path / "back")
    assert back["engines"]["transformers"]["status"] == "ok"
    assert torch.equal(logits(tmp_path / "back"), logits(children["linear"]))


def test_what_engines_do_not_compute_is_unsupported_and_named() -> None:
    whole, base = Architecture.from_list(WHOLE), SHAPE.__dict__

    def refusing(**flags: Any) -> set[str]:
        shape = ModelShape(**{**base, **flags})
        return {name for name, engine in ENGINES.items() if unsupported(engine, shape, whole)}

    assert refusing() == set()
    assert refusing(qk_norm=True) == set(ENGINES) - {"transformers"}
    assert refusing(qkv_bias=True, o_bias=True) == {"trtllm"}
    assert refusing(mlp_bias=True) == {"sglang", "trtllm"}
    assert refusing(head_dim=32) == {"mlx"}
    assert refusing(head_dim=32, qkv_bias=True, o_bias=True) == {"mlx", "trtllm", "llamacpp"}
    dynamic = {name for name, engine in ENGINES.items() if unsupported(engine, SHAPE, whole, "dynamic")}
    assert dynamic == {"llamacpp", "mlx"}


def test_a_search_for_an_engine_asks_the_same_facts(children: dict[str, Path]) -> None:
    """Whatever the space of a target holds, its engine serves, and without an attention of zeros."""
    import random

    from search_spaces import load_space

    draw = random.Random(0)
    for target in ENGINES:
        space = load_space("default", target)
        for _ in range(20):
            layers = Architecture(tuple(draw.choice(space.layer_candidates(SHAPE, index)) for index in range(4)))
            assert unsupported(ENGINES[target], SHAPE, layers) == []
            changes = canonical(SHAPE, layers, ENGINES[target].form(portable=False)).changes
            assert not any("zeros with 1 KV head" in change.text or change.kv_values for change in changes)


# Loading what is damaged.


@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_a_tensor_too_few_too_many_or_of_another_shape_is_one_line(child: Path, fault: str) -> None:
    tensors, place = load_file(child / "model.safetensors"), "model.layers.1.self_attn.k_proj"
    if fault == "unexpected":
        place = "model.layers.2.self_attn.q_proj"
        tensors[f"{place}.weight"] = torch.zeros(64, 64)
    else:
        tensors = spoil(tensors, fault, 1)
    save_file(tensors, child / "model.safetensors", metadata={"format": "pt"})
    for command in (("check", child), ("export", child, "--to", "vllm", "--out", child.parent / "out")):
        one_line(nas(*command), place)
    assert not (child.parent / "out").exists()
    with pytest.raises(ValueError, match=f"does not fit its configuration .*{place}"):
        AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)


def test_a_tensor_of_another_dtype_is_one_line(child: Path) -> None:
    tensors = load_file(child / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors["model.layers.3.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, child / "model.safetensors", metadata={"format": "pt"})
    one_line(nas("check", child), "config.json says float32", "model.layers.3.mlp.up_proj.weight bfloat16")


def test_a_configuration_of_a_newer_version_is_one_line_wherever_it_is_read(child: Path) -> None:
    assert configuration_decilm.FORMAT == layout.FORMAT
    assert config_of(child)["marquetry_format"] == layout.FORMAT_OF_BF16
    change_config(child, marquetry_format=layout.FORMAT + 1)
    for command in (("check", child), ("export", child, "--to", "vllm", "--out", child.parent / "out")):
        one_line(nas(*command), "newer version", "pip install -U marquetry")
    with pytest.raises(ValueError, match="newer version of marquetry"):
        AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True)
    with pytest.raises(CheckpointError, match="newer version"):
        load_child(child)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 10000.0}, "rope_theta"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype"),
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        ({"intermediate_size": 256}, "intermediate_size is 256"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_one_line(child: Path, changes: dict[str, Any], words: str) -> None:
    change_config(child, **changes)
    one_line(nas("check", child), words, "contradicts itself")


def test_a_published_configuration_is_taken_and_written_anew(child: Path, tmp_path: Path) -> None:
    """NVIDIA's config.json leaves the sizes null and spells rope and dtype the older way alone: engines load that."""
    content = {key: value for key, value in config_of(child).items() if key not in ("rope_parameters", "dtype")}
    content |= {"num_key_value_heads": None, "intermediate_size": None}
    del content["marquetry_format"]
    (child / "config.json").write_text(json.dumps(content))
    assert verdicts(open_child(child))["vllm"].status == "ok"
    export(child, "vllm", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["num_key_value_heads"] == 2 and config["rope_parameters"]["rope_type"] == "llama3"
    assert config["dtype"] == "float32"


def test_what_an_engine_would_miss_in_config_json_is_named_and_mended(child: Path, tmp_path: Path) -> None:
    content = config_of(child)
    del content["rope_theta"], content["torch_dtype"], content["block_configs"][1]["ffn"]["sparsify"]
    (child / "config.json").write_text(json.dumps(content))
    found = verdicts(open_child(child))
    assert found["mlx"].text(4) == "ok with config.json completed by rope_theta, torch_dtype"
    assert found["trtllm"].text(4) == "ok with config.json completed by rope_theta, torch_dtype, ffn.sparsify"
    made = export(child, "trtllm", tmp_path / "out")
    assert made["engines"]["trtllm"]["status"] == made["engines"]["mlx"]["status"] == "ok"


# The commands.


def test_check_has_a_status_for_the_engines_asked_about(children: dict[str, Path]) -> None:
    assert nas("check", children["linear"]).code == 0
    assert nas("check", children["linear"], "--engine", "transformers").code == 0
    result = nas("check", children["linear"], "--engine", "transformers", "--engine", "vllm")
    assert result.code == 1 and "unsupported because it knows no linear attention" in " ".join(result.out.split())
    result = nas("check", children["linear"], "--engine", "vlm")
    assert result.code == 2 and "did you mean 'vllm'" in result.err
    found = nas("check", children["whole"], "--json").json
    assert found["layers"] == WHOLE and found["engines"].keys() == ENGINES.keys()
    assert found["parameters"] == SHAPE.parameters(Architecture.from_list(WHOLE))


def test_every_export_ends_with_the_table(children: dict[str, Path], tmp_path: Path) -> None:
    shown = succeed("export", children["whole"], "--to", "vllm", "--out", tmp_path / "out").out
    for engine in ENGINES:
        assert f"\n{engine} " in shown


def test_a_run_is_its_healed_child_or_its_child(children: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(children["whole"], tmp_path / "run" / "child")
    assert find_child(tmp_path / "run") == tmp_path / "run" / "child"
    shutil.copytree(children["uneven"], tmp_path / "run" / "healed")
    made = succeed("export", tmp_path / "run", "--to", "vllm", "--json").json
    assert made["child"] == str(tmp_path / "run" / "healed")
    assert made["out"] == str(tmp_path / "run" / "export" / "vllm")
    made = succeed("export", tmp_path / "run" / "child", "--to", "mlx", "--json").json
    assert made["out"] == str(tmp_path / "run" / "child-mlx")
    assert nas("export", tmp_path / "nothing", "--to", "vllm").code == 2


def test_what_is_no_child_is_not_overwritten(children: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for out in (tmp_path / "mine", children["whole"], children["whole"].parent):
        result = nas("export", children["whole"], "--to", "vllm", "--out", out)
        assert result.code == 2 and "--out" in result.err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    export(children["whole"], "vllm", tmp_path / "out")
    export(children["uneven"], "vllm", tmp_path / "out")
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 2


def test_an_export_is_whole_or_not_there(
    children: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(children["whole"], "vllm", tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    from nas import export as module

    def full(self: Any, name: str) -> Tensor:
        if "layers.3" in name:
            raise OSError(28, "No space left on device")
        return self.store.get(name)

    monkeypatch.setattr(module.Child, "read", full)
    one_line(nas("export", children["uneven"], "--to", "vllm", "--out", tmp_path / "out", "--json"), "No space left")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_llama_cpp_gets_one_file_of_a_child_in_its_form(children: dict[str, Path], tmp_path: Path) -> None:
    made = export(children["uneven"], "llamacpp", tmp_path / "child.gguf")
    fields = GGUFReader(tmp_path / "child.gguf").fields
    arrays = [fields[f"deci.{name}"].contents() for name in ("attention.head_count_kv", "feed_forward_length")]
    assert arrays == [[2, 1], [512, 256]] and fields["deci.block_count"].contents() == made["layers"]["after"] == 2
    assert (
        made["engines"]["llamacpp"]["status"] == "ok" and made["load"] == f"llama-server -m {tmp_path / 'child.gguf'}"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["child.gguf"]
    assert nas("export", children["uneven"], "--to", "llamacpp", "--out", tmp_path / "directory").code == 2


def test_llama_cpp_gets_the_same_file_out_of_the_form_of_mlx(parent_dir: Path, tmp_path: Path) -> None:
    layers = [WHOLE[0], LINEAR[1], WHOLE[2], WHOLE[3]]
    write_child(tmp_path / "child", parent_dir, Architecture.from_list(layers), random_tensors(layers), "float32")
    export(tmp_path / "child", "mlx", tmp_path / "mlx")
    for source in ("child", "mlx"):
        export(tmp_path / source, "llamacpp", tmp_path / f"{source}.gguf")
    found = [
        {t.name: t.data.tobytes() for t in GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in ("child", "mlx")
    ]
    assert found[0] == found[1] and len(found[0]) > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["child", "child.gguf", "mlx", "mlx.gguf"]


def test_a_vocabulary_that_llama_cpp_does_not_know_is_said_before_anything_is_written(child: Path) -> None:
    tokenizer = json.loads((child / "tokenizer.json").read_text())
    tokenizer["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}
    (child / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = verdicts(open_child(child))
    assert found["llamacpp"].status == "unsupported" and "Unigram" in found["llamacpp"].text(4)
    assert found["vllm"].status == "ok"
    one_line(nas("export", child, "--to", "llamacpp", "--json"), "llama.cpp cannot serve", "Unigram")


# The plugin.


def in_fresh_python(code: str, *arguments: Path) -> Iterator[str]:
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    yield from done.stdout.split()


def test_vllm_finds_the_configuration_without_trusting_remote_code(children: dict[str, Path]) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    code = f"""
import sys
from importlib.metadata import EntryPoint
register = EntryPoint("marquetry", {points["marquetry"]!r}, "vllm.general_plugins").load()
assert not {{"torch", "transformers"}} & sys.modules.keys()
register(), register()
from transformers import AutoConfig
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)
print(type(config).__module__, config.block_configs[2].attention.no_op, config.block_configs[1].ffn.ffn_mult)
import copy, pickle
assert pickle.loads(pickle.dumps(copy.deepcopy(config))).block_configs[0].ffn.no_op is False
"""
    found = list(in_fresh_python(code, children["whole"]))
    assert found == ["blocks.child.configuration_decilm", "True", "6.0"]


def test_asking_what_an_engine_serves_needs_no_torch() -> None:
    code = "import sys, blocks.engines, search_spaces; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    assert list(in_fresh_python(code)) == ["[]"]
