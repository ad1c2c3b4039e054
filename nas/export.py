"""`nas export` and `nas check`: a child in the form that one engine loads, and what every engine makes of one.

    child = open_child(Path("runs/default"))             # its healed/, else its child/
    verdicts(child)["vllm"].text(child.weight_bytes)     # "ok", "ok with ...", "unsupported because ..."
    export_child(child, "sglang", Path("out"))
    export_child(child, "vllm", Path("out"), packing=Packing("gptq", Path("runs/default")))

A child with precisions is written with its weights in them, in compressed-tensors form (blocks/packing.py).

`open_child` is strict: a tensor that is missing, left over, of another shape or dtype, or a config.json that contradicts
itself or comes from a newer version, is an error of one line.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.canonical import Change, Rewrite, canonical
from blocks.child.layout import expected_tensors, is_packed, read_architecture, read_config
from blocks.engines import ENGINES, Engine, Verdict, and_list, changes_json, engine_of, unsupported, verdict
from blocks.errors import CheckpointError, ConfigError, NasError, UnsupportedModelError
from blocks.families import CHILD_TYPE
from blocks.files import remove_directory
from blocks.shape import ModelShape, as_built
from blocks.spec import Architecture
from blocks.weights import WeightStore

if TYPE_CHECKING:
    from torch import Tensor

    from nas.packed_export import Packing
    from nas.progress import Reporter

OURS = {"self_attn.linear_attn.": "self_attn.linear.", "mlp.linear_mlp.": "mlp.linear."}  # and mlx-lm's names
OLDER_SPELLINGS = ("rope_theta", "torch_dtype")  # what engines on transformers 4, and mlx-lm, read of config.json


@dataclass(frozen=True)
class Child:
    """A child on disk whose files have been checked.

    Attributes:
        path: its directory.
        content: of its config.json.
        shape, architecture: as built.
    """

    path: Path
    content: Mapping[str, Any]
    shape: ModelShape
    architecture: Architecture

    @cached_property
    def store(self) -> WeightStore:
        return WeightStore(self.path)

    @cached_property
    def linear_name(self) -> str:
        """What its linear replacements are stored under: "" for our names, "linear" for mlx-lm's."""
        return "linear" if any(name.endswith((".linear.weight",)) for name in self.store.shapes) else ""

    @property
    def packed(self) -> bool:
        """Whether its weights lie there in their formats; else in `dtype`, whatever its precisions."""
        return is_packed(self.content)

    @property
    def rope(self) -> str:
        """`rope_type`, whichever way config.json spells it."""
        rope = self.content.get("rope_parameters") or self.content.get("rope_scaling") or {}
        return str(rope.get("rope_type") or rope.get("type") or "default")

    @property
    def dtype(self) -> str:
        return str(self.store.dtype).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        return self.store.dtype.itemsize

    def read(self, name: str) -> Tensor:
        """One tensor by our name."""
        return self.store.get(_renamed(name) if self.linear_name else name)


def find_child(path: Path) -> Path:
    """The directory of a child: `path` itself, or of a run its healed/, else its child/. Raises ConfigError if none."""
    if path.is_file():
        raise ConfigError(f"{path} is a file; give the child's directory, or a run")
    for place in (path, path / "healed", path / "child"):
        if (place / "config.json").is_file():
            return place
    raise ConfigError(f"{path} is no child and no run with one (no config.json, healed/ or child/); see `nas search`")


def open_child(path: Path) -> Child:
    """Opens and checks a child, or a run's.

    Raises:
        ConfigError: if there is none.
        CheckpointError: naming what is missing, left over, of another shape or dtype, or newer than this version.
    """
    place = find_child(path)
    content = read_config(place)
    child = Child(place, content, *read_architecture(place))
    if child.packed:
        from blocks.packed_child import check_packed

        check_packed(child.store, content, child.shape, child.architecture)
        _check_dtypes(child, ["model.embed_tokens.weight"])
        _check_config(child)
        return child
    expected = expected_tensors(child.shape, child.architecture)
    if child.linear_name:
        expected = {_renamed(name): size for name, size in expected.items()}
    child.store.check(expected, only=True)
    _check_dtypes(child, expected)
    _check_config(child)
    return child


def _check_dtypes(child: Child, names: Iterable[str]) -> None:
    stored = {name: str(child.store.get(name).dtype).removeprefix("torch.") for name in names}
    said = child.content.get("dtype") or child.content.get("torch_dtype") or child.dtype
    if wrong := [f"{name} {dtype}" for name, dtype in stored.items() if dtype != said]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{child.path}: config.json says {said}, but {wrong[0]}{more} is stored; write the child again"
        )


