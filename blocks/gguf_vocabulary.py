"""A checkpoint's tokenizer as a GGUF file holds it: read from tokenizer.json, never by a name or a hash.

Two kinds are known, both BPE: over bytes (GPT-2's alphabet: Llama 3, Qwen, SmolLM), where llama.cpp must be told by name how
text is split before merging; and over characters with bytes as a last resort (Llama 2, Mistral), where merges become scores.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blocks.errors import CheckpointError, UnsupportedModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's token types
# How text is split before merging, by what tokenizer.json says, and the name of the same in llama.cpp. `True` and `False`
# say whether a piece that is a token is taken whole (`ignore_merges`), which llama.cpp ties to the name.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[tuple[str, ...], dict[bool, str]] = {
    ("gpt2",): {False: "gpt-2"},
    ("digits", "gpt2"): {False: "smollm"},
    (_WORDS % r"\p{N}{1,3}", "bytes"): {True: "llama-bpe", False: "smaug-bpe"},
    (_WORDS % r"\p{N}", "bytes"): {False: "qwen2"},
    (_TEKKEN, "bytes"): {True: "tekken"},
}


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs in order to read and write text.

    Attributes:
        model: "gpt2" (bytes) or "llama" (characters).
        pre: llama.cpp's name for how text is split; None for characters, which are not.
        tokens, types: by id.
        merges: "left right", first merge first; empty for characters.
        scores: by id, higher is merged earlier; empty for bytes.
        special: ids by role: bos, eos, unk, pad.
        add_bos, add_eos: whether text is given them by default.
        chat_template: in Jinja; None if there is none.
    """

    model: str
    pre: str | None
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    chat_template: str | None = None


def read_vocabulary(directory: Path, size: int) -> Vocabulary:
    """The vocabulary of a Hugging Face directory.

    Args:
        directory: with tokenizer.json; tokenizer_config.json and chat_template.jinja are read if they are there.
        size: rows of the embedding; ids beyond the tokenizer's are filled with unused tokens.

    Raises:
        CheckpointError: if there is no tokenizer.json, it is damaged, or it has more tokens than the embedding rows.
        UnsupportedModelError: if llama.cpp has no tokenizer that splits text alike.
    """
    file = directory / "tokenizer.json"
    content, settings = _json(file), _json(directory / "tokenizer_config.json", optional=True)
    model: dict[str, Any] = content.get("model") or {}
    if model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise UnsupportedModelError(
            f"{file} is of type {model.get('type')!r}; only BPE vocabularies are written to GGUF"
        )
    added = {int(token["id"]): token for token in content.get("added_tokens") or []}
    names = {int(index): text for text, index in model["vocab"].items()}
    names |= {index: token["content"] for index, token in added.items()}
    if names and max(names) >= size:
        raise CheckpointError(f"{file} has a token {max(names)}, the embedding has {size} rows: it is of another model")
    tokens = [names.get(index, f"[PAD{index}]") for index in range(size)]
    characters = bool(model.get("byte_fallback"))
    types = [_type(index, names, added, characters, model.get("unk_token")) for index in range(size)]
    special = _special(settings, {text: index for index, text in names.items()})
    first, last = _template(content.get("post_processor"))
    return Vocabulary(
        model="llama" if characters else "gpt2",
        pre=None if characters else _split_name(file, content, model),
        tokens=tokens,
        types=types,
        merges=[] if characters else [" ".join(pair) for pair in _pairs(model["merges"])],
        scores=_scores(model["merges"], tokens) if characters else [],
        special=special,
        add_bos=bool(settings.get("add_bos_token"))
        or (first is not None and first == names.get(special.get("bos", -1))),
        add_eos=bool(settings.get("add_eos_token")) or (last is not None and last == names.get(special.get("eos", -1))),
        chat_template=_chat_template(directory, settings),
    )


def _json(file: Path, optional: bool = False) -> dict[str, Any]:
    if optional and not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}; copy the parent's tokenizer files into it") from error
    return content


def _type(
    index: int, names: Mapping[int, str], added: Mapping[int, Mapping[str, Any]], characters: bool, unknown: Any
) -> int:
    if index not in names:
        return UNUSED
    if characters and names[index] == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    text = names[index]
    return BYTE if characters and len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _pairs(merges: list[Any]) -> Iterator[tuple[str, str]]:
    """tokenizer.json writes a merge as a pair, older files as one string."""
    for merge in merges:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        yield left, right


def _scores(merges: list[Any], tokens: list[str]) -> list[float]:
    """By id: minus the rank of the first merge that makes the token. What no merge makes is never merged into."""
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(_pairs(merges)):
        rank.setdefault(left + right, index)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _split_name(file: Path, content: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    split, whole = tuple(_splits(content.get("pre_tokenizer"))), bool(model.get("ignore_merges"))
    if name := _SPLITS.get(split, {}).get(whole):
        return name
    raise UnsupportedModelError(
        f"{file} splits text in a way that llama.cpp is not known to: {list(split)}, ignore_merges {whole}"
    )


def _splits(part: Mapping[str, Any] | None) -> Iterator[str]:
    """What a pre-tokenizer does, step by step: a regular expression, "digits", "gpt2" (its own expression), or "bytes"."""
    kind = (part or {}).get("type")
    if part is None or kind is None:
        yield "nothing"
    elif kind == "Sequence":
        for step in part["pretokenizers"]:
            yield from _splits(step)
    elif kind == "Digits" and part.get("individual_digits"):
        yield "digits"
    elif kind == "ByteLevel" and not part.get("add_prefix_space"):
        yield "gpt2" if part.get("use_regex", True) else "bytes"
    elif kind == "Split" and part.get("behavior") == "Isolated" and "Regex" in part["pattern"]:
        yield part["pattern"]["Regex"]
    else:
        yield json.dumps(part)


def _special(settings: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    found = {}
    for role in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            found[role] = ids[text]
    return found


def _template(part: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """The special tokens that a post-processor puts before and after a text."""
    if not part:
        return None, None
    if part.get("type") == "Sequence":
        steps = [_template(step) for step in part["processors"]]
        return next((step for step in steps if any(step)), (None, None))
    if part.get("type") != "TemplateProcessing" or not part.get("single"):
        return None, None
    first, last = (part["single"][end].get("SpecialToken", {}).get("id") for end in (0, -1))
    return first, last


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
