"""Search space recipes: the shipped ones give legal candidates for every shape, and mistakes are named."""

from __future__ import annotations

import fnmatch
import tomllib
from pathlib import Path

import pytest

import search_spaces
from blocks.engines import ENGINES
from blocks.errors import ConfigError
from blocks.shape import ModelShape
from blocks.spec import AttentionSpec, FFNSpec
from search_spaces import available_spaces, load_space
from search_spaces.loader import SearchSpace

ROOT = Path(__file__).parent.parent
SHIPPED, TARGETS = ("default", "keep_or_skip", "quick"), tuple(ENGINES)
SHAPES = {
    "SmolLM2-135M": ModelShape(576, 1536, 30, 9, 3, 64, 49_152, tie_word_embeddings=True),
    "Llama-3.3-70B": ModelShape(8192, 28_672, 80, 64, 8, 128, 128_256),
    "Qwen2.5-0.5B": ModelShape(896, 4864, 24, 14, 2, 64, 151_936, tie_word_embeddings=True, qkv_bias=True),
    "mha": ModelShape(64, 512, 4, 12, 12, 8, 272),
    "one KV head": ModelShape(64, 256, 4, 4, 1, 16, 272),
    "width of no multiple": ModelShape(64, 1000, 4, 4, 2, 16, 272),
    "narrower than 256": ModelShape(64, 172, 4, 4, 2, 16, 272),
}


