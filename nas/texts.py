"""Texts that models are compared on: token packs of any source, and KL, perplexity and agreement on them with standard errors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blocks.errors import DataError, UnsupportedModelError
from distill.data import TokenStream, heldout_batches
from distill.evaluation import sequence_statistics
from distill.loss import STATISTICS
from distill.models import FrozenTeacher, StudentLoss, check_pair
from nas.documents import load_documents

_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Text:
    """A text as tokens.

    Attributes:
        name: "held-out", or the source as the user gave it.
        pack: [sequences, length] token ids of the parent's tokenizer.
        tokens: about how many of them count, evenly spread; 0 for all.
    """

    name: str
    pack: np.ndarray
    tokens: int = 0

    @property
    def digest(self) -> str:
        content = f"{self.pack.shape} {self.tokens} ".encode() + np.ascontiguousarray(self.pack).astype("<u4").tobytes()
        return hashlib.sha256(content).hexdigest()[:16]


def read_text(source: str, column: str, tokenizer: Any, length: int, tokens: int, seed: int = 0) -> Text:
    """A text of any source that `nas score --data` takes, packed: documents in a drawn order, each ended by the end-of-text token.

    Args:
        column: of .jsonl, .parquet and `datasets`.
        tokenizer: the parent's.
        length: tokens per sequence.
        tokens: most tokens; 0 for all.

    Raises:
        DataError: it cannot be read, or holds less than two sequences, of which nothing could be said how sure it is.
    """
    documents = load_documents(source, column)
    end, ids = tokenizer.eos_token_id, list[int]()
    order = np.random.default_rng(seed).permutation(len(documents))
    for start in range(0, len(order), _DOCUMENTS_AT_ONCE):
        part = [documents[index] for index in order[start : start + _DOCUMENTS_AT_ONCE]]
        encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document in encoded:
            ids += document if end is None else [*document, end]
        if tokens and len(ids) >= tokens:
            break
    found = min(len(ids), tokens) if tokens else len(ids)
    sequences = found // length
    if sequences < 2:
        raise DataError(
            f"--data {source} gives {found} tokens, less than two sequences of {length}; "
            "give more text, a larger --text-tokens or a shorter --sequence-length"
        )
    return Text(source, np.array(ids[: sequences * length], np.uint32).reshape(sequences, length))


def compare_on_text(
    teacher: nn.Module,
    student: nn.Module,
    text: Text,
    *,
    compute_dtype: str = "float32",
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """KL to the teacher, top-1 agreement and perplexity of a model on a text, each with its standard error over sequences.

    Args:
        teacher: the parent; may be the student itself, whose KL is then 0.
        progress: called with sequences done, and all, after each batch.

    Returns:
        {"tokens", "sequences", "kl", "kl_se", "ce", "ce_se", "perplexity", "perplexity_se", "top1_agreement",
        "top1_agreement_se"}: nats per token, shares; errors are null for a single sequence.

    Raises:
        ConfigError: another vocabulary.
        UnsupportedModelError: a model whose decoder and head are not where those of Llama are.
    """
    for model in (teacher, student):
        if not (hasattr(model, "model") and hasattr(model, "lm_head")):
            kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
            raise UnsupportedModelError(
                f"KL and perplexity need a model with its decoder in `model` and its head in `lm_head`; {kind} is built otherwise"
            )
    length = text.pack.shape[1]
    stream = TokenStream(text.pack, length, check_pair(teacher, student), f"text {text.name}")
    batches = heldout_batches(stream, text.tokens, length, max(1, batch_tokens // length))
    wanted = min(len(stream), max(1, text.tokens // length)) if text.tokens else len(stream)
    pair = FrozenTeacher(teacher, compute_dtype), StudentLoss(student, compute_dtype)
    return statistics_of(sequence_statistics(*pair, _told(batches, wanted, progress)))


def _told(
    batches: Iterator[tuple[Tensor, Tensor]], wanted: int, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[Tensor, Tensor]]:
    done = 0
    for tokens, mask in batches:
        yield tokens, mask
        done += len(tokens)
        if progress is not None:
            progress(done, wanted)


def statistics_of(sums_SC: Tensor) -> dict[str, Any]:
    """Means over tokens of what was summed over each sequence [S, 5] (`STATISTICS`, then tokens), and their standard errors.

    A mean over tokens is a ratio of two means over sequences; its error is that of the ratio (Cochran, Sampling Techniques, 3rd
    ed., section 2.11), which the differences in length between sequences do not inflate. That of the perplexity exp(CE) is
    exp(CE) times that of the cross-entropy.
    """
    sums = sums_SC.double().cpu().numpy()
    counts = sums[:, -1]
    found = {name: _ratio(sums[:, column], counts) for column, name in enumerate(STATISTICS)}
    ce, ce_se = found["student_ce"]
    perplexity = math.exp(min(ce, 700.0))
    result: dict[str, Any] = {"tokens": int(counts.sum()), "sequences": len(sums)}
    result |= {"kl": found["kl"][0], "kl_se": found["kl"][1], "ce": ce, "ce_se": ce_se}
    result |= {"perplexity": perplexity, "perplexity_se": None if ce_se is None else perplexity * ce_se}
    agreement, agreement_se = found["top1_agreement"]
    return result | {"top1_agreement": agreement, "top1_agreement_se": agreement_se}


def _ratio(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float | None]:
    mean, sequences = float(sums.sum() / counts.sum()), len(sums)
    if sequences < 2:
        return mean, None
    beyond = sums - mean * counts
    return mean, float(np.sqrt(np.square(beyond).sum() * sequences / (sequences - 1)) / counts.sum())


def dtype_named(name: str) -> torch.dtype:
    """float32 or bfloat16."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