def _check_config(child: Child) -> None:
    """Older and newer spellings of one fact must agree: each engine reads one of them."""
    content, where = child.content, child.path / "config.json"
    rope = content.get("rope_parameters") or {}
    pairs = (("rope_theta", content.get("rope_theta"), rope.get("rope_theta")),)
    pairs += (("torch_dtype", content.get("torch_dtype"), content.get("dtype")),)  # type: ignore[assignment]
    for name, old, new in pairs:
        if None not in (old, new) and old != new:
            raise CheckpointError(f"{where} contradicts itself: {name} is {old}, its newer spelling says {new}")
    for name, largest in (
        ("num_key_value_heads", max(layer.attention.kv_heads for layer in child.architecture)),
        ("intermediate_size", max(layer.ffn.width for layer in child.architecture)),
    ):
        if isinstance(content.get(name), int) and content[name] < largest:
            raise CheckpointError(
                f"{where} contradicts itself: {name} is {content[name]}, but a layer has {largest}; write the child again"
            )


def lacks(child: Child, engine: Engine) -> list[str]:
    """What an engine reads of config.json that this one leaves out."""
    from blocks.child.configuration_decilm import ATTENTION_KEYS, FFN_KEYS

    found = [name for name in OLDER_SPELLINGS if child.content.get(name) is None]
    if engine.every_key:
        for part, keys in (("attention", ATTENTION_KEYS), ("ffn", FFN_KEYS)):
            absent = {key for block in child.content["block_configs"] for key in keys - block[part].keys()}
            found += [f"{part}.{key}" for key in sorted(absent)]
    return found


def verdicts(child: Child, written: bool = False) -> dict[str, Verdict]:
    """What each engine makes of a child as it lies there. `written`: a GGUF file of it, in bf16, has just been written."""
    found = {}
    for name, engine in ENGINES.items():
        architecture = child.architecture.structure if written else child.architecture
        found[name] = verdict(name, child.shape, architecture, child.rope, child.linear_name, written, child.packed)
        if not found[name].because and not child.packed and (packing := packing_change(child, architecture)):
            found[name] = Verdict(name, (), (*found[name].changes, packing))
        if engine.gguf and not found[name].because and (faults := _gguf_faults(child)):
            found[name] = Verdict(name, tuple(faults))
        if not found[name].because and (missing := lacks(child, engine)):
            note = Change(f"config.json completed by {', '.join(missing)}")
            found[name] = Verdict(name, (), (note, *found[name].changes))
    return found


def _gguf_faults(child: Child) -> list[str]:
    """What of rotary embedding, activation and vocabulary no GGUF file can say."""
    from blocks.gguf_export import gguf_obstacles
    from blocks.gguf_vocabulary import read_vocabulary

    faults = list(gguf_obstacles(dict(child.content)))
    try:
        read_vocabulary(child.path, child.shape.vocab_size)
    except NasError as error:
        faults.append(str(error))
    return faults


def packing_change(child: Child, architecture: Architecture) -> Change | None:
    """What packing a child of that architecture does, with the bytes that it saves; None if all of it is bf16."""
    formats = architecture.rounded
    if not formats:
        return None
    from blocks.rounded import subblock_bytes

    saved = 0
    for layer in as_built(child.shape, architecture)[1]:
        for part in (layer.attention, layer.ffn):
            whole = subblock_bytes(child.shape, part.structure, child.weight_bytes)
            saved += whole - subblock_bytes(child.shape, part, child.weight_bytes)
    return Change(f"weights packed as {and_list(formats)}", more_bytes=-saved)


def plan_export(child: Child, to: str, portable: bool = True, pack: bool = True) -> Rewrite:
    """What `nas export` would do; without `pack`, precisions are left out of it.

    Raises:
        UnsupportedModelError: saying why, if the engine cannot serve the child.
        ConfigError: if the child is packed already.
    """
    engine = engine_of(to, "--to")
    if child.packed:
        raise ConfigError(
            f"{child.path} is packed already, and `nas check` says what loads it; export the bf16 child that it was made from"
        )
    architecture = child.architecture if pack else child.architecture.structure
    because = unsupported(engine, child.shape, architecture, child.rope)
    if because := because or (_gguf_faults(child) if engine.gguf else []):
        raise UnsupportedModelError(f"{engine.title} cannot serve {child.path}: {'; '.join(because)}")
    # What is packed no GGUF file can hold, so it need not suit llama.cpp, and FFNs of zeros would be bf16.
    rewrite = canonical(child.shape, architecture, engine.form(portable and not architecture.rounded))
    if packing := packing_change(child, rewrite.architecture):
        return replace(rewrite, changes=(*rewrite.changes, packing))
    return rewrite


