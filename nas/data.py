"""Turns text into token packs: for fitting, calibration, held-out measurement and healing.

    data/{fit,calibration,heldout,train}.npy     [sequences, sequence_length] token ids
    data/split.json                              what they were made from, and which document went where

A document goes to one of fit, calibration and heldout, never to two. `train`, for healing, is fit and everything that
no part took.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blocks.errors import ConfigError, DataError
from blocks.files import clear_leftovers, save_array, save_json
from nas.documents import load_documents

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "PARTS",
    "DataConfig",
    "DataSplit",
    "load_documents",
    "load_pack",
    "prepare_data",
    "split_documents",
    "to_tokens",
]

PARTS = ("fit", "calibration", "heldout", "train")
MINIMUM_SEQUENCES = 8  # of each part: fewer say nothing about a model
_FORMAT = 1
_BATCH_DOCUMENTS = 64
_SPLIT_FILE = "split.json"

Progress = Callable[[int, int], None]
"""Called with the number of documents tokenised and the number of all."""


@dataclass(frozen=True)
class DataConfig:
    """Which text, and how much of it for what. Raises ConfigError for values that cannot work."""

    source: str = "python-docs"
    """A .txt, .jsonl or .parquet file, a directory of them, a `datasets` id[:config][:split], or "python-docs"."""
    text_column: str = "text"
    """The column of .jsonl, .parquet and `datasets` that holds the text."""
    sequence_length: int = 512
    """Tokens per sequence."""
    seed: int = 0
    """Decides which document (or sequence) goes where."""
    split: str = "document"
    """`document`: no document is in two parts. `sequence`: pack everything, then split the sequences; neighbours out of
    one document then lie in both calibration and held-out, which leaks. Only for comparison with published setups."""
    fit_tokens: int = 81_920
    """Most tokens for fitting candidates."""
    calibration_tokens: int = 32_768
    """Most tokens for scores."""
    heldout_tokens: int = 32_768
    """Most tokens for measuring children; nothing else ever sees them."""
    train_tokens: int | None = None
    """Most tokens for healing; None takes all that the other parts leave. No more text is tokenised than this needs."""
    calibration_share: float = 0.2
    """Of a corpus smaller than the three parts together: calibration gets this share of its tokens."""
    heldout_share: float = 0.2
    """Of a corpus smaller than the three parts together: heldout gets this share of its tokens."""

    def __post_init__(self) -> None:
        if self.split not in ("document", "sequence"):
            raise ConfigError(f"split is {self.split!r}; write document or sequence")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be 0 or more")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length is {self.sequence_length}; it must be at least 2")
        least = MINIMUM_SEQUENCES * self.sequence_length
        for name in PARTS:
            if (tokens := getattr(self, f"{name}_tokens")) is not None and tokens < least:
                raise ConfigError(
                    f"{name}_tokens is {tokens}, less than {MINIMUM_SEQUENCES} sequences of {self.sequence_length} "
                    f"({least} tokens); raise it or shorten sequence_length"
                )
        shares = self.calibration_share, self.heldout_share
        if not (min(shares) > 0 and sum(shares) < 1):  # nan is neither
            raise ConfigError(f"calibration_share and heldout_share are {shares}; each above 0, together below 1")

    @property
    def wanted_tokens(self) -> float:
        """Tokens that fill every part to its cap; infinity if train has none."""
        train = math.inf if self.train_tokens is None else max(self.train_tokens, self.fit_tokens)
        return self.calibration_tokens + self.heldout_tokens + train

    def targets(self, tokens: int) -> dict[str, int]:
        """Tokens for heldout, calibration and fit out of a corpus of `tokens`: the caps, or shares if it is smaller."""
        heldout, calibration = self.heldout_tokens, self.calibration_tokens
        if tokens < heldout + calibration + self.fit_tokens:
            heldout = min(heldout, int(tokens * self.heldout_share))
            calibration = min(calibration, int(tokens * self.calibration_share))
        return {"heldout": heldout, "calibration": calibration, "fit": self.fit_tokens}

    @property
    def needed_tokens(self) -> int:
        """Tokens of the smallest corpus that fills every part with the fewest sequences, roughly."""
        share = min(self.calibration_share, self.heldout_share, 1 - self.calibration_share - self.heldout_share)
        return math.ceil((MINIMUM_SEQUENCES + 1) * self.sequence_length / share)


@dataclass(frozen=True)
class DataSplit:
    """The packs of a run.

    Attributes:
        directory: where they are.
        parts: for each of `PARTS`: {"documents" (None after a sequence split), "sequences", "tokens", "sha256" of which
            documents or sequences it holds, and their "hashes" except for train}.
    """

    directory: Path
    parts: dict[str, dict[str, Any]] = field(hash=False)

    def path(self, part: str) -> Path:
        return self.directory / f"{part}.npy"

    def pack(self, part: str) -> np.ndarray:
        """The token ids of one of `PARTS`: [sequences, sequence_length], memory-mapped."""
        return load_pack(self.path(part))


def prepare_data(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    out_dir: Path,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> DataSplit:
    """Tokenises a corpus, splits it and writes the packs; does nothing if the same were written before.

    Args:
        config: which text, and how much of it for what.
        tokenizer: the parent's. Its end-of-text token is put after each document; no other special token is added.
        vocab_size: of the parent. Packs are uint16 up to 65,536 and uint32 above.
        out_dir: where the packs go.
        progress: called after each batch of documents.
        overwrite: replace packs that were made from something else, instead of raising.

    Raises:
        DataError: if the text cannot be read, is too little, does not fit the vocabulary, or `out_dir` holds packs of
            another configuration or tokenizer.
    """
    made_from = {
        "format": _FORMAT,
        "config": asdict(config),
        "tokenizer": _tokenizer_digest(tokenizer),
        "vocab_size": vocab_size,
    }
    if (found := _read_split(out_dir, made_from, overwrite)) is not None:
        return found
    texts = list({_digest([text.strip()]): text for text in _texts(config)}.values())
    order = (
        np.random.default_rng(config.seed).permutation(len(texts)) if config.split == "document" else range(len(texts))
    )
    documents = _tokenise([texts[i] for i in order], tokenizer, vocab_size, config.wanted_tokens, progress)
    splitter = _split_by_document if config.split == "document" else _split_by_sequence
    return _write(out_dir, made_from, splitter(documents, config))


def to_tokens(pack: np.ndarray, most: int | None, device: torch.device) -> torch.Tensor:
    """The first sequences of a token pack [sequences, S], about `most` tokens (at least one sequence), as int64."""
    import torch

    count = len(pack) if most is None else max(1, most // pack.shape[1])
    return torch.from_numpy(pack[:count].astype("int64")).to(device)


def load_pack(path: Path) -> np.ndarray:
    """A token pack [sequences, sequence_length], memory-mapped and read-only. Raises DataError if it is not one."""
    try:
        pack: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path} is not a whole token pack ({error}); delete its directory and prepare it again"
        ) from error
    if pack.ndim != 2 or pack.dtype not in (np.uint16, np.uint32):
        raise DataError(f"{path} holds {pack.dtype} {list(pack.shape)}, not sequences of token ids")
    return pack


# ---- tokens

CHARACTERS_PER_TOKEN = 8  # more than any text has on average, so that enough is read


def _texts(config: DataConfig) -> list[str]:
    return load_documents(config.source, config.text_column, CHARACTERS_PER_TOKEN * config.wanted_tokens)


def _tokenise(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    wanted_tokens: float,
    progress: Progress | None,
) -> list[np.ndarray]:
    """Token ids of the documents, each ended by the end-of-text token, until there are `wanted_tokens`."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no eos_token, which separates documents; set it in tokenizer_config.json")
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    documents: list[np.ndarray] = []
    tokens = 0
    for start in range(0, len(texts), _BATCH_DOCUMENTS):
        batch = texts[start : start + _BATCH_DOCUMENTS]
        encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for ids in encoded:
            if (largest := max([*ids, end])) >= vocab_size:
                raise DataError(
                    f"the tokenizer gives token {largest}, but the parent's vocabulary ends at {vocab_size}"
                )
            documents.append(np.array([*ids, end], dtype))
            tokens += len(ids) + 1
        if progress is not None:
            progress(len(documents), len(texts))
        if tokens >= wanted_tokens:
            break
    return documents