def recipe(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    return str(file)


def texts(space: SearchSpace, shape: ModelShape, layer: int) -> list[str]:
    return [str(spec) for spec in space.layer_candidates(shape, layer)]


def test_the_shipped_recipes_are_these() -> None:
    assert set(available_spaces()) == set(SHIPPED)


def test_all_recipes_are_shipped_as_package_data() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = Path(search_spaces.__file__).parent
    files = [file.relative_to(package) for pattern in ("*.yaml", "*.yml") for file in package.rglob(pattern)]
    assert len(files) == len(SHIPPED)
    for file in files:
        assert any(fnmatch.fnmatch(str(file), pattern) for pattern in patterns["search_spaces"]), file


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_give_legal_candidates(name: str, target: str, shape: ModelShape) -> None:
    space = load_space(name, target)
    assert (space.name, space.target) == (name, target)
    for layer in (0, 1, shape.num_hidden_layers - 1):
        candidates = space.layer_candidates(shape, layer)
        assert candidates[0] == shape.parent_layer
        assert len(set(candidates)) == len(candidates)
        for spec in candidates:
            shape.check(spec)
            assert spec.ffn.width == shape.intermediate_size or spec.ffn.width % 256 == 0
            if spec.attention.kind == "kv":
                assert shape.num_attention_heads % spec.attention.kv_heads == 0
            if layer == 0:
                assert spec.attention.kind == "kv"
            if target in ("vllm", "sglang", "exllamav3"):
                assert "linear" not in (spec.attention.kind, spec.ffn.kind)
            if target == "llamacpp":
                assert spec.ffn.kind != "linear"
            if target == "sglang":
                assert spec.attention.kv_heads in (0, shape.num_key_value_heads)


@pytest.mark.parametrize("name", ["default", "quick"])
def test_linear_candidates_appear_where_the_target_serves_them(name: str) -> None:
    candidates = texts(load_space(name, "transformers"), SHAPES["SmolLM2-135M"], 1)
    assert "attention:linear+ffn:linear" in candidates
    assert "attention:linear+ffn:linear" not in texts(load_space(name, "vllm"), SHAPES["SmolLM2-135M"], 1)


@pytest.mark.parametrize("target", ["vllm", "sglang", "llamacpp", "mlx"])
def test_a_target_that_needs_an_attention_in_layer_0_refuses_a_recipe_without(tmp_path: Path, target: str) -> None:
    text = "attention: {skip: true}\nkeep_first_attention: false"
    with pytest.raises(ConfigError, match=f"{target} needs an attention in layer 0"):
        load_space(recipe(tmp_path, text), target)
    for free in ("transformers", "trtllm", "exllamav3"):
        space = load_space(recipe(tmp_path, text), free)
        assert AttentionSpec("skip") in space.attention_candidates(SHAPES["SmolLM2-135M"], 0)


def test_sglang_is_given_one_number_of_kv_heads(tmp_path: Path) -> None:
    space = load_space("default", "sglang")
    assert list(map(str, space.attention_candidates(SHAPES["Llama-3.3-70B"], 1))) == ["attention:kv8", "attention:skip"]
    with pytest.raises(ConfigError, match="one number of KV heads"):
        load_space(recipe(tmp_path, "attention: {kv_heads: [4]}"), "sglang")


def test_linear_attention_alone_is_served_by_llama_cpp() -> None:
    candidates = texts(load_space("default", "llamacpp"), SHAPES["SmolLM2-135M"], 1)
    assert "attention:linear+ffn:768" in candidates
    assert not any("ffn:linear" in text for text in candidates)


def test_default_space_of_smollm2_is_this() -> None:
    space, shape = load_space("default"), SHAPES["SmolLM2-135M"]
    assert list(map(str, space.attention_candidates(shape, 5))) == ["attention:kv3", "attention:kv1", "attention:skip"]
    widths = ["ffn:1536", "ffn:1280", "ffn:1024", "ffn:768", "ffn:512", "ffn:256", "ffn:skip"]
    assert list(map(str, space.ffn_candidates(shape))) == widths
    assert len(space.layer_candidates(shape, 5)) == 3 * 7
    assert len(space.layer_candidates(shape, 0)) == 2 * 7


def test_keep_or_skip_has_seven_candidates_beside_the_parents() -> None:
    candidates = texts(load_space("keep_or_skip"), SHAPES["SmolLM2-135M"], 1)
    assert len(candidates) == 8
    assert {text.split("+")[0] for text in candidates} == {"attention:kv3", "attention:skip"}


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    text = """
        attention: {kv_heads: [4, 2, 16], skip: true}
        ffn: {ratios: [0.5], widths: [1024, 256], linear: true}
        keep_first_attention: false
    """
    space = load_space(recipe(tmp_path, text), "transformers")
    shape = ModelShape(64, 1024, 4, 8, 8, 8, 272)
    attentions = [AttentionSpec("kv", 8), AttentionSpec("kv", 4), AttentionSpec("kv", 2), AttentionSpec("skip")]
    assert space.attention_candidates(shape, 0) == attentions
    ffns = [FFNSpec("width", 1024), FFNSpec("width", 512), FFNSpec("width", 256), FFNSpec("linear")]
    assert space.ffn_candidates(shape) == ffns
    assert space.name == "mine"


def test_an_empty_mapping_leaves_fewer_heads_only(tmp_path: Path) -> None:
    candidates = texts(load_space(recipe(tmp_path, "{}")), SHAPES["SmolLM2-135M"], 1)
    assert candidates == ["attention:kv3+ffn:1536", "attention:kv1+ffn:1536"]


@pytest.mark.parametrize("heads", ["kv_heads: [3]", "kv_heads: [4, 5]"])
def test_head_counts_that_do_not_divide_the_parents_are_refused(tmp_path: Path, heads: str) -> None:
    space = load_space(recipe(tmp_path, f"attention: {{{heads}}}"))
    with pytest.raises(ConfigError, match="does not divide the parent's 8 KV heads"):
        space.layer_candidates(SHAPES["Llama-3.3-70B"], 1)


def test_widths_that_engines_cannot_say_are_refused(tmp_path: Path) -> None:
    space = load_space(recipe(tmp_path, "ffn: {widths: [1000]}"))
    with pytest.raises(ConfigError, match="multiples of 256"):
        space.layer_candidates(SHAPES["Llama-3.3-70B"], 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("atention: {}", r"unknown key 'atention' \(did you mean 'attention'\?\); known: attention, ffn"),
        ("attention: {kv_head: parent}", r"attention: unknown key 'kv_head' \(did you mean 'kv_heads'\?\)"),
        ("ffn: {ratio: [0.5]}", r"ffn: unknown key 'ratio' \(did you mean 'ratios'\?\)"),
        ("ffn: {zzz: 1}", r"ffn: unknown key 'zzz'; known: ratios"),
        ("1: 2", "unknown key 1"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_space(recipe(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe must be a mapping"),
        ("[1, 2]", "the recipe must be a mapping"),
        ("attention: true", "attention must be a mapping with keys kv_heads, skip, linear"),
        ("ffn:", "ffn must be a mapping"),
        ("attention: {skip: 1}", "attention.skip must be true or false, not 1"),
        ("ffn: {skip: 'no'}", "ffn.skip must be true or false, not 'no'"),
        ("ffn: {linear: sometimes}", "ffn.linear must be true or false, not 'sometimes'"),
        ("keep_first_attention: [true]", "keep_first_attention must be true or false"),
        ("attention: {kv_heads: all}", "must be a list of positive integers, not 'all'"),
        ("attention: {kv_heads: 2}", "must be a list of positive integers, not 2"),
        ("attention: {kv_heads: [1, 0]}", "must be a list of positive integers"),
        ("attention: {kv_heads: [true]}", "must be a list of positive integers"),
        ("attention: {kv_heads: [1.5]}", "must be a list of positive integers"),
        ("attention: {kv_heads: }", "must be a list of positive integers, not None"),
        ("ffn: {ratios: 0.5}", "ffn.ratios must be a list of positive shares, not 0.5"),
        ("ffn: {ratios: [-0.5]}", "ffn.ratios must be a list of positive shares"),
        ("ffn: {ratios: [.nan]}", "ffn.ratios must be a list of positive shares"),
        ("ffn: {ratios: ['0.5']}", "ffn.ratios must be a list of positive shares"),
        ("ffn: {ratios: [768]}", "at most 1; for channels use ffn.widths"),
        ("ffn: {widths: [0.5]}", "ffn.widths must be a list of positive integers"),
        ("ffn: [", "is not YAML"),
        ("ffn: !!python/object:os.system {}", "is not YAML"),
    ],
)
def test_wrong_types_are_refused_with_where_and_what(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_space(recipe(tmp_path, text))
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["attention", "ffn"])
def test_linear_is_refused_where_the_target_does_not_serve_it(tmp_path: Path, section: str) -> None:
    file = recipe(tmp_path, f"{section}: {{linear: true}}")
    with pytest.raises(ConfigError, match=f"{section}.linear: vllm does not serve linear .* --target transformers"):
        load_space(file, "vllm")
    assert f"{section}:linear" in str(texts(load_space(file, "transformers"), SHAPES["SmolLM2-135M"], 1))


def test_an_unknown_recipe_or_target_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--space defualt: no such recipe or file; recipes here: default, keep_or_skip"
    ):
        load_space("defualt")
    with pytest.raises(ConfigError, match="no such recipe or file"):
        load_space(str(tmp_path))
    with pytest.raises(ConfigError, match=r"--target vlm: not known \(did you mean 'vllm'\?\)"):
        load_space("default", "vlm")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_space(str(tmp_path / "mine.yaml"))