def export_child(
    child: Child,
    to: str,
    out: Path,
    reporter: Reporter,
    portable: bool = True,
    packing: Packing | None = None,
    pack: bool = True,
) -> dict[str, Any]:
    """Writes a child in the form that an engine loads, whole or not at all, and says what every engine makes of it.

    Args:
        child: from `open_child`.
        to: a key of `ENGINES`.
        out: a directory to write, or for llama.cpp a .gguf file. An earlier child there is replaced.
        portable: an attention never stands alone in its layer, which llama.cpp would drop; not of packed weights, which it cannot read.
        packing: how weights are rounded, where the child has precisions; to nearest if None.
        pack: False writes bf16 weights, whatever the precisions.

    Raises:
        UnsupportedModelError: saying why, if the engine cannot serve the child.
        ConfigError: if something else than a child stands at `out`, or text is needed that is not there.
    """
    rewrite, engine = plan_export(child, to, portable, pack), ENGINES[to]
    if engine.gguf:
        _check_gguf_target(out)
    else:
        check_target(child.path, out)
    formats = rewrite.architecture.rounded
    names = len(expected_tensors(rewrite.shape, rewrite.architecture))
    if formats:
        from nas.packed_export import Packing, write_packed

        packing = packing or Packing()
        write_packed(child, rewrite, out, packing, reporter)
    else:
        with reporter.task(f"Writing {out}", names) as advance:
            if engine.gguf:
                _write_gguf(child, rewrite, out, advance)
            else:
                _write(child, rewrite, out, engine.linear_name, advance)
    after = verdicts(child, written=True) if engine.gguf else verdicts(open_child(out))
    changes = changes_json(rewrite.changes, child.weight_bytes)
    return {
        "child": str(child.path),
        "to": to,
        "out": str(out),
        "load": engine.load.replace("CHILD.gguf", "CHILD").replace("CHILD", shlex.quote(str(out))),
        "layers": {"before": len(child.architecture), "after": len(rewrite.architecture)},
        "changes": changes,
        "added_bytes": sum(change["bytes"] for change in changes),
        "packed": formats,
        "quantizer": packing.quantizer if formats and packing else None,
        "added_kv_values": sum(change.kv_values for change in rewrite.changes),
        "engines": {name: found.to_json(child.weight_bytes) for name, found in after.items()},
    }


def _write(child: Child, rewrite: Rewrite, out: Path, linear_name: str, advance: Callable[[], None]) -> None:
    from blocks.checkpoint import write_child

    def counted() -> Iterator[tuple[str, Tensor]]:
        for pair in rewrite.tensors(child.read):
            yield pair
            advance()

    rename = _renamed if linear_name else str
    config = sizes_for(child, rewrite)
    write_child(out, child.path, rewrite.architecture, counted(), child.dtype, config=config, rename=rename)


def sizes_for(child: Child, rewrite: Rewrite) -> dict[str, Any]:
    """Any description of the right sizes: `write_child` takes all else from it and writes the blocks anew."""
    layers = len(rewrite.architecture)
    return {key: value for key, value in child.content.items() if key != "marquetry_precisions"} | {
        "num_hidden_layers": layers,
        "block_configs": [_any_block(child)] * layers,
        "num_key_value_heads": rewrite.shape.num_key_value_heads,
        "intermediate_size": rewrite.shape.intermediate_size,
    }


def _write_gguf(child: Child, rewrite: Rewrite, out: Path, advance: Callable[[], None]) -> None:
    """The writer brings layers into llama.cpp's form itself; only mlx-lm's names need another directory on the way."""
    from blocks.gguf_export import write_gguf

    if not child.linear_name:
        return write_gguf(child.path, out)
    directory = out.with_name(f".{out.name}.hf")
    try:
        _write(child, rewrite, directory, "", advance)
        write_gguf(directory, out)
    finally:
        if directory.exists():
            remove_directory(directory)


def _any_block(child: Child) -> Any:
    from blocks.child.configuration_decilm import block_config
    from blocks.shape import ffn_mult

    heads = child.shape.num_attention_heads // child.shape.num_key_value_heads
    return block_config(heads, ffn_mult(child.shape.intermediate_size, child.shape.hidden_size))


def _renamed(name: str) -> str:
    for ours, theirs in OURS.items():
        name = name.replace(ours, theirs)
    return name


def _check_gguf_target(out: Path) -> None:
    if out.is_dir() or out.suffix != ".gguf":
        raise ConfigError(f"--out {out}: llama.cpp reads one file; give a name that ends in .gguf")


def check_target(child: Path, out: Path) -> None:
    """Raises ConfigError if a child must not be written to `out`: what lies there is the child, of a run, or no child."""
    if out.resolve() in (child.resolve(), *child.resolve().parents):
        raise ConfigError(f"--out {out} holds the child itself; give another place")
    if out.name in ("child", "healed", "uniform") and (out.parent / "config.yaml").exists():
        raise ConfigError(f"--out {out} is what the run {out.parent} has made itself; give another place")
    if out.exists() and not _is_child(out):
        raise ConfigError(f"--out {out} is there already and no child; give another place, or remove it")


def _is_child(path: Path) -> bool:
    try:
        return read_config(path).get("model_type") == CHILD_TYPE
    except CheckpointError:
        return False


def default_out(path: Path, child: Child, to: str) -> Path:
    """Where an export goes: of a run RUN/export/ENGINE, of a directory beside it, NAME-ENGINE."""
    place = path / "export" / to if child.path != path else path.resolve().with_name(f"{path.resolve().name}-{to}")
    return place.with_name(f"{place.name}.gguf") if ENGINES[to].gguf else place