def _pack(documents: Sequence[np.ndarray], length: int, most_tokens: int | None) -> np.ndarray:
    """Joins documents and cuts them into [sequences, length]; the last partial sequence is dropped."""
    flat = np.concatenate(documents)[:most_tokens]
    sequences = len(flat) // length
    return flat[: sequences * length].reshape(sequences, length)


# ---- splits


@dataclass(frozen=True)
class _Part:
    pack: np.ndarray
    hashes: list[str]  # of the documents (or sequences) that it was made from
    documents: int | None


def split_documents(lengths: Sequence[int], config: DataConfig) -> dict[str, list[int]]:
    """Which of the documents, given in random order, go to heldout, calibration and fit, and which to `rest`.

    Each part in turn takes documents that fit into what it still lacks (and an eighth more, or one sequence), so that
    one long document does not swallow the corpus; the held-out documents are therefore a little shorter than average.

    Args:
        lengths: tokens of each document. At least three.
        config: how many tokens each part gets.

    Returns:
        Indices into `lengths`: each in exactly one of the four lists.
    """
    remaining = list(range(len(lengths)))
    parts: dict[str, list[int]] = {}
    for part, target in config.targets(sum(lengths)).items():
        chosen: list[int] = []
        tokens, most = 0, target + max(config.sequence_length, target // 8)  # packs are cut at the cap
        spare = len(remaining) - (2 - len(parts))  # each later part is left one document at least
        for index in remaining:
            if tokens >= target or len(chosen) == spare:
                break
            if tokens + lengths[index] <= most:
                chosen.append(index)
                tokens += lengths[index]
        parts[part] = chosen or [min(remaining, key=lambda index: lengths[index])]
        taken = set(parts[part])
        remaining = [index for index in remaining if index not in taken]
    return parts | {"rest": remaining}


def _split_by_document(documents: list[np.ndarray], config: DataConfig) -> dict[str, _Part]:
    if len(documents) < 3:
        tokens = sum(map(len, documents))
        raise DataError(
            f"{config.source} holds {len(documents)} different documents ({tokens} tokens), but fit, calibration and "
            f"heldout need one each; give more text (about {config.needed_tokens} tokens), or set split to sequence"
        )
    members = split_documents([len(document) for document in documents], config)
    members["train"] = members["fit"] + members.pop("rest")
    parts = {}
    for name in PARTS:
        chosen = [documents[index] for index in members[name]]
        pack = _pack(chosen, config.sequence_length, getattr(config, f"{name}_tokens"))
        parts[name] = _Part(pack, [_digest([document]) for document in chosen], len(chosen))
    return _enough(parts, sum(map(len, documents)), config)


def _split_by_sequence(documents: list[np.ndarray], config: DataConfig) -> dict[str, _Part]:
    pack = _pack(documents, config.sequence_length, None)
    order = np.random.default_rng(config.seed).permutation(len(pack))
    members, start = {}, 0
    for name, target in config.targets(pack.size).items():
        end = start + target // config.sequence_length
        members[name] = order[start:end]
        start = end
    most = None if config.train_tokens is None else config.train_tokens // config.sequence_length
    members["train"] = np.concatenate([members["fit"], order[start:]])[:most]
    parts = {name: _Part(pack[members[name]], [_digest([row]) for row in pack[members[name]]], None) for name in PARTS}
    return _enough(parts, sum(map(len, documents)), config)


def _enough(parts: dict[str, _Part], tokens: int, config: DataConfig) -> dict[str, _Part]:
    for name, part in parts.items():
        if len(part.pack) < MINIMUM_SEQUENCES:
            raise DataError(
                f"{config.source} holds {tokens} tokens, which leaves {len(part.pack)} sequences of "
                f"{config.sequence_length} for {name} ({MINIMUM_SEQUENCES} needed); give more text "
                f"(about {config.needed_tokens} tokens, in documents of similar length) or a shorter sequence_length"
            )
    return parts


# ---- files


def _write(directory: Path, made_from: dict[str, Any], parts: dict[str, _Part]) -> DataSplit:
    """Writes the packs and then split.json, whose presence says that the packs are whole."""
    described: dict[str, dict[str, Any]] = {}
    (directory / _SPLIT_FILE).unlink(missing_ok=True)
    clear_leftovers(directory)
    for name, part in parts.items():
        save_array(directory / f"{name}.npy", part.pack)
        described[name] = {
            "documents": part.documents,
            "sequences": len(part.pack),
            "tokens": int(part.pack.size),
            "sha256": _digest(sorted(part.hashes)),
            "hashes": part.hashes if name != "train" else None,
        }
    save_json(directory / _SPLIT_FILE, made_from | {"parts": described})
    return DataSplit(directory, described)


def _read_split(directory: Path, made_from: dict[str, Any], overwrite: bool) -> DataSplit | None:
    """The packs in `directory` if they were made from the same; None if they are to be made."""
    try:
        content = json.loads((directory / _SPLIT_FILE).read_text())
        split = DataSplit(directory, content.pop("parts"))
        changes = list(_changes(content, made_from))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        if overwrite:
            return None
        raise DataError(f"{directory / _SPLIT_FILE} is damaged ({error}); delete {directory} and run again") from error
    if not changes:
        for part in PARTS:
            split.pack(part)  # refuses a damaged one
        return split
    if overwrite:
        return None
    raise DataError(
        f"{directory} holds other data: {', '.join(changes)}; use another run directory, or delete this one"
    )


def _changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    old, new = (content | content["config"] for content in (old, new))
    for key in sorted((old.keys() | new.keys()) - {"config"}):
        if old.get(key) != new.get(key):
            yield f"{key} was {old.get(key)} and is now {new.get(key)}"


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    return _digest([json.dumps([vocabulary, tokenizer.eos_token_id])])[:16]


def _digest(items: Sequence[str | np.ndarray]) -> str:
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.encode() if isinstance(item, str) else item.tobytes())
    return digest.hexdigest()
