"""Converts a GGUF file into a Hugging Face directory, once.

    $MARQUETRY_CACHE/NAME-DIGEST/      (~/.cache/marquetry/parents/NAME-DIGEST/ unless set)

The digest is of the file's size and content, so that a changed file is converted anew. Weights are dequantized to
fp32, which loses nothing of what the file says.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from blocks.digest import sample_file
from blocks.errors import CheckpointError, ConfigError, UnsupportedModelError
from blocks.families import family_of
from blocks.files import replace_directory, write_errors, write_tensors
from blocks.weights import HEAD, SINGLE

logger = logging.getLogger(__name__)
_CONVERSION = 2  # raise it when the same GGUF file would be converted into something else
_HEAD_BYTES = 1 << 20
_REMEDY = "free some space, or set MARQUETRY_CACHE to another place"


def cache_directory() -> Path:
    """Where converted parents are kept: `$MARQUETRY_CACHE`, or ~/.cache/marquetry/parents."""
    return Path(os.environ.get("MARQUETRY_CACHE") or Path.home() / ".cache" / "marquetry" / "parents")


def import_gguf(file: Path, name: str) -> Path:
    """The Hugging Face directory of a GGUF file, converted at the first call and kept in the cache.

    Several processes may ask at once: one converts, the others wait.

    Args:
        file: the GGUF file.
        name: how the directory's name begins.

    Raises:
        ConfigError: if the `gguf` package is missing.
        UnsupportedModelError: if the model cannot be a parent.
        CheckpointError: if the file is damaged or the cache cannot be written.
    """
    from filelock import FileLock

    try:
        digest = sample_file(file, _HEAD_BYTES).hex()[:12]
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    directory = cache_directory() / f"{name}-v{_CONVERSION}-{digest}"
    if directory.is_dir():
        return directory
    _require_gguf(file)
    with write_errors(directory, _REMEDY):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(directory.with_name(f".{directory.name}.lock")):
            if not directory.is_dir():
                logger.info("converting %s, once, into %s", file, directory)
                _convert(file, directory)
    return directory


def _require_gguf(file: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(f"converting {file.name} needs the package gguf: pip install gguf")


def _convert(file: Path, directory: Path) -> None:
    """Writes config.json, model.safetensors and the tokenizer of `file` into a new `directory`."""
    from transformers import AutoTokenizer

    _refuse_lost_tensors(file)
    with _quiet():
        config, tensors = _load(file)
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except Exception as error:  # the converters raise whatever the file's contents trip over
            raise CheckpointError(f"{file} has no tokenizer that transformers can convert ({error!r})") from error
        with replace_directory(directory, _REMEDY) as new:
            write_tensors(new / SINGLE, tensors)
            config.save_pretrained(new)
            tokenizer.save_pretrained(new)
            _name_for_transformers_4(new / "tokenizer_config.json")


def _name_for_transformers_4(file: Path) -> None:
    """transformers 5 calls its class by a name that 4 does not know; both know this one, and the children inherit the file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _load(file: Path) -> tuple[Any, dict[str, Any]]:
    """The configuration and the fp32 tensors, without the lm_head of a tied model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        family = family_of(config.model_type)
        shape = family.shape(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32, output_loading_info=True
        )
        model, report = loaded
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"transformers cannot convert {file} ({error!r}); give a safetensors directory"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(f"{file} lacks {len(missing)} tensors, among them {missing[0]}")
    # transformers refuses to save a model that it loaded from GGUF, hence by hand.
    config = model.config
    for key in ("quantization_config", "_model_name_or_path"):  # of the GGUF file, not of what is written
        vars(config).pop(key, None)
    config.architectures = [family.architecture]
    config.dtype = "float32"
    config.rms_norm_eps = float(str(np.float32(config.rms_norm_eps)))  # 9.999999747e-06 was 1e-05 before GGUF's fp32
    state = model.state_dict()
    if shape.tie_word_embeddings:
        state.pop(HEAD, None)
    return config, state


def _refuse_lost_tensors(file: Path) -> None:
    """Llama 3.1 and later keep their long-context rotary scaling in a tensor that transformers drops silently."""
    from gguf import GGUFReader

    try:
        names = {tensor.name for tensor in GGUFReader(file).tensors}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{file} is not a whole GGUF file ({error}); copy or download it again") from error
    if "rope_freqs.weight" in names:
        raise UnsupportedModelError(
            f"{file} scales its rotary frequencies (rope_freqs), which the conversion would lose; "
            "give the safetensors directory of this model"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the bars and warnings that transformers prints while it converts."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging as messages

    bars, verbosity, tqdm = messages.is_progress_bar_enabled(), messages.get_verbosity(), reader.tqdm
    messages.disable_progress_bar()
    messages.set_verbosity_error()
    reader.tqdm = lambda tensors, **_: tensors  # this bar has no switch
    try:
        yield
    finally:
        reader.tqdm = tqdm
        messages.set_verbosity(verbosity)
        if bars:
            messages.enable_progress_bar()
